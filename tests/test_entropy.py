"""Packed bits, coded integers and coded floats: every bit back, and small."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.entropy import (
    Coded,
    CodedFloats,
    CodedWords,
    Packed,
    code_floats,
    entropy_code,
    literals,
    pack,
    planes,
    rans,
    tables,
)
from jaxcompress.entropy.integers import stored_bytes
from jaxcompress.entropy.packing import packed_rows
from jaxcompress.entropy.parallel import in_order
from jaxcompress.entropy.words import code_words
from jaxcompress.tree.leaves import Leaf, dense, static_fields

RANDOM = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same, whichever ran before it."""
    global RANDOM
    RANDOM = np.random.default_rng(7)


decode = jax.jit(dense)


def entropy_bytes(values: np.ndarray) -> float:
    """Order-0 entropy of an array in bytes, from the definition."""
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) * values.size / 8


def gaussian(shape, deviation, low, high, dtype):
    values = np.rint(RANDOM.normal((low + high) / 2, deviation, shape))
    return np.clip(values, low, high).astype(dtype)


def reload(leaf: Leaf) -> Leaf:
    """The leaf as it comes back from a file."""
    fields = {name: getattr(leaf, name) for name in static_fields(leaf)}
    return type(leaf).restored(leaf.stored(), fields)


