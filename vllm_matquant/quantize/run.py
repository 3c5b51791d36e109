"""One quantization: its steps from a source to the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.measure.windows import Windows
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.embeddings import head_hessian, layer_method, quantize_rows
from vllm_matquant.quantize.end_to_end import EndToEnd
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.quality import HeldOut
from vllm_matquant.quantize.resume import WorkFolder
from vllm_matquant.quantize.selection import Selection, owner_of
from vllm_matquant.quantize.sensitivity import token_weights
from vllm_matquant.quantize.source import Source


@dataclass(frozen=True)
class Run:
    """One quantization of one source, whose finished layers lie in a work folder.

    The steps go in this order: :meth:`blocks`, :meth:`outer`, :meth:`train`, :meth:`measure`, :meth:`publish`. What is
    in the work folder already is not made again. Every rank takes all steps but the last, which is the first rank's.

    Attributes:
        source: the model.
        method: how codes and decoders are chosen.
        format: of the checkpoint in the making.
        calibration: the text to calibrate on, None for a method that needs none.
        work: where finished layers are kept; begun by the first rank.
        folder: on whose disk activations are kept, None to keep them in memory.
    """

    source: Source
    method: Method
    format: Format
    calibration: Windows | None
    work: WorkFolder
    folder: Path | None = None

    @cached_property
    def selection(self) -> Selection:
        """What is quantized of the source."""
        return Selection(self.source, self.format)

    @property
    def block_names(self) -> list[str]:
        """Full names of the source's transformer blocks."""
        return self.source.runner.block_names

    def untrained(self) -> list[int]:
        """The widths whose decoders are still to be trained end to end."""
        widths = self.method.trained_widths
        done = ranks.from_first(sum(self.work.is_trained(width) for width in widths))
        return list(widths[done:])

    @torch.no_grad()
    def blocks(self) -> torch.Tensor | None:
        """Quantize the blocks that are not finished; what they are given is made anew from the finished ones.

        Returns:
            The outputs of the source's last block on this rank's windows of the calibration text, float32 [sequences,
            length, hidden_size]; None without such a text, or if no step to come needs them.
        """
        finished = ranks.from_first(self.work.finished(self.block_names))
        if finished == len(self.block_names) and not self._outer_left() and not self.untrained():
            return None
        # Where all blocks are finished, the source's states are wanted, and no slice's.
        unfinished = finished < len(self.block_names)
        followed = self.method.followed_widths if unfinished else ()
        activations, weights = None, dict[str, torch.Tensor]()
        if self.calibration:
            if unfinished:
                weights = self._token_weights(self.calibration.tokens)
            activations = Activations(self.source.runner, self.calibration.tokens, followed, self.folder)
            for index in tqdm(range(finished), desc="resuming", unit="block", disable=_silent() or not finished):
                self._replay(self._task(index, activations))
        layers = [len(self.selection.group_sizes(index)) for index in range(len(self.block_names))]
        with _progress("quantizing", "layer", sum(layers), sum(layers[:finished])) as progress:
            for index in range(finished, len(layers)):
                self._quantize(self._task(index, activations, weights), progress)
        return activations.reference if activations else None

    def head_moments(self, states: torch.Tensor | None) -> torch.Tensor | None:
        """Second moments of the output head's inputs, float32 [in_features, in_features].

        Args:
            states: see :meth:`blocks`.

        Returns:
            None without a calibration text, or if the head is not to be quantized any more.
        """
        return head_hessian(self.source, states) if states is not None and self._head in self._outer_left() else None

    @torch.no_grad()
    def outer(self, head_moments: torch.Tensor | None) -> None:
        """Quantize what is not finished of input embedding and output head.

        Args:
            head_moments: see :meth:`head_moments`.
        """
        left = self._outer_left()
        total = sum(self.selection.outer[name][0] for name in left)
        with _progress("embeddings", "row", total, hidden=not left) as progress:
            for name in left:
                method = layer_method(self.method).with_widths(self.format.widths_of(name))
                group_size = self.format.group_size_of(self.selection.outer[name][1], name)
                moments = head_moments if name == self._head else None
                kind = self.format.decoder_kind
                layer = quantize_rows(self.source, name, method, group_size, kind, moments, progress.update)
                if ranks.is_first():
                    self.work.save(name, {name: layer}, self.format.decoder_kind)

    @torch.no_grad()
    def train(self, states: torch.Tensor) -> None:
        """Train the decoders of the widths that are not finished end to end, one width after the other.

        Args:
            states: see :meth:`blocks`.
        """
        if not (settings := self.method.training) or not self.calibration:
            return
        tokens = self.calibration.tokens
        for width in self.untrained():
            training = EndToEnd(self.selection, width, self.work.load, tokens, states, settings, self.folder)
            trained = training.train()
            if ranks.is_first():
                self.work.save_trained(width, trained)
            ranks.wait()  # for what the next width must not count as its own

    @torch.no_grad()
    def measure(self, tokens: torch.Tensor) -> list[dict[str, Any]]:
        """The quality of every width, as rows of :func:`vllm_matquant.measure.evaluate.evaluate`.

        Args:
            tokens: int64 [windows, length], a text that calibration did not see.
        """
        held_out = HeldOut(self.source, tokens, self.format, self._finished(self.source.embedding), self.folder)
        for index in tqdm(range(len(self.block_names)), desc="measuring", unit="block", disable=_silent()):
            self._follow(self._task(index, None), held_out)
        return held_out.rows(self._finished(self.source.output_head))

    def publish(self, writer: CheckpointWriter, manifest: Mapping[str, Any]) -> dict[str, dict[int, float]]:
        """Write the finished layers and every other tensor, and publish the checkpoint.

        Args:
            writer: of the checkpoint.
            manifest: see :meth:`vllm_matquant.checkpoint.writer.CheckpointWriter.finish`.

        Returns:
            The errors of the layers, in the model's order, see :class:`QuantizedLayer`.
        """
        errors: dict[str, dict[int, float]] = {}
        for finished in tqdm([*self.block_names, *self.selection.outer], desc="writing", unit="block"):
            for name, layer in self.work.load(finished, self.format.widths_of).items():
                writer.add_layer(name, layer.codes, layer.decoders)
                errors[name] = layer.errors
        for name in self.selection.unquantized:
            writer.add_tensor(name, self.source.tensors.read(name))
        self.work.begin_publishing()
        writer.finish(self.source.config, copy_from=self.source.folder, manifest=dict(manifest))
        return {name: errors[name] for name in self.selection.shapes if errors[name]}

    def shown(self) -> frozenset[str]:
        """The finished layers of experts that too few tokens reached: they were fitted to all tokens of their block."""
        return frozenset(name for block in self.block_names for name in self.work.shown(block))

    @property
    def _head(self) -> str | None:
        return owner_of(self.source, self.source.output_head) if self.source.output_head else None

    def _outer_left(self) -> list[str]:
        """What is not finished of input embedding and output head."""
        outer = list(self.selection.outer)
        finished = ranks.from_first(self.work.finished([*self.block_names, *outer]))
        return outer[max(0, finished - len(self.block_names)) :]

    def _finished(self, name: str | None) -> QuantizedLayer | None:
        """The input embedding or the output head, if it is quantized."""
        owner = self.selection.outer_owner(name)
        return None if owner is None else self.work.load(owner, self.format.widths_of)[owner]

    def _token_weights(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """How much each token counts in the Hessian of each layer; nothing where all count the same."""
        settings = self.method.weighing
        return token_weights(self.source, self.selection.linears, tokens, settings, self.folder) if settings else {}

    def _task(
        self, index: int, activations: Activations | None, weights: Mapping[str, torch.Tensor] | None = None
    ) -> BlockTask:
        group_sizes = self.selection.group_sizes(index)
        widths = {name: self.format.widths_of(name) for name in group_sizes if name in self.format.layer_widths}
        block = self.source.runner.load_block(index)
        kind = self.format.decoder_kind
        return BlockTask(self.block_names[index], block, group_sizes, activations, widths, kind, weights or {})

    # In these three a block is an argument and nothing else, so that it is gone before the next one is loaded.
    def _quantize(self, task: BlockTask, progress: tqdm[NoReturn]) -> None:
        layers = {}
        for name, layer in self.method.quantize_block(task):
            layers[name] = layer
            progress.update()
        if ranks.is_first():
            self.work.save(task.name, layers, self.format.decoder_kind, task.shown)
        self._advance(task, layers)

    def _replay(self, task: BlockTask) -> None:
        self._advance(task, self.work.load(task.name, self.format.widths_of))

    def _follow(self, task: BlockTask, held_out: HeldOut) -> None:
        held_out.advance(task, self.work.load(task.name, self.format.widths_of))

    def _advance(self, task: BlockTask, layers: Mapping[str, QuantizedLayer]) -> None:
        if task.activations:
            task.activations.advance(task.block, lambda width: task.decoded(layers, width, self.method.slicing))


def _progress(title: str, unit: str, total: int, done: int = 0, *, hidden: bool = False) -> tqdm[NoReturn]:
    return tqdm(total=total, initial=done, desc=title, unit=unit, smoothing=0, disable=_silent() or hidden)


def _silent() -> bool:
    """Whether progress is for another rank to show."""
    return not ranks.is_first()
