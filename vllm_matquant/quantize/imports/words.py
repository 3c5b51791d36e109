"""Codes in words of 32 bits, as other tools pack them: each function takes them apart along the last dimension."""

from __future__ import annotations

import torch

from vllm_matquant.checkpoint.packing import PACKED_CODES, unpack_field

WORD_BITS = 32
_CODES = 32  # that a block of planes holds
# GPTQModel's planes of a code: bits of each, from the least significant.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
PLANE_WIDTHS = tuple(_PLANES)


def words_of(count: int, bits: int) -> int:
    """Words of a dense stream of ``count`` codes."""
    return -(-count * bits // WORD_BITS)


def padded_words_of(count: int, bits: int) -> int:
    """Words of ``count`` codes of which none lies in two words."""
    return -(-count // (WORD_BITS // bits))


def plane_words_of(count: int, bits: int) -> int:
    """Words of ``count`` codes in planes."""
    return -(-count // _CODES) * bits


def unpack_stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes one after the other, the first in the least significant bits; one may lie in two words.

    Args:
        words: int32 [rows, words_of(count, bits)].
        bits: 2 to 8.
        count: of codes.

    Returns:
        uint8 [rows, count].
    """
    parts = words.contiguous().split(max(1, PACKED_CODES // max(1, count)))
    return torch.cat([unpack_field(part.view(torch.uint8), bits, count) for part in parts])


def unpack_padded(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """As many whole codes as a word has room for; the bits that are left over are not used.

    Args:
        words: int32 [rows, padded_words_of(count, bits)].
        bits, count: see :func:`unpack_stream`.

    Returns:
        uint8 [rows, count].
    """
    shifts = bits * torch.arange(WORD_BITS // bits, dtype=torch.int32)
    # An arithmetic shift fills in the sign, which the mask cuts off: no code reaches past the word's last bit.
    parts = words.split(max(1, PACKED_CODES // max(1, count)))
    codes = [((part[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1) for part in parts]
    return torch.cat(codes)[:, :count]


def unpack_planes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """GPTQModel's planes (``gptq_p``): of each 32 codes first the low bits of all, then the higher ones.

    Args:
        words: int32 [rows, plane_words_of(count, bits)].
        bits, count: see :func:`unpack_stream`.

    Returns:
        uint8 [rows, count].
    """
    blocks = words.unflatten(1, (-1, bits))
    codes = torch.zeros(len(words), blocks.shape[1] * _CODES, dtype=torch.uint8)
    first = offset = 0
    for width in _PLANES[bits]:
        plane = blocks[:, :, first : first + width].flatten(1)
        codes |= unpack_stream(plane, width, codes.shape[1]) << offset
        first, offset = first + width, offset + width
    return codes[:, :count]


def add_one(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words with one added to each code, a carry going to the code after it; the bits divide the word's.

    Args:
        words: int32 of any shape.
        bits: 2, 4 or 8.
    """
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
    return (words.long() + ones).to(torch.int32)  # modulo 2^32
