"""What the pages of the site and the README show is executed: each page in one
namespace, block after block, in an empty folder.

The reference model stands in one layer deep, so that a page takes seconds; the
README and the demo run on the whole one (`test_documents`).
"""

import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import pytest

import jaxcompress as jc

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SLOW = {
    "concepts.md",
    "exports.md",
    "extending.md",
    "guides/calibrate.md",
    "guides/distil.md",
    "guides/low_rank.md",
    "guides/prune.md",
    "guides/quantize.md",
    "guides/rate_distortion.md",
    "guides/shrink.md",
    "guides/training.md",
    "many_devices.md",
    "text_coding.md",
}
LAYERS = {"guides/distil.md": 2}
# Blocks marked `py` need another program, or a version that is not installed here.
NOT_RUN = {"exports.md": 1, "guides/own_model.md": 1, "many_devices.md": 1}
load = jc.models.load


def shallow(layers):
    """`models.load`, the reference model cut to its first layers."""

    def load_shallow(source, *options, **named):
        model, params, tokenizer = load(source, *options, **named)
        if source == "reference":
            model, params = jc.models.fewer_layers(model, params, range(layers))
        return model, params, tokenizer

    return load_shallow


def blocks(page):
    """The blocks of Python, each behind as many empty lines as precede it."""
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        yield "\n" * text[: match.start(1)].count("\n") + match[1]


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if list(blocks(page))]


def parameters():
    for page in PAGES:
        name = page.relative_to(DOCS).as_posix()
        marks = [pytest.mark.slow] if name in SLOW else []
        yield pytest.param(page, id=name, marks=marks)


@pytest.mark.parametrize("page", list(parameters()))
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = LAYERS.get(page.relative_to(DOCS).as_posix(), 1)
    monkeypatch.setattr(jc.models, "load", shallow(layers))
    names = {"__name__": "page"}
    for source in blocks(page):
        exec(compile(source, str(page), "exec"), names)


def test_slow_pages_exist():
    assert {page.relative_to(DOCS).as_posix() for page in PAGES} >= SLOW


def test_what_is_not_run_is_counted():
    found = {
        page.relative_to(DOCS).as_posix(): page.read_text("utf-8").count("\n```py\n")
        for page in DOCS.rglob("*.md")
    }
    assert {name: count for name, count in found.items() if count} == NOT_RUN


@pytest.mark.nightly
def test_models_of_transformers_run_as_the_page_says():
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("4."):
        pytest.skip("version 5 has no Flax models")
    text = (DOCS / "guides/own_model.md").read_text("utf-8")
    (source,) = re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names = {"jc": jc, "jnp": jnp}
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")  # of transformers, and of few tokens
        exec(source, names)
    assert names["logits"].shape == (4, 24, 256)
    assert jc.nbytes(names["small"]) < jc.nbytes(names["model"].params) / 4
