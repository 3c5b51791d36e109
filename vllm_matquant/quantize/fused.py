"""The layers that vLLM computes as one, which need one setting for all of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator

from vllm_matquant.checkpoint.skeleton import Skeleton
from vllm_matquant.checkpoint.spec import Format

# The parts of what vLLM's model classes fuse (their packed_modules_mapping), by the usual names: a checkpoint is made
# where there may be no vLLM, and is to be served by any.
FUSED_PARTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+")


def check_fused(skeleton: Skeleton, format_: Format, *, options: bool = True) -> None:
    """Refuse settings that differ between the parts of a layer that vLLM fuses, or of experts that are part quantized.

    Args:
        skeleton: of the model.
        format_: what is quantized of it, and how.
        options: whether to name the options that make them the same.

    Raises:
        ValueError: one part is ignored and another one not, or has another group size or other widths; or some
            experts of a mixture are ignored and others not.
    """
    quantized = skeleton.quantized_layers(format_)
    settings: dict[str, Callable[[str], object]] = {
        "ignore": lambda name: "quantized" if name in quantized else "ignored",
        "group-size-for": format_.group_size_setting,
        "bits-for": lambda name: ",".join(map(str, format_.widths_of(name))),
    }
    for parent, parts in _fused(skeleton):
        for option, setting_of in settings.items():
            found = {part: setting_of(f"{parent}.{part}") for part in parts}
            if len(set(found.values())) > 1:
                told = ", ".join(f"{part} {setting}" for part, setting in found.items())
                cure = f". Give --{option} an expression that matches all of them, such as '({'|'.join(parts)})'"
                raise ValueError(
                    f"{option}: found for {parent} {told}, expected the same for {' and '.join(parts)}, which vLLM "
                    f"computes as one layer{cure if options else ''}"
                )
    for experts, names in _mixtures(skeleton).items():
        ignored = [name for name in names if name not in quantized]
        if 0 < len(ignored) < len(names):
            cure = f". Give --ignore an expression that matches all, such as '{experts}'"
            raise ValueError(
                f"ignore: found {len(ignored)} of the {len(names)} layers of {experts}, such as {ignored[0]}, expected "
                f"all or none of them, which vLLM computes as one layer{cure if options else ''}"
            )


def _mixtures(skeleton: Skeleton) -> dict[str, list[str]]:
    """The experts of each block, and the names of their layers."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in skeleton.linears:
        if match := _EXPERT.fullmatch(name):
            found[match[1]].append(name)
    return found


def _fused(skeleton: Skeleton) -> Iterator[tuple[str, list[str]]]:
    """Each module with layers that are fused, and their names within it."""
    children: defaultdict[str, set[str]] = defaultdict(set)
    for name in skeleton.linears:
        parent, _, child = name.rpartition(".")
        children[parent].add(child)
    for parent, names in children.items():
        for parts in FUSED_PARTS:
            present = [part for part in parts if part in names]
            if len(present) > 1:
                yield parent, present
