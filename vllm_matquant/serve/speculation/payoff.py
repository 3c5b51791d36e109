"""Whether drafts pay, from what the first steps took."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

STEPS = 32  # that are measured


@dataclass
class Payoff:
    """What speculation gains over steps of one token, measured in the same steps.

    With K drafts of which a share a is accepted, a step gives 1 + a K tokens of a request; it takes the time to draft
    them, and that to check them, K + 1 tokens at once. Without drafts the same time would give one token for each plain
    pass that fits into it.

    Attributes:
        tokens: drafts of a request in a step, K.
        wanted: steps to measure.
    """

    tokens: int
    wanted: int = STEPS
    _drafted: int = 0
    _accepted: int = 0
    _drafting: list[float] = field(default_factory=list)
    _checking: list[float] = field(default_factory=list)
    _plain: list[float] = field(default_factory=list)

    def add(self, requests: int, accepted: int, *, drafting: float, checking: float, plain: float) -> None:
        """Count a step in which each request had K drafts checked, and got new ones.

        Args:
            requests: in the step.
            accepted: drafts of all of them.
            drafting: seconds for the new drafts.
            checking: seconds for the rest of the step: the pass that checked the old ones, and all that lies between.
            plain: seconds that a step would have taken without drafts.
        """
        self._drafted += requests * self.tokens
        self._accepted += accepted
        self._drafting.append(drafting)
        self._checking.append(checking)
        self._plain.append(plain)

    def is_settled(self) -> bool:
        """Whether enough has been measured."""
        return len(self._plain) >= self.wanted

    @property
    def acceptance(self) -> float:
        """The share of drafts that were accepted."""
        return self._accepted / self._drafted

    @property
    def gain(self) -> float:
        """How many times as fast as without drafts; from medians, for a machine that others use too has odd steps."""
        step = (median(self._drafting) + median(self._checking)) / median(self._plain)
        return (1 + self.acceptance * self.tokens) / step

    def __str__(self) -> str:
        """One line that says what was measured, and what to change where it does not pay."""
        drafting, checking, plain = (1000 * median(each) for each in (self._drafting, self._checking, self._plain))
        measured = (
            f"{self.acceptance:.0%} of the drafts were accepted, {1 + self.acceptance * self.tokens:.2f} tokens a "
            f"step; drafting {self.tokens} takes {drafting:.1f} ms, checking them {checking:.1f} ms, and a step "
            f"without drafts {plain:.1f} ms: {self.gain:.2f} times the speed"
        )
        if self.gain >= 1:
            return f"Speculation pays: {measured}"
        return (
            f"Speculation does not pay: {measured}. Try other --speculate-tokens or --speculate-bits, or serve without "
            "--speculate-bits"
        )
