#!/usr/bin/env bash
# transformers 5.19.0: `tie_word_embeddings: true` in config.json does not mean that the output head is the embedding.
#
# Where the weights' file holds a head that differs from the embedding, from_pretrained keeps both and says in a warning
# that it ties nothing, though the configuration of the loaded model still says true. The same tensors given to
# load_state_dict, followed by tie_weights(), give another model: there the configuration decides and the head is lost.
# So a program that writes or reads weights without from_pretrained must compare the two tensors.
#
# Seen with transformers 5.19.0, torch 2.13.0, Python 3.11:
#     from_pretrained: tied False, config says True
#     load_state_dict and tie_weights: tied True, config says True
#     logits differ by more than 0.1: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 numpy==2.3.5
"$folder/venv/bin/python" - "$folder/model" >"$folder/found" 2>/dev/null <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

folder = sys.argv[1]
torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
AutoModelForCausalLM.from_config(config).save_pretrained(folder)
tensors = load_file(f"{folder}/model.safetensors")
tensors["lm_head.weight"] = torch.randn(64, 32)
save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})

loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
by_hand = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
by_hand.load_state_dict(tensors, strict=False)
by_hand.tie_weights()
tokens = torch.arange(8)[None]
for name, model in (("from_pretrained", loaded), ("load_state_dict and tie_weights", by_hand)):
    tied = torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    print(f"{name}: tied {tied}, config says {model.config.tie_word_embeddings}")
with torch.no_grad():
    away = (loaded(tokens).logits - by_hand(tokens).logits).abs().max()
print(f"logits differ by more than 0.1: {bool(away > 0.1)}")
PYTHON
diff - "$folder/found" <<'EXPECTED'
from_pretrained: tied False, config says True
load_state_dict and tie_weights: tied True, config says True
logits differ by more than 0.1: True
EXPECTED
cat "$folder/found"
