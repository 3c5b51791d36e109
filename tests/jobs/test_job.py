"""Values that Python code gives a job, in place of a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_matquant.jobs.job import command_of
from vllm_matquant.jobs.quantize import Quantize

RULES = (("q_proj|k_proj", (2, 4)), ("down_proj", (8,)))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ignore", "lm_head", ("lm_head",)),
        ("ignore", Path("lm_head"), ("lm_head",)),
        ("ignore", ["lm_head", "v_proj"], ("lm_head", "v_proj")),
        ("ignore", (), ()),
        ("setting", "sweeps=1", ("sweeps=1",)),
        ("setting", {"sweeps": 1, "end_to_end.up_to": 4}, ("sweeps=1", "end_to_end.up_to=4")),
        ("bits_for", {"q_proj|k_proj": (2, 4), "down_proj": 8}, RULES),
        ("bits_for", [("q_proj|k_proj", [4, 2]), ("down_proj", 8)], RULES),
        ("bits_for", ["q_proj|k_proj=2,4", "down_proj=8"], RULES),
        ("bits_for", "down_proj=8", RULES[1:]),
        ("group_size_for", {"down_proj": 64, "o_proj": "channel"}, (("down_proj", 64), ("o_proj", "channel"))),
        ("group_size_for", "down_proj=64", (("down_proj", 64),)),
    ],
)
def test_an_option_that_may_be_given_several_times(name: str, value: Any, expected: Any) -> None:
    job = Quantize("model", "out", **{name: value})
    assert getattr(job, name) == expected
    words = command_of("quantize", job)
    assert words.count("--" + name.replace("_", "-")) == len(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ignore", 5, r"^ignore: found 5, expected REGEX, a list of such$"),
        ("ignore", True, r"^ignore: found True, expected REGEX, a list of such$"),
        ("ignore", {"lm_head": 4}, r"^ignore: found \{'lm_head': 4\}, expected REGEX, a list of such$"),
        ("bits_for", 8, r"^bits_for: found 8, expected REGEX=WIDTHS, a list of such or a mapping$"),
        ("bits_for", [8], r"^bits_for: found 8, expected REGEX=WIDTHS$"),
        ("bits_for", [("down_proj",)], r"^bits_for: found \('down_proj',\), expected REGEX=WIDTHS$"),
        ("bits_for", {"down_proj": 9}, r"^bits_for: found '9', expected distinct widths from 2 to 8"),
        ("bits_for", "down_proj", r"^bits_for: found 'down_proj', expected REGEX=WIDTHS$"),
        ("group_size_for", {"down_proj": 30}, r"^group_size_for: found '30', expected a multiple of 8"),
    ],
)
def test_what_is_no_value(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize("model", "out", **{name: value})
