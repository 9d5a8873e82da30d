"""How small does text become, and where do the bytes go?

Encodes the first bytes of a text with one model and several windows, overlaps and
numbers of lanes, with the mixer and without, next to other compressors on the same
bytes. Every row compares the file with the cross entropy of the logits that coded it,
in float32. `--decode 64` decodes the first 64 tokens of each lane
and fails where they differ; `--decode -1` decodes the whole file. Hidden states are
computed once for all rows, and kept in the folder `--store` for later runs.

    python -m experiments.textcoding.ratio reference --settings 512/256/1,512/0/1
    python -m experiments.textcoding.ratio SmolLM2.gguf wikitext2-valid.txt \\
        --settings 2048/1024/1 --decode 64
"""

import bz2
import dataclasses
import gzip
import hashlib
import importlib
import lzma
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock, timed
from jaxcompress import textcoding
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.models.loading import load
from jaxcompress.textcoding import codec, container, mixing, pieces, windows
from jaxcompress.textcoding.fixed_point import Rows
from jaxcompress.tree.compress import compress


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""  # held-out text of the reference model where there is none
    bytes: int = 61440
    settings: str = "512/256/1"  # window/overlap/lanes, separated by commas
    recipe: str = ""  # compress the model first
    primer: str = ""  # a file
    mix: str = "1,0"  # with the mixer, without it
    decode: int = 0  # tokens of each lane
    store: str = ""  # folder of hidden states
    peers: bool = False
    fast: bool = False  # two thousand bytes
    results: str = "experiments/textcoding/results/ratio.jsonl"


ROWS = 64  # hidden states whose logits are held at once


class HiddenStates:
    """Hidden states of batches of tokens, each computed once; and the processor's
    seconds of it.
    """

    def __init__(self, model: Any, folder: str):
        self.digest, self.folder = model.digest, folder
        self.memory: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.used: set[str] = set()
        self.spent = 0.0
        self.compute = windows._hidden

    def __call__(self, model: Any, inputs: np.ndarray) -> Any:
        key = hashlib.sha256(self.digest.encode() + inputs.tobytes()).hexdigest()
        path = Path(self.folder) / f"{key}.npz"
        self.used.add(key)
        if key not in self.memory and self.folder and path.exists():
            stored = np.load(path)
            self.memory[key] = Rows(stored["values"], stored["exponent"])
            self.seconds[key] = float(stored["seconds"])
        if key not in self.memory:
            x, _, self.seconds[key] = timed(lambda: self.compute(model, inputs))
            self.memory[key] = Rows(*map(np.asarray, x))
            self.spent += self.seconds[key]
            if self.folder:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
                np.savez(path, seconds=self.seconds[key], **self.memory[key]._asdict())
        return self.memory[key]


def run(config: Config) -> list[dict[str, Any]]:
    """Code a text by each setting and compressor; a row for each."""
    if config.fast:
        config = dataclasses.replace(config, bytes=500, settings="64/32/2", decode=9)
    text = Path(config.text).read_bytes() if config.text else b""
    data = (text or heldout_text().encode())[: config.bytes]
    text_name = Path(config.text).name or "heldout"
    results = Results(config, experiment="ratio", text=text_name, bytes=len(data))
    if config.peers or config.fast:
        for row in other_compressors(data):
            results.add(row)
    if not config.settings:
        return results.rows
    model, params, tokenizer = load(config.model, scan=False)
    if config.recipe:
        params = compress(params, config.recipe)
    settings = [tuple(map(int, x.split("/"))) for x in config.settings.split(",")]
    context = max(2048, max(window for window, _, _ in settings))
    exact = textcoding.exact(model, params, context=context)
    primer = Path(config.primer).read_bytes() if config.primer else b""
    hidden = windows._hidden = HiddenStates(exact, config.store)
    try:
        for window, overlap, lanes in settings:
            for mix in map(int, config.mix.split(",")):
                hidden.used, hidden.spent = set(), 0.0
                options = {"window": window, "overlap": overlap, "lanes": lanes}
                row = {"coder": Path(config.model).name, "recipe": config.recipe}
                if Path(config.model).is_file():
                    row["model_bytes"] = Path(config.model).stat().st_size
                row |= {**options, "mix": bool(mix), "primer": len(primer)}
                options |= {"mix": bool(mix), "primer": primer}
                row |= measure(data, exact, tokenizer, options, config.decode, hidden)
                results.add(row)
    finally:
        windows._hidden = hidden.compute
    return results.rows


def measure(
    data: bytes,
    exact: Any,
    tokenizer: Any,
    options: dict[str, Any],
    decode: int,
    hidden: HiddenStates,
) -> dict[str, Any]:
    """Return bytes of the file, its entropy, and seconds of both directions."""
    bits: list[float] = []
    code = windows._intervals

    def coded(model: Any, x: Any, order: Any, targets: Any, *rest: Any) -> Any:
        begin, end, mixer = rest
        copy = jax.tree.map(jnp.copy, mixer)  # the other is donated
        bits.append(float(surprise(model, x, order, targets, begin, end, copy)))
        return code(model, x, order, targets, *rest)

    arguments = (data, exact, None, tokenizer)
    file, seconds, processor_seconds = timed(
        lambda: textcoding.encode(*arguments, **options, verify=False)
    )
    computed = sum(hidden.seconds[key] for key in hidden.used)
    processor_seconds -= hidden.spent
    windows._intervals = coded
    try:
        again = textcoding.encode(*arguments, **options, verify=False, store=False)
    finally:
        windows._intervals = code
    lanes = options["lanes"]
    allowed = 1.001 * sum(bits) / 8 + 96 + 10 * lanes
    row = {
        "file_bytes": len(file),
        "bits_per_byte": 8 * len(file) / len(data),
        "encode_seconds": seconds,
        "hidden_processor_seconds": computed,
        "other_processor_seconds": processor_seconds,
        "entropy_bytes": sum(bits) / 8,
        "coded_bytes": len(again),
        "within": len(again) <= allowed,
    }
    if decode:
        row |= decoded(again, data, exact, tokenizer, options, decode)
    return row


