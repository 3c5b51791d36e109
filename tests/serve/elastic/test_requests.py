"""The slice that a request is given when it arrives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams

from tests.serve.elastic.slices import FOUR, a_front
from vllm_matquant.serve.elastic.requests import BITS, SLICE, with_slices


class Processor:
    """vLLM's, as far as slices go."""

    def __init__(self, front: Any, method: str | None = "matquant") -> None:
        quant_config = None if method is None else SimpleNamespace(front=front, get_name=lambda: method)
        self.vllm_config = SimpleNamespace(quant_config=quant_config)
        self.salt: str | None = None

    def process_inputs(self, request_id: str, prompt: Any, params: Any, resumable: bool = False) -> Any:
        own = params.clone()
        return SimpleNamespace(sampling_params=own, cache_salt=self.salt, resumable=resumable)


process = with_slices(Processor.process_inputs)


def asking(bits: Any = None, **others: Any) -> SamplingParams:
    return SamplingParams(extra_args=others | ({} if bits is None else {BITS: bits}))


def test_a_request_has_the_active_slice_or_that_which_it_asks_for() -> None:
    processor = Processor(a_front())
    params = asking(other=1)
    request = process(processor, "a", "text", params)
    assert request.sampling_params.extra_args == {"other": 1, SLICE: "uniform-8"}
    assert params.extra_args == {"other": 1}
    assert request.cache_salt == "matquant/uniform-8/"
    request = process(processor, "b", "text", asking("my-recipe"))
    assert request.sampling_params.extra_args == {BITS: "my-recipe", SLICE: "my-recipe"}
    assert request.cache_salt == "matquant/my-recipe/"
    processor.vllm_config.quant_config.front.active = FOUR
    assert process(processor, "c", "text", SamplingParams()).sampling_params.extra_args == {SLICE: "uniform-4"}


def test_a_client_cannot_name_its_slice_itself() -> None:
    request = process(Processor(a_front()), "a", "text", asking(**{SLICE: "uniform-2"}))
    assert request.sampling_params.extra_args == {SLICE: "uniform-8"}


def test_the_salt_of_a_client_stays_part_of_the_key() -> None:
    processor = Processor(a_front())
    processor.salt = "secret"
    assert process(processor, "a", "text", asking(4)).cache_salt == "matquant/uniform-4/secret"


@pytest.mark.parametrize("bits", [2, 3, 9, "uniform-2", "other", 0.5, [4]])
def test_what_no_client_can_have_is_refused(bits: Any) -> None:
    with pytest.raises(VLLMValidationError, match=r"matquant_bits: found .*, expected one of 8, 4, 'my-recipe'"):
        process(Processor(a_front()), "a", "text", asking(bits))


def test_where_all_requests_have_one_width() -> None:
    processor = Processor(a_front(refusal="a reason"))
    request = process(processor, "a", "text", asking(other=1))
    assert request.sampling_params.extra_args == {"other": 1}
    assert request.cache_salt is None
    with pytest.raises(VLLMValidationError, match="a reason"):
        process(processor, "a", "text", asking(4))
    process(processor, "a", "text", PoolingParams())


def test_a_server_with_one_width_says_so() -> None:
    assert process(Processor(None), "a", "text", asking(other=1)).cache_salt is None
    with pytest.raises(VLLMValidationError, match="this server has one width; with --elastic"):
        process(Processor(None), "a", "text", asking(4))


@pytest.mark.parametrize("method", [None, "awq"])
def test_other_models_are_left_alone(method: str | None) -> None:
    request = process(Processor(None, method), "a", "text", asking(4))
    assert request.sampling_params.extra_args == {BITS: 4}
    assert request.cache_salt is None


def test_prompts_in_parts_are_refused() -> None:
    with pytest.raises(VLLMValidationError, match="streamed in parts"):
        process(Processor(a_front()), "a", "text", asking(), resumable=True)
