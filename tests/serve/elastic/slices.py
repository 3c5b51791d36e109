"""Slices and offers of no checkpoint."""

from __future__ import annotations

from typing import Any

from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.serve.elastic.offer import Offer
from vllm_matquant.serve.elastic.requests import Front


def plain(width: int) -> Slice:
    return Slice(f"uniform-{width}", {"layer": width}, float(width), width * 1000, (), width=width)


RECIPE = Slice("my-recipe", {"layer": 3}, 3.4, 3400, (), kl=0.5)
EIGHT, FOUR, TWO = plain(8), plain(4), plain(2)


def an_offer(**fields: Any) -> Offer:
    """8, 4 and 2 bits and a recipe between, of which clients may ask for all but 2 bits."""
    slices = (EIGHT, FOUR, RECIPE, TWO)
    return Offer(**{"slices": slices, "for_clients": tuple(each.name for each in slices[:3])} | fields)


def a_front(**fields: Any) -> Front:
    return Front(an_offer(**fields), EIGHT)
