"""Memory holds a block and the activations, not the model: shown with a model larger than the process may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quantize.tiny_sources import byte_tokenizer
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.reader import open_checkpoint

# The limit is on what a process may own of memory (heap and private writable mappings), which Linux refuses beyond.
# What stands at its begin, mostly imported libraries, is part of it; room is what the work may take.
PREPARE = """
import json, resource, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.baselines import RoundToNearest
from vllm_matquant.quantize.end_to_end import EndToEndSettings
from vllm_matquant.quantize.hessian import HessianCollector
from vllm_matquant.quantize.pipeline import CalibrationSettings, plan_format, quantize
from vllm_matquant.quantize.resume import WorkFolder
from vllm_matquant.quantize.source import SourceModel

folder, text, room = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) * 2**20
lines = Path("/proc/self/status").read_text().splitlines()
limit = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData")) + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
long_text = torch.zeros(128, 512, dtype=torch.int64)  # its activations are larger than room
"""
# Written shard by shard, a block each, until it is larger than the limit.
WRITE = """
config = AutoConfig.for_model(
    "llama", vocab_size=320, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=8,
    num_hidden_layers=1, tie_word_embeddings=True, max_position_embeddings=512,
)
block = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model.layers[0].state_dict()
others = {"embed_tokens.weight": torch.randn(320, 1024).bfloat16(), "norm.weight": torch.ones(1024).bfloat16()}
size, count, located = 0, 0, {}


def write(tensors, name):
    global size
    save_file(tensors, folder / name)
    size += sum(tensor.nbytes for tensor in tensors.values())
    located.update(dict.fromkeys(tensors, name))


write({f"model.{name}": tensor for name, tensor in others.items()}, "others.safetensors")
while size <= limit:
    rolled = {f"model.layers.{count}.{name}": tensor.roll(count, 0) for name, tensor in block.items()}
    write(rolled, f"{count}.safetensors")
    count += 1
del block, others, rolled
config.num_hidden_layers = count
config.save_pretrained(folder)
(folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": located}))
"""
QUANTIZE = '''
class Calibrated(RoundToNearest):
    """The quickest choice of codes, between all that calibration and training end to end need of memory."""

    needs_calibration = True
    followed_widths = (2,)
    training = EndToEndSettings(up_to=2)

    def quantize_block(self, task):
        hessians = HessianCollector(task.linears)
        with hessians.collecting():
            task.activations.outputs(task.block)
        assert all(name in hessians._owner for name in task.linears)
        for name, linear in task.linears.items():
            yield name, self.quantize(linear.weight, None, task.group_sizes[name], task.decoder_kind)


source, method = SourceModel(folder), Calibrated((2, 8))
settings = CalibrationSettings(text, samples=4, sequence_length=32)
begun = set()
load = WorkFolder.load
WorkFolder.load = lambda self, block, widths_of: begun.add(self.is_trained(2)) or load(self, block, widths_of)
quantize(source, folder / "nested", method, plan_format(source, method, 128, []), settings, activations_on_disk=True)
assert begun == {False, True}  # loaded to be trained, and when that was done
Activations(source.runner, long_text, folder=folder)
print(size, limit)
'''
CONTROL = """
def load():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return sum(parameter.nbytes for parameter in model.parameters())


for attempt in (load, lambda: Activations(SourceModel(folder).runner, long_text)):
    try:
        attempt()
    except (RuntimeError, MemoryError, OSError) as error:
        assert "memory" in str(error), error
    else:
        raise AssertionError("the limit does not bite")
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(load())
"""
ROOT = Path(__file__).parents[2]
ROOM = 240  # MiB: 160 are needed, most of them for 128 of shards; a third of the model


def limited(folder: Path, script: str, text: Path) -> list[int]:
    """Run a script in a process that may not own more than it does at its begin, and room; returns what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", PREPARE + script, folder, text, str(ROOM)],
        # A fixed threshold keeps tensors out of glibc's heap, whose holes count as owned though nothing is in them.
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [int(word) for word in process.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_a_model_larger_than_memory(text_file: Path, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    size, limit = limited(tmp_path, WRITE + QUANTIZE, text_file)
    assert size > limit
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert len(checkpoint.layers) == 7 * read_json(tmp_path / "config.json")["num_hidden_layers"]
    assert limited(tmp_path, CONTROL, text_file) == [size]
