"""Coded integers: every code back, at about the entropy, and damage contained."""

import math
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lossless_checks import check, decode, entropy_bytes

import jaxcompress as jc
from jaxcompress.coding import Coded, Packed, entropy_code, rans, record, tables
from jaxcompress.coding.integers import leaf as coded_integers
from jaxcompress.coding.integers import shared_programs
from jaxcompress.coding.integers.leaf import stored_bytes
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tree.leaf import dense, materialize, static_fields

RANDOM = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same, whichever ran before it."""
    global RANDOM
    RANDOM = np.random.default_rng(7)


def gaussian(shape, deviation, low, high, dtype):
    values = np.rint(RANDOM.normal((low + high) / 2, deviation, shape))
    return np.clip(values, low, high).astype(dtype)


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
    table = len(record.write_numbers(np.asarray(coded.frequencies).ravel()))
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    for wrong in ({"width": 2**31}, {"low_bits": 2**31}, {"escape": 9}):
        with pytest.raises(ValueError, match="damaged"):
            Coded.restored(arrays, {**fields, **wrong})
    for wrong in ({"trailing": (3, 5)}, {"low_bits": 3}):
        if wrong.get("low_bits") or coded.states.shape[-1] > 1:
            with pytest.raises(ValueError, match="damaged"):
                Coded.restored(arrays, {**fields, **wrong})


# What is chosen for each leaf


@pytest.mark.parametrize("kept, group", [(2, 4), (1, 4), (4, 8)])
def test_a_pattern_costs_its_number_of_choices(kept, group):
    """Of n of m along the inputs: `log2(m over n) / m` bits an entry, and little more.

    Only bytes that hold a group each give that; the plan finds them by itself.
    """
    w = jnp.asarray(RANDOM.normal(0, 1, (1024, 200)), jnp.float32)
    mask = jc.magnitude(nm=f"{kept}:{group}")(w).mask
    codes = np.asarray(dense(mask))
    coded = entropy_code(codes)
    check(coded, codes)
    assert coded.width <= 8 // group
    bits = np.log2(math.comb(group, kept)) / group
    assert bits < 8 * stored_bytes(coded) / codes.size < 1.03 * bits + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_masks_and_indices_cost_about_their_entropy(share):
    mask = RANDOM.random((500, 400)) < share
    coded = entropy_code(mask)
    check(coded, mask)
    entropy = entropy_bytes(mask)
    assert stored_bytes(coded) < min(1.03 * entropy, 1.01 * mask.size / 8) + 60
    gaps = np.diff(np.flatnonzero(mask)).astype(np.int32)  # indices as differences
    coded = entropy_code(gaps)
    check(coded, gaps)
    assert stored_bytes(coded) < 1.05 * entropy_bytes(gaps) + 150


@pytest.mark.slow
def test_each_leaf_gets_the_model_that_suits_it():
    """One tree: a byte's table, a list of values, tables by row, and no coder."""
    tree = {
        "plain": gaussian((200, 100), 20, -128, 127, np.int8),
        "wide": RANDOM.choice(np.array([0, 9, 70_000], np.int32), (200, 100)),
        "rows": np.rint(
            RANDOM.normal(0, np.geomspace(0.5, 30, 200)[:, None], (200, 100))
        ).astype(np.int8),
        "noise": RANDOM.integers(0, 256, (200, 100), dtype=np.uint8),
    }
    coded = {name: entropy_code(x) for name, x in tree.items()}
    for name, x in tree.items():
        check(coded[name], x)
    assert coded["plain"].contexts is None and coded["plain"].symbols is None
    assert coded["wide"].symbols is not None
    assert coded["rows"].contexts is not None
    assert not isinstance(coded["noise"], Coded)


def test_slices_are_coded_side_by_side(monkeypatch):
    """The same with any number of threads; PART bounds what one codes at a time."""
    codes = np.rint(np.random.default_rng(0).normal(0, 3, (6, 64, 64))).astype(np.int8)
    monkeypatch.setattr(coded_integers, "PART", codes[0].size)
    made, seen = [], []
    encode = rans.encode

    def watched(*given, **options):
        seen.append(threading.get_ident())
        return encode(*given, **options)

    monkeypatch.setattr(rans, "encode", watched)
    for cores in (1, 4):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        made.append(entropy_code(codes))
    assert len(seen) == 12 and set(seen[:6]) == {threading.get_ident()}
    assert threading.get_ident() not in seen[6:]
    for x, y in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_array_equal(x, y)
    check(made[1], codes)


def test_the_compiled_decoder_serves_a_tree_of_many_small_leaves(monkeypatch):
    """What decides is the work of all leaves that share a program, not of one."""
    random = np.random.default_rng(0)
    arrays = [random.integers(-7, 8, (40, 24), np.int8) for _ in range(6)]
    arrays += [random.integers(-7, 8, (5000,), np.int8)]
    tree = {f"layer_{i}": entropy_code(x) for i, x in enumerate(arrays)}
    assert all(isinstance(x, Coded) for x in tree.values())
    by_numpy = []
    on_host = Coded.on_host
    monkeypatch.setattr(
        Coded, "on_host", lambda self: by_numpy.append(self.shape) or on_host(self)
    )
    assert len({x.decoding_work()[0] for x in tree.values()}) == 2
    each = tree["layer_0"].decoding_work()[1]
    monkeypatch.setattr(coded_integers, "FEW", 6 * each)
    for function in (materialize, decode_once):
        by_numpy.clear()
        found = function(tree)
        assert by_numpy == [(5000,)]
        for x, want in zip(found.values(), arrays, strict=True):
            np.testing.assert_array_equal(x, want)
    by_numpy.clear()
    np.testing.assert_array_equal(tree["layer_0"].materialize(), arrays[0])
    assert by_numpy == [(40, 24)]


@pytest.mark.parametrize(("count", "share"), [(23, 0.0), (29, 0.01), (40, 0.0)])
def test_arrays_of_similar_alphabets_share_a_compiled_decoder(count, share):
    """Columns are filled up in front of the last one, whose symbols escape."""
    known = np.sort(RANDOM.choice(20_000, count, replace=False)).astype(np.int32)
    codes = known[RANDOM.integers(0, count, 6000)]
    rare = RANDOM.random(6000) < share
    codes = np.where(rare, RANDOM.integers(0, 20_000, 6000, np.int32), codes)
    leaf = entropy_code(codes[None])
    assert isinstance(leaf, Coded) and leaf.symbols is not None
    assert (leaf.escape > 0) == (share > 0)
    roomy = shared_programs.fill_up(leaf)
    assert roomy.symbols.shape[-1] in (32, 64) and leaf.symbols.shape[-1] not in (
        32,
        64,
    )
    np.testing.assert_array_equal(coded_integers._decoded(roomy), codes[None])
    np.testing.assert_array_equal(leaf.on_host(), codes[None])
