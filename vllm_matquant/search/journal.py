"""What a search has measured, on the disk: a search that was cut off runs again and finds its measurements there.

A search is a deterministic function of its measurements, so nothing else needs to be kept: with the journal it takes
the same steps as before, at no cost, up to where it stopped. A journal is a file of JSON lines. The first says what the
measurements depend on; a last line that a crash cut short is measured anew.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_matquant.checkpoint.files import publish, publish_text, save_tensors, sync, writing

JOURNAL_VERSION = 1


class JournalError(ValueError):
    """A journal is of other settings, or cannot be read."""


class Journal:
    """Measurements by a key, each with what it cost.

    Attributes:
        passes: what all measurements asked for so far cost, those that came from the file too.
        replayed: how many came from the file.

    Args:
        path: the file; None to keep nothing.
        settings: what the measurements depend on, as JSON values.
        resume: use the measurements that the file holds, else begin anew.

    Raises:
        JournalError: the file's settings are others.
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], *, resume: bool = False) -> None:
        self.passes, self.replayed = 0, 0
        self._path = path
        self._known: dict[str, tuple[Any, int]] = {}
        self._asked: set[str] = set()
        if path is None:
            return
        settings = {"journal_version": JOURNAL_VERSION} | settings
        if resume and path.is_file():
            self._read(path, settings)
        lines = [
            settings,
            *({"key": key, "value": value, "passes": cost} for key, (value, cost) in self._known.items()),
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def measure(self, key: str, run: Callable[[], tuple[Any, int]]) -> Any:
        """The measurement of this key; ``run`` makes it, a JSON value and what it cost, if there is none yet."""
        if key in self._known:
            value, cost = self._known[key]
            self.replayed += key not in self._asked
        else:
            value, cost = run()
            # As it would be read back, so that what follows is the same with and without a crash.
            value = json.loads(json.dumps(value))
            self._known[key] = value, cost
            self._append({"key": key, "value": value, "passes": cost})
        if key not in self._asked:
            self._asked.add(key)
            self.passes += cost
        return value

    def tensors(self, key: str, run: Callable[[], tuple[dict[str, torch.Tensor], int]]) -> dict[str, torch.Tensor]:
        """The tensors of this key, by their names; ``run`` makes them, and says what they cost, if there are none yet.

        The key names their file.
        """
        if self._path is None:
            return run()[0]
        file = self._path.with_name(f"{key}.safetensors")

        def kept() -> tuple[str, int]:
            made, cost = run()
            publish(file, lambda temporary: save_tensors(made, temporary))
            return file.name, cost

        self.measure(key, kept)
        return load_file(file)

    def remove(self) -> None:
        """Forget the files: the search is complete."""
        if self._path is not None:
            for file in self._path.parent.glob("*.safetensors"):
                file.unlink()
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else lies there
                self._path.parent.rmdir()

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            with writing(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                sync(file.fileno())

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        lines = path.read_text(encoding="utf-8").split("\n")
        try:
            found = json.loads(lines[0])
        except ValueError:
            found = None
        if found != json.loads(json.dumps(settings)):
            differing = sorted(
                name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]
            )
            raise JournalError(
                f"{path}: found measurements of other settings ({', '.join(differing) or 'more of them'}), expected "
                "those of this search: search with the same settings, or without --resume, which begins anew"
            )
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the last line, cut off
            self._known[entry["key"]] = entry["value"], entry["passes"]
