"""The mixer against its definition in float64, and that its integers depend on the
tokens alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.textcoding import mixing

VOCABULARY, COUNT = 40, 160


def stream():
    """Logits `[COUNT, VOCABULARY]` that know little, and a text that repeats itself."""
    random = np.random.default_rng(0)
    phrases = [random.integers(0, VOCABULARY, 9) for _ in range(3)]
    tokens = np.concatenate([phrases[i] for i in random.integers(0, 3, COUNT // 9 + 1)])
    logits = np.rint(random.normal(size=(COUNT, VOCABULARY)) * 8000)
    return logits.astype(np.int32), tokens[:COUNT].astype(np.int32)


@jax.jit
def run(mixer, logits, tokens):
    def step(mixer, row):
        mixed, matches = mixing.mix(mixer, row[0])
        mixer = mixing.learn(mixer, row[0], mixed, matches, row[1])
        return mixer, (mixed, matches.lengths)

    return jax.lax.scan(step, mixer, (logits, tokens))


def mixed_by_definition(logits, tokens):
    """Logits in bits, one row after another: lists, floats and the rule alone."""
    z = logits / 4096
    bias, temperature = np.zeros(VOCABULARY), 1.0
    weights = dict(zip(range(1, 7), (0.4, 0.6, 1.6, 3.1, 4.0, 5.0), strict=True))
    surprise, rows = [], []
    for t, token in enumerate(tokens):
        centered = z[t] - z[t].max()
        mixed = temperature * centered + bias
        found = []
        for place in range(1, t):
            length = 0
            while length < min(place, 6):
                if tokens[place - 1 - length] != tokens[t - 1 - length]:
                    break
                length += 1
            if length:
                found.append((length, place))
        shares = {}
        for length, place in sorted(found, reverse=True)[:16]:
            key = (length, tokens[place])
            shares[key] = min(1.5, shares.get(key, 0.0) + surprise[place])
        for (length, other), share in shares.items():
            mixed[other] += weights[length] * share
        rows.append(mixed)
        p = 2.0 ** (mixed - np.logaddexp2.reduce(mixed))
        for (length, other), share in shares.items():
            weights[length] += 0.04 * share * ((other == token) - p[other])
        bias = bias + 0.2 * ((np.arange(VOCABULARY) == token) - p)
        coarse = np.maximum(centered, -20)
        temperature += (363 / 2**19) * (coarse[token] - p @ coarse)
        temperature = min(max(temperature, 0.5), 1.5)
        surprise.append(1 - p[token])
    return np.stack(rows)


@pytest.mark.slow
def test_the_mixer_is_its_definition():
    logits, tokens = stream()
    _, (mixed, lengths) = run(mixing.start(VOCABULARY, COUNT), logits, tokens)
    assert int(lengths.max()) == mixing.LONGEST
    wanted = mixed_by_definition(logits, tokens)
    np.testing.assert_allclose(mixed / 4096, wanted, atol=0.02)

    def bits(z):
        return np.logaddexp2.reduce(z, axis=1) - z[np.arange(COUNT), tokens]

    assert bits(wanted).sum() < 0.6 * bits(logits / 4096).sum()


@pytest.mark.slow
def test_room_and_other_lanes_change_no_integer():
    logits, tokens = stream()
    mixer, (mixed, _) = run(mixing.start(VOCABULARY, COUNT), logits, tokens)
    longer, (same, _) = run(mixing.start(VOCABULARY, 300), logits, tokens)
    np.testing.assert_array_equal(mixed, same)
    for name in ("bias", "temperature", "weights", "count"):
        np.testing.assert_array_equal(getattr(mixer, name), getattr(longer, name))
    two = jax.tree.map(lambda x: jnp.stack([x, x]), mixing.start(VOCABULARY, 300))
    rows = np.stack([logits[::-1], logits]), np.stack([tokens[::-1], tokens])
    _, (same, _) = jax.vmap(run)(two, *rows)
    np.testing.assert_array_equal(mixed, same[1])


def test_the_largest_keys_are_found_in_order():
    keys = np.full(75, -1, np.int32)
    keys[3:60] = np.random.default_rng(0).permutation(57)
    np.testing.assert_array_equal(
        mixing._largest(jnp.asarray(keys)), np.sort(keys)[::-1][: mixing.MATCHES]
    )
    few = jnp.array([-1, 7, -1, 9], jnp.int32)
    assert mixing._largest(few).tolist() == [9, 7, *[-1] * 14]


@pytest.mark.slow
def test_extremes_stay_in_range():
    """The largest logits, the same token again and again: no overflow, no NaN."""
    logits = np.full((50, 8), -(1 << 28), np.int32)
    logits[:, 0] = 1 << 28
    tokens = np.full(50, 7, np.int32)
    mixer, (mixed, _) = run(mixing.start(8, 64), logits, tokens)
    assert int(jnp.abs(mixed).max()) <= 1 << 28
    assert mixer.temperature == 1 << 26  # as low as it goes
    assert (mixer.bias[7] > 0) and (mixer.bias[0] < 0)
