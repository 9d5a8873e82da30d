"""Configurations whose logits were recorded with transformers, and their weights.

`scripts/record_settings.py` recorded them, on weights that depend on names and
shapes alone.
"""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxcompress.models.assembly import assemble, foreign_names, parameter_shapes
from jaxcompress.models.families import FAMILIES

TESTS = Path(__file__).parent
RECORDED = TESTS / "data" / "settings"


def _record_settings():
    path = TESTS.parent / "scripts" / "record_settings.py"
    spec = importlib.util.spec_from_file_location("record_settings", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


record = _record_settings()


def config_of(family, change=()):
    return {**FAMILIES[family].base, **dict(change), "architectures": [family]}


def weights(family, model):
    """The recorded tensors of the model by the file's names, and our parameters."""
    modules, offset = FAMILIES[family].modules, np.float32(FAMILIES[family].norm_offset)
    tensors = {}
    family = FAMILIES[family]
    for ours, shape in parameter_shapes(model).items():
        names = foreign_names(ours, shape, modules)
        shape = shape[1:] if len(names) > 1 else shape
        _, count = family.fused.get(module_of(ours), (0, 1))
        shape = (*shape[:-1], count * shape[-1])
        conv1d = family.conv1d and ours.startswith("layer_")
        if ours.endswith("/kernel") and not conv1d:
            shape = shape[::-1]
        for theirs in names:
            tensors[theirs] = record.weight(theirs, shape, 1 - offset)

    def fetch(theirs, ours):
        array = tensors[theirs] + offset * ours.endswith("norm/scale")
        if family.conv1d and ours.startswith("layer_") and ours.endswith("/kernel"):
            array = array.T
        part, count = family.fused.get(module_of(ours), (0, 1))
        return np.split(array, count)[part]

    read = assemble(model, tensors, fetch, modules, source="recorded weights")
    return tensors, read.read_all()


def module_of(name):
    """The module of a parameter within its layer."""
    return "/".join(name.split("/")[1:-1])


def states(model, params):
    out = model.apply({"params": params}, jnp.asarray(record.TOKENS))
    return np.asarray(out)[0, list(record.POSITIONS)]
