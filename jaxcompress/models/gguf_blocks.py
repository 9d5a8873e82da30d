"""Blocks of GGUF's quantized types, packed from integers and unpacked to them.

A block is 32 weights of one row and a float16 scale `d`: Q8_0 stores int8 `q`, Q4_0
four bits `q + 8`, Q4_1 four bits `q` and a float16 offset `m`; a weight is `d q`, or
`d q + m`. Source: ggml-org/llama.cpp, `ggml-common.h` and `ggml-quants.c`.
"""

import numpy as np

BLOCK = 32


def pack_q8_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Pack int8 `[rows, columns]` and float16 `[rows, columns / 32]` to bytes."""
    blocks = codes.astype(np.int8).reshape(*scale.shape, BLOCK)
    return _join(_bytes(scale), blocks.view(np.uint8))


def unpack_q8_0(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack bytes `[rows, blocks * 34]` to int8 codes and float16 scales."""
    blocks = _blocks(data, 2 + BLOCK)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return codes.reshape(len(data), -1), _halves(blocks[..., :2])


def pack_q4_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Pack codes of -8 to 7 `[rows, columns]` and float16 scales to bytes."""
    return _join(_bytes(scale), _nibbles(codes.astype(np.int16) + 8, scale.shape))


def unpack_q4_0(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack bytes `[rows, blocks * 18]` to int8 codes of -8 to 7 and scales."""
    blocks = _blocks(data, 2 + BLOCK // 2)
    codes = _from_nibbles(blocks[..., 2:]).astype(np.int8) - np.int8(8)
    return codes.reshape(len(data), -1), _halves(blocks[..., :2])


def pack_q4_1(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Pack codes of 0 to 15, float16 scales and float16 offsets to bytes."""
    return _join(_bytes(scale), _bytes(offset), _nibbles(codes, scale.shape))


def unpack_q4_1(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unpack bytes `[rows, blocks * 20]` to codes of 0 to 15, scales and offsets."""
    blocks = _blocks(data, 4 + BLOCK // 2)
    codes = _from_nibbles(blocks[..., 4:]).reshape(len(data), -1)
    return codes, _halves(blocks[..., :2]), _halves(blocks[..., 2:4])


def _nibbles(codes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the first half of a block in the low bits, the second in the high ones."""
    low, high = np.split(codes.astype(np.uint8).reshape(*shape, BLOCK), 2, axis=-1)
    return low | high << np.uint8(4)


def _from_nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _join(*parts: np.ndarray) -> np.ndarray:
    """Return bytes `[rows, blocks, *]` of each block in sequence, as `[rows, *]`."""
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(len(joined), -1)


def _blocks(data: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1, size)


def _bytes(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers.astype("<f2"))[..., None].view(np.uint8)


def _halves(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float16)
