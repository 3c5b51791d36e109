"""What TensorBoard shows of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_matquant.train.loop import Progress


class MissingLoggerError(ValueError):
    """The package that writes logs is not installed."""


class Log:
    """The log of a training, for TensorBoard.

    Args:
        folder: to write to; made if absent. Of a training that goes on, later steps than ``done`` are shown no more.
        done: steps that were taken before.

    Raises:
        MissingLoggerError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        self._writer: Any = _writer()(str(folder), purge_step=done + 1 if done else None)

    def add(self, progress: Progress) -> None:
        """Write what is known after a step."""
        figures: dict[str, dict[Any, float]] = {
            "loss": progress.losses,
            "rate": progress.rates,
            "gradient": {} if progress.norm is None else {"norm": progress.norm},
            "changed codes": progress.changed,
            "held-out KL": progress.held_out,
        }
        for group, values in figures.items():
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, progress.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def check_logger() -> None:
    """Check that logs can be written.

    Raises:
        MissingLoggerError: the package ``tensorboard`` is not installed.
    """
    _writer()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as cause:
        raise MissingLoggerError(
            "log_folder: found no package tensorboard, expected it for --log-folder: pip install 'vllm_matquant[train]'"
        ) from cause
    return SummaryWriter
