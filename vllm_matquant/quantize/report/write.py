"""Writes what people read about a checkpoint: the report as data and as a page, and the model card."""

from __future__ import annotations

from pathlib import Path

from vllm_matquant.checkpoint.files import publish_json, publish_text
from vllm_matquant.checkpoint.names import MODEL_CARD_FILE, REPORT_DATA_FILE, REPORT_FOLDER, REPORT_PAGE_FILE
from vllm_matquant.quantize.report.card import render_card
from vllm_matquant.quantize.report.data import Report
from vllm_matquant.quantize.report.page import render_page


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, the page and the model card next to a published checkpoint, in place of older ones.

    Each file is there whole or as it was before. Everything is rendered before anything is written.

    Args:
        folder: of the checkpoint.

    Raises:
        OSError: the folder cannot be written to.
    """
    page, card = render_page(report), render_card(report)
    (folder / REPORT_FOLDER).mkdir(exist_ok=True)
    publish_json(folder / REPORT_DATA_FILE, report.to_dict())
    publish_text(folder / REPORT_PAGE_FILE, page)
    publish_text(folder / MODEL_CARD_FILE, card)
