"""Compare this project's methods with quantizers of other projects, calibrated on the same tokens.

In every model the linear layers of the transformer blocks are quantized, and all else, the input embedding and the
output head too, is the source's. Results stay in the output folder, one folder for each quantized model; another run
makes only what is not there yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
from llama_cpp_peer import TYPES, WEIGHTS_FILE, llama_cpp_folder
from matplotlib.figure import Figure
from peer_quantizers import PEERS
from results_folder import RECORD_FILE, MakeError, fill, stored_bits
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_matquant.checkpoint.files import publish_json, publish_text, read_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.jobs.arguments import positive, width_list
from vllm_matquant.measure.evaluate import compare
from vllm_matquant.measure.model import LayerWeights, stored_weights
from vllm_matquant.measure.windows import Windows, draw_windows, load_tokenizer, spread_windows
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.source import SourceModel, locate

ONE_WIDTH = "-one-width"
DEFAULT_METHODS = ("nested", f"nested{ONE_WIDTH}", "matgptq", *PEERS)
SAMPLES, SEQUENCE_LENGTH = 16, 512  # windows of each held-out text and the tokens of one, as matquant evaluate has them
TOOLS = Path(__file__).parent
TOKENS_FILE = "tokens.safetensors"
SETTINGS_FILE = "settings.json"
LLAMA_CPP = "llama.cpp"  # the folder of what its types share, and their name in the picture

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A quantized model: a nested parent of several widths, or a model made for one width.

    Attributes:
        method: of ours, a peer or a type of llama.cpp.
        widths: that it is made for.
        judged: those of them to be evaluated.
    """

    method: str
    widths: tuple[int, ...]
    judged: tuple[int, ...]

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.method if len(self.widths) > 1 or self.method in TYPES else f"{self.method}-{self.widths[0]}"

    def command(self, folder: Path, options: argparse.Namespace, model: Path) -> list[str]:
        """What writes the model into ``folder``."""
        if self.method in TYPES:
            script = llama_cpp_command("quantize", options, model, folder)
            return [*script, "--prepared", str(options.output / LLAMA_CPP), self.method]
        if self.method in PEERS:
            script = [str(options.peer_python), str(TOOLS / "peer_quantizers.py"), self.method, "--model", str(model)]
            script += ["--tokens", str(options.output / TOKENS_FILE), "--output", str(folder / WEIGHTS_FILE)]
        else:
            script = [sys.executable, "-m", "vllm_matquant", "quantize", "--no-report"]
            script += [str(model), "--output", str(folder)]
            method = self.method.removesuffix(ONE_WIDTH)
            script += ["--method", method, "--samples", str(options.samples)]
            script += ["--sequence-length", str(options.sequence_length), "--seed", str(options.seed)]
            if options.calibration and METHODS[method].needs_calibration:
                script += ["--calibration", options.calibration]
        return [*script, "--bits", ",".join(map(str, self.widths)), "--group-size", str(options.group_size)]


def llama_cpp_command(job: str, options: argparse.Namespace, model: Path, folder: Path) -> list[str]:
    """What runs a job of llama_cpp_peer.py that writes into ``folder``."""
    script = [sys.executable, str(TOOLS / "llama_cpp_peer.py"), job, "--model", str(model), "--output", str(folder)]
    return [*script, "--llama-cpp-folder", str(options.llama_cpp_folder)]


def method_list(text: str) -> tuple[str, ...]:
    """Parse names of methods: ours, ours for one width alone, peers, and types of llama.cpp."""
    known = [*METHODS, *(f"{name}{ONE_WIDTH}" for name in METHODS), *PEERS, *TYPES]
    methods = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"found {unknown[0]!r}, expected some of {', '.join(known)}")
    return methods


