#!/usr/bin/env bash
# CUDA 13.0: `__byte_perm(x, y, selector)` is not the instruction `prmt` that it compiles to.
#
# Of each of prmt's selectors the fourth bit asks for the chosen byte's sign in all eight bits (PTX ISA, prmt, default
# mode): what spreads signs over bytes. The intrinsic takes three bits: the compiler clears the fourth one, of a constant
# while it compiles and of a variable by an instruction of its own, without a warning. So signs want inline PTX, and a
# variable selector that is known to have no such bit costs an instruction less there too.
#
# Seen with nvidia-cuda-nvcc 13.0.88, nvidia-cuda-runtime 13.0.96, for sm_80; no GPU is needed:
#     __byte_perm, selector 0xba98: prmt with 0x3210
#     __byte_perm, a variable selector: and with 0x7777, then prmt
#     asm prmt, selector 0xba98: prmt with 0xba98
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96
cat >"$folder/selectors.cu" <<'CUDA'
extern "C" __global__ void constant(unsigned* out, unsigned x, unsigned y) { *out = __byte_perm(x, y, 0xba98); }
extern "C" __global__ void variable(unsigned* out, unsigned x, unsigned y, unsigned selector) {
    *out = __byte_perm(x, y, selector);
}
extern "C" __global__ void instruction(unsigned* out, unsigned x, unsigned y) {
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(*out) : "r"(x), "r"(y), "r"(0xba98));
}
CUDA
nvcc=$(find "$folder/venv" -path '*/bin/nvcc')
"$nvcc" --ptx -arch=sm_80 -o "$folder/selectors.ptx" "$folder/selectors.cu"
"$folder/venv/bin/python" - "$folder/selectors.ptx" >"$folder/found" <<'PYTHON'
import re
import sys

kernels = dict(re.findall(r"\.entry (\w+)\(.*?\{(.*?)\n\}", open(sys.argv[1]).read(), re.DOTALL))


def constants(name, opcode):
    """The constants that a kernel's instructions of this kind are given, also through a register."""
    registers = dict(re.findall(r"mov\.[ub]32\s+(%r\d+), (\d+);", kernels[name]))
    [line] = re.findall(rf"{opcode}\.b32\s+(.*?);", kernels[name])
    words = [registers.get(word, word) for word in line.split(", ")[1:]]
    return [hex(int(word)) for word in words if word.isdigit()]


print(f"__byte_perm, selector 0xba98: prmt with {', '.join(constants('constant', 'prmt'))}")
assert constants("variable", "prmt") == []
print(f"__byte_perm, a variable selector: and with {', '.join(constants('variable', 'and'))}, then prmt")
print(f"asm prmt, selector 0xba98: prmt with {', '.join(constants('instruction', 'prmt'))}")
PYTHON
diff - "$folder/found" <<'EXPECTED'
__byte_perm, selector 0xba98: prmt with 0x3210
__byte_perm, a variable selector: and with 0x7777, then prmt
asm prmt, selector 0xba98: prmt with 0xba98
EXPECTED
cat "$folder/found"
