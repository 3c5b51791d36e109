"""What vLLM's ``/metrics`` tells of an elastic server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.serve.elastic.offer import Offer
from vllm_matquant.serve.elastic.switch import Switched

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ElasticMetrics:
    """The metrics of one server; all names begin with ``matquant_``.

    Args:
        offer: what the server offers.
        active: what is active at first.
        registry: where they are shown.
    """

    def __init__(self, offer: Offer, active: Slice, registry: CollectorRegistry = REGISTRY) -> None:
        self._offer = offer
        self._bits = Gauge("matquant_active_bits", "Average width of the active slice, in bits.", registry=registry)
        self._active = Gauge("matquant_active", "1 for the active slice, 0 for others.", ["slice"], registry=registry)
        self._tokens = Counter(
            "matquant_tokens", "Tokens computed with a slice, of prompts and of answers.", ["slice"], registry=registry
        )
        self._switches = Counter("matquant_switches", "Switches of the active slice.", ["to"], registry=registry)
        self._switch_seconds = Histogram(
            "matquant_switch_seconds", "Of a switch, without waiting for requests.", buckets=_SECONDS, registry=registry
        )
        self._drain_seconds = Histogram(
            "matquant_drain_seconds", "For which a switch waited for requests.", buckets=_SECONDS, registry=registry
        )
        self._bytes = Gauge(
            "matquant_resident_bytes", "Bytes of codes and decoders of a process.", ["process"], registry=registry
        )
        self._decisions = Counter(
            "matquant_policy_decisions", "Switches that the load asked for.", ["reason"], registry=registry
        )
        self._counted = {each.name: 0 for each in offer.slices}
        for each in offer.slices:
            self._tokens.labels(each.name)
        self._show_active(active)

    def switched(self, switched: Switched) -> None:
        """Count a switch."""
        if switched.before == switched.active:
            return
        self._switches.labels(switched.active.name).inc()
        self._switch_seconds.observe(switched.seconds)
        self._drain_seconds.observe(switched.drain_seconds)
        self._show_active(switched.active)

    def decided(self, reason: str) -> None:
        """Count a decision of the policy.

        Args:
            reason: which measure asked for it, one of a few.
        """
        self._decisions.labels(reason).inc()

    def update(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over what the processes of the engine tell of themselves (:meth:`ElasticWorker.matquant_state`)."""
        for process, state in enumerate(states):
            self._bytes.labels(str(process)).set(state["bytes"])
        # All processes compute parts of the same tokens; those of a later stage of a pipeline may be a step behind.
        for name, count in states[0]["tokens"].items():
            self._tokens.labels(name).inc(count - self._counted[name])
            self._counted[name] = count

    def _show_active(self, active: Slice) -> None:
        self._bits.set(active.average_bits)
        for each in self._offer.slices:
            self._active.labels(each.name).set(each == active)
