"""The job that measures the quality of a checkpoint's widths and recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.jobs.arguments import output_file, positive, width_list
from vllm_matquant.jobs.job import Job, Say, argument, running, silent
from vllm_matquant.jobs.reference import locate_reference
from vllm_matquant.jobs.slices import RECIPES_HELP, chosen_slices
from vllm_matquant.jobs.table import figures, headings
from vllm_matquant.kernels.reference import Rounding, default_rounding
from vllm_matquant.measure.evaluate import evaluate as evaluate_slices
from vllm_matquant.measure.windows import load_tokenizer, spread_windows
from vllm_matquant.serve.request import ACTIVATION_BITS

COLUMNS = ("bits", "bits_per_weight", "perplexity", "reference_perplexity", "kl", "tokens")


@dataclass(frozen=True)
class Evaluate(Job[list[dict[str, Any]]]):
    """Perplexity of a nested checkpoint's widths and recipes on a text, and KL divergence from the model it comes from.

    Gives a row for each: bits, bits_per_weight (codes and decoders), perplexity, reference_perplexity, kl (nats per
    token), tokens (how many were predicted) and beginning_of_text (whether each window began with the model's
    beginning-of-text token); a recipe's row has its name as recipe.
    """

    folder: Path | str = field(
        metadata=argument("folder of the nested checkpoint", parse=Path, positional=True, metavar="DIR")
    )
    reference: Path | str = field(metadata=argument("the source model: a folder or a hub name", metavar="MODEL"))
    text: Path | str = field(metadata=argument("text that calibration never saw", parse=Path, metavar="FILE"))
    _: KW_ONLY
    bits: Sequence[int] | None = field(
        default=None, metadata=argument("widths to evaluate; default: all that the folder can serve", parse=width_list)
    )
    recipes: str | None = field(default=None, metadata=argument(RECIPES_HELP.format("evaluate"), metavar="LIST"))
    text_column: str = field(
        default="text", metadata=argument("the text's field in a record (default: %(default)s)", metavar="NAME")
    )
    samples: int = field(
        default=16, metadata=argument("windows, spread evenly over the text (default: %(default)s)", parse=positive)
    )
    sequence_length: int = field(
        default=512, metadata=argument("tokens in each window (default: %(default)s)", parse=positive)
    )
    activation_bits: int | str | None = field(
        default=None,
        metadata=argument(
            "round what quantized layers read, as the kernels of the CPU do: to 8 or 16 bits, or as they are served "
            "by default, which depends on the width; if not given: not at all",
            parse=lambda text: int(text) if text.isdigit() else text,
            choices=(*ACTIVATION_BITS, "served"),
        ),
    )
    json: Path | str | None = field(
        default=None, metadata=argument("write the rows there (JSON)", parse=output_file, metavar="OUT")
    )

    def run(self, say: Say = silent) -> list[dict[str, Any]]:
        checkpoint = open_checkpoint(self.folder)
        slices = chosen_slices(checkpoint, self.bits, self.recipes)
        reference = locate_reference(str(self.reference), checkpoint)
        windows = spread_windows(
            Path(self.text),
            load_tokenizer(reference),
            samples=self.samples,
            sequence_length=self.sequence_length,
            text_column=self.text_column,
        )
        rounding_of = _rounding_of(self.activation_bits)
        rows = [
            row | {"beginning_of_text": windows.source["beginning_of_text"]}
            for row in evaluate_slices(checkpoint, reference, windows.tokens, slices, rounding_of)
        ]
        say(headings(COLUMNS))
        for row in rows:
            say(f"{figures(row, COLUMNS)} {row.get('recipe', '')}")
        if self.json:
            publish_json(Path(self.json), rows)
        return rows


evaluate = running(Evaluate)


def _rounding_of(activation_bits: int | str | None) -> Callable[[int], Rounding] | None:
    """How a layer of a width rounds what it reads, None for not at all."""
    if isinstance(activation_bits, int):
        return lambda width: Rounding(activation_bits)
    return default_rounding if activation_bits else None
