"""The report as one HTML page that opens without a network."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources

from jinja2 import Environment, StrictUndefined

from vllm_matquant.quantize.report import wording
from vllm_matquant.quantize.report.data import Report, finite
from vllm_matquant.quantize.report.plots import plot_errors, plot_quality


def render_page(report: Report) -> str:
    """The page, with style, script and figures inside.

    Names come from other people's files: the template engine escapes each of them, and the page's own policy lets no
    script run but the page's.
    """
    files = resources.files(__package__)
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    # autoescape: whatever the template does not call safe.
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "figure": wording.figure,
        "nats": wording.nats,
        "size": wording.size,
        "duration": wording.duration,
        "text": wording.text_source,
        "command": wording.command,
    }
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        quality_figures=plot_quality(report),
        error_figures=plot_errors(report.layers),
        heat=_heat_levels(report),
        script=script,
        script_hash=f"sha256-{base64.b64encode(digest).decode()}",
    )


def _heat_levels(report: Report) -> dict[int, list[float | None]]:
    """For each width with errors, where the logarithm of each layer's error lies between the least and the largest."""
    levels: dict[int, list[float | None]] = {}
    for width in report.format.widths:
        errors = [finite(layer.errors.get(width)) for layer in report.layers]
        logs = [math.log(error) if error else None for error in errors]
        known = [log for log in logs if log is not None]
        if known:
            low, span = min(known), (max(known) - min(known)) or 1.0
            levels[width] = [None if log is None else round((log - low) / span, 2) for log in logs]
    return levels
