"""AutoRound's own format: by ``packing_format`` GPTQ's packing, or AWQ's.

Symmetric codes have GPTQ's packing of version 1 ("auto_round:auto_gptq"), asymmetric ones of 4 bits AWQ's, and others
("auto_round") GPTQ's with their zero points as they are. Scales of symmetric codes are signed, half of them negative.
"""

from __future__ import annotations

from vllm_matquant.quantize.imports.awq import AWQ
from vllm_matquant.quantize.imports.fields import Fields
from vllm_matquant.quantize.imports.gptq import GPTQ
from vllm_matquant.quantize.imports.layer import Layout

_AWQ = "auto_round:auto_awq"
_AS_THEY_ARE = "auto_round"
_LESS_ONE = ("auto_round:auto_gptq", "auto_round:gptqmodel")


def layout_of_auto_round(fields: Fields) -> Layout:
    """From ``quantization_config``.

    Raises:
        ConfigError: a field is missing or of another value than this reads.
    """
    fields.refuse("rotation_config")
    fields.one_of(("data_type",), ("int",), "int")
    if fields.get("act_bits", default=16) < 16:
        raise fields.fail("act_bits", "16: activations that are not quantized")
    packing = fields.one_of(("packing_format",), (*_LESS_ONE, _AWQ, _AS_THEY_ARE), None)
    if packing == _AWQ:
        return AWQ.of(fields)
    return GPTQ(
        fields.bits("bits"),
        fields.group_size("group_size"),
        own_bits=bool(fields.get("extra_config")),
        less_one=packing != _AS_THEY_ARE,
        name=f"auto-round, {packing}",
    )