def check(leaf, array: np.ndarray) -> None:
    """Same bits, shape and dtype, also on the host and after a file."""
    word = np.dtype(f"u{array.dtype.itemsize}")
    found = [dense(leaf)]
    if isinstance(leaf, Coded | CodedWords):
        found += [leaf.on_host(), dense(reload(leaf))]
    if isinstance(leaf, Leaf):
        assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype)
    for one in found:
        assert (one.shape, one.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(np.asarray(one).view(word), array.view(word))


# Packed


def packed_by_definition(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of a matrix of codes, written out as strings of bits."""
    rows, start = [], 0
    for width in [8] * (bits // 8) + [w for w in (4, 2, 1) if bits & w]:
        for first in range(0, len(codes), 8 // width):
            row = []
            for column in codes.T:
                byte = ""
                for code in column[first : first + 8 // width]:
                    text = format(int(code), "032b")[::-1][start : start + width]
                    byte = text[::-1] + byte
                row.append(int(byte, 2))
            rows.append(row)
        start += width
    return np.array(rows, np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 11, 24, 32])
def test_packed_bytes_are_those_of_the_definition(bits):
    dtype = np.uint8 if bits <= 8 else np.uint32
    for length in (8, 13):
        codes = RANDOM.integers(0, 2**bits, (length, 3), dtype=np.uint64).astype(dtype)
        wanted = packed_by_definition(codes, bits)
        for one in (codes, jnp.asarray(codes)):
            packed = pack(one, bits)
            np.testing.assert_array_equal(packed.packed, wanted)
            check(packed, codes)
        ragged = length * bits % 8 + 7 * 3  # at most seven bits lost in each field
        assert wanted.size <= 3 * (length * bits + ragged) / 8
    vector = pack(codes[:, 0], bits)
    np.testing.assert_array_equal(vector.packed, wanted[:, 0])
    check(vector, codes[:, 0])
    few = pack(codes.T, bits)  # three inputs, thirteen outputs
    rows = packed_by_definition(codes.T, bits)
    np.testing.assert_array_equal(few.packed, wanted.T if few.axis == -1 else rows)
    assert few.packed.size == min(wanted.size, rows.size)
    check(few, codes.T)
    assert pack(codes[:1, 0], bits).packed.size == packed_rows(bits, 1)


def test_packed_is_cut_along_the_stack_by_scan_vmap_and_index():
    codes = RANDOM.integers(0, 8, (4, 9, 5)).astype(np.int8)
    packed = jax.jit(lambda x: pack(x, 3))(codes)
    assert packed.packed.shape == (4, packed_rows(3, 9), 5)
    check(packed, codes)
    scan = jax.jit(lambda p: jax.lax.scan(lambda c, x: (c, dense(x)), 0, p)[1])
    np.testing.assert_array_equal(scan(packed), codes)
    np.testing.assert_array_equal(jax.vmap(dense)(packed), codes)
    np.testing.assert_array_equal(dense(jax.tree.map(lambda x: x[2], packed)), codes[2])
    stacked = jax.vmap(lambda x: pack(x, 3))(codes)
    np.testing.assert_array_equal(stacked.packed, packed.packed)


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[0, 9\].*\[0, 7\]"):
        pack(np.arange(10), 3)
    with pytest.raises(ValueError, match=r"\[-1, 6\]"):
        pack(jnp.arange(8) - 1, 3)
    with pytest.raises(ValueError, match="1 to 32"):
        pack(np.arange(10), 0)
    with pytest.raises(ValueError, match="scalar"):
        pack(np.uint8(1), 3)
    with pytest.raises(TypeError, match="float32"):
        pack(np.ones(4, np.float32), 3)


# Tables


@pytest.mark.parametrize("seed", range(6))
def test_normalized_tables_cost_hardly_more_than_the_best(seed):
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(12, [0.02, 0.1, 1.0][seed % 3]))
    counts = random.multinomial(20000, shares)
    sizes = tables.normalize(counts).astype(int)
    assert sizes.sum() == 4096 and ((sizes > 0) == (counts > 0)).all()
    best = (counts > 0).astype(int)  # units dealt one by one to where they gain most
    for _ in range(4096 - best.sum()):
        gain = np.where(best > 0, counts * np.log2(1 + 1 / np.maximum(best, 1)), -1)
        best[gain.argmax()] += 1
    seen = counts > 0
    excess = (counts * np.log2(np.where(seen, best / np.maximum(sizes, 1), 1))).sum()
    assert -1e-6 <= excess <= 1e-3 * counts.sum() * 12 / 8


def test_number_lists_come_back_and_damaged_ones_raise():
    numbers = [0, 0, 5, 300, 0, 2**31, 0, 0, 0]
    data = tables.write_numbers(numbers)
    assert tables.read_numbers(data, 0, len(numbers)) == (numbers, len(data))
    with pytest.raises(ValueError, match="cut off"):
        tables.read_numbers(data[:-2], 0, len(numbers))
    with pytest.raises(ValueError, match="longer than its list"):
        tables.read_numbers(data, 0, len(numbers) - 1)
    assert [tables.unfold_sign(tables.fold_sign(n)) for n in (0, -1, 7, -300)] == [
        0,
        -1,
        7,
        -300,
    ]


# Sizes


@pytest.mark.parametrize("count, excess", [(10**5, 1.02), (10**6, 1.005)])
@pytest.mark.parametrize("kind", ["gauss4", "gauss8", "laplace8", "skewed", "binary"])
def test_coded_size_is_close_to_the_entropy(kind, count, excess):
    shape = (count // 500, 500)
    codes = {
        "gauss4": lambda: gaussian(shape, 2.4, 0, 15, np.uint8),
        "gauss8": lambda: gaussian(shape, 37, -128, 127, np.int8),
        "laplace8": lambda: RANDOM.laplace(0, 6, shape).clip(-128, 127).astype("int8"),
        "skewed": lambda: np.minimum(RANDOM.geometric(0.7, shape), 255).astype("uint8"),
        "binary": lambda: RANDOM.random(shape) < 0.02,
    }[kind]()
    coded = entropy_code(codes)
    np.testing.assert_array_equal(dense(coded), codes)
    table = len(tables.write_numbers(np.asarray(coded.frequencies).ravel()))
    assert stored_bytes(coded) <= excess * entropy_bytes(codes) + table
    assert table <= 300


def test_masks_of_two_in_four_cost_less_than_their_order_0_entropy():
    mask = RANDOM.permuted(np.arange(4) < 2 * np.ones((256, 60, 1)), axis=-1)
    mask = mask.transpose(0, 2, 1).reshape(1024, 60)  # two of four along the inputs
    assert stored_bytes(entropy_code(mask)) * 8 / mask.size < 0.66  # log2(6) / 4


def test_lanes_follow_the_number_of_symbols():
    counts = [rans.count_lanes(n) for n in (0, 1, 16383, 16384, 10**9)]
    assert counts == [1, 1, 1, 2, 4096]
    assert rans.count_lanes(10**6, 17000) == 8
    assert entropy_code(gaussian((500, 200), 37, 0, 255, np.uint8)).states.shape == (
        12,
    )


# Coded integers


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"]
)
def test_integers_of_every_width_come_back(dtype):
    info = np.iinfo(dtype)
    codes = np.rint(RANDOM.normal(0, 3, (61, 53))) + (info.min + info.max + 1) // 2
    codes = codes.astype(dtype)
    codes[::17, ::13] = info.min
    codes[1::17, 1::13] = info.max
    coded = entropy_code(codes)
    assert isinstance(coded, Coded)
    check(coded, codes)


def with_outliers(largest: int) -> np.ndarray:
    """Small codes, with one in a hundred anywhere in `[-largest, largest - 1]`."""
    codes = np.rint(RANDOM.normal(0, 3, (400, 90))).astype(np.int32)
    rare = RANDOM.integers(-largest, largest, codes.shape, dtype=np.int32)
    rare[7, 7], rare[8, 8] = -largest, largest - 1
    rare_at = RANDOM.random(codes.shape) < 0.01
    rare_at[[7, 8], [7, 8]] = True
    return np.where(rare_at, rare, codes)


@pytest.mark.parametrize("escape, largest", [(1, 2**15), (2, 2**31)])
def test_rare_values_escape(escape, largest):
    codes = with_outliers(largest)
    coded = entropy_code(codes)
    assert coded.escape == escape
    check(coded, codes)


@pytest.mark.parametrize("shape", [(5000,), (3, 700), (2, 3, 40, 50), (1, 1, 6000)])
def test_wide_codes_keep_their_lowest_bits(shape):
    codes = gaussian(shape, 900, -(2**15), 2**15 - 1, np.int16)
    coded = entropy_code(codes)
    assert coded.low_bits > 0
    check(coded, codes)


@pytest.mark.parametrize("shape", [(9001,), (77, 90), (1, 8000), (4, 31, 70)])
def test_narrow_codes_share_bytes(shape):
    codes = RANDOM.binomial(3, 0.1, shape).astype(np.int32) - 2
    coded = entropy_code(codes)
    assert isinstance(coded, Coded) and coded.dtype == jnp.int32
    check(coded, codes)


def test_many_lanes_and_a_last_step_that_is_not_full():
    codes = gaussian((1001, 333), 20, 0, 255, np.uint8)
    coded = entropy_code(codes)
    lanes = coded.states.shape[-1]
    assert lanes == 40 and codes.size % lanes
    np.testing.assert_array_equal(decode(coded), codes)
    check(coded, codes)


def test_constant_arrays_cost_a_few_bytes():
    for value, dtype in [(-7, np.int16), (2**32 - 1, np.uint32), (1, np.bool_)]:
        codes = np.full((3, 300, 40), value, dtype)
        coded = entropy_code(codes)
        assert stored_bytes(coded) <= 32
        check(coded, codes)
    codes[1] = False  # slices that are constant, with different constants
    coded = entropy_code(codes)
    assert stored_bytes(coded) <= 32
    check(coded, codes)


def test_what_coding_would_not_shrink_is_packed_or_left_alone():
    noise = RANDOM.integers(0, 2**32, (50, 50), dtype=np.uint32)
    assert entropy_code(noise) is noise
    for codes in (np.zeros((0, 3), np.int8), np.int8([-7]), np.int8(3)):
        assert entropy_code(codes) is codes
    for codes, bits in [
        (RANDOM.random((41, 30)) < 0.5, 1),
        (RANDOM.integers(0, 8, (41, 30)).astype(np.int32), 3),
        (RANDOM.integers(0, 2**20, (41, 30)).astype(np.int32), 20),
    ]:
        packed = entropy_code(codes)
        assert isinstance(packed, Packed) and packed.bits == bits
        check(packed, codes)


def test_slices_of_a_stack_are_coded_on_their_own():
    spread = np.array([0.3, 1.0, 9.0])[:, None, None]
    codes = np.rint(RANDOM.normal(0, 1, (3, 90, 70)) * spread).astype(np.int32)
    codes[2, 0, 0] = 10**6
    coded = entropy_code(codes)
    check(coded, codes)
    scan = jax.jit(lambda p: jax.lax.scan(lambda c, x: (c, dense(x)), 0, p)[1])
    np.testing.assert_array_equal(scan(coded), codes)
    np.testing.assert_array_equal(jax.jit(jax.vmap(dense))(coded), codes)
    for i in range(3):
        check(jax.tree.map(lambda x, i=i: x[i], coded), codes[i])
    alone = sum(stored_bytes(entropy_code(one)) for one in codes)
    assert stored_bytes(coded) < alone + 64  # padding in memory is not in the file
    whole = entropy_code(codes, stack=0)
    assert whole.trailing == codes.shape
    check(whole, codes)


def test_entropy_code_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match="code_floats"):
        entropy_code(np.ones((9, 9), np.float32))
    with pytest.raises(TypeError, match="int64"):
        entropy_code(np.ones((9, 9), np.int64))
    with pytest.raises(ValueError, match="stack=2"):
        entropy_code(np.ones((9, 9), np.int8), stack=2)
    with pytest.raises(ValueError, match=r"\(9, 2\)"):
        entropy_code(np.ones((9, 9), np.int8), contexts=np.zeros((9, 2), np.int8))
    with pytest.raises(ValueError, match="255"):
        entropy_code(np.ones((9, 9), np.int8), contexts=np.full((9, 1), 256))
    with pytest.raises(TypeError, match="entropy_code is a host method"):
        jax.jit(entropy_code)(jnp.ones((9, 9), jnp.int8))


# Contexts and memory


def conditional_entropy_bytes(codes, contexts):
    contexts = np.broadcast_to(contexts, codes.shape)
    kinds = np.unique(contexts)
    return sum(entropy_bytes(codes[contexts == kind]) for kind in kinds)


@pytest.mark.parametrize("largest", [100, 2**31 - 1])
def test_contexts_choose_the_table(largest):
    scales = np.exp(RANDOM.normal(0, 1.2, (2, 300, 1)))
    contexts = np.digitize(scales, np.quantile(scales, np.arange(0.1, 1, 0.1)))
    codes = np.rint(RANDOM.normal(0, 2, (2, 300, 250)) * scales)
    codes = codes.clip(-100, 100).astype(np.int32)
    codes[0, 5, 7] = largest
    coded = entropy_code(codes, contexts=contexts)
    assert coded.contexts.shape == (2, 300, 1)
    wanted = conditional_entropy_bytes(codes, contexts)
    assert stored_bytes(coded) < 1.03 * wanted + 2 * 10 * 60
    assert stored_bytes(coded) < 0.93 * entropy_bytes(codes)
    check(coded, codes)
    scan = jax.jit(lambda p: jax.lax.scan(lambda c, x: (c, dense(x)), 0, p)[1])
    np.testing.assert_array_equal(scan(coded), codes)


def test_contexts_that_do_not_pay_are_dropped():
    codes = gaussian((200, 200), 3, 0, 15, np.uint8)
    coded = entropy_code(codes, contexts=RANDOM.integers(0, 9, codes.shape))
    assert coded.contexts is None
    check(coded, codes)


@pytest.mark.parametrize("axis", [1, 2])
def test_rows_or_columns_of_unequal_scale_get_tables_of_their_own(axis):
    shape = [2, 1, 1]
    shape[axis] = 200
    scales = np.exp(RANDOM.normal(0, 1.0, shape))
    codes = np.rint(RANDOM.normal(0, 4, (2, 200, 200)) * scales)
    codes = codes.clip(-128, 127).astype(np.int8)
    coded = entropy_code(codes)
    assert coded.contexts.shape == tuple(shape)
    assert stored_bytes(coded) < 0.96 * entropy_bytes(codes)
    check(coded, codes)
    alike = np.rint(RANDOM.normal(0, 4, codes.shape)).astype(np.int8)
    assert entropy_code(alike).contexts is None


NEXT = jnp.array([[0, 1], [2, 3], [1, 0], [3, 2]])  # state, parity of symbol -> state


def walk(state, symbols):
    """A machine of four states whose parity is the table of the next symbol."""
    state = NEXT[state, symbols & 1]
    return state, state & 1


def test_a_coder_with_memory_follows_its_lanes():
    steps, lanes, largest = 900, 7, 20
    state = np.zeros(lanes, int)
    symbols = np.zeros((steps, lanes), np.int32)
    used = np.zeros((steps, lanes), int)
    for t in range(steps):  # odd states draw wide symbols, even ones narrow
        used[t] = state & 1
        spread = np.where(used[t] == 1, 6.0, 0.8)
        symbols[t] = np.rint(RANDOM.normal(0, 1, lanes) * spread)
        if t == 3:
            symbols[t, 2] = 70_001  # escapes, and drives the machine all the same
        state = np.asarray(NEXT)[state, symbols[t] & 1]
    memory = (walk, jnp.zeros(lanes, jnp.int32), jnp.zeros(lanes, jnp.int32))
    offset = np.full((steps, lanes), 2)
    offset[: steps // 2] = 0  # tables 0 and 1 for the first half, 2 and 3 after it
    np.testing.assert_array_equal(rans.follow(symbols, memory), used)
    followed = rans.follow(symbols, memory, offset)
    values = np.arange(-largest, largest + 1)
    columns = np.clip(symbols + largest, 0, 2 * largest)
    columns[np.abs(symbols) > largest] = 2 * largest + 1
    frequencies = np.stack(
        [
            tables.normalize(np.bincount(columns[followed == k], minlength=42))
            for k in range(4)
        ]
    )
    listed = np.tile(np.append(values, 0).astype(np.int32), (4, 1))
    stream = rans.encode(columns, frequencies, followed, raw=symbols, escape=2)
    same = {"steps": steps, "escape": 2, "memory": memory}
    for one in (
        rans.decode(stream, frequencies, listed, offset, **same),
        jax.jit(lambda s: rans.decode(s, frequencies, listed, offset, **same))(stream),
        rans.decode_on_host(stream, frequencies, listed, offset, **same),
    ):
        np.testing.assert_array_equal(one, symbols)
    wanted = conditional_entropy_bytes(columns, followed)
    assert stream.words.nbytes < 1.02 * wanted + 4 * lanes
    assert stream.words.nbytes < 0.97 * entropy_bytes(columns)


def test_encode_refuses_symbols_and_tables_that_cannot_be_coded():
    with pytest.raises(ValueError, match="4096"):
        rans.encode(np.zeros((3, 1), int), np.array([[4000, 90]]))
    with pytest.raises(ValueError, match="frequency zero"):
        rans.encode(np.ones((3, 1), int), np.array([[4096, 0]]))


# Damage


def test_damaged_streams_stay_inside_their_arrays():
    codes = with_outliers(2**31)
    codes[:200] //= 8
    contexts = np.arange(400)[:, None] // 200
    coded = entropy_code(codes, contexts=contexts)
    assert coded.escape and coded.contexts is not None
    arrays, structure = jax.tree.flatten(coded)
    for seed in range(40):
        random = np.random.default_rng(seed)
        damaged = [np.array(x) for x in arrays]
        victim = damaged[seed % len(damaged)].reshape(-1)
        raw = victim.view(np.uint8)
        raw[:] = random.integers(0, 256, raw.shape)
        leaf = jax.tree.unflatten(structure, damaged)
        assert decode(leaf).shape == codes.shape
        if seed >= 2 * len(arrays):  # the host is slow
            continue
        try:
            assert leaf.on_host().shape == codes.shape
        except ValueError as error:
            assert "damaged" in str(error)
    cut = jax.tree.unflatten(structure, [x[..., :0] for x in arrays[:1]] + arrays[1:])
    assert decode(cut).shape == codes.shape
    with pytest.raises(ValueError, match="damaged"):
        cut.on_host()


@pytest.mark.parametrize("largest", [60, 2**30])
def test_damaged_files_raise_or_give_an_array_of_the_right_shape(largest):
    codes = gaussian((2, 30, 50), 5, 0, 60, np.int32)
    codes[1, 3, 3] = largest
    coded = entropy_code(codes)
    fields = {name: getattr(coded, name) for name in static_fields(coded)}
    arrays = coded.stored()
    refused = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        stream = arrays["stream"].copy()
        if seed % 3 == 0:
            stream = stream[: random.integers(0, stream.size)]
        else:
            reach = stream.size if seed % 3 == 1 else 12
            stream[random.integers(0, reach)] ^= 1 << random.integers(0, 8)
        try:
            leaf = Coded.restored({**arrays, "stream": stream}, fields)
        except ValueError as error:
            assert any(word in str(error) for word in ("damaged", "list"))
            refused += 1
        else:
            assert leaf.shape[-2:] == codes.shape[-2:]
    assert refused > 180
    for wrong in ({"trailing": (3, 5)}, {"low_bits": 3}):
        if wrong.get("low_bits") or coded.states.shape[-1] > 1:
            with pytest.raises(ValueError, match="damaged"):
                Coded.restored(arrays, {**fields, **wrong})


# Floating-point numbers

FLOATS = [ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn]


def bits_of(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_keep_every_bit(dtype):
    x = RANDOM.normal(0, 0.05, (2, 90, 60)).astype(dtype)
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


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("fast", [False, True])
def test_scales_of_blocks_are_used(dtype, fast):
    """Rows of unequal scale cost about what they would alone."""
    scales = np.repeat(np.exp(RANDOM.normal(0, 1.5, (256, 1))), 2, axis=0)
    x = (RANDOM.normal(0, 0.05, (512, 512)) * scales).astype(dtype)
    x[3, 5], x[100, 7] = np.array([3e-39, 3e4]).astype(dtype)  # outside any window
    coded = code_floats(x, fast=fast)
    check(coded, x)
    np.testing.assert_array_equal(bits_of(np.asarray(decode(coded))), bits_of(x))
    even = RANDOM.normal(0, 0.05, x.shape).astype(dtype)
    even = stored_bytes(code_floats(even, fast=fast))
    assert stored_bytes(coded) < even + (0.35 if fast else 0.25) * x.size / 8
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
        frame = planes._compressor().compress(plane.tobytes())
        if found := literals.parse(frame):
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
        assert literals.parse(planes._compressor().compress(plane)) is None
    for frame in (b"", b"12345678", literals.MAGIC):
        with pytest.raises(ValueError, match="not a Zstandard frame"):
            literals.parse(frame)


@pytest.fixture
def small_chunks(monkeypatch):
    """Arrays of a few thousand numbers are several chunks."""
    monkeypatch.setattr(planes, "CHUNK", 1 << 14)


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
    for wrong in ({"split": "float16"}, {"kind": "uint8"}, {"trailing": (9, 9)}):
        with pytest.raises(ValueError, match=r"damaged|not coded"):
            CodedWords.restored({"stream": stream}, {**fields, **wrong})


def test_threads_give_chunks_in_order():
    import threading

    seen = set()

    def work(i):
        seen.add(threading.get_ident())
        return i * i

    assert list(in_order(work, range(50), threads=3)) == [i * i for i in range(50)]
    assert list(in_order(work, range(3), threads=1)) == [0, 1, 4]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda i: 1 // i, range(5), threads=2))
