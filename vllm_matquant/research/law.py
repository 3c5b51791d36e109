"""Scaling laws for mixed quantization (arXiv 2410.06722): what a share of weights in low precision costs a model.

The loss degeneration, delta = (perplexity of the mix - perplexity) / perplexity, follows

    delta = C * exp(A * Q_r) * N^(-gamma_N) * (Q_b + d)^gamma_c

with Q_r the share of weights in low precision, Q_b the weights that share a scale and N the model's weights. Which
layers are in low precision matters too; the law is of the mean over random choices of them. It is fitted here to the
logarithm of that mean, by least squares that a few outliers do not pull far (soft L1), with intervals from a bootstrap.
What the observations do not vary is not fitted: with one model gamma_N is 0 and C holds its size; with one block size
gamma_c is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from vllm_matquant.checkpoint.files import read_json

LAW_VERSION = 1
UNQUANTIZED_BITS = 16.0
_OUTLIER = 0.3  # of log delta: residuals past it count less than their square
_FOLDS = 5
_RESAMPLES = 200
_INTERVAL = 95.0  # percent
_NAMES = ("log_c", "a", "gamma_n", "gamma_c", "log_d")
_BOUNDS = ((-100.0, -100.0, -3.0, 0.0, math.log(0.1)), (100.0, 100.0, 3.0, 1.0, math.log(1024.0)))


class LawError(ValueError):
    """Observations that no law can be fitted to, or a file that holds none."""


@dataclass(frozen=True)
class Observation:
    """Random mixes with the same share of weights in low precision, measured.

    Attributes:
        model: whose.
        weights: N, how many weights are quantized or could be.
        ratio: Q_r, the share of them in low precision, the mean over the mixes.
        block: Q_b, weights that share a scale.
        mixes: delta of each mix.
    """

    model: str
    weights: int
    ratio: float
    block: int
    mixes: tuple[float, ...]

    @property
    def degeneration(self) -> float:
        """delta, the mean over the mixes."""
        return math.fsum(self.mixes) / len(self.mixes)


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        log_c, a, gamma_n, gamma_c, log_d: its constants, C and d as logarithms.
        low_bits: bits of a weight in low precision.
        high_bits: of all others; 16 where they are not quantized.
        r2: share of the variance of log delta that the law explains.
        held_out_r2: share of the variance of log delta that the law explains of observations that it was not fitted to
            (5 folds).
        held_out_error: median of |predicted / measured - 1| of these.
        mix_error: median of |predicted / measured - 1| of single mixes instead of their mean.
        intervals: the 95 % interval of each constant.
        observations: how many it was fitted to.
        left_out: how many more had no positive mean delta, whose logarithm does not exist.
        models: sizes N by the models' names.
        blocks: the block sizes that were observed.
    """

    log_c: float
    a: float
    gamma_n: float
    gamma_c: float
    log_d: float
    low_bits: float
    high_bits: float
    r2: float
    held_out_r2: float
    held_out_error: float
    mix_error: float
    intervals: dict[str, tuple[float, float]]
    observations: int
    left_out: int
    models: dict[str, int]
    blocks: list[int]

    def predict(self, ratio: float, weights: float, block: float) -> float:
        """delta for a share Q_r of N weights in low precision, with blocks of Q_b."""
        theta = np.array([self.log_c, self.a, self.gamma_n, self.gamma_c, self.log_d])
        return float(np.exp(_log_delta(theta, np.array([[ratio, weights, block]]))[0]))

    def ratio_for_budget(self, bits: float) -> float:
        """The share Q_r in low precision with which weights have ``bits`` on average.

        Raises:
            LawError: not between the law's two precisions.
        """
        if not self.low_bits <= bits <= self.high_bits:
            raise LawError(f"budget: found {bits:g} bits, expected {self.low_bits:g} to {self.high_bits:g} by the law")
        return (self.high_bits - bits) / (self.high_bits - self.low_bits)

    def predict_for_budget(self, bits: float, weights: float, block: float) -> float:
        """What random mixes of ``bits`` on average cost in the mean, in nats per token: log(1 + delta)."""
        return math.log1p(self.predict(self.ratio_for_budget(bits), weights, block))

    def to_dict(self) -> dict[str, Any]:
        return {"law_version": LAW_VERSION} | asdict(self)


def read_law(path: Path) -> Law:
    """The law that a file holds under the key ``law``, as :meth:`Law.to_dict` gives it.

    Raises:
        MissingFileError: there is no such file.
        LawError: it holds no law.
    """
    content = read_json(path).get("law")
    names = {field.name for field in fields(Law)}
    if not isinstance(content, dict) or content.pop("law_version", None) != LAW_VERSION or set(content) != names:
        raise LawError(f"{path}: found no scaling law of version {LAW_VERSION}, expected a fitted one (JSON)")
    return Law(**content)


