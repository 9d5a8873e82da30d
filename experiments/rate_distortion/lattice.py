"""Without any data: an E8 lattice coder compared with our own variants.

Eight consecutive inputs of an output are rounded to the nearest point of a scaled E8
(Conway and Sloane 1982, "Fast quantizing and decoding algorithms for lattice
quantizers"); which of its two cosets, and the coordinates given it, are coded by rANS.
One step a matrix, found by bisection for a rate. Beside it `asymmetric`, and
`rate_distortion` without moments: rounding, and its trellis. Kernels only, the rest
stays float; nothing is calibrated. One JSON line per row; rows that the results hold
are left out:

    python -m experiments.rate_distortion.lattice
    python -m experiments.rate_distortion.lattice all-MiniLM-L6-v2 text.txt
    python -m experiments.rate_distortion.lattice SmolLM2.gguf text.txt --bits 2 3 \\
        --tokens 512 --windows 8
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock
from experiments.quantization.calibrated import stored
from experiments.rate_distortion.original import KERNELS, encoder, language
from jaxcompress.coding import rans, tables
from jaxcompress.tree.equality import same_bits
from jaxcompress.tree.paths import roots

METHODS = {
    "nearest": "asymmetric(bits={bits}, block=64, search=True)",
    "rounding": "rate_distortion(rate={bits}, states=0)",
    "trellis": "rate_distortion(rate={bits}, states={states})",
}
CLASSES = 8  # of outputs, by their size: each has its own tables
SIDE = 64  # bits of a stream: lowest symbol, number of columns, lanes, steps


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    bits: tuple[int, ...] = (4, 3, 2)
    variants: str = ";".join(("E8", *METHODS))
    states: int = 128
    also: str = "docstrings,plays"  # further texts to measure on
    calibration: int = 16  # windows, or batches of sentences, that nothing is fitted to
    curvature: int = 16
    windows: int = 32  # of each text
    sentences: int = 2000
    tokens: int = 256  # in a window
    length: int = 64  # pieces of a sentence
    fast: bool = False  # the reference model at 3 bits, little text
    results: str = "experiments/rate_distortion/results/lattice.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the bits and variants that the results lack; a row for each text."""
    if config.fast:
        config = dataclasses.replace(
            config,
            model="reference",
            bits=(3,),
            variants="E8;rounding;trellis",
            states=8,
            also="docstrings",
            windows=4,
        )
    subject = encoder(config) if Path(config.model).is_dir() else language(config)
    model = Path(config.model).name
    results = Results(config, model=model)
    for bits in config.bits:
        for variant in config.variants.split(";"):
            label = {"variant": variant, "bits": bits}
            if results.holds(model=model, **label):
                continue
            clock = Clock()
            if variant == "E8":
                ready, size = compress(subject.params, bits)
                about = {"bits_per_compressed_weight": size}
            else:
                method = METHODS[variant].format(bits=bits, states=config.states)
                layouts = {
                    name: jc.Layout(stack=(0,), inputs=(1,), outputs=(2,))
                    for name, x in roots(subject.params)
                    if name.endswith("kernel") and x.ndim == 3  # of scanned layers
                }
                recipe = [(KERNELS, method)]
                small = jc.compress(subject.params, recipe, layouts=layouts)
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "small.safetensors"
                    jc.save(path, small)
                    loaded = jc.load(path)
                    if not same_bits(small, loaded):
                        raise ValueError(f"{variant}: the file holds other bits")
                    about = stored(path, loaded)
                ready = jax.jit(jc.materialize)(loaded)
            about["compress_processor_seconds"] = clock.processor_seconds
            for row in subject.judge(ready):
                results.add({**label, **row, **about})
    return results.rows


