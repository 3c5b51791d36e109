"""The model card: README.md as a hub shows it."""

from __future__ import annotations

import re
from collections import Counter
from importlib import resources
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

from vllm_matquant.checkpoint.names import MODEL_CARD_FILE
from vllm_matquant.checkpoint.spec import BASE_BITS
from vllm_matquant.checkpoint.tensor_parallel import describe_misfits, misfits
from vllm_matquant.quantize.report import wording
from vllm_matquant.quantize.report.data import Report

_LICENSE_FIELDS = ("license", "license_name", "license_link")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|&~$])")


def read_license(source: Path) -> dict[str, str]:
    """What the model card in a source's folder states of its licence; empty where there is no card or no such word."""
    try:
        stated = metadata_load(source / MODEL_CARD_FILE) or {}
    except (OSError, ValueError, yaml.YAMLError):  # there is none, or it is none: not worth a failure
        return {}
    return {name: stated[name] for name in _LICENSE_FIELDS if isinstance(stated.get(name), str)}


def render_card(report: Report) -> str:
    """The model card in Markdown, with what a hub searches by in front."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # names are escaped one by one
    environment.filters |= {
        "figure": wording.figure,
        "nats": wording.nats,
        "size": wording.size,
        "text": wording.text_source,
        "command": lambda arguments: wording.command(arguments).replace("\n", "\n    "),
        "misfits": describe_misfits,
        "plain": plain,
        "code": code,
    }
    format_ = report.format
    sizes = [format_.tensors_of_layer(*layer.shape, layer.name) for layer in report.layers]
    stored_widths = sorted({width for tensors in sizes for width in tensors} - {BASE_BITS})
    template = environment.from_string(resources.files(__package__).joinpath("card.md").read_text(encoding="utf-8"))
    body = template.render(
        report=report,
        rows=report.width_rows(),
        widths=_enumerated(format_.widths),
        stored_width=format_.stored_width,
        stored_widths=stored_widths,
        served_from={
            stored: min(width for width in format_.widths if format_.stored_width(width) >= stored)
            for stored in stored_widths
        },
        misfits=misfits(format_, {layer.name: layer.shape for layer in report.layers}),
        layer_widths={_enumerated(widths): count for widths, count in Counter(format_.layer_widths.values()).items()},
    )
    return f"---\n{_front_matter(report)}\n---\n\n{body}"


def plain(text: str) -> str:
    """``text`` on one line, with no character that Markdown or HTML would take for markup."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """``text`` as Markdown code on one line, whatever backticks are in it."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _front_matter(report: Report) -> str:
    data = ModelCardData(
        base_model=report.model if _is_repository(report.model) else None,
        base_model_relation="quantized",
        library_name="vllm",
        pipeline_tag="image-text-to-text" if report.tower else "text-generation",
        tags=["vllm", "quantized", "matquant"],
        **report.license,
    )
    return data.to_yaml()


def _is_repository(name: str) -> bool:
    """Whether a hub takes ``name`` for that of a repository; it refuses a card with any other base model."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _enumerated(widths: tuple[int, ...]) -> str:
    *first, last = map(str, widths)
    return f"{', '.join(first)} or {last}" if first else last
