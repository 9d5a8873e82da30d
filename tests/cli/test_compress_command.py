"""`compress` and `plan`: goals, calibration, recipe files, what is checked first."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxcompress import storage
from jaxcompress.cli import compressing, main
from jaxcompress.cli.recipes import read_recipe
from jaxcompress.models import loading
from jaxcompress.models.saved import save
from jaxcompress.reporting import render, table


@pytest.mark.slow
def test_a_size_is_met_and_said(run, folder):
    out = run("compress", "dense.safetensors", "by_size", "--size", "70kB", *QUICK)
    size = (folder / "by_size").stat().st_size
    assert 69_300 <= size <= 70_000 and f"{size:,}".replace(",", " ") in out
    assert "by_size: written, tokenizer included" in out
    out = run("compress", "dense.safetensors", "by_size", "--size", "60kB", *QUICK)
    assert "by_size: replaced" in out
    message = run(
        "compress", "dense.safetensors", "by_size", "--no-clobber", *QUICK, code=2
    )
    assert "exists" in message and (folder / "by_size").stat().st_size <= 60_000


QUICK = ("--effort", "quick", "--quiet")


def test_a_plan_is_a_recipe_file(run, folder):
    run("plan", "dense.safetensors", "--size", "70kB", "--out", "plan.json", *QUICK)
    printed = run("plan", "dense.safetensors", "--size", "70kB", *QUICK)
    assert (folder / "plan.json").read_text() == printed
    stages, recipe = read_recipe(folder / "plan.json")
    assert recipe == json.loads(printed)["recipe"] and len(stages) == 1
    options = ("--recipe-file", "plan.json", "--quiet")
    run("compress", "dense.safetensors", "planned", *options)
    # The first attempt, which compress --size would correct.
    assert 65_000 < (folder / "planned").stat().st_size <= 75_000
    with storage.open_checkpoint(folder / "planned") as stored:
        assert stored.metadata["recipe"] == recipe


@pytest.mark.slow
def test_methods_that_need_data_are_calibrated(run, folder):
    recipe = ("--recipe", ".*q_proj.*=gptq(bits=4, block=32)", "--quiet")
    message = run("compress", "dense.safetensors", "none", *recipe, code=2)
    assert "--calibrate FILE" in message and "collect_moments" not in message
    run("compress", "dense.safetensors", "gptq", *recipe, "--calibrate", "text.txt")
    with storage.open_checkpoint(folder / "gptq") as stored:
        kind, *_ = stored.describe("params/layer_0/attention/q_proj/kernel")
    assert kind == "Quantized"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--text", "nofile.txt"], "nofile.txt"),
        (["out", "--calibrate", "nofile.txt"], "nofile.txt"),
        (["out", "--recipe-file", "nofile.json"], "nofile.json"),
        (["folder"], "folder is a directory"),
        (["dense.safetensors"], "is the model itself"),
        (["out", "--size", "1MB", "--kl", "0.1"], "one goal"),
        (["out", "--size", "1MB", "--recipe", "nf4()"], "leave out --recipe"),
        (["out", "--size", "many"], "not a size"),
        (["out", "--size", "1MB", "--no-coding"], "excludes --size"),
        (["out", "--no-coding", "--coded-in-memory"], "excludes --coded-in-memory"),
        (["out", "--recipe", "int4"], "did you mean 'symmetric(bits=4, block=32)'"),
        (["out", "--recipe", "q4_0"], "did you mean 'symmetric(bits=4, block=32)'"),
        (["out", "--recipe", "symmetric"], "symmetric needs bits, for instance"),
        (["out", "--json", "no/such/rows"], "no directory"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(
    run, folder, monkeypatch, arguments, message
):
    (folder / "folder").mkdir(exist_ok=True)

    def never(*_, **__):
        raise AssertionError("work began")

    monkeypatch.setattr(compressing, "load", never)
    err = run("compress", "dense.safetensors", *arguments, code=2)
    assert err.count("\n") == 1 and message in err
    assert not (folder / "out").exists()


def test_models_of_other_programs_are_named(run, folder):
    (folder / "model.bin").write_bytes(b"GGUF" + bytes(64))
    (folder / "model.pt").write_bytes(b"PK\x03\x04" + bytes(64))
    (folder / "empty").mkdir(exist_ok=True)
    assert "is a GGUF file" in run("inspect", "model.bin", code=2)
    assert "PyTorch" in run("verify", "model.pt", code=2)
    assert "no config.json" in run("generate", "empty", "--prompt", "a", code=2)
    assert run("verify", "nofile", code=2) == "jaxcompress: no file at nofile\n"


def test_a_text_needs_a_tokenizer(run, folder):
    model, params, _ = loading.load(folder / "dense.safetensors")
    save(folder / "mute.safetensors", model, params)
    for goal in ([], ["--size", "70kB"]):
        for option in ("--text", "--calibrate"):
            options = ("mute", *goal, option, "text.txt", "--quiet")
            err = run("compress", "mute.safetensors", *options, code=2)
            assert f"no tokenizer, which {option} needs" in err
    assert not (folder / "mute").exists()


def test_an_interruption_is_one_line_and_130(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compressing, "load", interrupted)
    err = run("compress", "dense.safetensors", "out", code=130)
    assert err == "jaxcompress: interrupted, nothing was written\n"


@pytest.mark.nightly
def test_a_signal_while_threads_compress_is_130(tmp_path):
    out = tmp_path / "small.safetensors"
    options = ["--size", "1.5MB", "--effort", "quick"]
    with subprocess.Popen(
        [sys.executable, "-m", "jaxcompress", "compress", "reference", out, *options],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            if "compressing" in line:
                break
        time.sleep(2)  # inside compiled programs
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130 and not out.exists()
    assert err == "jaxcompress: interrupted, nothing was written\n"


def test_a_reader_that_has_seen_enough_ends_quietly(run, monkeypatch):
    closed, open_ = os.pipe()
    os.close(closed)
    with os.fdopen(open_, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["inspect", "dense.safetensors"]) == 141


def test_no_command_is_the_help(run):
    out = run()
    assert "usage: python -m jaxcompress" in out and "--size 60MB" in out


def test_a_dry_run_writes_its_row(run, folder):
    run("compress", "dense.safetensors", "none", "--dry-run", "--json", "dry.jsonl")
    row = json.loads((folder / "dry.jsonl").read_text())
    assert row["dry_run"] and row["memory_bytes_after"] < row["memory_bytes_before"]


@pytest.mark.slow
def test_a_dry_run_of_a_goal_forecasts_it(run, folder, monkeypatch):
    monkeypatch.setattr(compressing, "shrink", None)  # reads and writes nothing
    goal = ("--size", "70kB", "--dry-run", "--json", "goal")
    out = run("compress", "dense.safetensors", "out", *goal)
    assert "at most 70 000 bytes" in out and "of memory" in out
    row = json.loads((folder / "goal").read_text())
    shapes = {name: x.size for name, x in loading.shapes("dense.safetensors").items()}
    kernels = [name for name in shapes if "scale" not in name]
    assert row["weights"] == sum(shapes.values())
    assert row["planned_weights"] == sum(shapes[name] for name in kernels)
    assert row["file_bytes"] == 70_000 > row["planned_bytes"] > 60_000
    assert row["seconds"] > 0 and row["memory_bytes"] > 2**20
    message = run(
        "compress", "dense.safetensors", "out", "--size", "2kB", "--dry-run", code=2
    )
    assert "takes" in message and not (folder / "out").exists()


def test_a_dry_run_of_a_plan_has_its_rates(run, folder):
    rate = "rate_distortion(rate=3)"
    rules = [["layers/mlp/.*", rate], ["layers/attention/q.*", "gptq(bits=4)"]]
    (folder / "rules.json").write_text(json.dumps(rules))
    options = ("--recipe-file", "rules.json", "--dry-run", "--json", "rates")
    run("compress", "dense.safetensors", "out", *options, "--calibrate", "text.txt")
    row = json.loads((folder / "rates").read_text())
    saved = 3 * 2 * 64 * 64 * (4 - 3 / 8) + 2 * 64 * 64 * (4 - 4 / 8)
    steps = 2 * 64 * 2  # of q_proj, in bfloat16
    change = row["memory_bytes_before"] - row["memory_bytes_after"]
    assert change == saved - steps


def test_rules_name_layers_that_are_stacked(run, folder):
    rule = "layers/mlp/.*=symmetric(bits=3, block=32)"
    run("compress", "dense.safetensors", "stacked", "--recipe", rule, "--quiet")
    with storage.open_checkpoint(folder / "stacked") as stored:
        kind, shape, _ = stored.describe("params/layers/mlp/up_proj/kernel")
    assert kind in ("Quantized", "Reshaped") and shape == (2, 64, 64)


def test_names_are_never_folded():
    name = "layers/" + "attention/" * 30 + "kernel"
    assert name in render(table([{"leaf": name, "bytes": 3}]))
