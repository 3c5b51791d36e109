"""Speed and memory of a checkpoint that vLLM serves, at each width, each in a process of its own."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.memory import WeightMemory
from vllm_matquant.serve.elastic.offer import choice_of
from vllm_matquant.serve.elastic.policy import Choice
from vllm_matquant.serve.version import EXPECTED

if TYPE_CHECKING:
    from vllm_matquant.bench.llama_cpp import LlamaCpp

PROMPT = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 48
PROMPT_TOKENS = 16  # where there is no tokenizer
MODEL_LENGTH = 1024  # at most
UNQUANTIZED_BITS = 16
DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
READ_BYTES = 2**28  # more than caches hold
COLUMNS = (
    "bits",
    "output_tokens_per_s",
    "decode_tokens_per_s",
    "prompt_tokens_per_s",
    "roofline",
    "resident_bytes",
    "load_seconds",
    "batch",
)


@dataclass(frozen=True)
class Load:
    """What is asked of a served model.

    Attributes:
        batch: requests at a time.
        output_tokens: tokens to generate for each.
        prompt: what to ask; models without a tokenizer get PROMPT_TOKENS numbers.
        activation_bits: see ``--activation-bits`` of ``vllm serve``.
        prompt_tokens: so many numbers in place of the prompt, None for the prompt.
        rounds: how often to measure; rows have the medians.
        speculate_bits, speculate_tokens: see ``--speculate-bits`` of ``vllm serve``; None for no drafts.
    """

    batch: int = 1
    output_tokens: int = 64
    prompt: str = PROMPT
    activation_bits: int | None = None
    prompt_tokens: int | None = None
    rounds: int = 1
    speculate_bits: Choice | float | None = None
    speculate_tokens: int | None = None


def set_engine_defaults() -> None:
    """Have vLLM's engines that start in this process, or below it, be small and quiet, unless the environment says."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class Served:
    """A model that vLLM serves in this process.

    Args:
        folder: of the model.
        parts: the slices of a nested checkpoint that it serves: one, or several of an elastic server; none
            of a model that is not quantized.
        load: what will be asked of it.
    """

    def __init__(self, folder: Path, parts: Sequence[Slice], load: Load) -> None:
        # The engine in this process: its model can be asked for its size, and nothing outlives the process.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        set_engine_defaults()
        from vllm import LLM, TokensPrompt
        from vllm.platforms import current_platform

        start = time.perf_counter()
        self.load, self.name = load, folder.resolve().name
        self.has_tokenizer = (folder / "tokenizer_config.json").exists()
        self.llm = LLM(
            str(folder),
            additional_config=_settings(parts, load),
            max_model_len=min(
                MODEL_LENGTH, read_json(folder / CONFIG_FILE).get("max_position_embeddings", MODEL_LENGTH)
            ),
            max_num_seqs=max(load.batch, len(parts)),
            skip_tokenizer_init=not self.has_tokenizer,
            enable_prefix_caching=False,  # a prompt that is asked again is computed again
            disable_log_stats=load.speculate_bits is None,  # they count drafts
        )
        self.load_seconds = time.perf_counter() - start
        numbers = TokensPrompt(prompt_token_ids=list(range(100, 100 + (load.prompt_tokens or PROMPT_TOKENS))))
        self.prompt = load.prompt if self.has_tokenizer and load.prompt_tokens is None else numbers
        self.prompt_tokens = self._generate(load.output_tokens)[1]  # warms up
        self.memory = WeightMemory().take((READ_BYTES,), torch.uint8).fill_(1) if current_platform.is_cpu() else None

    def measure(self) -> dict[str, float]:
        """Generate once: {"output_tokens_per_s", "decode_tokens_per_s", "prompt_tokens_per_s"}, of all requests
        together, on a CPU {"read_gb_per_s"}, the speed of a plain read of memory, and with drafts {"acceptance"}, the
        share of them that was accepted.

        The second is the speed of all tokens but the first, so that the prompt does not count; nan where these took no
        time that could be told from the prompt's. The third counts the tokens of the prompts against the time to the
        first of the answers.
        """
        first = self._generate(1)[0]
        before = self._drafts()
        whole = self._generate(self.load.output_tokens)[0]
        drafted, accepted = (after - earlier for after, earlier in zip(self._drafts(), before, strict=True))
        tokens = self.load.batch * self.load.output_tokens
        decoded = tokens - self.load.batch
        measured = {
            "output_tokens_per_s": tokens / whole,
            "decode_tokens_per_s": decoded / (whole - first) if decoded and whole > first else math.nan,
            "prompt_tokens_per_s": self.prompt_tokens / first,
        }
        if self.load.speculate_bits is not None:
            measured["acceptance"] = accepted / drafted if drafted else math.nan
        if self.memory is not None:
            start = time.perf_counter()
            ops.read_memory(self.memory)
            measured["read_gb_per_s"] = READ_BYTES / (time.perf_counter() - start) / 1e9
        return measured

    def answers(self, choices: Sequence[Choice | None]) -> list[str]:
        """The greedy answers to the prompt, in one batch: each at a slice that an elastic server offers, or (None) at
        the active one. Empty ones of a model without a tokenizer."""
        from vllm import SamplingParams

        if not self.has_tokenizer:
            return [""] * len(choices)
        asked = [
            SamplingParams(
                temperature=0,
                max_tokens=ANSWER_TOKENS,
                extra_args=None if choice is None else {"matquant_bits": choice},
            )
            for choice in choices
        ]
        if self.llm.get_tokenizer().chat_template:
            chat = [{"role": "user", "content": self.load.prompt}]
            outputs = self.llm.chat([chat] * len(asked), asked, use_tqdm=False)
        else:
            outputs = self.llm.generate([self.load.prompt] * len(asked), asked, use_tqdm=False)
        return [output.outputs[0].text.strip() for output in outputs]

    def describe(self) -> dict[str, Any]:
        """What a row of ``matquant bench serve`` says of the server."""
        from vllm_matquant.serve.linear import resident_bytes
        from vllm_matquant.serve.step_bytes import step_bytes

        return {
            "resident_bytes": sum(self.llm.apply_model(resident_bytes)),
            "step_bytes": sum(self.llm.apply_model(step_bytes)),
            "load_seconds": self.load_seconds,
            "batch": self.load.batch,
            "model": self.name,
        }

    def _drafts(self) -> tuple[int, int]:
        """Draft tokens, and those of them that were accepted, since the server began."""
        if self.load.speculate_bits is None:
            return 0, 0
        counts = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        return counts[DRAFTED], counts[ACCEPTED]

    def _generate(self, tokens: int) -> tuple[float, int]:
        """Seconds that all requests take together, and the tokens of their prompts."""
        from vllm import SamplingParams

        fixed_length = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=self.has_tokenizer)
        start = time.perf_counter()
        outputs = self.llm.generate([self.prompt] * self.load.batch, fixed_length, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, sum(len(output.prompt_token_ids or ()) for output in outputs)


def _settings(parts: Sequence[Slice], load: Load) -> dict[str, Any]:
    if not parts:
        return {}
    if len(parts) > 1:
        offered = [choice_of(each) for each in parts]
        return {"matquant": {"elastic": offered, "activation_bits": load.activation_bits}}
    [part] = parts
    widths = {"recipe": dict(part.widths)} if part.width is None else {"bits": part.width}
    drafts = {"speculate_bits": load.speculate_bits, "speculate_tokens": load.speculate_tokens}
    given = {name: value for name, value in drafts.items() if value is not None}
    return {"matquant": widths | {"activation_bits": load.activation_bits} | given}


_served: Served  # of a process that serves one


def _serve(folder: Path, parts: Sequence[Slice], load: Load) -> tuple[dict[str, Any], list[str]]:
    """Serve a model in this process: what it is, and its answers at each slice.

    Errors become such as another process can be told of: not all of vLLM's can.
    """
    global _served
    try:
        _served = Served(folder, parts, load)
        return _served.describe(), _answers(parts)
    except ValueError as error:
        raise ValueError(f"{folder}: vLLM refuses to serve it: {error}") from None


def _answers(parts: Sequence[Slice]) -> list[str]:
    """The answers of the server of this process at each of its slices: in one batch, where requests have their own."""
    choices = [choice_of(each) for each in parts]
    if len(choices) < 2:
        return _served.answers([None])
    if _served.llm.llm_engine.vllm_config.quant_config.front.offer.refusal is None:
        return _served.answers(choices)
    return [_served.answers([None])[0] for choice in choices if _switch(choice)]


def _switch(choice: Choice) -> Slice:
    from vllm_matquant.serve.elastic.switch import switch

    if isinstance(choice, str):
        return switch(_served.llm, recipe=choice)
    return switch(_served.llm, bits=choice)


def _measure(choice: Choice | None) -> dict[str, float]:
    """Measure the server of this process, an elastic one at the slice that it is told."""
    if choice is not None:
        _switch(choice)
    return _served.measure()


def check_vllm() -> None:
    """Refuse to begin where there is no engine.

    Raises:
        ValueError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ValueError(f"vllm: found no such package, expected {EXPECTED}")


def bench_serve(
    folder: Path,
    slices: Sequence[Slice],
    load: Load,
    reference: Path | None = None,
    llama_cpp: Path | None = None,
    elastic: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows of ``matquant bench serve``, each from an engine in a process of its own.

    Args:
        folder: of the nested checkpoint.
        slices: of it, to be served.
        load: what is asked of them.
        reference: folder of a model that is not quantized; its row comes first.
        llama_cpp: a program llama-batched-bench, which decodes with random weights of the same shape in turn with the
            widths for which it has types; their rows follow.
        elastic: whether one engine serves all slices, switched from each to the next.

    Raises:
        ValueError: vLLM refuses a model, or the program fails.
    """
    if reference:
        yield from _rows_of_engine(reference, [], load, None)
    for together in [slices] if elastic else [[each] for each in slices]:
        yield from _rows_of_engine(folder, together, load, llama_cpp)


def _rows_of_engine(
    folder: Path, parts: Sequence[Slice], load: Load, llama_cpp: Path | None
) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        described, answers = pool.submit(_serve, folder, parts, load).result()
        served: list[Slice | None] = [*parts] or [None]
        for part, answer in zip(served, answers, strict=True):
            choice = choice_of(part) if part and len(parts) > 1 else None
            with TemporaryDirectory(prefix="matquant-") as temporary:
                peers = _peers_of(part, folder, llama_cpp, Path(temporary))
                ours: list[dict[str, float]] = []
                theirs: list[list[dict[str, float]]] = [[] for _ in peers]
                for _ in range(load.rounds):
                    ours.append(pool.submit(_measure, choice).result())
                    for peer, figures in zip(peers, theirs, strict=True):
                        prompt_tokens = load.prompt_tokens or PROMPT_TOKENS
                        figures.append(peer.measure(load.batch, prompt_tokens, load.output_tokens))
            named = part.label if part else {"bits": UNQUANTIZED_BITS}
            row = named | _summary(ours) | described | {"answer": answer}
            # An elastic server, or one with drafts, reads other bytes for a token.
            yield row if choice or load.speculate_bits is not None else row | _roofline(row)
            for peer, figures in zip(peers, theirs, strict=True):
                model = f"llama.cpp {peer.type}, head {peer.head_type}"
                named = {"model": model, "bits_per_weight": peer.bits_per_weight}
                yield named | _summary(figures) | {"batch": load.batch}


def _peers_of(part: Slice | None, folder: Path, program: Path | None, temporary: Path) -> list[LlamaCpp]:
    if program is None or part is None:
        return []
    from vllm_matquant.bench.llama_cpp import TYPES_OF_WIDTH, LlamaCpp, head_width, misfit

    config = read_json(folder / CONFIG_FILE)
    head = head_width(config, part.widths)
    if part.width is None or misfit(config, part.width, head):
        return []
    threads = torch.get_num_threads()
    return [LlamaCpp(program, temporary, config, each, threads, head) for each in TYPES_OF_WIDTH[part.width]]


def _roofline(row: dict[str, Any]) -> dict[str, float]:
    """The bytes that decoding read in a second, as a share of what a plain read did; nothing where it is not known."""
    decoded, read = row.get("decode_tokens_per_s"), row.get("read_gb_per_s")
    return {"roofline": decoded / row["batch"] * row["step_bytes"] / 1e9 / read} if decoded and read else {}


def _summary(measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The median of each figure, None if it is not known, and the least and the greatest of several."""
    summary: dict[str, Any] = {}
    for name in measured[0]:
        values = [each[name] for each in measured if not math.isnan(each[name])]
        summary[name] = statistics.median(values) if values else None
        if len(values) > 1:
            summary[f"{name}_range"] = [min(values), max(values)]
    return summary


def plot_serving(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Tokens per second and resident megabytes against the width."""
    rows = [row for row in rows if row.get("bits") in WIDTHS and "recipe" not in row]  # neither reference nor peers
    figure = Figure(figsize=(6, 4), layout="constrained")
    speed = figure.subplots()
    bits = [row["bits"] for row in rows]
    speed.plot(bits, [row["output_tokens_per_s"] for row in rows], "o-", color="tab:blue")
    speed.set(xlabel="bits", ylabel="output tokens per second", title=f"{rows[0]['model']}, batch {rows[0]['batch']}")
    speed.set_ylim(bottom=0)
    memory = speed.twinx()
    memory.plot(bits, [row["resident_bytes"] / 1e6 for row in rows], "s--", color="tab:gray")
    memory.set_ylabel("resident MB of quantized layers (dashed)")
    memory.set_ylim(bottom=0)
    figure.savefig(file, dpi=150, format=file.suffix.removeprefix(".") or "png")
