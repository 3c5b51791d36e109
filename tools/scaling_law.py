"""Measure what low precision in randomly chosen layers costs models, and fit the scaling law that predicts it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from vllm_matquant.checkpoint.files import publish_json, read_json
from vllm_matquant.jobs.arguments import float_list, output_file, positive, positive_list
from vllm_matquant.measure.windows import load_tokenizer, spread_windows
from vllm_matquant.quantize.source import locate
from vllm_matquant.research.degeneration import MixedModel, linear_layers
from vllm_matquant.research.law import UNQUANTIZED_BITS, Law, LawError, Observation, fit_law, read_law

_EPILOG = """
The law (arXiv 2410.06722): loss degeneration = C exp(A Q_r) N^-gamma_n (Q_b + d)^gamma_c, with Q_r the share of weights
in low precision, Q_b the weights that share a scale (--blocks) and N the model's weights. It is of the mean over
random choices of layers (--trials); a single mix may be far from it. Precisions are by rounding to
the nearest. Observations are kept in OUT with the law: a later call adds other models to them (--add OUT).

    python tools/scaling_law.py MODEL_A MODEL_B --output law.json --plot law.png
    python tools/scaling_law.py --predict law.json --weights 7e9 --budget 2.5 --blocks 64
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders or hub names of unquantized models")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="to measure on; default: a part of Python's reference"
    )
    parser.add_argument("--bits", type=float, default=4, help="of weights in low precision (default: %(default)s)")
    parser.add_argument(
        "--high-bits", type=float, default=UNQUANTIZED_BITS, help="of all others; default: 16, not quantized"
    )
    parser.add_argument(
        "--ratios",
        type=float_list,
        default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        metavar="LIST",
        help="shares Q_r to measure (default: 0.1 to 1)",
    )
    parser.add_argument(
        "--blocks",
        type=positive_list,
        default=(16, 32, 64, 128),
        metavar="LIST",
        help="weights that share a scale, Q_b (default: 16,32,64,128)",
    )
    parser.add_argument("--trials", type=positive, default=4, help="random choices of layers for each (default: 4)")
    parser.add_argument("--samples", type=positive, default=8, help="windows of the text (default: %(default)s)")
    parser.add_argument("--sequence-length", type=positive, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choices (default: %(default)s)")
    parser.add_argument("--add", type=Path, metavar="LAW.json", help="fit its observations too")
    parser.add_argument("--output", type=output_file, metavar="OUT.json", help="where the law is written")
    parser.add_argument("--plot", type=output_file, metavar="OUT.png", help="draw it there (needs matplotlib)")
    parser.add_argument("--predict", type=Path, metavar="LAW.json", help="measure nothing; predict by this law")
    parser.add_argument("--weights", type=float, metavar="N", help="with --predict: size of the model")
    parser.add_argument("--budget", type=float_list, metavar="LIST", help="with --predict: average bits")
    return parser


def observe(options: argparse.Namespace) -> list[Observation]:
    """The observations of all models, with a progress bar."""
    observations = []
    for name in options.models:
        folder = locate(name)
        windows = spread_windows(
            options.text, load_tokenizer(folder), samples=options.samples, sequence_length=options.sequence_length
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        mixed = MixedModel(folder.name, model, linear_layers(model), windows.tokens, options.bits, options.high_bits)
        total = len(options.blocks) * len(options.ratios)
        found = mixed.observe(options.ratios, options.blocks, options.trials, options.seed)
        observations += list(tqdm(found, desc=folder.name, total=total, unit="observation"))
    return observations


def read_observations(path: Path, options: argparse.Namespace) -> list[Observation]:
    """What an earlier call measured.

    Raises:
        LawError: with other precisions.
    """
    law = read_law(path)
    if (law.low_bits, law.high_bits) != (options.bits, options.high_bits):
        found = f"a law of {law.low_bits:g} and {law.high_bits:g} bits"
        raise LawError(f"{path}: found {found}, expected {options.bits:g} and {options.high_bits:g}")
    return [Observation(**item | {"mixes": tuple(item["mixes"])}) for item in read_json(path)["measured"]]


def show(law: Law) -> None:
    print(f"{law.observations} observations ({law.left_out} left out), {len(law.models)} models, blocks {law.blocks}")
    for name, (low, high) in law.intervals.items():
        print(f"  {name:<8} {getattr(law, name):9.4f}   95 % interval {low:9.4f} to {high:9.4f}")
    print(
        f"  R^2 {law.r2:.4f}, of observations held out {law.held_out_r2:.4f}; "
        f"median error of a held-out prediction {100 * law.held_out_error:.1f} %, "
        f"for a single mix {100 * law.mix_error:.1f} %"
    )


def predict(options: argparse.Namespace) -> None:
    """Print what the law says of the budgets.

    Raises:
        ValueError: a budget that the law does not reach, or no size.
    """
    law = read_law(options.predict)
    if not options.weights or not options.budget:
        raise ValueError("--predict: found no --weights or no --budget, expected both")
    print(f"{'bits':>6} {'block':>6} {'loss degeneration':>18} {'nats per token':>15}")
    for bits in options.budget:
        for block in options.blocks:
            delta = law.predict(law.ratio_for_budget(bits), options.weights, block)
            print(f"{bits:6.3g} {block:6} {delta:18.4g} {math.log1p(delta):15.4g}")
    least, most = min(law.models.values()), max(law.models.values())
    if not least <= options.weights <= most:
        print(f"note: weights {options.weights:,.0f} lie outside of the {least:,} to {most:,} that were measured")


def plot(law: Law, observations: Sequence[Observation], file: Path) -> None:
    """Loss degeneration against Q_r, a panel for each model and a colour for each block size."""
    from matplotlib.figure import Figure

    names = list(law.models)
    figure = Figure(figsize=(1 + 4 * len(names), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    ratios = [step / 50 for step in range(51)]
    for panel, name in zip(panels, names, strict=True):
        for index, block in enumerate(law.blocks):
            own = [item for item in observations if item.model == name and item.block == block]
            color = f"C{index}"
            for item in own:
                panel.plot([item.ratio] * len(item.mixes), item.mixes, ".", ms=2, alpha=0.5, color=color)
            panel.plot([item.ratio for item in own], [item.degeneration for item in own], "o", ms=4, color=color)
            line = [law.predict(ratio, law.models[name], block) for ratio in ratios]
            panel.plot(ratios, line, "-", color=color, label=f"blocks of {block}")
        panel.set(yscale="log", xlabel="share in low precision, Q_r", title=f"{name}, N = {law.models[name]:,}")
    panels[0].set_ylabel(f"loss degeneration ({law.low_bits:g} bits)")
    panels[0].legend()
    figure.suptitle(f"R² {law.r2:.3f}, held out {law.held_out_r2:.3f}")
    figure.savefig(file, dpi=150)


def run(options: argparse.Namespace) -> None:
    if options.predict:
        predict(options)
        return
    if not options.output or not (options.models or options.add):
        raise ValueError("found no MODEL or no --output, expected both (or --predict)")
    if options.plot:
        import matplotlib  # noqa: F401 - before the work, not after it
    earlier = read_observations(options.add, options) if options.add else []
    observations: list[Observation] = [*earlier, *observe(options)]
    law = fit_law(observations, options.bits, options.high_bits, options.seed)
    content: dict[str, Any] = {"law": law.to_dict(), "measured": [vars(item) for item in observations]}
    publish_json(options.output, content)
    show(law)
    if options.plot:
        plot(law, observations, options.plot)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
