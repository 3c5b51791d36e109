"""llama.cpp on a model of a given shape with random weights, by the program llama-batched-bench of a build of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES_OF_WIDTH = {8: ("Q8_0",), 4: ("Q4_0",), 3: ("Q3_K",), 2: ("Q2_K", "IQ2_XS")}
HEAD_TYPES = {width: types[0] for width, types in TYPES_OF_WIDTH.items()} | {7: "Q8_0", 6: "Q6_K", 5: "Q6_K"}
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
_SCALES = {"Q8_0": (0,), "Q6_K": (208,), "Q4_0": (0,), "Q3_K": (108,), "Q2_K": (80, 82), "IQ2_XS": (0,)}
_SCALE = 2.0**-12
# Instructions that tell what a program was built for, as objdump writes them.
_INSTRUCTIONS = {
    "AVX-512": r"%zmm",
    "AVX-512 VNNI": r"vpdpbusds? .*%zmm",
    "AVX-VNNI": r"\{vex\} vpdpbusd",
    "AMX": r"tdpb[us]{2}d",
}


class LlamaCpp:
    """A build of llama.cpp with a model of its own.

    Args:
        program: its llama-batched-bench.
        folder: where the model is written; some gigabytes for a large shape.
        config: the model's shape, as transformers' config.json has it.
        type_: of its layers, one of :data:`TYPES_OF_WIDTH`.
        threads: to compute with.
        head_width: its head's type is the one of at least so many bits, of :data:`HEAD_TYPES`; by default bfloat16.
    """

    def __init__(
        self,
        program: Path,
        folder: Path,
        config: dict[str, Any],
        type_: str,
        threads: int,
        head_width: int | None = None,
    ) -> None:
        self.program, self.threads = program, threads
        self.type = type_
        self.head_type = "BF16" if head_width is None else HEAD_TYPES[head_width]
        self.file = folder / f"{self.type}.gguf"
        write_gguf(self.file, config, self.type, self.head_type)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight of its layers, scales counted."""
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return 8 * size / block

    def measure(self, batch: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
        """Decode once: {"prompt_tokens_per_s", "decode_tokens_per_s"}, of all requests together.

        Raises:
            ValueError: the program fails; what it wrote last is shown.
        """
        context = 2 * batch * (prompt_tokens + output_tokens)
        command = [str(self.program), "-m", str(self.file), "-t", str(self.threads), "-c", str(context)]
        command += ["-npp", str(prompt_tokens), "-ntg", str(output_tokens), "-npl", str(batch), "-b", str(context)]
        result = subprocess.run([*command, "--output-format", "jsonl"], capture_output=True, text=True)
        rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        if result.returncode != 0 or not rows:
            status = result.returncode
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            written = (result.stdout + result.stderr)[-2000:]
            raise ValueError(f"--llama-cpp: {self.program} failed at {self.type} ({how}):\n{written}")
        return {"prompt_tokens_per_s": rows[0]["speed_pp"], "decode_tokens_per_s": rows[0]["speed_tg"]}


def head_width(config: dict[str, Any], widths: Mapping[str, int]) -> int | None:
    """The width of a Llama's output head among those of a slice's quantized layers, None if it is not quantized."""
    return widths.get("model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head")


def misfit(config: dict[str, Any], width: int, head_width: int | None = None) -> str | None:
    """Why llama.cpp lacks a type for a shape whose layers and head have these widths, None if it lacks none."""
    if width not in TYPES_OF_WIDTH:
        return f"no type of about {width} bits"
    wanted = [(name, config[size]) for name in TYPES_OF_WIDTH[width] for size in ("hidden_size", "intermediate_size")]
    if head_width is not None:
        wanted.append((HEAD_TYPES[head_width], config["hidden_size"]))
    for name, columns in wanted:
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        if columns % block:
            return f"{columns} columns are no blocks of {block}, as {name} has them"
    return None


def instruction_sets(program: Path) -> str:
    """Which of the instruction sets past AVX2 a program was built for, by what binutils' objdump finds in it."""
    if shutil.which("objdump") is None:
        return "unknown instruction sets (no objdump)"
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(program)], capture_output=True, text=True).stdout
    return ", ".join(name for name, pattern in _INSTRUCTIONS.items() if re.search(pattern, code)) or "none past AVX2"


def random_blocks(rows: int, columns: int, name: str, generator: np.random.Generator) -> np.ndarray:
    """Quantized weights as llama.cpp stores them: uint8 [rows, bytes of a row]."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place in _SCALES[name]:
        data[:, :, place : place + 2] = np.frombuffer(np.float16(_SCALE).tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write_gguf(file: Path, config: dict[str, Any], name: str, head_type: str) -> None:
    """A model of the shape that config.json says, its layers of type ``name``, its embedding in bfloat16."""
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

    def add_random(tensor: str, rows: int, columns: int, name: str) -> None:
        data = random_blocks(rows, columns, name, generator)
        writer.add_tensor(tensor, data, raw_dtype=gguf.GGMLQuantizationType[name])

    def add_bfloat16(tensor: str) -> None:
        weights = generator.standard_normal((vocabulary, hidden), dtype=np.float32) * 0.02
        halves = (weights.view(np.uint32) >> 16).astype(np.uint16)
        writer.add_tensor(tensor, halves.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    add_bfloat16("token_embd.weight")
    if head_type == "BF16":
        add_bfloat16("output.weight")
    else:
        add_random("output.weight", vocabulary, hidden, head_type)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config["num_hidden_layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for tensor, (rows, columns) in _LAYER_TENSORS.items():
            add_random(f"blk.{layer}.{tensor}.weight", sizes[rows], sizes[columns], name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
