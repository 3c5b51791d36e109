"""Switch an elastic server thousands of times while clients ask it, and check every answer.

Each answer must be, token by token, the one that the slice gives with which the request was begun, asked alone before
the first switch. Memory of the engine's processes is taken when a tenth of the switches are made, and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
import psutil

from vllm_matquant.bench.serve import set_engine_defaults
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.jobs.arguments import output_file, positive
from vllm_matquant.serve.elastic.offer import parse_choices

PROMPTS, PROMPT_TOKENS = 8, (8, 48)
NAME = "name"  # of a request, among its extra arguments


@dataclass(frozen=True)
class Plan:
    """What is asked of the server.

    Attributes:
        switches: how many to make, one after the other, each to a slice that is drawn.
        clients: that each ask one request after the other.
        tokens: of an answer.
        seed: of all that is drawn.
    """

    switches: int
    clients: int
    tokens: int
    seed: int


@dataclass
class Tally:
    """What became of it.

    Attributes:
        answers: by the name of the slice that each was begun with.
        wrong, failed: requests with another answer, and with none: what they were.
        seconds: that each switch took.
    """

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def count(
        self, name: str, part: str, prompt: int, answer: list[int], expected: dict[tuple[str, int], list[int]]
    ) -> None:
        """Count an answer.

        Args:
            name: of the request.
            part: the name of the slice that it was begun with.
            prompt: its number.
            answer: its tokens.
            expected: the right ones, by slice and prompt.
        """
        self.answers[part] += 1
        if answer != expected[part, prompt]:
            self.wrong.append(f"{name}: prompt {prompt}, {part}: {answer} for {expected[part, prompt]}")


def check_switches(folder: Path, plan: Plan, **arguments: Any) -> dict[str, Any]:
    """Serve in this process, switch and ask.

    Args:
        folder: of the nested checkpoint.
        plan: what to ask.
        arguments: for vLLM's engine, the plugin's settings among them.

    Returns:
        A row: counts of answers, of wrong and of failed ones, the switches' seconds, and the memory of all processes in
        bytes.
    """
    set_engine_defaults()
    return asyncio.run(_check(folder, plan, **arguments))


async def _check(folder: Path, plan: Plan, **arguments: Any) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_matquant.serve.elastic.switch import Switcher

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            max_model_len=PROMPT_TOKENS[1] + plan.tokens,
            max_num_seqs=plan.clients,
            skip_tokenizer_init=True,
            **arguments,
        )
    )
    random, tally = Random(plan.seed), Tally()
    vocabulary = engine.model_config.get_vocab_size()
    prompts = [[random.randrange(vocabulary) for _ in range(random.randint(*PROMPT_TOKENS))] for _ in range(PROMPTS)]
    try:
        front = engine.vllm_config.quant_config.front
        if front.offer.refusal is not None:
            raise ValueError(f"requests cannot have slices of their own here: {front.offer.refusal}")
        switcher, given = Switcher(engine, front), _note_slices(front)
        expected: dict[tuple[str, int], list[int]] = {}
        for part in front.offer.slices:
            await switcher.switch(part)
            for index, prompt in enumerate(prompts):
                answer = await _ask(engine, prompt, plan.tokens, f"alone-{part.name}-{index}")
                expected[part.name, index] = answer
        done = asyncio.Event()

        async def client(number: int) -> None:
            own, asked = Random(f"{plan.seed}-{number}"), 0
            while not done.is_set():
                index, name = own.randrange(PROMPTS), f"client-{number}-{asked}"
                asked += 1
                try:
                    answer = await _ask(engine, prompts[index], plan.tokens, name)
                except Exception as error:  # whatever it is, it is counted and said
                    tally.failed.append(f"{name}: {error}")
                    continue
                finally:
                    part = given.pop(name, "")
                tally.count(name, part, index, answer, expected)

        clients = [asyncio.create_task(client(number)) for number in range(plan.clients)]
        early, begun = 0, time.monotonic()
        for count in range(1, plan.switches + 1):
            others = [part for part in front.offer.slices if part != front.active]
            tally.seconds.append((await switcher.switch(random.choice(others))).seconds)
            if count == max(1, plan.switches // 10):
                early = _memory()
            if count % 500 == 0:
                print(f"{count} switches, {tally.answers.total()} answers", flush=True)
        late = _memory()
        done.set()
        await asyncio.gather(*clients)
        return {
            "switches": plan.switches,
            "seconds": time.monotonic() - begun,
            "median_switch_seconds": statistics.median(tally.seconds),
            "slowest_switch_seconds": max(tally.seconds),
            "answers": dict(sorted(tally.answers.items())),
            "wrong": tally.wrong,
            "failed": tally.failed,
            "distinct_answers": len({tuple(answer) for answer in expected.values()}),
            "early_bytes": early,
            "late_bytes": late,
        }
    finally:
        engine.shutdown()


def _note_slices(front: Any) -> dict[str, str]:
    """The name of the slice that each request is given from now on, by the request's name."""
    given: dict[str, str] = {}
    slice_for = front.slice_for

    def noting(params: Any) -> Any:
        part = slice_for(params)
        given[params.extra_args[NAME]] = part.name
        return part

    front.slice_for = noting
    return given


async def _ask(engine: Any, prompt: Sequence[int], tokens: int, name: str) -> list[int]:
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    fixed = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={NAME: name},
    )
    async for output in engine.generate(TokensPrompt(prompt_token_ids=list(prompt)), fixed, name):
        answer = output
    return list(answer.outputs[0].token_ids)


def _memory() -> int:
    """Bytes that this process and those of the engine have in memory."""
    gc.collect()
    this = psutil.Process()
    return sum(each.memory_info().rss for each in (this, *this.children(recursive=True)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the nested checkpoint")
    parser.add_argument(
        "--elastic", default="2..8", metavar="LIST", help="what is offered, as of vllm serve (default: %(default)s)"
    )
    parser.add_argument("--switches", type=positive, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--clients", type=positive, default=8, help="that ask (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, default=16, help="of an answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--enforce-eager", action="store_true", help="as of vllm serve")
    for parallel in ("tensor", "pipeline"):
        parser.add_argument(
            f"--{parallel}-parallel-size", type=positive, default=1, help="as of vllm serve (default: %(default)s)"
        )
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write the row there")
    options = parser.parse_args(arguments)
    try:
        checkpoint = open_checkpoint(options.folder, check_values=False)
        for choice in parse_choices(options.elastic):
            checkpoint.slice(choice)
    except ValueError as error:
        parser.error(str(error))
    plan = Plan(options.switches, options.clients, options.tokens, options.seed)
    settings = {
        "additional_config": {"matquant": {"elastic": options.elastic}},
        "enforce_eager": options.enforce_eager,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
    }
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # nothing outlives the engine's process
        row = pool.submit(check_switches, options.folder, plan, **settings).result()
    if options.json:
        publish_json(options.json, row)
    for said in (*row["wrong"][:5], *row["failed"][:5]):
        print(said)
    grown = row["late_bytes"] / row["early_bytes"] - 1
    print(
        f"{row['switches']} switches in {row['seconds']:.0f} s ({row['median_switch_seconds'] * 1e3:.0f} ms in the "
        f"median, {row['slowest_switch_seconds'] * 1e3:.0f} at most): {sum(row['answers'].values())} answers, "
        f"{len(row['wrong'])} wrong, {len(row['failed'])} failed; memory {grown:+.2%} since a tenth of them"
    )
    return 1 if row["wrong"] or row["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
