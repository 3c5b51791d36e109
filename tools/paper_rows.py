"""The rows of MatQuant's tables (arXiv 2502.06786), each with the commands that make its models.

tools/matquant_figures.py makes and measures them. A row is one parent, whose slices serve every width, or a model for
each width alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vllm_matquant.checkpoint.spec import PARENT_BITS, WIDTHS
from vllm_matquant.quantize.methods import METHODS, settings_of, with_settings
from vllm_matquant.quantize.terms import Term, parse_terms, trained_widths
from vllm_matquant.train.settings import NATIVE, ROUNDED, ROUNDED_EXTRA, TrainingSettings

LOSSES = {"": "8,4,2", "-from-8": "8,4,8->2", "-and-8": "8,4,2,8->2"}
"""MatQuant's losses, by what ends the name of a row: without and with co-distillation (section 3.2)."""
EXTRA = "-extra"
"""What ends the name of a row with extra precision: slices that are rounded and not clamped."""
NARROWEST = WIDTHS[0]
_METHODS = ("omniquant", "matquant-omni", "rtn", "nested", "nested-tuned", "nested-vq")  # whose settings rows can have
_LOSS_SETTINGS = ("terms", "weights")


@dataclass(frozen=True)
class Effort:
    """What the models are made of, and how long.

    Attributes:
        source: folder of the model to quantize.
        group_size: columns that share a scale.
        calibration: a text, see :func:`vllm_matquant.measure.text.read_source`; None for the built-in one.
        samples, sequence_length: calibration windows and the tokens of each.
        settings: NAME=VALUE, given to every method that has a setting of this name.
        texts: what is trained on; none for the calibration's.
        learn_text: train on the text's next tokens, as the paper does, and not on the source's predictions.
        steps, batch, training_length: of a training, the windows of a step and the tokens of each.
        code_rate, decoder_rate: of a training.
        wide_weight: what a term counts whose width is not the narrowest that learns; that counts 1.
        seed: of the windows.
        alone: the widths that have models of their own.
    """

    source: Path
    group_size: int
    calibration: str | None
    samples: int
    sequence_length: int
    settings: Sequence[str]
    texts: Sequence[str]
    learn_text: bool
    steps: int
    batch: int
    training_length: int
    code_rate: float
    decoder_rate: float
    wide_weight: float
    seed: int
    alone: Sequence[int]

    @property
    def training(self) -> TrainingSettings:
        """Of a training, but for its loss.

        Raises:
            ValueError: a rate is out of its range.
        """
        return TrainingSettings(
            (Term(NARROWEST),),
            steps=self.steps,
            batch=self.batch,
            sequence_length=self.training_length,
            code_rate=self.code_rate,
            decoder_rate=self.decoder_rate,
        )


