"""What is offered, and to whom."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.elastic.slices import EIGHT, FOUR, RECIPE, TWO, an_offer
from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.serve.elastic.offer import OfferError, choice_of, ladder_of, parse_choices
from vllm_matquant.serve.elastic.policy import LoadPolicy


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        ("2..8", (2, 3, 4, 5, 6, 7, 8)),
        ("4", (4,)),
        ("2,4,8", (2, 4, 8)),
        ("8, 2..4,3", (8, 2, 3, 4)),
        ("8,my-recipe", (8, "my-recipe")),
        ([2, 4, 8], (2, 4, 8)),
        ([8, "2..3", "my-recipe"], (8, 2, 3, "my-recipe")),
        (("2.5-bits",), ("2.5-bits",)),
    ],
)
def test_lists(value: Any, choices: tuple[Any, ...]) -> None:
    assert parse_choices(value) == choices


@pytest.mark.parametrize("value", ["", "1", "9", "8..2", "1..8", "2,,4", [], [9], [2.5], [True], [None], 4, None, {}])
def test_what_is_no_list(value: Any) -> None:
    with pytest.raises(ValueError, match="expected widths from 2 to 8 and names of recipes"):
        parse_choices(value)


@pytest.mark.parametrize(
    ("choice", "found"),
    [(8, EIGHT), (4.0, FOUR), ("4", FOUR), ("uniform-2", TWO), ("my-recipe", RECIPE)],
)
def test_finding_a_slice(choice: Any, found: Any) -> None:
    assert an_offer().find(choice) == found


@pytest.mark.parametrize("choice", [3, 9, 0, -4, 4.5, "3", "", "other", True, None, [4], {"bits": 4}, float("nan")])
def test_what_is_not_offered(choice: Any) -> None:
    with pytest.raises(OfferError, match="expected one of 8, 4, 'my-recipe', 2"):
        an_offer().find(choice)


def test_clients_may_ask_for_less_than_an_operator() -> None:
    assert an_offer().find_for_client(4) == FOUR
    with pytest.raises(OfferError, match=r"found 2, expected one of 8, 4, 'my-recipe'$"):
        an_offer().find_for_client(2)
    with pytest.raises(OfferError, match="lets no client choose"):
        an_offer(for_clients=()).find_for_client(4)
    with pytest.raises(OfferError, match="all requests are computed at the server's width: a reason"):
        an_offer(refusal="a reason").find_for_client(4)


def test_slots() -> None:
    offer = an_offer()
    assert [offer.slot(each.name) for each in offer.slices] == [0, 1, 2, 3]
    assert [choice_of(each) for each in offer.slices] == [8, 4, "my-recipe", 2]
    with pytest.raises(OfferError, match="found 'uniform-3'"):
        offer.slot("uniform-3")


def test_the_ladder_of_a_policy() -> None:
    offer = an_offer()
    assert ladder_of(LoadPolicy(), offer) == [EIGHT, FOUR, RECIPE, TWO]
    assert ladder_of(LoadPolicy(floor="my-recipe", ceiling=4), offer) == [FOUR, RECIPE]
    with pytest.raises(ConfigError, match="from uniform-4 to uniform-4"):
        ladder_of(LoadPolicy(floor=4, ceiling=4), offer)
    with pytest.raises(OfferError):
        ladder_of(LoadPolicy(floor=3), offer)
