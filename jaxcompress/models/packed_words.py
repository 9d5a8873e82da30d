"""Codes of 1, 2, 4 or 8 bits in 32-bit words, as compressed-tensors packs them.

Each row is a little-endian bit stream: the first code is in the lowest bits of the
first word. Source: compressed-tensors 0.20, `pack_to_int32`.
"""

import numpy as np

WIDTHS = (1, 2, 4, 8)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes `[rows, columns]` to int32 `[rows, ceil(columns bits / 32)]`.

    The last word of a row is filled up with zeros.

        pack_words(np.arange(8, dtype=np.uint8)[None], 4)  # [[0x76543210]]
    """
    _check(bits)
    per_byte = 8 // bits
    rows, columns = codes.shape
    codes = np.pad(codes.astype(np.uint8), [(0, 0), (0, -columns % (4 * per_byte))])
    codes = codes.reshape(rows, -1, per_byte)
    packed = codes[:, :, 0].copy()
    for i in range(1, per_byte):
        packed |= codes[:, :, i] << np.uint8(i * bits)
    return packed.view("<i4").astype(np.int32, copy=False)


def unpack_words(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Unpack int32 `[rows, words]` to uint8 codes `[rows, columns]`."""
    _check(bits)
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[:, :, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(words), -1)[:, :columns]


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(
            f"{bits} bits per code; words of one layout hold codes of "
            f"{', '.join(map(str, WIDTHS))} bits"
        )
