"""Every architecture of a language model that transformers knows, of multimodal ones too, is quantized rightly or
refused by name.

``MATQUANT_WRITE_TABLE=1 pytest tests/quantize/test_architectures.py`` writes docs/reference/architectures.md anew.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from vllm import __version__ as vllm_version
from vllm.model_executor.models import ModelRegistry

from tests.quantize.tiny_architectures import MULTIMODAL, TINY, TOKENS, tiny_model
from tests.quantize.tiny_sources import VOCABULARY
from vllm_matquant.checkpoint.errors import CheckpointError, ConfigError
from vllm_matquant.quantize.runner import run_block
from vllm_matquant.quantize.source import SourceModel

TABLE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
RIGHT = "yes"
CLASSES = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
del CLASSES["shieldgemma2"]  # a classifier, listed for its processor's sake
verdicts: dict[str, str] = {}  # of each architecture, as the table says it


def open_or_refuse(folder: Path) -> SourceModel | CheckpointError:
    try:
        return SourceModel(folder)
    except CheckpointError as cause:
        return cause


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(CLASSES))
@torch.no_grad()
def test_every_architecture_is_right_or_refused_by_name(model_type: str, tmp_path: Path) -> None:
    verdicts[model_type] = "untried: no small random model could be built"
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    opened = open_or_refuse(tmp_path)
    if isinstance(opened, CheckpointError):
        kind, said = repr(model.config.model_type), str(opened.found)
        assert opened.where == str(tmp_path / "config.json")
        assert opened.subject == "architectures" or said.startswith(f"{kind}, ")
        verdicts[model_type] = f"refused: {said.removeprefix(kind).removeprefix(', ')}"
        return
    runner = opened.runner
    verdicts[model_type] = RIGHT
    expected: list[torch.Tensor] = []
    for block in model.get_decoder().layers:
        block.register_forward_pre_hook(
            lambda _, given, named: expected.append([*given, *named.values()][0].clone()), with_kwargs=True
        )
    logits = model(input_ids=TOKENS, use_cache=False).logits
    hidden = torch.empty_like(expected[0])
    arguments = runner.embed(TOKENS, hidden)
    for index, wanted in enumerate(expected):
        torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)
        run_block(runner.load_block(index), hidden, hidden, arguments[index], 2 * TOKENS.shape[1])
    torch.testing.assert_close(runner.load_head()(hidden), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_table() -> None:
    if len(verdicts) < len(CLASSES):
        pytest.skip("not every architecture was tried in this process")
    written = page()
    if os.environ.get("MATQUANT_WRITE_TABLE") == "1":
        TABLE.write_text(written)
    found = TABLE.read_text()
    if written.partition(":")[0] != found.partition(":")[0]:
        pytest.skip("the page is of other versions of transformers or vLLM than are installed")
    assert found == written


def page() -> str:
    own = ModelRegistry.get_supported_archs()
    rows = []
    for model_type, verdict in verdicts.items():
        own_class = CLASSES[model_type] if CLASSES[model_type] in own else "-"
        rows.append(f"| {model_type}{' *' * (model_type in MULTIMODAL)} | {verdict} | {own_class} |")
    right = sum(verdict == RIGHT for verdict in verdicts.values())
    return HEAD.format(
        transformers=version("transformers"),
        vllm=vllm_version,
        right=right,
        tried=len(rows),
        multimodal=len(MULTIMODAL & CLASSES.keys()),
        rows="\n".join(rows),
    )


HEAD = """\
# Architectures

Of transformers {transformers} and vLLM {vllm}: the {tried} architectures of causal language models, {multimodal} of
them multimodal (*), by the `model_type` in config.json.

A tiny random model of each was run block by block, as quantizing does, with text alone, and every hidden state compared
with the model's own forward. {right} are right; the others are refused by name before any work. The last column names
vLLM's own class for it; without one vLLM may take its Transformers backend. It does not say that somebody has served
such a model: [limits](../guide/limits.md) says of which that is known. `tests/quantize/test_architectures.py` wrote
this page.

| model_type | quantize | class in vLLM |
|---|---|---|
{rows}
"""


@pytest.mark.parametrize(
    "fields",
    [
        {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0},
        {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY},
    ],
)
def test_blocks_that_need_more_than_a_hidden_state(fields: dict[str, int], tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 8}
    config = AutoConfig.for_model("gemma4_text", **(TINY | layers | fields))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: model_type: found 'gemma4_text', whose blocks share"):
        SourceModel(tmp_path)
