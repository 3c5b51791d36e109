"""The jobs that measure speed: of one layer, and of a checkpoint that vLLM serves."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_matquant.bench import experts as mixtures
from vllm_matquant.bench.kernel import BATCHES, PEERS, SHAPES, Settings, plot_kernel
from vllm_matquant.bench.kernel import COLUMNS as KERNEL_COLUMNS
from vllm_matquant.bench.kernel import bench_kernel as measure_kernel
from vllm_matquant.bench.serve import COLUMNS, PROMPT, Load, check_vllm, plot_serving
from vllm_matquant.bench.serve import bench_serve as measure_serving
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, KINDS
from vllm_matquant.checkpoint.files import publish_json, read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.jobs.arguments import names_of, output_file, positive, positive_list, width_list
from vllm_matquant.jobs.job import Job, Say, argument, running, show, silent
from vllm_matquant.jobs.slices import RECIPES_HELP, chosen_slices
from vllm_matquant.jobs.table import figures, headings
from vllm_matquant.serve.request import ACTIVATION_BITS
from vllm_matquant.serve.speculation.settings import parse_draft

Rows = list[dict[str, Any]]


def shape_list(text: str) -> tuple[tuple[int, int], ...]:
    """Parse ``llama-3-8b,4096x11008``: names of models and out_features x in_features."""
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        sizes = part.split("x")
        if part in SHAPES:
            shapes += SHAPES[part]
        elif len(sizes) == 2 and all(size.isdigit() and int(size) > 0 for size in sizes) and int(sizes[1]) % 8 == 0:
            shapes.append((int(sizes[0]), int(sizes[1])))
        else:
            expected = f"some of {', '.join(SHAPES)} or N x K with K a multiple of 8, such as 4096x11008"
            raise argparse.ArgumentTypeError(f"found {part!r}, expected {expected}")
    return tuple(dict.fromkeys(shapes))


def mixture_list(text: str) -> tuple[mixtures.Shape, ...]:
    """Parse ``qwen3-30b-a3b,128x8x2048x768``: names of models, and experts x chosen x hidden x inner features."""
    shapes: list[mixtures.Shape] = []
    for part in text.split(","):
        sizes = part.split("x")
        if part in mixtures.MIXTURES:
            shapes.append(mixtures.MIXTURES[part])
            continue
        shape = mixtures.Shape(*map(int, sizes)) if len(sizes) == 4 and all(map(str.isdigit, sizes)) else None
        if shape is None or not 1 <= shape.chosen < shape.experts or shape.hidden % 16 or shape.inner % 16:
            expected = f"some of {', '.join(mixtures.MIXTURES)} or EXPERTS x CHOSEN x HIDDEN x INNER"
            example = "with fewer chosen than experts and multiples of 16 features, such as 128x8x2048x768"
            raise argparse.ArgumentTypeError(f"found {part!r}, expected {expected} {example}")
        shapes.append(shape)
    return tuple(dict.fromkeys(shapes))


def draft(text: str) -> float | str:
    """Parse ``3``, ``2.5`` or ``my-recipe``."""
    try:
        return parse_draft(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _show_shapes(shapes: Sequence[tuple[int, int]]) -> str:
    return ",".join(f"{rows}x{columns}" for rows, columns in shapes)


@dataclass(frozen=True)
class BenchKernel(Job[Rows]):
    """Time of one linear layer on the CPU at each width, beside a plain read of the same bytes and other libraries'
    layers of the same shape; weights are out of the caches.

    Gives a row for each layer, number of threads, batch and width.
    """

    _: KW_ONLY
    bits: Sequence[int] = field(
        default=WIDTHS, metadata=argument("widths to measure (default: 2 to 8)", parse=width_list)
    )
    batch: Sequence[int] = field(
        default=BATCHES,
        metadata=argument(f"tokens multiplied at once (default: {show(BATCHES)})", parse=positive_list, metavar="LIST"),
    )
    shapes: Sequence[tuple[int, int]] = field(
        default=tuple(dict.fromkeys(shape for shapes in SHAPES.values() for shape in shapes)),
        metadata=argument(
            f"out_features x in_features, such as 4096x11008, or layers of {', '.join(SHAPES)} (default: all these)",
            parse=shape_list,
            show=_show_shapes,
            metavar="LIST",
        ),
    )
    threads: Sequence[int] = field(
        default=(1, 2), metadata=argument("numbers of threads (default: 1,2)", parse=positive_list, metavar="LIST")
    )
    group_size: int = field(default=128, metadata=argument("columns of a group (default: %(default)s)", parse=positive))
    activation_bits: int | None = field(
        default=None,
        metadata=argument(
            "bits to which activations are rounded (default: as they are served, which depends on the width)",
            parse=int,
            choices=(8, 16, 24),
        ),
    )
    decoders: str = field(
        default=AFFINE_INT8.name,
        metadata=argument("how decoders are stored (default: %(default)s)", choices=tuple(KINDS)),
    )
    peers: Sequence[str] = field(
        default=tuple(PEERS),
        metadata=argument(
            f"other libraries to time: some of {', '.join(PEERS)}, or none (default: all)",
            parse=names_of(tuple(PEERS), "none"),
            metavar="LIST",
        ),
    )
    json: Path | str | None = field(
        default=None, metadata=argument("write the rows there (JSON)", parse=output_file, metavar="OUT")
    )
    plot: Path | str | None = field(
        default=None, metadata=argument("draw time against bits", parse=output_file, metavar="OUT.png")
    )

    def run(self, say: Say = silent) -> Rows:
        settings = Settings(
            *(self.shapes, self.batch, self.bits, self.threads, self.group_size, self.activation_bits, self.peers),
            decoder_kind=KINDS[self.decoders],
        )
        columns = (*KERNEL_COLUMNS, *self.peers)
        say(headings(columns))
        rows = []
        for row in measure_kernel(settings):
            rows.append(row)
            say(figures(row | dict.fromkeys(self.peers, math.nan) | row["peer_seconds"], columns))
        if self.json:
            publish_json(Path(self.json), rows)
        if self.plot:
            plot_kernel(rows, Path(self.plot))
        return rows


@dataclass(frozen=True)
class BenchExperts(Job[Rows]):
    """Time of one mixture of experts on the CPU at each width, beside a plain read of the experts that are hit and
    vLLM's own in bfloat16; each round routes its tokens to other experts.

    Gives a row for each mixture, number of threads, batch and width.
    """

    _: KW_ONLY
    bits: Sequence[int] = field(
        default=WIDTHS, metadata=argument("widths to measure (default: 2 to 8)", parse=width_list)
    )
    batch: Sequence[int] = field(
        default=mixtures.BATCHES,
        metadata=argument(
            f"tokens computed at once (default: {show(mixtures.BATCHES)})", parse=positive_list, metavar="LIST"
        ),
    )
    shapes: Sequence[mixtures.Shape] = field(
        default=tuple(mixtures.MIXTURES.values()),
        metadata=argument(
            "experts x experts of a token x hidden x inner features, such as 128x8x2048x768, or those of "
            f"{', '.join(mixtures.MIXTURES)} (default: all these)",
            parse=mixture_list,
            show=lambda shapes: ",".join("x".join(map(str, shape)) for shape in shapes),
            metavar="LIST",
        ),
    )
    threads: Sequence[int] = field(
        default=(2,), metadata=argument("numbers of threads (default: 2)", parse=positive_list, metavar="LIST")
    )
    group_size: int = field(default=128, metadata=argument("columns of a group (default: %(default)s)", parse=positive))
    decoders: str = field(
        default=AFFINE_INT8.name,
        metadata=argument("how decoders are stored (default: %(default)s)", choices=tuple(KINDS)),
    )
    peers: Sequence[str] = field(
        default=(mixtures.VLLM,),
        metadata=argument(
            f"{mixtures.VLLM}, or none (default: {mixtures.VLLM})",
            parse=names_of((mixtures.VLLM,), "none"),
            metavar="LIST",
        ),
    )
    json: Path | str | None = field(
        default=None, metadata=argument("write the rows there (JSON)", parse=output_file, metavar="OUT")
    )

    def run(self, say: Say = silent) -> Rows:
        settings = mixtures.Settings(
            *(self.shapes, self.batch, self.bits, self.threads, self.group_size, self.peers),
            decoder_kind=KINDS[self.decoders],
        )
        columns = (*mixtures.COLUMNS, *self.peers)
        say(headings(columns))
        rows = []
        for row in mixtures.bench_experts(settings):
            rows.append(row)
            say(figures(row | dict.fromkeys(self.peers, math.nan) | row["peer_seconds"], columns))
        if self.json:
            publish_json(Path(self.json), rows)
        return rows


@dataclass(frozen=True)
class BenchServe(Job[Rows]):
    """Tokens per second and memory of each width and recipe of a checkpoint, served by vLLM.

    Gives a row for each: bits, output_tokens_per_s, resident_bytes, load_seconds, batch, model and answer.
    """

    folder: Path | str = field(
        metadata=argument("folder of the nested checkpoint", parse=Path, positional=True, metavar="DIR")
    )
    _: KW_ONLY
    bits: Sequence[int] | None = field(
        default=None, metadata=argument("widths to measure; default: all that the folder can serve", parse=width_list)
    )
    recipes: str | None = field(default=None, metadata=argument(RECIPES_HELP.format("measure"), metavar="LIST"))
    batch: int = field(default=1, metadata=argument("requests at a time (default: %(default)s)", parse=positive))
    output_tokens: int = field(
        default=64, metadata=argument("tokens to generate for each request (default: %(default)s)", parse=positive)
    )
    prompt: str = field(default=PROMPT, metadata=argument("what to ask (default: %(default)s)"))
    activation_bits: int | None = field(
        default=None, metadata=argument("as that of vllm serve", parse=int, choices=ACTIVATION_BITS)
    )
    reference: Path | str | None = field(
        default=None,
        metadata=argument("folder of a model that is not quantized, measured first", parse=Path, metavar="MODEL"),
    )
    llama_cpp: Path | str | None = field(
        default=None,
        metadata=argument(
            "a llama-batched-bench: llama.cpp decodes random weights of this shape in turn with 8, 4, 3 and 2 bits "
            "(Q8_0, Q4_0, Q3_K; Q2_K and IQ2_XS)",
            parse=Path,
            metavar="PROGRAM",
        ),
    )
    elastic: bool = field(
        default=False, metadata=argument("one engine for all of them, switched from each to the next, not one for each")
    )
    prompt_tokens: int | None = field(
        default=None, metadata=argument("a prompt of so many numbers in place of --prompt", parse=positive)
    )
    rounds: int = field(
        default=1, metadata=argument("how often to measure; medians are shown (default: %(default)s)", parse=positive)
    )
    speculate_bits: float | str | None = field(
        default=None,
        metadata=argument(
            "draft with a slice, as vllm serve does; the share that was accepted is shown", parse=draft, metavar="N"
        ),
    )
    speculate_tokens: int | None = field(
        default=None, metadata=argument("drafts at a time, as those of vllm serve", parse=positive, metavar="K")
    )
    json: Path | str | None = field(
        default=None, metadata=argument("write the rows there (JSON)", parse=output_file, metavar="OUT")
    )
    plot: Path | str | None = field(
        default=None, metadata=argument("draw them there", parse=output_file, metavar="OUT.png")
    )

    def run(self, say: Say = silent) -> Rows:
        folder = Path(self.folder)
        checkpoint = open_checkpoint(folder, check_values=False)
        slices = chosen_slices(checkpoint, self.bits, self.recipes)
        check_vllm()
        if self.speculate_bits is not None and self.elastic:
            raise ValueError("speculate_bits: found it with --elastic, expected one of them: drafts are for one slice")
        load = Load(
            *(self.batch, self.output_tokens, self.prompt, self.activation_bits, self.prompt_tokens, self.rounds),
            *(self.speculate_bits, self.speculate_tokens),
        )
        llama_cpp = Path(self.llama_cpp) if self.llama_cpp else None
        if llama_cpp:
            describe_llama_cpp(llama_cpp, folder, slices, say)
        columns = COLUMNS if self.speculate_bits is None else (*COLUMNS, "acceptance")
        say(headings(columns))
        rows: Rows = []
        reference = Path(self.reference) if self.reference else None
        for row in measure_serving(folder, slices, load, reference, llama_cpp, self.elastic):
            rows.append(row)
            say(f"{figures(row, columns)} {row.get('recipe', '')}" if "bits" in row else _peer_line(row))
        if self.json:
            publish_json(Path(self.json), rows)
        if self.plot:
            plot_serving(rows, Path(self.plot))
        return rows


def describe_llama_cpp(program: Path, folder: Path, slices: Sequence[Slice], say: Say) -> None:
    """Say what a build of llama.cpp was built for, and which widths it has no types for.

    Raises:
        ValueError: there is no such program, or the package that writes its models is not installed.
    """
    if shutil.which(program) is None:
        raise ValueError(f"llama_cpp: found no program {program}, expected a build's llama-batched-bench")
    if find_spec("gguf") is None:
        raise ValueError(
            "gguf: found no such package, expected it for --llama-cpp (pip install 'vllm_matquant[llama-cpp-peer]')"
        )
    from vllm_matquant.bench.llama_cpp import head_width, instruction_sets, misfit

    say(f"llama.cpp: {program}, built for {instruction_sets(program)}")
    config = read_json(folder / CONFIG_FILE)
    for each in slices:
        reason = misfit(config, each.width, head_width(config, each.widths)) if each.width else None
        if reason:
            say(f"llama.cpp: not measured beside {each.width} bits: {reason}")


def _peer_line(row: dict[str, Any]) -> str:
    decoded = (
        f"{row['decode_tokens_per_s']:.4g} tokens per second decoded, {row['prompt_tokens_per_s']:.4g} of the prompt"
    )
    return f"{row['model']}: {decoded}, batch {row['batch']}"


bench_kernel = running(BenchKernel)
bench_experts = running(BenchExperts)
bench_serve = running(BenchServe)