def compress(params: Any, rate: float) -> tuple[Any, float]:
    """Round all kernels to E8 at a rate: the parameters, and bits of a weight."""
    sizes, weights = [], 0

    def one(path: Any, x: jax.Array) -> jax.Array:
        nonlocal weights
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("kernel"):
            flat = np.asarray(x, np.float32).reshape(-1, *x.shape[-2:])
            found = [at_rate(each, rate) for each in flat]
            sizes.extend(bits for _, bits in found)
            weights += x.size
            return jnp.asarray(np.stack([each for each, _ in found]).reshape(x.shape))
        return x

    return jax.tree_util.tree_map_with_path(one, params), sum(sizes) / weights


def nearest_point(x: np.ndarray) -> np.ndarray:
    """Find the nearest points of E8 to `[..., 8]`.

    E8 is D8, integers of an even sum, and D8 moved by a half.
    """
    points = [nearest_even(x - shift) + shift for shift in (0.0, 0.5)]
    errors = [np.square(x - each).sum(axis=-1, keepdims=True) for each in points]
    return np.where(errors[0] <= errors[1], *points)


def nearest_even(x: np.ndarray) -> np.ndarray:
    """Find the nearest integers of an even sum: the worst is rounded the other way."""
    rounded = np.rint(x)
    odd = (rounded.sum(axis=-1) % 2).astype(bool)
    error = x - rounded
    worst = np.abs(error).argmax(axis=-1)[..., None]
    step = np.where(np.take_along_axis(error, worst, axis=-1) >= 0, 1, -1)
    other = np.take_along_axis(rounded, worst, axis=-1) + step
    changed = rounded.copy()
    np.put_along_axis(changed, worst, other, axis=-1)
    return np.where(odd[..., None], changed, rounded)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Symbols of one kind, coded.

    Args:
        coded: words and lanes.
        frequencies: of each table, `[tables, columns]`.
        lowest: the symbol of the first column.
        steps: symbols of a lane.
    """

    coded: rans.Stream
    frequencies: np.ndarray
    lowest: int
    steps: int

    @property
    def bits(self) -> float:
        """Count words, a state and a place for each lane, and the tables.

        A table takes 12 bits for each column that occurs.
        """
        words, starts, _, states = self.coded
        columns = np.count_nonzero(self.frequencies)
        coded = 8 * (words.nbytes + starts.nbytes + states.nbytes)
        return coded + rans.PRECISION * columns + SIDE


def kinds_of(
    coset: np.ndarray, classes: np.ndarray, first: np.ndarray | None = None
) -> np.ndarray:
    """Number the tables of coordinates, by class and coset; the last, by parity too."""
    kinds = 2 * classes + coset
    return kinds if first is None else 2 * kinds + first.sum(axis=0) % 2


def code(points: np.ndarray, classes: np.ndarray) -> list[Stream]:
    """Code points of E8 as cosets, seven coordinates, and half of the last one.

    The last coordinate's parity is that of the sum of the others.

    Args:
        points: `[groups, outputs, 8]`.
        classes: of the outputs, `[outputs]`, from 0 on.
    """
    coset, first, last = split(points)
    kinds = kinds_of(coset, classes)
    return [
        coded(coset, np.broadcast_to(classes, coset.shape)),
        coded(first, np.broadcast_to(kinds, first.shape)),
        coded(last, kinds_of(coset, classes, first)),
    ]


def split(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return cosets, seven coordinates `[7, groups, outputs]`, and half of the last."""
    coset = (points[..., 0] % 1 != 0).astype(np.int64)
    whole = (points - coset[..., None] / 2).astype(np.int64)
    first = np.moveaxis(whole[..., :7], -1, 0)
    return coset, first, (whole[..., 7] - first.sum(axis=0) % 2) // 2


def decode(streams: list[Stream], classes: np.ndarray, groups: int) -> np.ndarray:
    """Return the points `[groups, outputs, 8]` that were coded."""
    shape = groups, classes.size
    coset = decoded(streams[0], np.broadcast_to(classes, shape))
    kinds = kinds_of(coset, classes)
    first = decoded(streams[1], np.broadcast_to(kinds, (7, *shape)))
    last = decoded(streams[2], kinds_of(coset, classes, first))
    last = 2 * last + first.sum(axis=0) % 2
    return (
        np.moveaxis(np.concatenate([first, last[None]]), 0, -1) + coset[..., None] / 2
    )