def interpreter(text: str) -> Path:
    """The path of a Python interpreter."""
    if not (Path(text).is_file() and os.access(text, os.X_OK)):
        raise argparse.ArgumentTypeError(f"found no program {text}, expected a Python interpreter")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="The peers need an environment of their own, made with python -m venv PEERS && PEERS/bin/pip install "
        "auto-round gptqmodel, and named with --peer-python PEERS/bin/python. llama.cpp's types need its source with a "
        "build of llama-quantize, named with --llama-cpp-folder, and the package gguf.",
    )
    parser.add_argument("model", help="folder with config.json, safetensors files and tokenizer, or a name on the hub")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="texts that calibration never saw"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of all results")
    parser.add_argument("--bits", type=width_list, default=(2, 3, 4, 8), help="widths to compare (default: 2,3,4,8)")
    parser.add_argument("--group-size", type=positive, default=64, help="columns that share a scale (default: 64)")
    parser.add_argument(
        "--methods",
        type=method_list,
        metavar="NAME,...",
        help=f"methods of matquant quantize, each as one parent of all widths, or with {ONE_WIDTH} as a model for each "
        f"width; peers: {', '.join(PEERS)}; and llama.cpp's types: {', '.join(TYPES)}, each beside the width of its "
        f"name (default: {','.join(DEFAULT_METHODS)}, and all types where there is a --llama-cpp-folder)",
    )
    parser.add_argument("--calibration", metavar="hf:NAME|FILE.txt|FILE.jsonl", help="default: a built-in text")
    parser.add_argument("--samples", type=positive, default=64, help="calibration windows (default: %(default)s)")
    parser.add_argument("--sequence-length", type=positive, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the windows' places (default: %(default)s)")
    parser.add_argument(
        "--peer-python",
        type=interpreter,
        default=Path(sys.executable),
        metavar="PATH",
        help="interpreter that has the peers",
    )
    parser.add_argument(
        "--llama-cpp-folder",
        type=llama_cpp_folder,
        metavar="DIR",
        help="llama.cpp's source, with build/bin/llama-quantize in it",
    )
    return parser


def widths_of(method: str) -> tuple[int, ...]:
    """The widths that a model for one width is worth making at."""
    if method in TYPES:
        return (TYPES[method],)
    return PEERS[method].widths if method in PEERS else WIDTHS


def plan(methods: Sequence[str], widths: tuple[int, ...]) -> list[Candidate]:
    """The models to make, in order."""
    candidates = []
    for method in methods:
        if method in METHODS:
            candidates.append(Candidate(method, WIDTHS, widths))
        else:
            judged = [width for width in widths if width in widths_of(method)]
            candidates += [Candidate(method, (width,), (width,)) for width in judged]
    return candidates


def prepare(options: argparse.Namespace, model: Path) -> None:
    """Write the calibration tokens, or check that the folder's models were made with the same ones.

    Raises:
        ValueError: they were made with other settings.
        TextError: the calibration text cannot be used.
    """
    tokens = draw_windows(
        options.calibration,
        load_tokenizer(model),
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
    ).tokens
    settings = {
        "model": str(model.resolve()),
        "group_size": options.group_size,
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    file = options.output / SETTINGS_FILE
    if not file.exists():
        options.output.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": tokens}, options.output / TOKENS_FILE)
        publish_json(file, settings)
    found = read_json(file)
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(f"{file}: {name}: found {found.get(name)}, expected {value}; give another --output")


def make(candidate: Candidate, options: argparse.Namespace, model: Path) -> None:
    """Make a model in a process of its own, unless it is there. Its folder appears once it is complete.

    Raises:
        MakeError: the process failed.
    """
    if (options.output / candidate.name).exists():
        print(f"{candidate.name}: there already", flush=True)
        return
    if candidate.method in TYPES and not (options.output / LLAMA_CPP).exists():
        tokens = ["--tokens", str(options.output / TOKENS_FILE)]
        fill(LLAMA_CPP, lambda folder: llama_cpp_command("prepare", options, model, folder) + tokens, options.output)
    fill(candidate.name, lambda folder: candidate.command(folder, options, model), options.output)


@dataclass(frozen=True)
class Entry:
    """A width of a model, to be evaluated.

    Attributes:
        seconds: that quantizing took: for a peer from loading the source to its result, for a type of llama.cpp the
            conversion, the importance matrix and llama-quantize, for ours the whole command.
        bits_per_weight: as stored, what decodes the codes included.
        types: the share of the weights that is stored as each type, in a file of llama.cpp; empty of other models.
    """

    method: str
    bits: int
    seconds: float
    bits_per_weight: float
    weights_of: Path
    types: Mapping[str, float] = field(default_factory=dict)

    def weights(self) -> LayerWeights:
        if self.weights_of.is_file():
            return stored_weights(self.weights_of)
        checkpoint = open_checkpoint(self.weights_of, check_files=False)
        return checkpoint.weights(checkpoint.slice(self.bits))


def entries(candidate: Candidate, output: Path) -> Iterator[Entry]:
    """What is to be evaluated of a model that was made."""
    folder = output / candidate.name
    if candidate.method in PEERS or candidate.method in TYPES:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            facts = file.metadata()
        (width,) = candidate.judged
        seconds, bits_per_weight = float(facts["seconds"]), float(facts["bits_per_weight"])
        if candidate.method in TYPES:
            seconds += read_json(output / LLAMA_CPP / RECORD_FILE)["seconds"]
        types = json.loads(facts.get("types", "{}"))
        yield Entry(candidate.method, width, seconds, bits_per_weight, folder / WEIGHTS_FILE, types)
        return
    checkpoint = open_checkpoint(folder)
    seconds = read_json(folder / RECORD_FILE)["seconds"]
    for width in candidate.judged:
        bits_per_weight = stored_bits(checkpoint, checkpoint.slice(width))
        yield Entry(candidate.method, width, seconds, bits_per_weight, folder)


def judge(
    judged: Sequence[Entry], model: Path, layers: Mapping[str, tuple[int, int]], windows: Mapping[str, Windows]
) -> list[Row]:
    """The figures of each model at each width on each text."""
    rows = []
    for text, measured_on in windows.items():
        named = ((f"{entry.method}, {entry.bits} bits", entry.weights()) for entry in judged)
        for entry, quality in zip(judged, compare(model, measured_on.tokens, layers, named), strict=True):
            gap = math.log(quality["perplexity"] / quality["reference_perplexity"])
            row = {"method": entry.method, "bits": entry.bits, "text": text, "gap": gap} | quality
            row["beginning_of_text"] = measured_on.source["beginning_of_text"]
            row |= {"seconds": entry.seconds, "bits_per_weight": entry.bits_per_weight}
            rows.append(row | ({"types": dict(entry.types)} if entry.types else {}))
    return rows


def tables(rows: Sequence[Row]) -> str:
    """For each text a table in Markdown, and below all what llama.cpp's types are stored as."""
    lines = []
    for text in dict.fromkeys(row["text"] for row in rows):
        of_text = [row for row in rows if row["text"] == text]
        loss = math.log(of_text[0]["reference_perplexity"])
        lines += [f"{text}: KL divergence from the source model and log-perplexity above its {loss:.4f}, in nats", ""]
        lines += ["| method | width | bits per weight as stored | KL divergence | log-perplexity | seconds |"]
        lines += ["|---" * 6 + "|"]
        for row in of_text:
            quality = f"{row['kl']:.5f} | {row['gap']:.4f}"
            lines.append(
                f"| {row['method']} | {row['bits']} | {row['bits_per_weight']:.3f} | {quality} | {row['seconds']:.0f} |"
            )
        lines.append("")
    stored = {row["method"]: row["types"] for row in rows if "types" in row}
    if stored:
        lines += ["Weights in llama.cpp's files:", ""]
        for name, types in stored.items():
            lines.append(f"- {name}: {', '.join(f'{share:.1%} {part}' for part, share in types.items())}")
        lines.append("")
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """For each text a panel: KL divergence against bits per weight as stored."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure = Figure(figsize=(7 * len(texts), 5), layout="constrained")
    for panel, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        series: dict[str, list[Row]] = {}
        for row in rows:
            if row["text"] == text:
                series.setdefault(LLAMA_CPP if row["method"] in TYPES else row["method"], []).append(row)
        for name, own in series.items():
            own.sort(key=lambda row: row["bits_per_weight"])
            style = "o-" if name in METHODS else "D" if name == LLAMA_CPP else "x--"
            panel.plot([row["bits_per_weight"] for row in own], [row["kl"] for row in own], style, label=name)
            for row in own if name in (*METHODS, LLAMA_CPP) else ():
                label = row["method"] if name == LLAMA_CPP else row["bits"]
                place = row["bits_per_weight"], row["kl"]
                panel.annotate(label, place, textcoords="offset points", xytext=(5, 4), fontsize=8)
        panel.set(title=text, yscale="log", xlabel="bits per weight as stored: codes, scales, codebooks")
        panel.set_ylabel("KL divergence from the source, nats per token")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(file, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    methods = options.methods or (*DEFAULT_METHODS, *(TYPES if options.llama_cpp_folder else ()))
    if not options.llama_cpp_folder and any(method in TYPES for method in methods):
        parser.error("argument --llama-cpp-folder: found none, expected the folder of llama.cpp for its types")
    try:
        model = locate(options.model)
        matrices = SourceModel(model).matrices.values()
        layers = {matrix.name: matrix.shape for matrix in matrices if matrix.block is not None}
        tokenizer = load_tokenizer(model)
        windows = {
            text.name: spread_windows(text, tokenizer, samples=SAMPLES, sequence_length=SEQUENCE_LENGTH)
            for text in options.text
        }
        prepare(options, model)
        planned, made = plan(methods, options.bits), []
        for candidate in planned:
            try:
                make(candidate, options, model)
                made.append(candidate)
            except MakeError as error:
                print(f"{parser.prog}: {error}", file=sys.stderr, flush=True)
        if not made:
            parser.exit(1, f"{parser.prog}: no model could be made\n")
        judged = [entry for candidate in made for entry in entries(candidate, options.output)]
        rows = judge(judged, model, layers, windows)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    publish_json(options.output / "results.json", rows)
    publish_text(options.output / "results.md", tables(rows))
    draw(rows, options.output / "results.png")
    print(tables(rows))
    return 0 if made == planned else 1


if __name__ == "__main__":
    raise SystemExit(main())
