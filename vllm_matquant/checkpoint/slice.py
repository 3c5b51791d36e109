"""A slice: what is served of a checkpoint, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_matquant.checkpoint.errors import RecipeError
from vllm_matquant.checkpoint.spec import WIDTHS

UNIFORM = "uniform-{}"  # names of the slices that have one width throughout


@dataclass(frozen=True)
class Slice:
    """What is served of a checkpoint: a width for each quantized layer, and the files that hold it.

    :meth:`vllm_matquant.checkpoint.reader.Checkpoint.slice` makes them.

    Attributes:
        name: ``uniform-4`` of a plain width, or the recipe's.
        widths: the width of each quantized layer, in the model's order.
        average_bits: mean width of a weight, decoders not counted.
        resident_bytes: bytes of its codes and decoders in memory.
        files: names of the files in the checkpoint's folder that hold its tensors, narrowest first.
        missing_files: those of them that were not in the folder.
        decoders_file: the one of them that holds decoders trained for just these widths, if there is one.
        kl: KL divergence from the source model, in nats per token, as far as it was measured.
        width: the offered width that it is, None of a recipe.
    """

    name: str
    widths: Mapping[str, int] = field(hash=False)
    average_bits: float
    resident_bytes: int
    files: tuple[str, ...]
    missing_files: tuple[str, ...] = ()
    decoders_file: str | None = None
    kl: float | None = None
    width: int | None = None

    @property
    def label(self) -> dict[str, Any]:
        """What rows of figures call it: ``bits`` and, of a recipe, its name as ``recipe``."""
        return {"bits": self.average_bits, "recipe": self.name} if self.width is None else {"bits": self.width}

    @property
    def narrowest(self) -> int:
        """The least width of a layer."""
        return min(self.widths.values(), default=WIDTHS[-1])

    @property
    def widest(self) -> int:
        """The largest width of a layer."""
        return max(self.widths.values(), default=WIDTHS[-1])

    def __str__(self) -> str:
        """One line that says what it is."""
        own = " with decoders of its own" if self.decoders_file else ""
        loss = "not measured" if self.kl is None else f"{self.kl:.4g} nats per token"
        return (
            f"{self.name}{own}: {self.average_bits:.4g} bits per weight, {self.resident_bytes:,} bytes of codes and "
            f"decoders, loss (KL divergence) {loss}"
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_dict` reads."""
        return {
            "name": self.name,
            "widths": dict(self.widths),
            "average_bits": self.average_bits,
            "resident_bytes": self.resident_bytes,
            "files": list(self.files),
            "missing_files": list(self.missing_files),
            "decoders_file": self.decoders_file,
            "kl": self.kl,
            "width": self.width,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Slice:
        """The slice that :meth:`to_dict` wrote.

        Raises:
            TypeError: a field is missing or unknown.
        """
        lists = {name: tuple(content[name]) for name in ("files", "missing_files") if name in content}
        return cls(**{**content, **lists})


def choose_slice(
    slices: Iterable[Slice], cost: Callable[[Slice], float], limit: float, unit: str, where: object
) -> Slice:
    """The slice of least loss among those that cost no more than ``limit``.

    Those whose loss nobody has measured come after all others, and among them the one with the most bits is the best.

    Args:
        slices: to choose among.
        cost: of a slice.
        limit: the most that it may be.
        unit: of both, for an error.
        where: the checkpoint's folder, for an error.

    Raises:
        RecipeError: none is within the limit; the message names the least.
    """
    candidates = list(slices)
    fitting = [each for each in candidates if cost(each) <= limit]
    if not fitting:
        least = min(candidates, key=cost, default=None)
        smallest = f"{cost(least):,.10g} {unit} ({least.name})" if least else "nothing that this folder can serve"
        raise RecipeError(str(where), "budget", f"{limit:,.10g} {unit}", f"at least {smallest}")
    return min(fitting, key=lambda each: (_loss(each), -each.average_bits, each.name))


def _loss(of: Slice) -> float:
    return float("inf") if of.kl is None else of.kl
