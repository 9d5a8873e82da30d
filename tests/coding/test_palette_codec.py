"""Arrays of few distinct numbers in files: near their entropy, every bit back."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcompress import storage
from jaxcompress.coding import array_codecs, chunked_stream, palette_codec, tables, zstd
from jaxcompress.coding.floats import chunks as float_chunks

RANDOM = np.random.default_rng(3)
COUNT = 100_003
NORMAL = np.rint(RANDOM.normal(0, 5, COUNT))
MASK = RANDOM.random(COUNT) < 0.1
PATTERNS = np.array(
    [0, 0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 1, 0x80000001],
    np.uint32,
)  # both zeros, quiet and signalling NaN with payloads, infinity, subnormals
CASES = {
    "bytes": RANDOM.integers(0, 256, COUNT).astype(np.float32),
    "float32": NORMAL.astype(np.float32),
    "bfloat16": NORMAL.astype(ml_dtypes.bfloat16),
    "float16": NORMAL.astype(np.float16),
    "int32": NORMAL.astype(np.int32),
    "int16": NORMAL.astype(np.int16),
    "int64": NORMAL.astype(np.int64) * 10**15,
    "float64": NORMAL * 0.1,
    "lattice": (RANDOM.integers(0, 16, COUNT) * 0.037).astype(np.float32),
    "ternary": RANDOM.choice([-0.2, 0.0, 0.2], COUNT, p=[0.1, 0.8, 0.1]),
    "constant": np.full(COUNT, 1.5, np.float32),
    "mask": MASK,
    "mask as numbers": MASK.astype(np.float32),
    "patterns": RANDOM.choice(PATTERNS, COUNT).view(np.float32),
}


def entropy(array):
    """Bytes of the numbers' bits at their frequencies."""
    words = array.view(f"u{array.dtype.itemsize}")
    return tables.entropy(np.unique(words, return_counts=True)[1]) / 8


def stream_of(data, array):
    def read(first, last):
        return bytes(data[first:last])

    return array_codecs.open_stream(
        read, len(data), chunked_stream.PALETTE, array.dtype, array.shape
    )


def decoded(data, array):
    return array_codecs.decode(stream_of(data, array), array.dtype)


@pytest.mark.parametrize("name", CASES)
def test_costs_little_more_than_entropy_and_comes_back(name, tmp_path):
    array = CASES[name]
    path = tmp_path / "x.safetensors"
    storage.save(path, {"a": array})
    with storage.open_checkpoint(path) as stored:
        assert stored.nbytes("a") < entropy(array) + 0.1 / 8 * COUNT + 1024
        coding = "zstd" if name == "constant" else "palette"
        assert stored.files()[0].codings["a"] == coding
        for first, last in ((0, COUNT), (7, 8), (COUNT - 3, COUNT), (0, 0)):
            found = stored.rows("a", first, last)
            assert found.tobytes() == array[first:last].tobytes()
    found = storage.load(path, numpy=True)["a"]
    assert found.dtype == array.dtype and found.tobytes() == array.tobytes()


