"""Bytes to bytes and back, whatever the bytes; refusals of everything else."""

import dataclasses
import hashlib
import pathlib

import jax
import numpy as np
import pytest

from jaxcompress.cli import main
from jaxcompress.models import Transformer
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.models.saved import load_reference, save
from jaxcompress.storage import FileDamaged
from jaxcompress.textcoding import codec, container, decode, encode, exact, verify
from jaxcompress.textcoding import pieces as pieces_module
from jaxcompress.textcoding.windows import cut_windows

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEXT = (
    "def add(self, name):\n    # A list of names: 17 of them.\n    return name\n\n" * 9
).encode()
ODD = {
    "empty": b"",
    "one byte": b"a",
    "one bad byte": b"\xff",
    "emoji": "naïve 😀👩‍👩‍👧 \u2028\ufeff".encode(),
    "control": bytes(range(32)) + b"\x00\x7f\x00",
    "bad UTF-8": b"\xc3(\xed\xa0\x80\xf8\x88\xff tail \xe2\x82",
    "special": b"<s></s><unk><pad><|im_start|>\xe2\x96\x81<0x41>",
    "spaces": b"  \n\t\r\n   x  ",
}


def tiny(tokenizer, seed=0):
    """A model of random weights that is quick to compile, with few parts of each."""
    model = Transformer(tokenizer.vocab_size, 16, 1, 1, 1, 16, 16)
    params = model.init(jax.random.key(seed), np.zeros((1, 2), np.int32))["params"]
    return exact(model, params)


@pytest.fixture(scope="module")
def coder():
    """An exact model and a tokenizer, as arguments of `encode`."""
    tokenizer = load_reference()[2]
    return tiny(tokenizer), None, tokenizer


def small(data, coder, **options):
    options = {"window": 16, "overlap": 8, "mix": False, "verify": False} | options
    return encode(data, *coder, **options)


@pytest.mark.parametrize("name", ODD)
def test_odd_bytes_come_back(coder, name):
    file = small(ODD[name], coder, store=False)
    assert decode(file, *coder) == ODD[name]
    if ODD[name]:
        assert container.read(file).lanes[0].kind in (container.TOKENS, container.MIXED)
    assert decode(small(ODD[name], coder), *coder) == ODD[name]


@pytest.mark.parametrize(("lanes", "window", "overlap"), [(1, 16, 8), (2, 16, 0)])
def test_text_in_lanes_and_windows_comes_back(coder, lanes, window, overlap):
    data = TEXT[:200]
    while len(pieces_module.to_pieces(coder[2], data).ids) % 2 == 0:
        data = data[:-1]  # so that two lanes are not equally long
    options = {"lanes": lanes, "window": window, "overlap": overlap, "store": False}
    file = small(data, coder, **options)
    assert len(container.read(file).lanes) == lanes
    assert verify(file, *coder) == len(data)


@pytest.mark.slow
def test_mixed_text_behind_a_primer_comes_back_and_is_smaller(coder):
    data, options = TEXT[:200], {"mix": True, "lanes": 2, "store": False}
    file = small(data, coder, primer=b"def other(): return", **options)
    assert file[4] == 2 and container.read(file).mix
    assert decode(file, *coder, primer=b"def other(): return") == data
    with pytest.raises(ValueError, match=r"another primer: SHA-256 [0-9a-f]{16}"):
        decode(file, *coder)
    # A model of random weights learns nothing but what the text itself repeats.
    plain = small(data, coder, store=False)
    assert plain[4] == 1
    mixed = small(data, coder, mix=True, store=False)
    sizes = [len(container.read(x).lanes[0].payload) for x in (mixed, plain)]
    assert sizes[0] < 0.75 * sizes[1]


def test_an_unknown_mixing_rule_is_refused(coder):
    contents = dataclasses.replace(container.read(small(b"", coder)), mix=True)
    assert container.read(container.write(contents)) == contents
    contents = dataclasses.replace(contents, mix=2)
    with pytest.raises(FileDamaged, match="mixing rule 2"):
        container.read(container.write(contents))


