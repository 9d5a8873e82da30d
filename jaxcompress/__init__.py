"""Pure functions that make Flax language models small, and exact again.

Examples in docstrings take as given: `import jaxcompress as jc`, a Flax `model` with
`params`, `tokens`, `tokenizer`, `batches` and `moments`; a weight `x` with moments
`of_x`; a `key`.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

# Public names by the module that defines them. They are imported when first used, so
# that importing the package stays light.
_NAMES = {
    "calibration.block_curvatures": "measure_curvatures_blockwise",
    "calibration.blockwise": "compress_blockwise",
    "calibration.collect": "collect_moments",
    "calibration.curvatures": "measure_curvatures",
    "calibration.moments": "Moments moments_from_covariance",
    "calibration.sensitivities": "measure_sensitivities",
    "coding.floats.code_floats": "CodedFloats code_floats",
    "coding.floats.leaf": "CodedWords",
    "coding.integers.leaf": "Coded entropy_code",
    "coding.levels.leaf": "CodedLevels",
    "coding.levels.rate_coded": "RateCoded",
    "coding.packing": "Packed pack_bits",
    "evaluation": "compare evaluate",
    "evaluation.sweep": "sweep",
    "factorization.corrections": "corrected",
    "factorization.cp": "CP cp",
    "factorization.low_rank": "LowRank",
    "factorization.svd": "svd",
    "factorization.tucker": "Tucker tucker",
    "pruning.outliers": "outliers",
    "pruning.reconstruction": "alps sparsegpt",
    "pruning.scores": "magnitude wanda",
    "pruning.sparse": "Sparse",
    "quantization.awq": "Scaled awq",
    "quantization.gptq": "gptq",
    "quantization.grids": "Quantized",
    "quantization.hqq": "hqq",
    "quantization.learned": "learned",
    "quantization.mixed": "mixed_channels",
    "quantization.nearest": "asymmetric sign_split symmetric",
    "quantization.number_formats": "fp8 mxfp4 nf4 nvfp4",
    "quantization.rate_distortion": "rate_distortion",
    "reporting.leaves": "explain report",
    "reporting.versions": "show_versions",
    "running.check": "check",
    "running.compressed_matmul": "compressed_matmul",
    "running.low_memory": "low_memory",
    "running.shardings": "shardings",
    "shrinking.shrink": "shrink",
    "shrinking.shrunk": "Shrunk",
    "storage.checkpoint": "load open_checkpoint save verify",
    "storage.orbax": "restore_orbax save_orbax",
    "storage.tree_json": "FileDamaged",
    "tracing.layouts": "find_layouts",
    "training.qat_leaf": "FakeQuantized",
    "training.steps": "make_train_step",
    "tree.compress": "chain compress",
    "tree.layouts": "Layout",
    "tree.generic_leaves": "Mixed Reshaped Sum",
    "tree.leaf": "Leaf leaf materialize nbytes static",
    "tree.methods": "method",
    "tree.partitions": "combine partition",
    "tree.paths": "leaf_names",
    "tree.record": "LeafReport",
}
_MODULES = {
    "distillation": "distillation",
    "evaluation": "evaluation",
    "export": "export",
    "masks": "pruning.masks",
    "models": "models",
    "optimizers": "training.optimizers",
    "planning": "planning",
    "plots": "plots",
    "qat": "training.qat",
    "storage": "storage",
    "structured": "pruning.structured",
    "textcoding": "textcoding",
    "tokenization": "tokenization",
    "training": "training",
    "tree": "tree",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(f"jaxcompress.{_MODULES[name]}")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"jaxcompress.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'jaxcompress' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
