"""Models as other tools write them, packed by the formats' definitions, field by field in Python's integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.quantize.tiny_sources import random_model, write_tokenizer

# Neither in_features nor out_features of all layers are a power of two.
SHAPE = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1, "head_dim": 24, "mlp_bias": False}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Layer:
    """A quantized layer: weight = scale * (code - zero).

    Attributes:
        codes: int64 [rows, columns].
        scale: float16 [rows, groups].
        zero: int64 [rows, groups].
        group_of: int64 [columns].
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group_of: np.ndarray
    bits: int

    def weight(self) -> np.ndarray:
        """float64 [rows, columns]."""
        return self.scale.astype(np.float64)[:, self.group_of] * (self.codes - self.zero[:, self.group_of])


def draw_layer(
    rows: int, columns: int, bits: int, group_size: int, seed: int, *, symmetric: bool = False, signed: bool = False
) -> Layer:
    """A random layer; zeros reach from 0 to the last code unless it is symmetric."""
    generator = np.random.default_rng(seed)
    group_of = np.arange(columns) // (group_size or columns)
    shape = rows, int(group_of[-1]) + 1
    scale = generator.uniform(0.3, 0.9, shape).astype(np.float16) / np.float16(2 ** (bits + 1))
    if signed:
        scale *= generator.choice([-1, 1], shape).astype(np.float16)
    zero = generator.integers(0, 2**bits, shape)
    if symmetric:
        zero[:] = 2 ** (bits - 1)
    return Layer(generator.integers(0, 2**bits, (rows, columns)), scale, zero, group_of, bits)


def words(fields: Sequence[int], bits: int) -> list[int]:
    """Fields one after the other in one long integer, cut into words of 32 bits."""
    whole = sum(int(value) << (bits * place) for place, value in enumerate(fields))
    return [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(fields) * bits // 32))]


def padded_words(fields: Sequence[int], bits: int) -> list[int]:
    """As many whole fields as a word has room for."""
    count = 32 // bits
    return [words(fields[start : start + count], bits)[0] for start in range(0, len(fields), count)]


def plane_words(fields: Sequence[int], bits: int) -> list[int]:
    """Of each 32 fields the words of their low bits, then those of the higher ones: 4, 2 and 1 bits, or 2 and 1."""
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]
    found: list[int] = []
    for start in range(0, len(fields), 32):
        rest = [int(value) for value in fields[start : start + 32]]
        for width in widths:
            found += words([value % 2**width for value in rest], width)
            rest = [value >> width for value in rest]
    return found


def tensor(packed: Sequence[Sequence[int]]) -> torch.Tensor:
    """Words as int32 [rows, words]."""
    return torch.from_numpy(np.array(packed, dtype=np.uint32).view(np.int32).copy())


def gptq(layer: Layer, version: str = "gptq", *, index: bool = True) -> dict[str, torch.Tensor]:
    """GPTQ's tensors: [words of inputs, rows], [groups, words of rows], [groups, rows]."""
    pack = plane_words if version == "gptq_p" else words
    zeros = [pack(row, layer.bits) for row in layer.zero.T]
    if version == "gptq" and layer.bits == 3:
        zeros = [pack((row - 1) % 8, layer.bits) for row in layer.zero.T]
    elif version == "gptq":  # off whole words: 0 borrows
        ones = words([1] * (32 // layer.bits), layer.bits)[0]
        zeros = [[(word - ones) % 2**32 for word in row] for row in zeros]
    found = {
        "qweight": tensor([pack(row, layer.bits) for row in layer.codes]).T.contiguous(),
        "qzeros": tensor(zeros),
        "scales": torch.from_numpy(layer.scale.T.copy()),
    }
    return found | ({"g_idx": torch.from_numpy(layer.group_of).int()} if index else {})


def auto_round(layer: Layer) -> dict[str, torch.Tensor]:
    """AutoRound's symmetric codes: GPTQ's packing without an index, the zero points less one in each field."""
    found = gptq(layer, "gptq_v2", index=False)
    return found | {"qzeros": tensor([words(row - 1, layer.bits) for row in layer.zero.T])}


def awq(layer: Layer) -> dict[str, torch.Tensor]:
    """AWQ's tensors: eight outputs in a word, in its order."""

    def pack(row: np.ndarray) -> list[int]:
        return [words([eight[place] for place in AWQ_ORDER], 4)[0] for eight in row.reshape(-1, 8)]

    return {
        "qweight": tensor([pack(column) for column in layer.codes.T]),
        "qzeros": tensor([pack(group) for group in layer.zero.T]),
        "scales": torch.from_numpy(layer.scale.T.copy()),
    }


def compressed(layer: Layer, *, dense: bool = True, symmetric: bool = False) -> dict[str, torch.Tensor]:
    """compressed-tensors' tensors; signed codes plus half of their range are the codes themselves."""
    pack = words if dense else padded_words
    found = {
        "weight_packed": tensor([pack(row, layer.bits) for row in layer.codes]),
        "weight_scale": torch.from_numpy(layer.scale),
        "weight_shape": torch.tensor(layer.codes.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = tensor([pack(row, layer.bits) for row in layer.zero.T]).T.contiguous()
    return found


@dataclass
class Model:
    """A model that was written.

    Attributes:
        folder: where.
        reference: transformers' model with the dequantized weights in float32.
        layers: the quantized layers by name.
    """

    folder: Path
    reference: PreTrainedModel
    layers: dict[str, Layer] = field(default_factory=dict)


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    pack: Callable[[Layer], Mapping[str, torch.Tensor]],
    bits: int | Callable[[str], int],
    group_size: int,
    seed: int,
    shape: Mapping[str, int] = MappingProxyType({}),
    **how: Any,
) -> Model:
    """Quantize all linear layers of a block, at random, and save the model as the other tool does."""
    reference = random_model("llama", seed, **(SHAPE | shape))
    state = {name: value.half() for name, value in reference.state_dict().items()}
    reference.load_state_dict({name: value.float() for name, value in state.items()})
    made = Model(folder, reference)
    for number, (name, module) in enumerate(reference.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            own = bits if isinstance(bits, int) else bits(name)
            layer = draw_layer(*module.weight.shape, own, group_size, 100 * seed + number, **how)
            module.weight.data = torch.from_numpy(layer.weight()).float()
            del state[f"{name}.weight"]
            state |= {f"{name}.{suffix}": value for suffix, value in pack(layer).items()}
            made.layers[name] = layer
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    content = reference.config.to_dict() | {
        "architectures": [type(reference).__name__],
        "dtype": "float16",
        "quantization_config": dict(config),
    }
    (folder / "config.json").write_text(json.dumps(content))
    write_tokenizer(folder)
    return made