def test_windows_cover_every_token_once():
    for count in (0, 1, 31, 32, 33, 100, 257):
        for window, overlap in ((32, 16), (32, 0), (32, 31), (2, 0), (64, 10)):
            for primer in (0, window // 2):
                covered = []
                for start, first, end in cut_windows(count, window, overlap, primer):
                    assert 0 <= start < first < end
                    assert end - 1 - start <= window
                    assert start == 0 or first - start >= max(1, overlap)
                    covered += range(first, end)
                assert covered == list(range(primer + 1, primer + count + 1))


def test_what_does_not_gain_is_stored(coder):
    noise = np.random.default_rng(0).bytes(4000)
    file = small(noise, coder)
    assert len(file) < len(noise) + 110 and decode(file, *coder) == noise
    letters = b"a" * 1_000_000
    file = small(letters, coder)
    assert len(file) < 10_000 and decode(file, *coder) == letters


def test_bytes_without_a_piece_are_escapes(coder):
    class Letters:
        """A tokenizer of three letters that changes case, as some normalizers do."""

        bos_id, eos_id, digest = None, None, "00" * 32
        pieces = (b"a", b"b", b"ab")

        def encode(self, text):
            return ["ab".find(x) % 3 for x in text.lower() if x.isalpha()]

    data = b"aAb\x00\xffba ab" * 5
    whole = pieces_module.to_pieces(Letters(), data)
    assert whole.escapes[0] == (1, b"A") and set(whole.ids) == {0, 1}
    assert pieces_module.from_pieces(Letters(), whole) == data
    for counts in ([30], [7, 7, 16], [0, 30]):
        parts = pieces_module.cut(whole, counts)
        assert b"".join(pieces_module.from_pieces(Letters(), x) for x in parts) == data
    file = small(data, (coder[0], None, Letters()), store=False, lanes=2)
    assert decode(file, coder[0], None, Letters()) == data


def test_every_altered_or_cut_file_is_refused(coder):
    file = small(TEXT[:200], coder, lanes=2, store=False)
    random = np.random.default_rng(0)
    for position in range(len(file)):
        bad = bytearray(file)
        bad[position] ^= 1 << int(random.integers(8))
        with pytest.raises(FileDamaged):
            container.read(bytes(bad))
    for length in range(len(file)):
        with pytest.raises(FileDamaged):
            container.read(file[:length])
    with pytest.raises(FileDamaged, match="1 bytes follow"):
        container.read(file + b"x")


def test_alterations_with_right_checksums_are_refused(coder):
    contents = container.read(small(TEXT[:200], coder, lanes=2, store=False))
    first, last = contents.lanes
    payload = bytearray(first.payload)
    payload[9] ^= 4
    cut = dataclasses.replace(first, payload=first.payload[:-2])
    for lanes in (
        [dataclasses.replace(first, payload=bytes(payload)), last],
        [cut, last],
        [dataclasses.replace(first, payload=first.payload + b"ab"), last],
        [last, first],
        [first],
        [dataclasses.replace(first, kind=container.RAW), last],
        [dataclasses.replace(first, kind=container.ZSTD), last],
        [dataclasses.replace(first, payload=b"abc"), last],
    ):
        forged = container.write(dataclasses.replace(contents, lanes=lanes))
        with pytest.raises(ValueError):
            decode(forged, *coder)
    for field, value in (("nbytes", 201), ("overlap", 99), ("data", b"x" * 16)):
        forged = container.write(dataclasses.replace(contents, **{field: value}))
        with pytest.raises(FileDamaged):
            decode(forged, *coder)


def test_another_model_tokenizer_or_device_is_named(coder):
    file = small(TEXT[:60], coder, store=False)
    with pytest.raises(ValueError, match=r"another model: SHA-256 [0-9a-f]{32}"):
        decode(file, tiny(coder[2], seed=1), None, coder[2])
    other = type("Other", (), {"__getattr__": lambda self, x: getattr(coder[2], x)})()
    other.digest = "ab" * 32
    with pytest.raises(ValueError, match=r"another tokenizer: .* here abab"):
        decode(file, coder[0], None, other)
    contents = dataclasses.replace(container.read(file), canary=b"canary!!")
    with pytest.raises(ValueError, match="another logits on fixed tokens"):
        decode(container.write(contents), *coder)


def test_options_that_make_no_sense(coder):
    for options, words in (
        ({"window": 1}, "window is 1"),
        ({"overlap": 16}, "overlap is 16; from 0 to 15"),
        ({"lanes": 0}, "lanes is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            small(b"x", coder, **options)
    with pytest.raises(ValueError, match="no tokenizer"):
        encode(b"x", coder[0])
    with pytest.raises(ValueError, match="params must be None"):
        encode(b"x", coder[0], {}, coder[2])
    with pytest.raises(ValueError, match="params without a model"):
        encode(b"x", None, {})


@pytest.mark.parametrize(
    ("name", "options", "primer"),
    [
        pytest.param("text", {"mix": False}, 0, marks=pytest.mark.slow),
        pytest.param(
            "mixed",
            {"overlap": 100, "lanes": 2},
            1000,
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_golden_files(name, options, primer):
    """Files of the reference model, made by another process, decode to their text."""
    golden = (GOLDEN / f"{name}.jxtc").read_bytes()
    text = heldout_text().encode()
    primer = text[20_000 - primer : 20_000]
    decoded = decode(golden, primer=primer)
    assert decoded == text[20_000:20_600]
    again = encode(decoded, window=256, primer=primer, verify=False, **options)
    assert hashlib.sha256(again).digest() == hashlib.sha256(golden).digest()
    assert len(again) < 0.4 * len(decoded)


def test_command_line(coder, tmp_path, capsys, monkeypatch):
    model = coder[0].model
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    save(tmp_path / "model.safetensors", model, params, coder[2])
    (tmp_path / "a.txt").write_bytes(TEXT[:100])
    which = ("--model", str(tmp_path / "model.safetensors"))
    files = [str(tmp_path / name) for name in ("a.txt", "a.jxtc", "b.txt")]
    options = ("--window", "16", "--lanes", "1", "--no-mix")
    assert main(["text", "encode", *files[:2], *which, *options]) == 0
    assert main(["text", "decode", *files[1:], *which]) == 0
    assert pathlib.Path(files[2]).read_bytes() == TEXT[:100]
    assert main(["text", "verify", files[1], *which]) == 0
    assert "100 bytes" in capsys.readouterr().out
    assert main(["text", "decode", files[0], files[2], *which]) == 2
    assert "not compressed text" in capsys.readouterr().err
    assert main(["text", "decode", files[1], str(tmp_path / "no/b"), *which]) == 2
    monkeypatch.setattr(codec, "_decode", lambda *_: b"something else")
    assert main(["text", "encode", *files[:2], *which, *options]) == 2
    assert "did not restore the text" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.part"))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    from jaxcompress.cli import text

    def full(fd):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").write_bytes(b"before")
    monkeypatch.setattr(text.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        text.write_whole(tmp_path / "out", b"after")
    assert (tmp_path / "out").read_bytes() == b"before"
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_a_text_that_would_not_come_back_is_an_error(coder, monkeypatch):
    monkeypatch.setattr(codec, "_decode", lambda *_: b"something else")
    with pytest.raises(RuntimeError, match="did not restore the text"):
        small(TEXT[:40], coder, verify=True)
