"""The command line, in this process, on a tiny model."""

import json
import re

import jax
import numpy as np
import pytest

from jaxcompress import storage
from jaxcompress.cli import main
from jaxcompress.cli.parser import keep_compiled, parser
from jaxcompress.cli.recipes import stages_of
from jaxcompress.models.loading import load
from jaxcompress.models.saved import save
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tokenization import train
from jaxcompress.tree.leaf import Leaf
from jaxcompress.tree.methods import describe


@pytest.mark.slow
def test_compress_writes_a_model_that_loads(run, folder):
    out = run(
        "compress",
        "dense.safetensors",
        "small.safetensors",
        "--recipe",
        "symmetric(bits=4, block=32)",
        "--text",
        "text.txt",
        "--length",
        "64",
        "--batch",
        "4",
        "--json",
        "rows.jsonl",
    )
    size = (folder / "small.safetensors").stat().st_size
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[-1])
    assert row["file_bytes"] == size
    assert f"{size:,}".replace(",", " ") in out
    assert row["bits_per_weight"] == pytest.approx(8 * size / row["weights"])
    assert "layer_0/mlp/up_proj/kernel" in out and "symmetric(bits=4, block=32)" in out
    assert row["text"]["kl"] > 0 and row["text"]["dense"]["loss"] > 0
    _, params, tokenizer = load(folder / "small.safetensors")
    assert isinstance(params["layer_0"]["mlp"]["up_proj"]["kernel"], Leaf)
    assert tokenizer.decode(tokenizer.encode("bird")) == "bird"

    out = run("evaluate", "small.safetensors", "--text", "text.txt", "--length", "64")
    found = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    small = row["text"]["small"]
    assert float(found["perplexity"]) == pytest.approx(small["perplexity"], rel=1e-4)
    assert float(found["bits per byte"]) == pytest.approx(
        small["bits_per_byte"], rel=1e-4
    )
    assert int(found["tokens"]) == row["text"]["tokens"]

    against = ("--against", "dense.safetensors", "--json", "rows.jsonl")
    text = ("--text", "text.txt", "--length", "64", "--batch", "4")
    out = run("evaluate", "small.safetensors", *text, *against)
    assert "KL" in out and "top-1" in out
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[-1])
    assert row["small"]["loss"] == pytest.approx(small["loss"], rel=1e-4)

    out = run("inspect", "small.safetensors")
    assert "\nlayer_1/attention/q_proj/kernel" in out  # as recipes name it
    assert "symmetric(bits=4, block=32)" in out and "Quantized" in out

    out = run("inspect", "small.safetensors", "--parts")
    parts = out.split("array ", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    counts = [re.search(r"  (\d[\d ]*?)  +(\S+)$", line)[1] for line in parts]
    assert sum(int(count.replace(" ", "")) for count in counts) == size
    assert any("codes" in line and "bytes" in line for line in parts)

    out = run("verify", "small.safetensors")
    assert f"{size:,}".replace(",", " ") in out

    out = run("generate", "small.safetensors", "--prompt", "A tree", "--tokens", "5")
    assert out.startswith("A tree")
    sampled = ("--temperature", "1", "--top-k", "9", "--seed", "3")
    again = [
        run("generate", "small.safetensors", "--prompt", "A", "--tokens", "5", *sampled)
        for _ in range(2)
    ]
    assert again[0] == again[1]


def test_line_ends_of_a_text_are_scored_as_they_are(run, folder):
    text = (folder / "text.txt").read_bytes().replace(b"\n", b"\r\n")
    (folder / "crlf.txt").write_bytes(text)
    tokenizer = load(folder / "dense.safetensors")[2]
    ids = tokenizer.encode(text.decode())
    arguments = ("--text", "crlf.txt", "--length", "64", "--json", "crlf.jsonl")
    run("evaluate", "dense.safetensors", *arguments)
    row = json.loads((folder / "crlf.jsonl").read_text())
    assert row["tokens"] == len(ids) - 1  # the first is context
    assert row["bytes"] == len(text) - tokenizer.token_bytes(ids[:1])[0]


@pytest.mark.slow
def test_coding_makes_the_file_smaller_and_changes_no_bit(run, folder):
    arguments = (
        "compress",
        "dense.safetensors",
        "--recipe",
        ".*kernel=symmetric(bits=3)",
    )
    arguments += ("--recipe", ".*embedding=symmetric(bits=3)")
    run(*arguments, "coded.safetensors")
    run(*arguments, "plain.safetensors", "--no-coding")
    sizes = [(folder / f"{x}.safetensors").stat().st_size for x in ("coded", "plain")]
    assert sizes[0] < sizes[1]
    coded, plain = (load(folder / f"{x}.safetensors")[1] for x in ("coded", "plain"))
    assert jax.tree.structure(coded) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, coded, plain)
    with storage.open_checkpoint(folder / "plain.safetensors") as stored:
        assert not any(file.codings for file in stored.files())  # it means it
    run(*arguments, "memory.safetensors", "--coded-in-memory")
    memory = load(folder / "memory.safetensors")[1]
    assert jax.tree.structure(memory) != jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, *map(decode_once, (memory, plain)))


