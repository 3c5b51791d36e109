"""The source model that slices of a checkpoint are measured against."""

from __future__ import annotations

from pathlib import Path

from vllm_matquant.checkpoint.errors import TensorShapeError
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.quantize.source import SourceModel, locate


def locate_reference(model: str, checkpoint: Checkpoint) -> Path:
    """The folder of the model that a checkpoint was made from.

    transformers would give a parameter that is in no file random values, and run a model of another shape.

    Args:
        model: a folder, or a name on the hub.
        checkpoint: made from it.

    Raises:
        CheckpointError: there is no such model, it is quantized or not whole, or its parameters are not those of the
            model that the checkpoint holds.
    """
    folder = locate(model)
    found = SourceModel(folder).skeleton.parameters
    expected = build_skeleton(checkpoint.config, checkpoint.folder / CONFIG_FILE).parameters
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            shapes = [str(list(each[name])) if name in each else "no such parameter" for each in (found, expected)]
            raise TensorShapeError(
                folder,
                f"shape of {name}",
                shapes[0],
                f"{shapes[1]} as in {checkpoint.folder}: the model it is made from",
            )
    return folder