def fit_law(observations: Sequence[Observation], low_bits: float, high_bits: float, seed: int = 0) -> Law:
    """Fit the law.

    Args:
        observations: of one model or several.
        low_bits: see :class:`Law`.
        high_bits: bits of all other weights; 16 where they are not quantized.
        seed: of folds and bootstrap.

    Raises:
        LawError: fewer than two observations for each constant that is fitted.
    """
    kept = [item for item in observations if item.degeneration > 0]
    terms = np.array([[item.ratio, item.weights, item.block] for item in kept], dtype=float).reshape(-1, 3)
    target = np.log([item.degeneration for item in kept])
    free = _free(terms)
    if len(kept) < 2 * len(free):
        raise LawError(
            f"observations: found {len(kept)} with a positive loss degeneration, expected at least {2 * len(free)}"
        )
    theta = _solve(terms, target, free)
    random = np.random.default_rng(seed)
    folds = random.permutation(len(kept)) % _FOLDS
    held_out = np.empty(len(kept))
    for fold in range(_FOLDS):
        apart = folds == fold
        held_out[apart] = _log_delta(_solve(terms[~apart], target[~apart], free), terms[apart])
    mix_errors = [
        np.abs(math.exp(found) / np.array([mix for mix in item.mixes if mix > 0]) - 1)
        for found, item in zip(held_out, kept, strict=True)
    ]
    drawn = [random.integers(len(kept), size=len(kept)) for _ in range(_RESAMPLES)]
    resampled = np.array([_solve(terms[rows], target[rows], free, theta) for rows in drawn])
    low, high = np.percentile(resampled, [(100 - _INTERVAL) / 2, (100 + _INTERVAL) / 2], axis=0)
    return Law(
        **dict(zip(_NAMES, theta.tolist(), strict=True)),
        low_bits=low_bits,
        high_bits=high_bits,
        r2=_r2(target, _log_delta(theta, terms)),
        held_out_r2=_r2(target, held_out),
        held_out_error=float(np.median(np.abs(np.expm1(held_out - target)))),
        mix_error=float(np.median(np.concatenate(mix_errors))),
        intervals={name: (float(low[i]), float(high[i])) for i, name in enumerate(_NAMES)},
        observations=len(kept),
        left_out=len(observations) - len(kept),
        models={item.model: item.weights for item in observations},
        blocks=sorted({item.block for item in observations}),
    )


def _log_delta(theta: np.ndarray, terms: np.ndarray) -> np.ndarray:
    log_c, a, gamma_n, gamma_c, log_d = theta
    ratio, weights, block = terms.T
    result: np.ndarray = log_c + a * ratio - gamma_n * np.log(weights) + gamma_c * np.log(block + np.exp(log_d))
    return result


def _free(terms: np.ndarray) -> list[int]:
    """The constants that the observations determine."""
    free = [0, 1]
    if len(set(terms[:, 1])) > 1:
        free.append(2)
    if len(set(terms[:, 2])) > 1:
        free += [3, 4]
    return free


def _solve(terms: np.ndarray, target: np.ndarray, free: list[int], start: np.ndarray | None = None) -> np.ndarray:
    """The constants of least robust error; those that are not free are 0."""
    lower, upper = (np.array(bound)[free] for bound in _BOUNDS)
    starts: Iterable[np.ndarray] = [start] if start is not None else _starts(target)
    best, least = np.zeros(len(_NAMES)), math.inf
    for theta in starts:

        def residuals(values: np.ndarray) -> np.ndarray:
            full = np.zeros(len(_NAMES))
            full[free] = values
            return _log_delta(full, terms) - target

        first = np.clip(theta[free], lower + 1e-6, upper - 1e-6)
        found = least_squares(residuals, first, bounds=(lower, upper), loss="soft_l1", f_scale=_OUTLIER)
        if found.cost < least:
            best, least = np.zeros(len(_NAMES)), found.cost
            best[free] = found.x
    return best


def _starts(target: np.ndarray) -> list[np.ndarray]:
    """Places to start from: the error has more than one valley in d."""
    middle = float(np.median(target)) if len(target) else 0.0
    return [np.array([middle, 2.0, 0.1, 0.3, log_d]) for log_d in (math.log(1.0), math.log(30.0), math.log(300.0))]


def _r2(target: np.ndarray, found: np.ndarray) -> float:
    spread = float(((target - target.mean()) ** 2).sum())
    return 1 - float(((target - found) ** 2).sum()) / spread if spread else math.nan