def decoded(
    file: bytes,
    data: bytes,
    exact: Any,
    tokenizer: Any,
    options: dict[str, Any],
    most: int,
) -> dict[str, Any]:
    """Decode the first tokens of each lane, or all of them; compare, and time."""
    contents = container.read(file)
    ids = pieces.to_pieces(tokenizer, data).ids
    texts = [
        ids[i : i + contents.lane_tokens]
        for i in range(0, len(ids), contents.lane_tokens)
    ]
    if any(lane.kind != container.TOKENS for lane in contents.lanes[:-1]):
        raise ValueError("a lane has escapes; decode the whole file with the codec")
    last = contents.lanes[-1].payload
    if contents.lanes[-1].kind == container.MIXED:
        reader = container.Reader(last)
        container.read_escapes(reader, reader.varint())
        last = last[reader.position :]
    payloads = [*[lane.payload for lane in contents.lanes[:-1]], last]
    most = max(map(len, texts)) if most < 0 else most
    wide, seconds, processor_seconds = exact.widen(), 0.0, 0.0
    primer = codec._primer_ids(tokenizer, options["primer"], options["window"])
    for limit in (2, most):  # the first compiles
        clock = Clock()
        tokens = windows.decode_windows(
            wide,
            payloads,
            [len(text) for text in texts],
            contents.first_token,
            contents.window,
            contents.overlap,
            primer,
            contents.mix,
            limit=limit,
        )
        seconds, processor_seconds = clock.seconds, clock.processor_seconds
        for own, text in zip(tokens, texts, strict=True):
            if own != text[:limit]:
                raise ValueError("the text did not come back")
    parts = [tokenizer.pieces[i] for own in tokens for i in own]
    return {
        "decoded_tokens": sum(map(len, tokens)),
        "decoded_bytes": len(b"".join(parts)),
        "decode_seconds": seconds,
        "decode_processor_seconds": processor_seconds,
    }


@jax.jit
def surprise(
    model: Any, x: Any, order: Any, targets: Any, begin: Any, end: Any, mixer: Any
) -> jax.Array:
    """Compute the bits of targets `begin` to `end`, as `windows._intervals` does."""

    order, targets = (jnp.pad(y, (0, ROWS)) for y in (order, targets))

    def some(carry: Any) -> Any:
        begin, mixer, total = carry
        rows = jax.lax.dynamic_slice(order, (begin,), (ROWS,))
        logits = model.logits(jax.tree.map(lambda y: y[rows][None], x))[0]

        def one(i: Any, carry: Any) -> Any:
            mixer, (high, low) = carry
            target, mixed = targets[begin + i], logits[i]
            if mixer is not None:
                mixed, matches = mixing.mix(mixer, logits[i])
                mixer = mixing.learn(mixer, logits[i], mixed, matches, target)
            centered = (mixed - jnp.max(mixed)) * (math.log(2) / 4096)
            bits = -jax.nn.log_softmax(centered)[target] / math.log(2)
            # Compensated, so that a long sum of float32 keeps its last bits.
            total = high + bits
            return mixer, (total, low + (bits - (total - high)))

        count = jnp.minimum(end - begin, ROWS)
        return begin + ROWS, *jax.lax.fori_loop(0, count, one, (mixer, total))

    zero = jnp.float32(0)
    carry = (begin, mixer, (zero, zero))
    carry = jax.lax.while_loop(lambda carry: carry[0] < end, some, carry)
    return sum(carry[2])


def other_compressors(data: bytes) -> list[dict[str, Any]]:
    """Run the compressors that this machine has, at their best settings."""
    named = {
        "gzip -9": lambda: gzip.compress(data, 9),
        "bzip2 -9": lambda: bz2.compress(data, 9),
        "xz -9e": lambda: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "zstd -19": lambda: zstandard.ZstdCompressor(level=19).compress(data),
        "brotli 11": lambda: importlib.import_module("brotli").compress(data),
        "ppmd H, order 16": lambda: importlib.import_module("pyppmd").compress(
            data, max_order=16, mem_size=1 << 28, variant="H"
        ),
        "zpaq -m5": lambda: outside(data, "zpaq"),
    }
    rows = []
    for name, run_one in named.items():
        clock = time.perf_counter()
        try:
            size = len(run_one())
        except (ImportError, FileNotFoundError):
            continue
        rows.append(
            {
                "coder": name,
                "file_bytes": size,
                "bits_per_byte": 8 * size / len(data),
                "encode_seconds": time.perf_counter() - clock,
            }
        )
    return rows


def outside(data: bytes, program: str) -> bytes:
    """Run zpaq's strongest method; its archive."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_bytes(data)
        command = [program, "add", "text.zpaq", "text", "-m5"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return (Path(folder) / "text.zpaq").read_bytes()


if __name__ == "__main__":
    run(parse(Config, __doc__))
