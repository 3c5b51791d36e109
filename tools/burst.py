"""Play bursts of requests to a checkpoint: served at one width, at another, and at one that follows the load.

The requests are drawn with a seed, and the same for all. Each way of serving has an engine of its own, and a process.
They are compared as NestedFP and MorphServe are: seconds to the first token, seconds between tokens, and how many
requests have their tokens further apart than a multiple of what a request alone has at the first of the widths.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
from vllm_matquant.bench.serve import set_engine_defaults
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.jobs.arguments import output_file, width_list
from vllm_matquant.jobs.table import figures, headings
from vllm_matquant.serve.elastic.policy import read_policy
from vllm_matquant.serve.elastic.simulator import Arrival

PROMPT_TOKENS, ANSWER_TOKENS = (16, 96), (16, 48)
WARM_UP, ALONE = 8, 5  # requests: together, and then one after the other
COLUMNS = ("first_p95", "first_mean", "between_p95", "between_mean", "violations", "requests", "average_bits")


@dataclass(frozen=True)
class Trace:
    """Requests by turns of calm and burst.

    Attributes:
        seconds: in which requests come.
        turn: seconds of calm, and as many of a burst.
        calm, burst: requests a second.
        seed: of all that is drawn.
    """

    seconds: float
    turn: float
    calm: float
    burst: float
    seed: int

    def arrivals(self) -> list[Arrival]:
        """Calm comes first; times between requests are exponential, lengths even."""
        random, arrivals, at = Random(self.seed), list[Arrival](), 0.0
        while True:
            in_burst = int(at // self.turn) % 2 == 1
            at += random.expovariate(self.burst if in_burst else self.calm)
            if at >= self.seconds:
                return arrivals
            arrivals.append(Arrival(at, random.randint(*PROMPT_TOKENS), random.randint(*ANSWER_TOKENS)))


def play(folder: Path, arrivals: Sequence[Arrival], **arguments: Any) -> dict[str, Any]:
    """Serve in this process and play the requests.

    Args:
        folder: of the nested checkpoint.
        arrivals: when which requests come.
        arguments: for vLLM's engine, the plugin's settings among them.

    Returns:
        ``first`` and ``between``, seconds for each request; ``alone``, the same two means of a request alone; and
        ``tokens`` by the names of slices, where there are several.
    """
    set_engine_defaults()
    played = asyncio.run(_play(folder, arrivals, **arguments))
    gc.collect()  # vLLM's engine fails, with a message, if it is found while the process ends
    return played


async def _play(folder: Path, arrivals: Sequence[Arrival], **arguments: Any) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_matquant.serve.elastic.follow import make_follower
    from vllm_matquant.serve.elastic.metrics import ElasticMetrics
    from vllm_matquant.serve.elastic.switch import Switcher

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            max_model_len=PROMPT_TOKENS[1] + ANSWER_TOKENS[1],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            **arguments,
        )
    )
    try:
        front = engine.vllm_config.quant_config.front
        switcher = None if front is None else Switcher(engine, front)
        middle = Arrival(0, sum(PROMPT_TOKENS) // 2, sum(ANSWER_TOKENS) // 2)
        await asyncio.gather(*(_ask(engine, middle, f"warm-{index}") for index in range(WARM_UP)))
        alone = [await _ask(engine, middle, f"alone-{index}") for index in range(ALONE)]
        before = await _tokens(switcher)
        following = None
        if switcher is not None:
            offer = front.offer
            follower = make_follower(switcher, offer.policy, ElasticMetrics(offer, front.active))
            following = asyncio.create_task(follower.run())
        begun = time.monotonic()

        async def come(arrival: Arrival, name: str) -> tuple[float, float]:
            await asyncio.sleep(max(0.0, begun + arrival.at - time.monotonic()))
            return await _ask(engine, arrival, name)

        played = await asyncio.gather(*(come(each, f"played-{index}") for index, each in enumerate(arrivals)))
        if following is not None:
            following.cancel()
        after = await _tokens(switcher)
        return {
            "first": [first for first, _ in played],
            "between": [between for _, between in played],
            "alone": [statistics.mean(each) for each in zip(*alone, strict=True)],
            "tokens": {name: count - before[name] for name, count in after.items()},
        }
    finally:
        engine.shutdown()


async def _ask(engine: Any, arrival: Arrival, name: str) -> tuple[float, float]:
    """Seconds to the first token, and the mean between two."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    vocabulary = engine.model_config.get_vocab_size()
    prompt = TokensPrompt(prompt_token_ids=[place % vocabulary for place in range(arrival.prompt)])
    fixed = SamplingParams(
        temperature=0,
        max_tokens=arrival.tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    begun, first, last = time.monotonic(), None, 0.0
    async for output in engine.generate(prompt, fixed, name):
        if output.outputs[0].token_ids:
            last = time.monotonic()
            first = last if first is None else first
    assert first is not None
    return first - begun, (last - first) / max(1, arrival.tokens - 1)


async def _tokens(switcher: Any) -> dict[str, int]:
    """How many tokens were computed with each slice of an elastic engine."""
    return {} if switcher is None else dict((await switcher.state())[0]["tokens"])


def row_of(
    served: str, played: dict[str, Any], bits: dict[str, float], alone: float, multiple: float
) -> dict[str, Any]:
    """What became of the requests.

    Args:
        served: how they were.
        played: what :func:`play` gave.
        bits: average widths by the names of slices.
        alone: seconds between two tokens of a request alone.
        multiple: of ``alone``, past which a request's service is a violation.
    """
    tokens = sum(played["tokens"].values())
    return {
        "served": served,
        "first_p95": statistics.quantiles(played["first"], n=20)[-1],
        "first_mean": statistics.mean(played["first"]),
        "between_p95": statistics.quantiles(played["between"], n=20)[-1],
        "between_mean": statistics.mean(played["between"]),
        "violations": sum(each > multiple * alone for each in played["between"]),
        "requests": len(played["first"]),
        "average_bits": sum(bits[name] * count for name, count in played["tokens"].items()) / tokens
        if tokens
        else None,
        "alone": played["alone"],
        "tokens": played["tokens"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the nested checkpoint")
    parser.add_argument(
        "--bits", type=width_list, default=(8, 3), metavar="LIST", help="single widths to serve at (default: 8,3)"
    )
    parser.add_argument(
        "--elastic",
        default="3..8",
        metavar="LIST",
        help="what follows the load, as of vllm serve (default: %(default)s)",
    )
    parser.add_argument(
        "--elastic-policy", default="load", metavar="POLICY", help="as of vllm serve (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="in which requests come (default: %(default)s)")
    parser.add_argument("--turn", type=float, default=15.0, help="of calm and of burst (default: %(default)s)")
    parser.add_argument("--calm", type=float, default=0.5, help="requests a second (default: %(default)s)")
    parser.add_argument("--burst", type=float, default=2.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--most", type=int, default=32, help="requests in a batch (default: %(default)s)")
    parser.add_argument("--multiple", type=float, default=3.0, help="that is a violation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: %(default)s)")
    parser.add_argument("--enforce-eager", action="store_true", help="as of vllm serve")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write the rows there")
    options = parser.parse_args(arguments)
    try:
        read_policy(options.elastic_policy)
        checkpoint = open_checkpoint(options.folder, check_values=False)
    except ValueError as error:
        parser.error(str(error))
    arrivals = Trace(options.seconds, options.turn, options.calm, options.burst, options.seed).arrivals()
    ways: dict[str, dict[str, Any]] = {f"{bits} bits": {"bits": bits} for bits in sorted(options.bits, reverse=True)}
    ways["load"] = {"elastic": options.elastic, "elastic_policy": options.elastic_policy}
    print(f"{len(arrivals)} requests\n{'':8}{headings(COLUMNS)}", flush=True)
    bits = {f"uniform-{width}": float(width) for width in WIDTHS}
    bits |= {recipe.name: checkpoint.slice(recipe.name).average_bits for recipe in checkpoint.recipes}
    rows: list[dict[str, Any]] = []
    for served, settings in ways.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            arguments_of_engine = {
                "additional_config": {"matquant": settings},
                "max_num_seqs": options.most,
                "enforce_eager": options.enforce_eager,
            }
            played = pool.submit(play, options.folder, arrivals, **arguments_of_engine).result()
        alone = rows[0]["alone"][1] if rows else played["alone"][1]
        row = row_of(served, played, bits, alone, options.multiple)
        row["average_bits"] = row["average_bits"] or settings["bits"]
        rows.append(row)
        print(f"{served:8}{figures(row, COLUMNS)}", flush=True)
    if options.json:
        publish_json(options.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