def test_neighbours_share_what_they_have_in_common():
    """Half of every four: 6 patterns of 16, which bits one by one do not show."""
    mask = RANDOM.random((COUNT // 4, 4)).argsort(axis=1) < 2
    data = b"".join(array_codecs.encode(mask, array_codecs.choose(mask)))
    assert 8 * len(data) / mask.size < np.log2(6) / 4 + 0.02
    np.testing.assert_array_equal(decoded(data, mask), mask.reshape(-1))


@pytest.mark.parametrize("distinct", [1, 2, 3, 4, 5, 16, 17, 255, 256])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_all_sizes_and_chunks_come_back(dtype, distinct, monkeypatch):
    """Parts are read alone, also where they end within a byte of places."""
    monkeypatch.setattr(float_chunks, "CHUNK", 1 << 10)
    monkeypatch.setattr(float_chunks, "PIECE", 1 << 8)
    words = RANDOM.permutation(np.iinfo(dtype).max - np.arange(256, dtype=dtype) ** 2)
    words = np.unique(words)[:distinct]
    for count in (1, 2, 7, 127, 1023, 1024, 4099):
        array = RANDOM.choice(words, count)
        data = b"".join(array_codecs.encode(array, chunked_stream.PALETTE))
        np.testing.assert_array_equal(decoded(data, array), array)
        stream = stream_of(data, array)
        for first, last in ((0, 1), (count // 3, count // 2), (count - 1, count)):
            found = array_codecs.decode(stream, dtype, first, last)
            np.testing.assert_array_equal(found, array[first:last])


def test_chunks_that_the_sample_missed_are_kept_otherwise(tmp_path):
    """The other chunks keep their palettes; the array is not left as it is."""
    array = RANDOM.choice(np.float32([0.1, 0.7]), 3 * float_chunks.CHUNK)
    array[1_500_000:1_500_300] = RANDOM.normal(0, 1, 300)
    storage.save(tmp_path / "x", {"a": array})
    with storage.open_checkpoint(tmp_path / "x") as stored:
        assert stored.files()[0].codings == {"a": "palette"}
        assert stored.nbytes("a") < array.size / 8 * 1.9
        found = stored.rows("a", 1_490_000, 1_510_000)
        np.testing.assert_array_equal(found, array[1_490_000:1_510_000])
    found = storage.load(tmp_path / "x", numpy=True)["a"]
    assert found.tobytes() == array.tobytes()


def test_words_that_share_a_slot_are_told_apart(monkeypatch):
    words = RANDOM.integers(0, 200, 5000, np.uint32)  # in one slot under the factor 1
    monkeypatch.setattr(palette_codec, "FACTORS", (1, *palette_codec.FACTORS))
    data = palette_codec.encode(words, 128)
    assert data[:2] == bytes([199, 1])
    out = np.empty_like(words)
    palette_codec.decode(data, 128, out)
    np.testing.assert_array_equal(out, words)
    monkeypatch.setattr(palette_codec, "FACTORS", (1,))
    data = palette_codec.encode(words, 128)
    assert data[:2] == bytes(2)
    palette_codec.decode(data, 128, out)
    np.testing.assert_array_equal(out, words)


def test_more_words_are_not_listed():
    """Weights, and as many distinct words as a list holds and one more."""
    words = np.arange(257, dtype=np.uint32).repeat(20)
    assert palette_codec.fits(words[20:]) and not palette_codec.fits(words)
    assert not palette_codec.fits(RANDOM.normal(0, 1, 5000).view(np.uint64))
    assert (
        array_codecs.choose(RANDOM.normal(0, 1, 5000).astype(np.float32)) == "bfloat16"
    )


def chunk(size=3, share=4, words=None, count=COUNT):
    """Bytes of a chunk of zeros that says so of itself."""
    listed = np.arange(size if words is None else words, dtype="<u4").tobytes()
    packed = np.zeros(-(-count // max(1, share)), np.uint8)
    data = float_chunks.write(float_chunks.encode(packed, palette_codec.BYTES, 512))
    return bytes([size - 1, share]) + listed + data


LIES = {
    "no bytes": (b"", "a chunk of 0 bytes"),
    "two bytes": (bytes([2, 1]), "a chunk of 2 bytes"),
    "share 0": (chunk(share=0), "3 distinct words, 0 places in a byte"),
    "share 3": (chunk(share=3), "3 distinct words, 3 places in a byte"),
    "share 8": (chunk(share=8), "3 distinct words, 8 places in a byte"),
    "a long list": (bytes([255, 1]) + bytes(1000), "256 distinct words in 1000 bytes"),
    "a short list": (chunk(words=2), "a list of numbers is cut off"),
    "more numbers": (chunk(count=COUNT + 4), "words, not 25001"),
    "fewer numbers": (chunk(count=COUNT - 4), "words, not 25001"),
    "no frame": (bytes(2) + bytes(50), "a frame is damaged"),
    "a short frame": (bytes(2) + zstd.compress(np.zeros(9, "u1")), "ends early"),
    "a long frame": (bytes(2) + zstd.compress(np.zeros(COUNT, "u8")), "not end"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie):
    data, words = LIES[lie]
    with pytest.raises(ValueError, match=words):
        palette_codec.decode(data, 512, np.empty(COUNT, np.uint32))


@pytest.mark.parametrize("share", [1, 2, 4])
def test_places_behind_the_list_are_refused(share):
    out = np.empty(COUNT, np.uint32)
    palette_codec.decode(chunk(share=share), 512, out)
    assert not out.any()
    packed = np.zeros(-(-COUNT // share), np.uint8)
    packed[packed.size // 2] = 3 << 8 - 8 // share  # of the last place in a byte
    data = float_chunks.write(float_chunks.encode(packed, palette_codec.BYTES, 512))
    head = bytes([2, share]) + np.arange(3, dtype="<u4").tobytes()
    with pytest.raises(ValueError, match="a place behind the last of 3 distinct"):
        palette_codec.decode(head + data, 512, out)


def test_mutated_chunks_raise_or_give_numbers():
    refused = 0
    for name in ("float32", "lattice", "mask"):
        array = CASES[name][:5000]
        whole = palette_codec.encode(array.view(f"u{array.dtype.itemsize}"), 128)
        for seed in range(150):
            random = np.random.default_rng(seed)
            data = bytearray(whole)
            if seed % 3 == 0:
                data = data[: random.integers(0, len(data))]
            elif seed % 3 == 1:
                data[random.integers(0, 60)] ^= 1 << random.integers(0, 8)
            else:
                data[random.integers(0, len(data))] ^= 1 << random.integers(0, 8)
            try:
                out = np.empty(array.size, f"u{array.dtype.itemsize}")
                palette_codec.decode(bytes(data), 128, out)
            except ValueError:
                refused += 1
    assert refused > 150


def test_a_coding_that_is_not_known_says_what_may_be():
    array = jnp.zeros(9)
    with pytest.raises(ValueError, match=r"'later' here; .* or of a newer"):
        array_codecs.open_stream(lambda i, j: b"", 9, "later", array.dtype, array.shape)


def test_codings_that_are_close_are_tried_on_more():
    """Numbers that repeat, but not within a small sample."""
    rows = np.random.default_rng(0).normal(0, 1, (700, 30)).astype(np.float32)
    array = rows[np.random.default_rng(1).integers(0, 700, 4000)]
    sizes = {
        name: sum(map(len, array_codecs.encode(array, name)))
        for name in ("bfloat16", "zstd")
    }
    assert sizes["zstd"] < 0.9 * sizes["bfloat16"]
    assert array_codecs.choose(array) == "zstd"