def coded(symbols: np.ndarray, kinds: np.ndarray) -> Stream:
    """Code symbols, each with the table of its kind."""
    lowest, lanes = int(symbols.min()), rans.count_lanes(symbols.size)
    columns = symbols - lowest
    counts = histograms(columns, kinds)
    frequencies = np.stack([tables.normalize(row) for row in counts])
    likely = int(counts[0].argmax())  # fills the last step
    laid = in_lanes(columns, lanes, likely), in_lanes(kinds, lanes, 0)
    stream = rans.encode(laid[0], frequencies, laid[1])
    return Stream(stream, frequencies, lowest, laid[0].shape[0])


def decoded(stream: Stream, kinds: np.ndarray) -> np.ndarray:
    """Return the symbols of a stream, in the shape of their kinds."""
    frequencies = stream.frequencies
    values = np.broadcast_to(np.arange(frequencies.shape[1]), frequencies.shape)
    found = rans.decode_on_host(
        stream.coded,
        frequencies,
        values.astype(np.int32),
        in_lanes(kinds, stream.coded.states.size, 0),
        steps=stream.steps,
    )
    return found.ravel()[: kinds.size].reshape(kinds.shape) + stream.lowest


def in_lanes(x: np.ndarray, lanes: int, fill: int) -> np.ndarray:
    """Lay numbers out as `[steps, lanes]`, the last step filled up."""
    flat = np.append(x.ravel(), np.full(-x.size % lanes, fill))
    return flat.reshape(-1, lanes)


def histograms(columns: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Count the symbols of each table: `[tables, columns]`."""
    width, count = int(columns.max()) + 1, int(kinds.max()) + 1
    both = np.bincount((kinds * width + columns).ravel(), minlength=count * width)
    return both.reshape(count, width)


def estimate(points: np.ndarray, classes: np.ndarray) -> float:
    """Count the bits of all streams at the entropy of each table."""
    coset, first, last = split(points)
    kinds = kinds_of(coset, classes)
    pairs = [
        (coset, np.broadcast_to(classes, coset.shape)),
        (first, np.broadcast_to(kinds, first.shape)),
        (last, kinds_of(coset, classes, first)),
    ]
    return sum(
        tables.entropy(row) for x, k in pairs for row in histograms(x - x.min(), k)
    )


def at_rate(x: np.ndarray, rate: float) -> tuple[np.ndarray, float]:
    """Round a matrix `[inputs, outputs]` at bits per weight: its values, and its bits.

    Eight classes of outputs, or one, whichever takes less.
    """
    inputs, outputs = x.shape
    groups = np.moveaxis(x.reshape(inputs // 8, 8, outputs), 1, -1)
    order = np.argsort(np.argsort(np.square(x).sum(axis=0), kind="stable"))
    found = []
    for number in (1, CLASSES):
        classes = order * number // outputs
        side = outputs * np.log2(number)
        sample = slice(None, None, max(1, x.size // 2**17))  # outputs
        low, high = -20.0, 4.0  # of the step's logarithm, over the deviation
        size = float(x.std())
        part = groups[:, sample], classes[sample]
        for _ in range(14):
            middle = (low + high) / 2
            points = nearest_point(part[0] / (size * 2**middle))
            over = estimate(points, part[1]) > rate * part[0].size
            low, high = (middle, high) if over else (low, middle)
        step = np.float32(size * 2**high)
        points = nearest_point(groups / step)
        bits = side + sum(stream.bits for stream in code(points, classes))
        values = np.moveaxis(step * points, -1, 1).reshape(inputs, outputs)
        found.append((np.square(values - x).sum() * 4 ** (bits / x.size), values, bits))
    _, values, bits = min(found, key=lambda each: each[0])
    return values, bits


if __name__ == "__main__":
    run(parse(Config, __doc__))
