"""Tokens per second of llama.cpp on a model of a given shape with random weights.

Runs in an environment of its own that has the extra `bench-peers`; tools/bench.py calls it. A line of JSON for each
type: {"type", "output_tokens_per_s", "bits_per_weight"}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = ("Q8_0", "Q4_0", "Q3_K", "Q2_K")
_LAYER_TENSORS = {  # rows and columns, in multiples of the sizes below
    "attn_q": ("heads", "hidden"),
    "attn_k": ("kv", "hidden"),
    "attn_v": ("kv", "hidden"),
    "attn_output": ("hidden", "heads"),
    "ffn_gate": ("intermediate", "hidden"),
    "ffn_up": ("intermediate", "hidden"),
    "ffn_down": ("hidden", "intermediate"),
}
# Bytes of a block at which float16 scales lie; all other bytes are codes and small integers.
_SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q3_K": (108,), "Q2_K": (80, 82)}
_SCALE = 2.0**-12


def random_blocks(rows: int, columns: int, name: str, generator: np.random.Generator) -> np.ndarray:
    """Quantized weights as llama.cpp stores them: uint8 [rows, bytes of a row]."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place in _SCALES[name]:
        data[:, :, place : place + 2] = np.frombuffer(np.float16(_SCALE).tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write_gguf(file: Path, config: dict[str, Any], name: str) -> None:
    """A model of the shape that config.json says, its layers of type ``name``, its head in bfloat16."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = hidden // heads
    sizes = {
        "hidden": hidden,
        "intermediate": config["intermediate_size"],
        "heads": heads * head,
        "kv": config["num_key_value_heads"] * head,
    }
    vocabulary, generator = config["vocab_size"], np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    bytes_and_words = [f"<0x{byte:02X}>" for byte in range(256)] + [f"\u2581w{i}" for i in range(vocabulary - 259)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_and_words])
    writer.add_token_scores([0.0] * vocabulary)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
                           + [kinds.NORMAL] * (vocabulary - 259))  # fmt: skip
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add_bfloat16(tensor: str) -> None:
        weights = generator.standard_normal((vocabulary, hidden), dtype=np.float32) * 0.02
        halves = (weights.view(np.uint32) >> 16).astype(np.uint16)
        writer.add_tensor(tensor, halves.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    add_bfloat16("token_embd.weight")
    add_bfloat16("output.weight")
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config["num_hidden_layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for tensor, (rows, columns) in _LAYER_TENSORS.items():
            data = random_blocks(sizes[rows], sizes[columns], name, generator)
            writer.add_tensor(f"blk.{layer}.{tensor}.weight", data, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens_per_second(file: Path, threads: int, prompt_tokens: int, output_tokens: int) -> float:
    """Of greedy decoding, one request, the prompt not counted."""
    import xllamacpp  # type: ignore[import-not-found]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.warmup = True
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)
    request = {
        "prompt": list(range(300, 300 + prompt_tokens)),
        "n_predict": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        answer = server.handle_completions(request)
        seconds = time.perf_counter() - start
        timings = answer.get("timings", {})
        best = max(best, timings.get("predicted_per_second", output_tokens / seconds))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.json", help="the model's shape, as transformers has it")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=64)
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    for name in options.types:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(file, config, name)
            speed = tokens_per_second(file, options.threads, options.prompt_tokens, options.output_tokens)
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        print(json.dumps({"type": name, "output_tokens_per_s": speed, "bits_per_weight": 8 * size / block}), flush=True)


if __name__ == "__main__":
    main()
