"""Coded floats and words: every bit back, small, decoded in blocks and chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lossless_checks import check, decode, entropy_bytes, reload

import jaxcompress as jc
from jaxcompress.coding import (
    CodedFloats,
    CodedWords,
    chunked_stream,
    code_floats,
    entropy_code,
    record,
    zstd,
    zstd_literals,
)
from jaxcompress.coding.floats import (
    block_classes,
)
from jaxcompress.coding.floats import (
    chunks as float_chunks,
)
from jaxcompress.coding.floats import (
    leaf as coded_words,
)
from jaxcompress.coding.floats.leaf import code_words
from jaxcompress.coding.integers.leaf import stored_bytes
from jaxcompress.tree.leaf import dense, is_leaf, static_fields

RANDOM = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same, whichever ran before it."""
    global RANDOM
    RANDOM = np.random.default_rng(7)


def gaussian(shape, deviation, low, high, dtype):
    values = np.rint(RANDOM.normal((low + high) / 2, deviation, shape))
    return np.clip(values, low, high).astype(dtype)


FLOATS = [ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn]


def bits_of(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


def test_an_exception_at_the_end_of_a_part_of_a_block_comes_back():
    """The last block is filled up with its last word, here one outside the window."""
    x = RANDOM.normal(0, 0.05, 20_001).astype(ml_dtypes.bfloat16)
    x[-1] = 1e-38
    coded = code_floats(x)
    assert isinstance(coded, CodedFloats)
    # Two: a single one would not be scattered by XLA but fused, and slow all.
    assert coded.bits.spots.tolist() == [20_000, 20_001]
    check(coded, x)
    check(coded.bits, bits_of(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_keep_every_bit(dtype):
    x = RANDOM.normal(0, 0.05, (2, 290, 60)).astype(dtype)
    size = x.dtype.itemsize * 8
    special = RANDOM.integers(0, 2**size, 400, dtype=np.uint64)
    high = np.array([0, 1, 2, 3, 0, 1, 2, 3, 1], np.uint64)
    special[:9] = high << np.uint64(size - 2)
    if dtype in FLOATS[:3]:
        infinity = bits_of(np.array([np.inf], dtype))[0].astype(np.uint64)
        special[9:100] = infinity + np.arange(91, dtype=np.uint64)  # and NaN payloads
    special[100:120] = np.arange(20)  # subnormals
    bits_of(x)[1].reshape(-1)[:400] = special
    coded = code_floats(x)
    assert isinstance(coded, CodedFloats) and isinstance(coded.bits, CodedWords)
    check(coded, x)

    def body(carry, leaf):  # a scan on the CPU quiets NaN of bfloat16 it stacks
        return carry, jax.lax.bitcast_convert_type(dense(leaf), word)

    word = bits_of(x).dtype
    found = jax.jit(lambda leaf: jax.lax.scan(body, 0, leaf)[1])(coded)
    np.testing.assert_array_equal(found, bits_of(x))
    check(jax.tree.map(lambda part: part[1], coded), x[1])


@pytest.mark.parametrize(
    "dtype, most", list(zip(FLOATS, [10.57, 13.6, 26.6, 6.6], strict=True))
)
def test_gaussian_floats_cost_their_exponents_entropy_and_the_rest(dtype, most):
    x = RANDOM.normal(0, 0.05, (500, 400)).astype(dtype)
    coded = code_floats(x)
    assert stored_bytes(coded) * 8 / x.size < most
    if dtype is ml_dtypes.bfloat16:
        wide = code_floats(x.astype(np.float32))  # nothing in the lower halves
        assert stored_bytes(wide) == stored_bytes(coded)
        check(wide, x.astype(np.float32))


def test_floats_of_few_values_cost_the_entropy_of_these():
    steps = gaussian((200, 200), 2.4, 0, 15, np.float32) - 8
    for x in (steps, steps * np.float32(0.0137)):
        coded = code_floats(x)
        assert stored_bytes(coded) < 1.02 * entropy_bytes(steps)
        check(coded, x)
    ones = np.ones(600, ml_dtypes.bfloat16)
    assert stored_bytes(code_floats(ones)) < 20
    check(code_floats(ones), ones)


def test_floats_that_do_not_shrink_are_left_alone():
    noise = RANDOM.integers(0, 2**16, (60, 60)).astype(np.uint16)
    for x in (noise.view(np.float16), np.ones((0, 3), np.float32), np.ones(1)):
        assert code_floats(x) is x
    with pytest.raises(TypeError, match="entropy_code"):
        code_floats(noise)
    with pytest.raises(TypeError, match="code_floats is a host method"):
        jax.jit(code_floats)(jnp.ones((9, 9)))


def test_stacked_vectors_are_coded_layer_by_layer():
    scales = jnp.asarray(
        np.random.default_rng(0).standard_normal((3, 4096)), jnp.bfloat16
    )
    params = {"norm": {"scale": scales}, "bias": scales[0]}
    coded = jc.compress(params, "code_floats()")
    assert isinstance(coded["norm"]["scale"], jc.CodedFloats)
    assert isinstance(coded["bias"], jc.CodedFloats)
    _, layers = jax.lax.scan(
        lambda carry, leaf: (carry, leaf.materialize()), 0, coded["norm"]["scale"]
    )
    np.testing.assert_array_equal(layers, scales)


def test_a_plain_matrix_is_coded_whole_under_any_name():
    """No row of it is a layer: one set of tables, the bits of a kernel."""
    x = jnp.asarray(RANDOM.normal(0, 0.02, (1024, 384)), jnp.bfloat16)
    kernel = jc.nbytes(jc.compress({"kernel": x}, "code_floats()"))
    assert kernel * 8 / x.size < 11
    for tree in (
        {"weight": x},
        {"model": {"word_embeddings": {"table": x}, "b": jnp.ones(1024)}},
        [x, x[:3]],
    ):
        coded = jc.compress(tree, "code_floats()")
        (big,) = (y for y in jax.tree.leaves(coded, is_leaf=is_leaf) if y.size > 2048)
        assert jc.nbytes(big) < 1.01 * kernel
        rows = np.array([7, 1023])
        np.testing.assert_array_equal(big.take_rows(rows), x[rows])


def test_vectors_of_a_scanned_module_are_coded_layer_by_layer_under_any_name():
    draw = lambda *shape: jnp.asarray(RANDOM.normal(0, 0.02, shape), jnp.bfloat16)  # noqa: E731
    layers = {
        "attention": {"weight": draw(3, 64, 96), "gate": draw(3)},
        "norm": {"gamma": draw(3, 4096)},
        "heads": {"bias": draw(3, 64, 96)},
    }
    coded = jc.compress({"layers": layers, "table": draw(600, 64)}, "code_floats()")
    assert isinstance(coded["layers"]["attention"]["weight"], CodedFloats)
    assert isinstance(coded["layers"]["norm"]["gamma"], CodedFloats)
    assert isinstance(coded["table"], CodedFloats)
    _, found = jax.lax.scan(
        lambda carry, layer: (carry, jax.tree.map(dense, layer, is_leaf=is_leaf)),
        0,
        coded["layers"],
    )
    jax.tree.map(np.testing.assert_array_equal, found, layers)


def test_lossless_methods_say_what_they_leave_as_it_is():
    """Nothing gets larger in memory, whatever its shape; the report says why."""
    noise = RANDOM.integers(0, 2**15, (64, 96)).astype(np.uint16).view(np.float16)
    params = {
        "random": {"kernel": jnp.asarray(noise)},
        "heads": {"weight": jnp.asarray(RANDOM.normal(0, 1, (400, 8, 8)), jnp.float32)},
        "short": jnp.asarray([0.3, -0.7, 2.5]),
        "table": {"weight": jnp.asarray(RANDOM.normal(0, 1, (128, 64)), jnp.bfloat16)},
    }
    report = []
    small = jc.compress(params, "code_floats()", record=report)
    by_name = {one.name: one for one in report}
    for name in ("random/kernel", "heads/weight", "short"):
        one = by_name.pop(name)
        assert (one.method, one.bytes_after) == ("", one.bytes_before)
        assert one.reason == "code_floats() makes it no smaller"
    assert small["random"]["kernel"] is params["random"]["kernel"]
    (one,) = by_name.values()
    assert one.method == "code_floats()" and not one.reason
    assert one.bytes_after < one.bytes_before

    even = jnp.asarray(RANDOM.integers(-7, 8, (64, 64)) / 7, jnp.float32)
    packed = jc.compress({"kernel": even}, "symmetric(bits=4)")
    report = []
    coded = jc.compress(packed, "entropy_code()", record=report)
    (one,) = report
    assert coded["kernel"] is packed["kernel"]
    assert one.reason == "entropy_code() makes it no smaller"


@pytest.mark.parametrize("stack", [0, 1, 2])
def test_leaves_take_less_memory_than_their_arrays(stack):
    """Tables of many slices are no gain, though a file leaves their padding out."""
    for shape in ((64, 7, 12), (3, 40, 90), (2, 300, 2)):
        floats = RANDOM.normal(0, 0.02, shape).astype(np.float32)
        codes = RANDOM.geometric(0.5, shape).astype(np.int32)
        for x, method in ((floats, code_floats), (codes, entropy_code)):
            held = method(x, stack=stack)
            assert held is x or jc.nbytes(held) < x.nbytes


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("speed", ["size", "decode"])
def test_scales_of_blocks_are_used(dtype, speed):
    """Rows of unequal scale cost about what they would alone."""
    scales = np.repeat(np.exp(RANDOM.normal(0, 1.5, (256, 1))), 2, axis=0)
    x = (RANDOM.normal(0, 0.05, (512, 512)) * scales).astype(dtype)
    x[3, 5], x[100, 7] = np.array([3e-39, 3e4]).astype(dtype)  # outside any window
    coded = code_floats(x, speed=speed)
    check(coded, x)
    np.testing.assert_array_equal(bits_of(np.asarray(decode(coded))), bits_of(x))
    even = RANDOM.normal(0, 0.05, x.shape).astype(dtype)
    even = stored_bytes(code_floats(even, speed=speed))
    assert (
        stored_bytes(coded) < even + (0.35 if speed == "decode" else 0.25) * x.size / 8
    )
    whole = entropy_bytes(bits_of(x) >> [9, 12, 25][FLOATS.index(dtype)])
    pooled = whole + x.size * [9, 12, 25][FLOATS.index(dtype)] / 8
    assert stored_bytes(coded) < pooled - 0.15 * x.size / 8


def test_whole_numbers_and_lattices_cost_their_integers():
    integers = np.rint(RANDOM.normal(0, 3000, (200, 300))) + 0.0  # no -0.0
    for power, dtype in ((0, np.float32), (-9, np.float32), (3, np.float32)):
        x = (integers * 2.0**power).astype(dtype)
        coded = code_floats(x)
        assert coded.power is not None and coded.power >= power
        assert stored_bytes(coded) < 1.01 * entropy_bytes(integers) + 2000
        check(coded, x)
    x[0, 0] = -0.0  # an integer has no negative zero
    coded = code_floats(x)
    assert coded.power is None
    wild = dataclasses.replace(coded, power=2**31)  # as a damaged file may say
    with pytest.raises(ValueError, match="damaged"):
        wild.materialize()
    check(coded, x)


def test_tails_of_shorter_numbers_are_not_stored():
    x = RANDOM.normal(0, 0.05, (400, 384)).astype(np.float32)
    x[40:300] = x[40:300].astype(np.float16)
    coded = code_floats(x)
    check(coded, x)
    assert stored_bytes(coded) * 8 / x.size < 26.7 - 13 * 260 / 400


# Coded words: blocks, lanes, chunks


def bits_read(data: bytes, end: int, lengths: np.ndarray, count: int) -> list[int]:
    """Symbols of one stream, by the definition: codes as strings, read from the end."""
    text = "".join(format(byte, "08b") for byte in data[:end][::-1])
    text = text[text.index("1") + 1 :]
    codes, number = {}, 0
    for length in range(11, 0, -1):
        for symbol in np.flatnonzero(lengths == length):
            codes[format(number >> 11 - length, f"0{length}b")] = int(symbol)
            number += 1 << 11 - length
    out = []
    while len(out) < count:
        size = next(n for n in range(1, 12) if text[:n] in codes)
        out.append(codes[text[:size]])
        text = text[size:]
    return out


@pytest.mark.parametrize("spread", [3.0, 6.0, 40.0])
def test_literals_of_zstandard_are_understood(spread):
    plane = RANDOM.normal(120, spread, 4000).clip(0, 255).astype(np.uint8)
    for _ in range(9):  # chance repetitions make a block that XLA can't decode
        RANDOM.shuffle(plane)
        frame = zstd.pack(plane.tobytes())
        if found := zstd_literals.parse(frame):
            break
    (block,) = found
    assert block.count == 4000 and len(block.ends) == 4
    kraft = (0.5 ** block.lengths[block.lengths > 0].astype(float)).sum()
    assert kraft == 1 and set(np.flatnonzero(block.lengths)) >= set(plane)
    read, start = [], 0
    for end in block.ends:
        read += bits_read(frame, end, block.lengths, 1000)
        start = end
    np.testing.assert_array_equal(read, plane)
    assert start == len(frame) - 1  # what follows says that there are no sequences


def test_what_is_not_only_literals_is_left_to_the_library():
    for plane in (b"abcdefgh" * 900, bytes(5000), RANDOM.bytes(5000)):
        assert zstd_literals.parse(zstd.pack(plane)) is None
    for frame in (b"", b"12345678", zstd_literals.MAGIC):
        with pytest.raises(ValueError, match="not a Zstandard frame"):
            zstd_literals.parse(frame)


@pytest.fixture
def small_chunks(monkeypatch):
    """Arrays of a few thousand numbers are several chunks."""
    monkeypatch.setattr(float_chunks, "CHUNK", 1 << 14)


@pytest.mark.parametrize("split", ["bfloat16", "bfloat16 pairs"])
def test_words_in_chunks_come_back_whole_and_by_rows(small_chunks, split):
    x = (RANDOM.normal(0, 1, (170, 300)) * 0.02).astype(np.float32).view(np.uint32)
    x[10:60] = 0
    x[10:60, ::7] = x[90:140, ::7]  # repetitions, and so blocks that are kept raw
    x[120, 3:8] = [0x7F800001, 0xFFFFFFFF, 1, 0x80000000, 0x00800000]
    coded, size = code_words(x, split, 0)
    assert abs(stored_bytes(coded) - size) < 60
    assert coded.bases.shape == (4,) and coded.spots.size >= 3
    check(coded, x)
    np.testing.assert_array_equal(decode(coded), x)
    rows = np.array([[0, 169, 10], [59, 120, -1]])
    np.testing.assert_array_equal(coded.take_rows(jnp.asarray(rows)), x[rows])
    check(reload(coded), x)


@pytest.mark.parametrize("together", [1, 40, 64, 1000])
@pytest.mark.parametrize("split", ["bfloat16", "bfloat16 pairs"])
def test_blocks_decode_in_groups(small_chunks, monkeypatch, together, split):
    """Groups do not divide the blocks, and have exceptions at their first and last."""
    monkeypatch.setattr(coded_words, "TOGETHER", together)
    x = (RANDOM.normal(0, 1, (131, 300)) * 0.02).astype(np.float32).view(np.uint32)
    coded, _ = code_words(x, split, 0)
    blocks, width = coded.starts.size, coded.width
    size = -(-blocks // -(-blocks // together))
    assert together > blocks or blocks % size or together == 1
    flat = x.reshape(-1)
    for block in (0, size - 1, size, blocks - size, blocks - 1):
        if block < blocks:
            flat[block * width] = 0x7F800001
            flat[min((block + 1) * width, flat.size) - 1] = 0x00800000
    coded, _ = code_words(x, split, 0)
    assert coded.spots.size >= 4
    decoded = jax.jit(lambda leaf: leaf.materialize())(coded)
    np.testing.assert_array_equal(decoded, x)


@pytest.mark.parametrize("blocks", [128, 130, 517, 2048])
def test_classes_are_few_and_lie_in_fours(blocks):
    """Also where many blocks have the largest mean there is, or all have one."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        sums = np.minimum(random.normal(30_000, 9_000, blocks), 35_000).astype(
            np.uint32
        )
        sample = random.normal(60, 6, 4096).astype(np.uint8)
        found = block_classes.classes_of(sums, sample, 512)
        sizes = np.bincount(found)
        assert 1 < sizes.size <= min(8, blocks // 64)
        assert sizes.all() and not (sizes[:-1] % 4).any()
        order = np.argsort(sums, kind="stable")
        assert (np.diff(found[order].astype(int)) >= 0).all()
    assert not block_classes.classes_of(
        np.full(blocks, 9, np.uint32), sample, 512
    ).any()


def test_a_frame_may_not_claim_more_than_it_gives():
    magic, flags = b"\x28\xb5\x2f\xfd", b"\xe0"  # its size in eight bytes
    frame = magic + flags + (1 << 50).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(ValueError, match=f"a frame of {1 << 50} bytes, not 100"):
        zstd.decompress(frame, 100)


def test_a_stream_may_not_claim_more_words_than_its_bytes_can_hold():
    chunks = 100
    numbers = record.write_numbers([chunks << 20, 512, chunks, *([0] * chunks)])
    index = numbers + bytes(4 * chunks)
    data = bytes(-(len(index) + 4) % 8) + index + len(index).to_bytes(4, "little")
    with pytest.raises(ValueError, match=r"words in .* bytes; the file is damaged"):
        chunked_stream.from_bytes(data, "bfloat16", 2, chunks << 20)


def test_slices_of_coded_words_stand_alone():
    x = RANDOM.normal(0, 0.02, (3, 64, 90)) * np.array([1, 9, 0.1])[:, None, None]
    x = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    coded, _ = code_words(x, "bfloat16", 1)
    scan = jax.jit(lambda p: jax.lax.scan(lambda c, x: (c, dense(x)), 0, p)[1])
    np.testing.assert_array_equal(scan(coded), x)
    for i in range(3):
        one = jax.tree.map(lambda part, i=i: part[i], coded)
        check(one, x[i])
        np.testing.assert_array_equal(one.take_rows(jnp.array([5, 63])), x[i][[5, 63]])


def test_damaged_words_raise_or_keep_their_shape(small_chunks):
    x = RANDOM.normal(0, 0.02, (90, 300)).astype(np.float32).view(np.uint32)
    coded, _ = code_words(x, "bfloat16", 0)
    fields = {name: getattr(coded, name) for name in static_fields(coded)}
    stream = coded.stored()["stream"]
    refused = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        damaged = stream.copy()
        if seed % 3 == 0:
            damaged = damaged[: random.integers(0, damaged.size)]
        elif seed % 3 == 1:
            damaged[random.integers(0, damaged.size)] ^= 1 << random.integers(0, 8)
        else:
            at = random.choice([0, 20, damaged.size - 60])
            damaged[at + random.integers(0, 50)] = random.integers(0, 256)
        try:
            leaf = CodedWords.restored({"stream": damaged}, fields)
            assert leaf.on_host().shape == x.shape
        except ValueError:
            refused += 1
    assert refused > 150
    arrays, structure = jax.tree.flatten(coded)
    for seed in range(2 * len(arrays)):
        random = np.random.default_rng(seed)
        damaged = [np.array(part) for part in arrays]
        raw = damaged[seed % len(damaged)].reshape(-1).view(np.uint8)
        raw[:] = random.integers(0, 256, raw.shape)
        leaf = jax.tree.unflatten(structure, damaged)
        assert decode(jax.tree.map(jnp.asarray, leaf)).shape == x.shape
    for wrong in ({"split": "float16"}, {"dtype": "uint8"}, {"trailing": (9, 9)}):
        with pytest.raises(ValueError, match=r"damaged|not coded"):
            CodedWords.restored({"stream": stream}, {**fields, **wrong})