@dataclass(frozen=True)
class Model:
    """A checkpoint that a command of matquant makes.

    Attributes:
        name: of its folder.
        effort: what it is made of.
        options: of the command, but for the models that it reads and the folder that it writes.
        tokens: how many the command learns from.
        parent: what is trained; None for a model that is quantized.
    """

    name: str
    effort: Effort
    options: tuple[str, ...]
    tokens: int
    parent: Model | None = None

    @property
    def lineage(self) -> list[Model]:
        """The models that must be made for it, itself the last."""
        return [*(self.parent.lineage if self.parent else ()), self]

    def command(self, output: Path, folder: Path) -> list[str]:
        """What writes the model.

        Args:
            output: the folder of all models.
            folder: the one to write.
        """
        job, read, *options = self.told
        read = str(output / read) if self.parent else read
        return [sys.executable, "-m", "vllm_matquant", job, read, *options, "--output", str(folder)]

    @property
    def told(self) -> list[str]:
        """The command as far as it decides what is made: without program and output, a parent by its name alone."""
        source = str(self.effort.source)
        job = ["train", self.parent.name, "--source", source] if self.parent else ["quantize", source]
        return [*job, *self.options]


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        name: of the row.
        models: what each width is read from.
        trained: the widths that its loss names; all others are interpolated.
    """

    name: str
    models: Mapping[int, Model]
    trained: tuple[int, ...]

    @property
    def lineages(self) -> list[Model]:
        """The models that must be made for it, in order, each once."""
        return list({each.name: each for model in self.models.values() for each in model.lineage}.values())


def quantized(effort: Effort, name: str, method: str, widths: Sequence[int], *settings: str) -> Model:
    """A model that ``matquant quantize`` makes.

    Args:
        effort: what it is made of.
        name: of its folder.
        method: of the codes.
        widths: that it offers.
        settings: of the row, besides those of the effort.
    """
    own = settings_for(METHODS[method], effort.settings)
    options = [
        "--no-report",
        "--method",
        method,
        "--bits",
        ",".join(map(str, widths)),
        "--group-size",
        str(effort.group_size),
    ]
    options += [part for setting in (*settings, *own) for part in ("--setting", setting)]
    if not METHODS[method].needs_calibration:
        return Model(name, effort, tuple(options), 0)
    options += ["--samples", str(effort.samples), "--sequence-length", str(effort.sequence_length)]
    options += ["--seed", str(effort.seed)]
    if effort.calibration is not None:
        options += ["--calibration", effort.calibration]
    return Model(name, effort, tuple(options), effort.samples * effort.sequence_length)


def trained(effort: Effort, name: str, parent: Model, form: str, loss: str) -> Model:
    """A model that ``matquant train`` makes.

    Args:
        effort: what it is made of.
        name: of its folder.
        parent: what is trained.
        form: of the training.
        loss: terms that learn from the source; they learn the text where the effort says so.
    """
    terms = parse_terms(loss)
    if effort.learn_text:
        terms = tuple(term if term.teacher else Term(term.width, None) for term in terms)
    options = ["--form", form, "--terms", ",".join(map(str, terms)), "--weights", weights_of(terms, effort)]
    options += ["--steps", str(effort.steps), "--batch", str(effort.batch), "--seed", str(effort.seed)]
    options += ["--sequence-length", str(effort.training_length)]
    options += ["--code-rate", str(effort.code_rate), "--decoder-rate", str(effort.decoder_rate)]
    for text in effort.texts or ([] if effort.calibration is None else [effort.calibration]):
        options += ["--text", text]
    return Model(name, effort, tuple(options), effort.steps * effort.batch * effort.training_length, parent)


def weights_of(terms: Sequence[Term], effort: Effort) -> str:
    """The lambda of each term: 1 where the narrowest width learns, less elsewhere, as the paper has for Gemma 2."""
    narrowest = trained_widths(terms)[0]
    return ",".join("1" if term.width == narrowest else str(effort.wide_weight) for term in terms)


def settings_for(method: type, settings: Sequence[str]) -> list[str]:
    """Those of some settings, NAME=VALUE, that a method has."""
    return [setting for setting in settings if setting.partition("=")[0] in setting_names(method)]


def setting_names(method: type) -> list[str]:
    """What a method's settings are called, but for those that are a row's own."""
    return [name for name, _ in settings_of(method((NARROWEST,))) if name not in _LOSS_SETTINGS]


def check_effort(effort: Effort) -> None:
    """Check the settings of methods and the weight of terms.

    Raises:
        ValueError: no row's method has a setting of this name, a value is none for it, or the weight is not positive.
    """
    if not 0 < effort.wide_weight < math.inf:
        raise ValueError(f"--wide-weight: found {effort.wide_weight}, expected a positive number")
    known = list(dict.fromkeys(name for method in _METHODS for name in setting_names(METHODS[method])))
    for setting in effort.settings:
        if setting.partition("=")[0] not in known:
            raise ValueError(f"--setting: found {setting}, expected NAME=VALUE with one of {', '.join(known)}")
    for name in _METHODS:
        with_settings(METHODS[name]((NARROWEST,)), settings_for(METHODS[name], effort.settings))


def _omniquant(effort: Effort) -> Row:
    models = {width: quantized(effort, f"omniquant-{width}", "omniquant", (width,)) for width in effort.alone}
    return Row("omniquant", models, tuple(models))


def _omni(name: str, method: str, loss: str, effort: Effort) -> Row:
    terms = parse_terms(loss)
    settings = [f"terms={loss}", f"weights={weights_of(terms, effort)}"]
    return _parent(quantized(effort, name, method, WIDTHS, *settings), trained_widths(terms))


def _omniquant_sliced(effort: Effort) -> Row:
    model = quantized(effort, "omniquant-sliced", "matquant-omni", WIDTHS, f"terms={PARENT_BITS}", "weights=1")
    return _parent(model, (PARENT_BITS,))


def _qat(effort: Effort) -> Row:
    models = {
        width: trained(effort, f"qat-{width}", quantized(effort, f"rtn-{width}", "rtn", (width,)), ROUNDED, str(width))
        for width in effort.alone
    }
    return Row("qat", models, tuple(models))


def _rounded(name: str, loss: str, effort: Effort, form: str = ROUNDED) -> Row:
    parent = quantized(effort, "rtn", "rtn", WIDTHS)
    return _parent(trained(effort, name, parent, form, loss), trained_widths(parse_terms(loss)))


def _single(effort: Effort) -> Row:
    """The narrowest slice trained alone, which the paper calls single-precision MatQuant."""
    return Row("matquant-qat-single", {NARROWEST: _rounded("matquant-qat-single", "2", effort).models[2]}, (2,))


def _native(ending: str, loss: str, effort: Effort) -> Row:
    model = trained(effort, f"nested-trained{ending}", quantized(effort, "nested", "nested", WIDTHS), NATIVE, loss)
    return _parent(model, trained_widths(parse_terms(loss)))


def _ours(method: str, effort: Effort) -> Row:
    return _parent(quantized(effort, method, method, WIDTHS), WIDTHS)


def _parent(model: Model, learned: tuple[int, ...]) -> Row:
    """The row of one model whose slices serve every width."""
    return Row(model.name, dict.fromkeys(WIDTHS, model), learned)


def _makers() -> Iterator[tuple[str, Callable[[Effort], Row]]]:
    yield "omniquant", _omniquant
    yield "omniquant-sliced", _omniquant_sliced
    for ending, loss in LOSSES.items():
        yield f"matquant-omni{ending}", partial(_omni, f"matquant-omni{ending}", "matquant-omni", loss)
    yield f"matquant-omni{EXTRA}", partial(_omni, f"matquant-omni{EXTRA}", "matquant-omni-extra", LOSSES[""])
    yield "qat", _qat
    yield "qat-sliced", partial(_rounded, "qat-sliced", str(PARENT_BITS))
    yield "matquant-qat-single", _single
    for ending, loss in LOSSES.items():
        yield f"matquant-qat{ending}", partial(_rounded, f"matquant-qat{ending}", loss)
    yield f"matquant-qat{EXTRA}", partial(_rounded, f"matquant-qat{EXTRA}", LOSSES[""], form=ROUNDED_EXTRA)
    for method in ("nested", "nested-tuned", "nested-vq"):
        yield method, partial(_ours, method)
    for ending, loss in LOSSES.items():
        yield f"nested-trained{ending}", partial(_native, ending, loss)


ROWS: dict[str, Callable[[Effort], Row]] = dict(_makers())
"""What makes each row, by its name, in the order of the tables."""
