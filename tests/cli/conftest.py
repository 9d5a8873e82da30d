"""A tiny model in a folder, and the command line in this process."""

import jax
import numpy as np
import pytest

from jaxcompress.cli import main
from jaxcompress.models.saved import save
from jaxcompress.models.transformer import Transformer
from jaxcompress.tokenization import train

TEXT = (
    "A tree falls in the forest and a bird writes down how it sounded. The sound was "
    "short, the note is long; 17 words became 170.\n"
) * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny dense model, and a text."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = train([TEXT], kind="bpe", vocab_size=320)
    model = Transformer(
        vocab_size=tokenizer.vocab_size,
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=16,
        mlp_width=64,
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), shapes["params"]
    )
    save(folder / "dense.safetensors", model, params, tokenizer)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments, code=0):
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err  # progress may be there
        return err if code else out

    return run
