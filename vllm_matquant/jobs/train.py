"""The job that trains all widths of a nested checkpoint together."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, cast

from vllm_matquant.checkpoint.manifest import command_line
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.jobs.arguments import float_list, positive
from vllm_matquant.jobs.job import PlannedJob, Say, argument, command_of, running, silent
from vllm_matquant.jobs.reference import locate_reference
from vllm_matquant.measure.windows import load_tokenizer, spread_windows
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.device import check_device
from vllm_matquant.quantize.terms import GRAMMAR, Term, parse_terms
from vllm_matquant.train.distributed import backend_of
from vllm_matquant.train.pipeline import Outcome, Work, check_disk, check_parent, check_work, read_texts
from vllm_matquant.train.pipeline import train as train_parent
from vllm_matquant.train.plan import TrainingPlan, make_plan
from vllm_matquant.train.settings import PRECISIONS, SCHEDULES, SLICINGS, STARTS, TrainingSettings
from vllm_matquant.train.state import TrainingFolder

_DEFAULT = TrainingSettings((Term(2),))


def _terms(text: str) -> tuple[Term, ...]:
    try:
        return parse_terms(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0 up")
    return number


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 0 up")
    return int(text)


@dataclass(frozen=True)
class Train(PlannedJob[Outcome]):
    """Train all widths of a nested checkpoint together: codes and decoders follow the gradient of a loss over widths.

    Quantization-aware training as MatQuant (arXiv 2502.06786) does it, with slices that are prefixes of one code at
    every step. Gives steps, the last losses, the share of codes that changed, and what was measured meanwhile.
    """

    epilog = (
        "example: matquant train nested --source SmolLM2-135M-Instruct --output trained --text news.txt "
        "--terms '8,4,2,8->2' --weights 0.1,0.1,1,1\n"
        f"TERMS: {GRAMMAR}\n"
        "on several processes, each of which holds a part: torchrun --nproc-per-node N -m vllm_matquant train ..."
    )

    parent: Path | str = field(
        metadata=argument("folder of the nested checkpoint to train", parse=Path, positional=True, metavar="DIR")
    )
    source: Path | str = field(
        metadata=argument("the model that it was made from: a folder or a name on the hub", metavar="MODEL")
    )
    output: Path | str = field(metadata=argument("folder to write; made if absent", parse=Path, metavar="OUT"))
    _: KW_ONLY
    overwrite: bool = field(
        default=False,
        metadata=argument("replace the matquant checkpoint, or unfinished training, in the output folder"),
    )
    resume: bool = field(
        default=False,
        metadata=argument("go on from the last state that is kept in the output folder, if any", recorded=False),
    )
    text: Sequence[Path | str] = field(
        default=(),
        metadata=argument(
            "text to train on: a text, a list in .json, records in .jsonl, .csv or .parquet (each with a text or a "
            "chat), or a data set; may be given several times; default: a built-in text, for a try",
            repeated=True,
            metavar="hf:NAME|FILE",
            group="text",
        ),
    )
    text_column: str = field(
        default="text",
        metadata=argument(
            "the text's field in a record, of the held-out text too (default: %(default)s)",
            metavar="NAME",
            group="text",
        ),
    )
    sequence_length: int = field(
        default=_DEFAULT.sequence_length,
        metadata=argument("tokens of a window (default: %(default)s)", parse=positive, metavar="N", group="text"),
    )
    seed: int = field(
        default=_DEFAULT.seed,
        metadata=argument(
            "of the windows' order and of random starts (default: %(default)s)", parse=int, metavar="N", group="text"
        ),
    )
    terms: Sequence[Term] | str = field(
        default=parse_terms("2"),
        metadata=argument(
            "of the loss: 4, 4 bits learn from the source's predictions; 4:text, from the text's own next tokens; "
            "8->2, 2 bits learn from the predictions of 8 (default: 2)",
            parse=_terms,
            metavar="TERMS",
            group="loss",
        ),
    )
    weights: Sequence[float] | None = field(
        default=None,
        metadata=argument(
            "what each term counts, such as 0.1,0.1,1,1 (default: 1 each)",
            parse=float_list,
            metavar="LIST",
            group="loss",
        ),
    )
    form: str = field(
        default=_DEFAULT.form,
        metadata=argument(
            "native: slices are prefixes, each width with decoders of its own; rounded: MatQuant's own latent weights "
            "and rounded slices, there only to compare with the paper: such a slice reads one bit more; rounded-extra: "
            "with its extra precision, which no server has (default: %(default)s)",
            choices=tuple(SLICINGS),
            group="loss",
        ),
    )
    start: str = field(
        default=_DEFAULT.start,
        metadata=argument(
            "where in its code's cell each position starts: anywhere, by the seed; where the source's weight lies; all "
            "in the middle, from where they leave it together (default: %(default)s)",
            choices=STARTS,
            group="loss",
        ),
    )
    steps: int = field(
        default=_DEFAULT.steps,
        metadata=argument("of the optimizer (default: %(default)s)", parse=positive, metavar="N", group="steps"),
    )
    batch: int = field(
        default=_DEFAULT.batch,
        metadata=argument(
            "windows that go through the model at once, on all processes together (default: %(default)s)",
            parse=positive,
            metavar="N",
            group="steps",
        ),
    )
    accumulate: int = field(
        default=_DEFAULT.accumulate,
        metadata=argument("such batches in a step (default: %(default)s)", parse=positive, metavar="N", group="steps"),
    )
    code_rate: float = field(
        default=_DEFAULT.code_rate,
        metadata=argument(
            "how far a step of AdamW moves a position, in units of the parent's code (default: %(default)s)",
            parse=_number,
            metavar="RATE",
            group="steps",
        ),
    )
    decoder_rate: float = field(
        default=_DEFAULT.decoder_rate,
        metadata=argument(
            "how far it moves scales and centres of 2 bits, relative to each scale; smaller by the square root of 2 "
            "with every bit more (default: %(default)s)",
            parse=_number,
            metavar="RATE",
            group="steps",
        ),
    )
    schedule: str = field(
        default=_DEFAULT.schedule,
        metadata=argument(
            "of both rates after the warm-up, towards 0 but for constant (default: %(default)s)",
            choices=tuple(SCHEDULES),
            group="steps",
        ),
    )
    warmup: int | None = field(
        default=None,
        metadata=argument(
            "steps in which the rates rise (default: 20, or a fifth of fewer than 100 steps)",
            parse=_count,
            metavar="N",
            group="steps",
        ),
    )
    weight_decay: float = field(
        default=_DEFAULT.weight_decay,
        metadata=argument(
            "of AdamW: decays the distance to the parent, of positions and decoders (default: %(default)s)",
            parse=_number,
            metavar="DECAY",
            group="steps",
        ),
    )
    clip_norm: float = field(
        default=_DEFAULT.clip_norm,
        metadata=argument(
            "largest norm of all derivatives of a step (default: %(default)s)",
            parse=_number,
            metavar="NORM",
            group="steps",
        ),
    )
    precision: str | None = field(
        default=None,
        metadata=argument(
            "of weights and activations in products; what is trained is float32 in any case (default: bf16 on a GPU, "
            "and on a CPU where it is faster)",
            choices=tuple(PRECISIONS),
            group="machine",
        ),
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata=argument(
            "keep of each block its inputs alone and run it once more for its derivatives: less memory, a third more "
            "time",
            group="machine",
        ),
    )
    device: str = field(
        default=_DEFAULT.device,
        metadata=argument("where to train: cpu or cuda (default: %(default)s)", metavar="NAME", group="machine"),
    )
    checkpoint_every: int = field(
        default=100,
        metadata=argument(
            "steps from one kept state to the next, for --resume (default: %(default)s)",
            parse=positive,
            metavar="N",
            group="progress",
        ),
    )
    held_out: Path | str | None = field(
        default=None,
        metadata=argument(
            "text that is not trained on, to measure the KL divergence of every width on meanwhile",
            parse=Path,
            metavar="FILE",
            group="progress",
        ),
    )
    held_out_samples: int = field(
        default=8,
        metadata=argument(
            "windows to take from it (default: %(default)s)", parse=positive, metavar="N", group="progress"
        ),
    )
    evaluate_every: int = field(
        default=100,
        metadata=argument(
            "steps from one measurement to the next (default: %(default)s)",
            parse=positive,
            metavar="N",
            group="progress",
        ),
    )
    log_folder: Path | str | None = field(
        default=None,
        metadata=argument(
            "write logs for TensorBoard there: loss of each term, rates, changed codes, held-out KL",
            parse=Path,
            metavar="DIR",
            group="progress",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settings()  # refuses numbers that do not fit together

    def plan(self) -> TrainingPlan:
        work = self._work()
        check_work(work, overwrite=self.overwrite, resume=self.resume)
        return make_plan(work)

    def check_plan(self, plan: TrainingPlan) -> None:
        check_disk(Path(self.output), plan.disk)

    def run(self, say: Say = silent) -> Outcome:
        check_device("device", self.device)
        command = command_line(command_of("train", self))
        try:
            with ranks.started(backend_of(self.device)):
                outcome = train_parent(self._work(), command=command, overwrite=self.overwrite, resume=self.resume)
        except KeyboardInterrupt as stop:
            folder = TrainingFolder(Path(self.output))
            kept = (
                f"step {folder.steps} of {self.steps} is kept in {folder.path}: the same command with --resume goes on"
                if folder.steps
                else f"no step was kept, and no checkpoint was written to {self.output}"
            )
            raise KeyboardInterrupt(kept) from stop
        for steps, found in outcome.held_out:
            say(f"step {steps}: " + ", ".join(f"{width} bits KL {value:.4f}" for width, value in found.items()))
        say("changed codes: " + ", ".join(f"{width} bits {share:.2%}" for width, share in outcome.changed.items()))
        if outcome.left_behind:
            names = ", ".join(outcome.left_behind)
            say(f"not carried over from {self.parent}, as it is true of that one alone: {names}")
        say(f"{self.output}: to measure it: {self._how_to_measure()}")
        return outcome

    def _settings(self) -> TrainingSettings:
        """How to train."""
        return TrainingSettings(
            terms=cast(tuple[Term, ...], self.terms),
            weights=None if self.weights is None else tuple(self.weights),
            steps=self.steps,
            batch=self.batch,
            accumulate=self.accumulate,
            sequence_length=self.sequence_length,
            code_rate=self.code_rate,
            decoder_rate=self.decoder_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            seed=self.seed,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            device=self.device,
            form=self.form,
            start=self.start,
        )

    def _work(self) -> Work:
        """What to train, and on what."""
        settings, parent = self._settings(), open_checkpoint(self.parent)
        check_parent(parent, settings)
        source = locate_reference(str(self.source), parent)
        tokenizer = load_tokenizer(source)
        tokens, texts = read_texts(
            [str(each) for each in self.text or ()] or [None], tokenizer, settings, self.text_column
        )
        held_out = None
        if self.held_out is not None:
            held_out = spread_windows(
                Path(self.held_out),
                tokenizer,
                samples=self.held_out_samples,
                sequence_length=self.sequence_length,
                text_column=self.text_column,
            )
        folder = None if self.log_folder is None else Path(self.log_folder)
        every: dict[str, Any] = {"evaluate_every": self.evaluate_every, "checkpoint_every": self.checkpoint_every}
        return Work(
            parent, source, Path(self.output), tokens, texts, settings, held_out=held_out, log_folder=folder, **every
        )

    def _how_to_measure(self) -> str:
        source = shlex.quote(str(self.source))
        return f"matquant evaluate {shlex.quote(str(self.output))} --reference {source} --text FILE"


train = running(Train)
