"""Other lossless coders of weights, where they are installed: functions, programs."""

import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

Coder = tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], int]]


def peers(data: bytes, kind: str) -> dict[str, Coder]:
    """Collect other coders that are installed: encode bytes, decode, size."""
    found: dict[str, Any] = {}
    numbers = np.frombuffer(data, jnp.dtype(kind))
    if util.find_spec("zipnn"):
        import zipnn

        nn = zipnn.ZipNN(input_format="byte", bytearray_dtype=kind, threads=1)
        found["ZipNN"] = (nn.compress, nn.decompress, len)
    if util.find_spec("zstandard"):
        import zstandard

        packer, reader = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
        found["zstd 3"] = (packer.compress, reader.decompress, len)
    if util.find_spec("blosc2"):
        import blosc2

        def blosc(data: bytes) -> list[bytes]:
            step = 1 << 27  # its buffers are bounded
            return [
                blosc2.compress2(
                    data[i : i + step],
                    typesize=numbers.itemsize,
                    codec=blosc2.Codec.ZSTD,
                    clevel=5,
                    filters=[blosc2.Filter.SHUFFLE],
                    nthreads=1,
                )
                for i in range(0, len(data), step)
            ]

        def unblosc(parts: list[bytes]) -> bytes:
            return b"".join(blosc2.decompress2(part, nthreads=1) for part in parts)

        found["blosc2"] = (blosc, unblosc, lambda parts: sum(map(len, parts)))
    if util.find_spec("pcodec"):
        from pcodec import ChunkConfig, standalone

        # It has no bfloat16: 16-bit integers that order as the numbers do.
        view = numbers
        if kind == "bfloat16":
            view = np.frombuffer(data, np.int16)
        options = ChunkConfig(compression_level=8)
        found["pcodec"] = (
            lambda _: standalone.simple_compress(view, options),
            lambda coded: standalone.simple_decompress(coded),
            len,
        )
    return found


def programs(tensors: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Run other programs on files: bits per weight, seconds forth and back.

    Bits per weight; processor seconds beyond those that a file of 64 KB takes, which
    are those of their start.
    """
    ways = {
        "lmzip": (
            ["lmz", "compress", "-f", "-q", "-j", "1", "{}/x.safetensors", "{}/x.lmz"],
            ["lmz", "decompress", "-f", "-q", "-j", "1", "{}/x.lmz", "{}/y"],
        ),
        "bigsmall": (
            ["bigsmall", "compress", "{}/x.safetensors", "-o", "{}/x.bs"],
            ["bigsmall", "decompress", "{}/x.bs", "-o", "{}/y"],
        ),
    }
    found = {}
    name, first = next((k, x) for k, x in tensors.items() if x.ndim == 2)
    little = {name: first.reshape(-1)[:4096].reshape(8, 512)}
    for name, commands in ways.items():
        if not shutil.which(commands[0][0]):
            continue
        spent = []
        for given in (little, little, tensors):  # the first time warms caches
            with tempfile.TemporaryDirectory() as folder:
                save_file(given, Path(folder, "x.safetensors"))
                for command in commands:
                    command = [part.format(folder) for part in command]
                    start = _of_children()
                    subprocess.run(command, check=True, capture_output=True)
                    spent.append(_of_children() - start)
                (packed,) = Path(folder).glob("x.[lb]*")
                back = load_file(Path(folder, "y"))
                if not all((back[k] == x).all() for k, x in given.items()):
                    raise ValueError(f"{name} gave back other weights")
                bits = 8 * packed.stat().st_size / sum(x.size for x in given.values())
        found[name] = bits, spent[4] - spent[2], spent[5] - spent[3]
    return found


def _of_children() -> float:
    """Count the processor seconds of processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
