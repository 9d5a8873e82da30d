"""How small does the reference model get without losing anything but bfloat16's bits?

Takes what `train_reference.py` left in a folder (`params.npz`, `tokenizer.model`,
`heldout.txt`), rounds the weights to bfloat16, codes them without loss, and writes the
model file that `models.load("reference")` reads:

    python -m experiments.models.pack_reference reference jaxcompress/models/data
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from experiments.models.train_reference import Config as Training
from experiments.models.train_reference import make_model
from jaxcompress import tokenization
from jaxcompress.coding import code_floats
from jaxcompress.models.assembly import parameter_shapes
from jaxcompress.models.saved import load_saved, save
from jaxcompress.tree.compress import compress
from jaxcompress.tree.leaf import materialize, nbytes


@dataclasses.dataclass(frozen=True)
class Config:
    source: str
    target: str


def run(config: Config) -> dict[str, Any]:
    """Write `reference.safetensors` and `heldout.txt` into the target folder."""
    source, target = Path(config.source), Path(config.target)
    model = make_model(Training())
    with np.load(source / "params.npz") as arrays:
        flat = {name: jnp.asarray(arrays[name]) for name in arrays.files}
    found = {name: array.shape for name, array in flat.items()}
    if found != parameter_shapes(model):
        raise ValueError(
            f"{source / 'params.npz'} does not hold the model of train_reference.Config"
        )
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
        unflatten_dict(flat, sep="/"),
    )
    coded = compress(rounded, code_floats())
    tokenizer = tokenization.from_bytes((source / "tokenizer.model").read_bytes())
    heldout = (source / "heldout.txt").read_bytes()
    metadata = {
        "name": "reference",
        "trained_on": "Python's standard library, see experiments/models",
        "heldout_sha256": hashlib.sha256(heldout).hexdigest(),
    }
    target.mkdir(parents=True, exist_ok=True)
    path = target / "reference.safetensors"
    save(path, model, coded, tokenizer, metadata)
    shutil.copyfile(source / "heldout.txt", target / "heldout.txt")
    _, read, _ = load_saved(path)
    jax.tree.map(np.testing.assert_array_equal, materialize(read), rounded)
    weights = sum(array.size for array in flat.values())
    return {
        "experiment": "pack_reference",
        "weights": weights,
        "bytes_float32": nbytes(rounded),
        "bytes_coded": nbytes(coded),
        "bytes_file": path.stat().st_size,
        "bits_per_weight": 8 * path.stat().st_size / weights,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Config):
        parser.add_argument(field.name)
    print(json.dumps(run(Config(**vars(parser.parse_args()))), indent=2))