def test_dry_run_gives_the_sizes_and_writes_nothing(run, folder):
    recipe = ("--recipe", ".*mlp.*kernel=symmetric(bits=4)", "--no-coding")
    out = run("compress", "dense.safetensors", "none.safetensors", "--dry-run", *recipe)
    assert not (folder / "none.safetensors").exists()
    run("compress", "dense.safetensors", "some.safetensors", *recipe, "--json", "x")
    row = json.loads((folder / "x").read_text())
    for key in ("memory_bytes_before", "memory_bytes_after"):
        assert f"{row[key]:,}".replace(",", " ") in out


def test_recipe_options_make_rules_and_stages():
    stages = stages_of(
        [
            "layer_(0|1)/.*=symmetric(bits=8)",
            ".*embed.*=None",
            "symmetric(bits=4)",
            ".*codes=entropy_code",
        ]
    )
    assert len(stages) == 3
    (pattern, method), (embed, kept) = stages[0]
    assert pattern == "layer_(0|1)/.*" and describe(method) == "symmetric(bits=8)"
    assert (embed, kept) == (".*embed.*", None)
    assert describe(stages[1]) == "symmetric(bits=4)"
    assert [pattern for pattern, _ in stages[2]] == [".*codes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "absent.gguf", "out"], "absent.gguf"),
        (["compress", "dense.safetensors", "no/such/folder/out"], "no directory"),
        (
            ["compress", "dense.safetensors", "out", "--recipe", "symetric(bits=4)"],
            "did",
        ),
        (
            ["compress", "dense.safetensors", "out", "--recipe", "symmetric(bits=9)"],
            "9",
        ),
        (
            ["compress", "dense.safetensors", "out", "--recipe", "x=symmetric(bits=4)"],
            "'x'",
        ),
        (["evaluate", "dense.safetensors", "--text", "absent.txt"], "absent.txt"),
        (
            ["evaluate", "dense.safetensors", "--text", "latin1.txt"],
            "latin1.txt is not UTF-8: byte 0xE9 at position 3",
        ),
        (["inspect", "text.txt"], "text.txt"),
        (["verify", "text.txt"], "text.txt"),
        (["generate", "dense.safetensors", "--prompt", "a", "--tokens", "0"], "0"),
    ],
)
def test_mistakes_are_one_line_and_code_2(run, arguments, message):
    err = run(*arguments, code=2)
    assert err.count("\n") == 1 and message in err and "Traceback" not in err


def test_a_damaged_file_is_refused(run, folder):
    data = bytearray((folder / "dense.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "damaged.safetensors").write_bytes(data)
    assert "damaged" in run("verify", "damaged.safetensors", code=2)


def test_models_of_different_tokenizers_are_not_compared(run, folder):
    model, params, _ = load(folder / "dense.safetensors")
    text = (folder / "text.txt").read_text(encoding="utf-8")
    other = train([text.upper()], kind="bpe", vocab_size=320)
    save(folder / "other.safetensors", model, params, other)
    against = ("--against", "dense.safetensors", "--text", "text.txt")
    assert "tokenizers" in run("evaluate", "other.safetensors", *against, code=2)


def test_debug_shows_the_traceback(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError):
        main(["verify", "absent.safetensors", "--debug"])


def test_every_command_has_an_example(capsys):
    names = ("compress", "plan", "evaluate", "generate", "inspect", "verify", "demo")
    for name in names:
        with pytest.raises(SystemExit) as stop:
            parser().parse_args([name, "--help"])
        assert stop.value.code == 0
        assert f"example:\n  python -m jaxcompress {name}" in capsys.readouterr().out


def test_the_file_written_names_its_recipe(run, folder):
    run(
        "compress",
        "dense.safetensors",
        "named.safetensors",
        "--recipe",
        "symmetric(bits=2)",
    )
    with storage.open_checkpoint(folder / "named.safetensors") as stored:
        assert stored.metadata["recipe"] == ["symmetric(bits=2)"]


def test_programs_are_kept_where_a_folder_is_named(monkeypatch):
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    try:
        keep_compiled()
        assert getattr(jax.config, least) == before
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "folder")
        keep_compiled()
        assert getattr(jax.config, least) == 0.05
    finally:
        jax.config.update(least, before)
