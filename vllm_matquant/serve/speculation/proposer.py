"""Drafts are made by the served model itself, while its layers read the draft's slice.

vLLM's draft model is a second model: it has weights and a KV cache of its own, and reads every prompt. Here both are
those of the served model. A draft's pass leaves the keys and values of its tokens where those of the served slice go:
of the last token that was sampled, and of those that were guessed after it. The served slice has computed none of these
yet; its next step does, and writes its own over them before anything reads them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.spec import QUANT_METHOD
from vllm_matquant.serve.adapters import one_row_each
from vllm_matquant.serve.linear import DRAFT, TARGET, quantized_layers
from vllm_matquant.serve.speculation.payoff import Payoff
from vllm_matquant.serve.speculation.sampling import mend_sampling

logger = init_logger(f"vllm.{__name__}")


class SliceProposer(DraftModelProposer):
    """vLLM's proposer of a draft model, save that the draft is a slice of the served model."""

    def load_model(self, target_model: Module) -> None:
        """Load nothing."""
        self.model = target_model
        self._layers = list(quantized_layers(target_model))
        attention = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        self._draft_attn_layer_names = set(attention)
        self._passes: dict[str, Any] = {}  # what the last pass told attention
        self._began = self._ended = time.perf_counter()  # of the served slice's pass, and of the drafts before it
        self._payoff = Payoff(self.num_speculative_tokens)
        target_model.register_forward_pre_hook(self._note_beginning)
        mend_sampling()

    def validate_same_kv_cache_group(self, kv_cache_config: KVCacheConfig) -> None:
        """Refuse models whose layers need more than one table of blocks, or forget what they have read."""
        found = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
        if found != [FullAttentionSpec.__name__]:
            expected = f"one {FullAttentionSpec.__name__}: attention to all tokens in every layer"
            raise ConfigError("model", "KV cache", found, expected, "Or serve without --speculate-bits.")

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        *,
        common_attn_metadata: Any,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The drafts of each request: int64 [requests, K]."""
        began, between = time.perf_counter(), self._began - self._ended
        requests, starts = common_attn_metadata.batch_size(), common_attn_metadata.query_start_loc[:-1]
        if num_rejected_tokens_gpu is not None:
            lengths = common_attn_metadata.seq_lens - num_rejected_tokens_gpu
            common_attn_metadata = common_attn_metadata.replace(seq_lens=lengths)
        with one_row_each(self.model, starts):
            with self._reading_the_draft():
                drafts = super().propose(
                    num_speculative_tokens, target_token_ids, common_attn_metadata=common_attn_metadata, **kwargs
                )
            drafting, checking = time.perf_counter() - began, began - self._ended
            checked = requests * num_speculative_tokens
            if num_rejected_tokens_gpu is not None and len(target_token_ids) == requests + checked:
                accepted = checked - int(num_rejected_tokens_gpu.sum())
                self._measure(requests, accepted, between, drafting=drafting, checking=checking)
        self._ended = time.perf_counter()
        return drafts

    def set_inputs_first_pass(
        self,
        target_token_ids: torch.Tensor,
        next_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        cad: Any,
        num_rejected_tokens_gpu: torch.Tensor | None,
    ) -> tuple[int, torch.Tensor, Any]:
        """The first pass reads one token of each request, as all others do: the served slice has read those before."""
        requests = cad.batch_size()
        if token_indices_to_sample is None:
            token_indices_to_sample = cad.query_start_loc[1:] - 1
        one_each = cad.replace(
            query_start_loc=self.arange[: requests + 1],
            query_start_loc_cpu=torch.arange(requests + 1, dtype=torch.int32),
            seq_lens=cad.seq_lens.clone(),
            num_actual_tokens=requests,
            max_query_len=1,
        )
        self.input_ids[:requests] = next_token_ids
        self._update_positions_dependent_metadata(
            target_positions[token_indices_to_sample], one_each, requests, requests, self.block_size
        )
        return requests, self.arange[:requests], one_each

    def _sample_draft_tokens(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        """A token for each request, and of requests that sample the probabilities that it was drawn from.

        They are constrained as the served slice's will be, and drawn with the request's own seed if it has one.
        """
        logits = self._logits(hidden_states)
        if sampling_metadata.all_greedy:
            return logits.argmax(-1), None
        greedy = sampling_metadata.temperature < _LEAST_TEMPERATURE
        temperature = torch.where(greedy, 1.0, sampling_metadata.temperature)
        logits = logits.float().div_(temperature[:, None])
        logits = apply_top_k_top_p(logits, sampling_metadata.top_k, sampling_metadata.top_p)
        probabilities = logits.softmax(-1)
        drawn = random_sample(probabilities.clone(), sampling_metadata.generators, self.use_fp64_gumbel)
        return torch.where(greedy, probabilities.argmax(-1), drawn), probabilities

    def build_per_group_and_layer_attn_metadata(
        self, *args: Any, **kwargs: Any
    ) -> tuple[list[object], dict[str, object]]:
        groups, self._passes = super().build_per_group_and_layer_attn_metadata(*args, **kwargs)
        return groups, self._passes

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        logits: torch.Tensor = model.compute_logits(hidden)
        return logits

    def _note_beginning(self, *_: Any) -> None:  # also of a draft's passes, after which nobody asks
        self._began = time.perf_counter()

    def _measure(self, requests: int, accepted: int, between: float, **seconds: float) -> None:
        """Count a step that checked drafts of every request, as long as it is not known whether drafts pay."""
        if self._payoff.is_settled():
            return
        self._payoff.add(requests, accepted, plain=between + self._time_plain_pass(requests), **seconds)
        if self._payoff.is_settled() and get_tensor_model_parallel_rank() == 0:
            (logger.info if self._payoff.gain >= 1 else logger.warning)("%s", self._payoff)

    def _time_plain_pass(self, requests: int) -> float:
        """Seconds of the served slice's pass over one token of each request: it repeats the last pass of the draft."""
        began = time.perf_counter()
        slots = self._get_slot_mapping(requests)
        with set_forward_context(self._passes, self.vllm_config, num_tokens=requests, slot_mapping=slots):
            hidden = self.model(
                input_ids=self.input_ids[:requests], positions=self._get_positions(requests), inputs_embeds=None
            )
        self._logits(hidden)
        return time.perf_counter() - began

    @contextmanager
    def _reading_the_draft(self) -> Iterator[None]:
        for layer, method in self._layers:
            method.read_slot(layer, DRAFT)
        try:
            yield
        finally:
            for layer, method in self._layers:
                method.read_slot(layer, TARGET)


_LEAST_TEMPERATURE = 1e-5  # what is below counts as greedy, as in vLLM


@functools.cache
def draft_with_slices() -> None:
    """Have engines of this process whose server has a draft make it with its slice; a second call does nothing."""
    DraftModelProposer.load_model = _with_slices(DraftModelProposer.load_model)


def _with_slices(load_model: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load_model)
    def wrapper(self: DraftModelProposer, target_model: Module) -> None:
        quant_config: Any = self.vllm_config.quant_config
        if quant_config is not None and quant_config.get_name() == QUANT_METHOD and quant_config.served.draft:
            self.__class__ = SliceProposer
            self.load_model(target_model)
        else:
            load_model(self, target_model)

    return wrapper
