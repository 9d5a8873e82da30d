"""Do the readers of compressed-tensors give the weights and logits that we mean?

Writes a model by each recipe as a compressed-tensors directory and as a dense one, and
compares them in their readers: tensor by tensor in compressed-tensors' decompressor and
in tpu-inference's unpack function, and as a whole in transformers, on the CPU. Needs
the packages of the `readers` extra; tpu-inference, where it is installed without what
it depends on, is read from its file:

    python -m experiments.export.directories SmolLM2.gguf text.txt
"""

import dataclasses
import functools
import importlib.util
import json
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import compressed_tensors  # noqa: F401  (before torch's own tests of its presence)
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors import safe_open

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from jaxcompress.models.bundled_text import heldout_text

KERNELS = "layer_.*/kernel"
# What is compared: method, activations; the first rows are run with --fast.
ROWS: dict[str, tuple[str, str | None]] = {
    "4 bits, groups of 32": ("symmetric(bits=4, block=32)", None),
    "nvfp4": ("nvfp4()", None),
    "4 bits, groups of 64, gptq": ("gptq(bits=4, block=64)", None),
    "4 bits, groups of 128": ("symmetric(bits=4, block=128, full_range=True)", None),
    "4 bits, channels": ("symmetric(bits=4)", None),
    "3 bits in 4, groups of 64": ("symmetric(bits=3, block=64)", None),
    "8 bits, groups of 32": ("symmetric(bits=8, block=32)", None),
    "8 bits, channels": ("symmetric(bits=8)", None),
    "8 bits, activations too": ("symmetric(bits=8)", "dynamic"),
    "fp8": ("fp8()", None),
    "fp8, activations too": ("fp8()", "dynamic"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""  # the packaged text by default
    tokens: int = 64
    only: str = ""  # rows whose name holds this
    fast: bool = False  # two rows
    results: str = "experiments/export/results/directories.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Have each recipe's directories read; a row for each."""
    torch.set_num_threads(1)
    model, params, tokenizer = jc.models.load(config.model, scan=False)
    text = jc.tokenization.read_text(config.text) if config.text else heldout_text()
    ids = np.asarray(tokenizer.encode(text[: 60 * config.tokens]), np.int32)
    tokens, *calibration = ids[: 9 * config.tokens].reshape(-1, 1, config.tokens)
    names = [name for name in ROWS if config.only in name]
    packages = ("compressed-tensors", "transformers", "torch")
    results = Results(
        config,
        model=Path(config.model).name,
        readers={x: metadata.version(x) for x in packages},
    )
    for name in names[:2] if config.fast else names:
        method, activations = ROWS[name]
        moments = (
            jc.collect_moments(model, params, calibration)
            if method.startswith("gptq")
            else None
        )
        clock = time.perf_counter()
        small = jc.compress(params, [(KERNELS, method)], moments)
        with tempfile.TemporaryDirectory() as folder:
            found = compare(
                Path(folder), model, small, tokenizer, tokens, activations=activations
            )
        row = {"row": name, "method": method, "tokens": config.tokens, **found}
        results.add({**row, "seconds": time.perf_counter() - clock})
    return results.rows


def compare(
    folder: Path,
    model: Any,
    small: Any,
    tokenizer: Any,
    tokens: np.ndarray,
    *,
    activations: str | None,
) -> dict[str, Any]:
    """Write both directories in float32 and in bfloat16, and have both read."""
    packed, dense = functools.partial(_packed, activations), jc.export.huggingface
    packed(folder / "f32", model, small, tokenizer, dtype="float32")
    dense(folder / "f32-dense", model, small, tokenizer, dtype="float32")
    found = tensors_differing(folder / "f32", folder / "f32-dense")
    found |= unpacked_on_tpu(folder / "f32", folder / "f32-dense")
    if activations is not None:
        return found  # its logits differ: it rounds what the dense one does not
    wanted = np.asarray(jax.jit(model.apply)({"params": jc.materialize(small)}, tokens))
    # transformers decompresses nvfp4 into bfloat16 only, unless all is dequantized.
    option = {"dequantize": found["layout"].startswith("nvfp4")}
    found |= option
    f32 = logits(folder / "f32", tokens, torch.float32, **option)
    found["largest_logit"] = float(np.abs(wanted).max())
    found["difference_to_ours"] = float(np.abs(f32 - wanted).max())
    whole = logits(folder / "f32-dense", tokens, torch.float32)
    found["difference_to_dense"] = float(np.abs(f32 - whole).max())
    packed(folder / "bf16", model, small, tokenizer, dtype="bfloat16")
    dense(folder / "bf16-dense", model, small, tokenizer, dtype="bfloat16")
    bf16 = logits(folder / "bf16", tokens, torch.bfloat16, **option)
    whole = logits(folder / "bf16-dense", tokens, torch.bfloat16)
    found["bfloat16_difference_to_dense"] = float(np.abs(bf16 - whole).max())
    return found


def _packed(activations: str | None, *args: Any, **options: Any) -> None:
    jc.export.compressed_tensors(*args, activations=activations, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def schemes_of(folder: Path) -> dict[str, tuple[str, QuantizationScheme]]:
    """Format and scheme of each target, read by compressed-tensors' own classes."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(settings)
    found = {}
    for group in settings["config_groups"].values():
        scheme = QuantizationScheme.model_validate(group)
        found |= {target: (group["format"], scheme) for target in group["targets"]}
    return found


def layers_of(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of each quantized layer by their last name."""
    found = {}
    for name in tensors:
        layer, _, last = name.rpartition(".")
        if last == "weight_scale":
            found[layer] = {
                key.rpartition(".")[2]: x
                for key, x in tensors.items()
                if key.rpartition(".")[0] == layer
            }
    return found


def tensors_differing(packed: Path, dense: Path) -> dict[str, Any]:
    """Compare what compressed-tensors decompresses with the dense directory."""
    tensors, wanted, schemes = tensors_of(packed), tensors_of(dense), schemes_of(packed)
    layers, differing, worst = layers_of(tensors), 0, 0.0
    for layer, parts in layers.items():
        format, scheme = schemes.get(layer) or schemes["Linear"]
        weight = decompress(format, parts, scheme)
        want = wanted.pop(f"{layer}.weight").float()
        differing += not torch.equal(weight, want)
        worst = max(worst, float((weight - want).abs().max() / want.abs().max()))
    for name, want in wanted.items():
        differing += not torch.equal(tensors[name].float(), want.float())
    return {
        "layout": format,
        "layers": len(layers),
        "tensors_differing": differing,
        "largest_relative_difference": worst,
    }


def decompress(
    format: str, parts: dict[str, torch.Tensor], scheme: QuantizationScheme
) -> torch.Tensor:
    """The float32 weight, computed by compressed-tensors.

    Its decompressor of nvfp4 computes in bfloat16 only; its parts do it in float32.
    """
    if not format.startswith("nvfp4"):
        compressor = BaseCompressor.get_value_from_registry(format)
        return compressor.decompress(parts, scheme)["weight"].float()
    rows, pairs = parts["weight_packed"].shape
    return dequantize(
        unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * pairs, torch.float32),
        parts["weight_scale"].float(),
        args=scheme.weights,
        global_scale=parts["weight_global_scale"],
        dtype=torch.float32,
    )


def unpacked_on_tpu(packed: Path, dense: Path) -> dict[str, Any]:
    """Compare what tpu-inference unpacks with the dense directory, where it can."""
    unpack = tpu_unpack()
    layers = layers_of(tensors_of(packed))
    (_, scheme), *_ = schemes_of(packed).values()
    is_int4 = scheme.weights.num_bits == 4 and scheme.weights.type == "int"
    if unpack is None or not is_int4:
        return {}
    wanted, differing = tensors_of(dense), 0
    for layer, parts in layers.items():
        inputs = int(parts["weight_shape"][1])
        scale = jnp.asarray(parts["weight_scale"].float().numpy())
        words = jnp.asarray(parts["weight_packed"].numpy())
        with jax.numpy_rank_promotion("allow"):
            codes, scale = unpack(words, scale, inputs)
        groups = jnp.repeat(scale, inputs // scale.shape[0], axis=0)
        weight = np.asarray(codes.astype(jnp.float32) * groups)
        differing += not np.array_equal(weight.T, wanted[f"{layer}.weight"].numpy())
    return {"tpu_inference_layers": len(layers), "tpu_inference_differing": differing}


def tpu_unpack() -> Any:
    """tpu-inference's function, from its file, or None where it is not installed."""
    package = importlib.util.find_spec("tpu_inference")
    if package is None:
        return None
    (root,) = package.submodule_search_locations
    path = Path(root) / "layers" / "common" / "quantization" / "__init__.py"
    spec = importlib.util.spec_from_file_location("tpu_quantization", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.unpack_wna16_linear_weight


def logits(
    folder: Path, tokens: np.ndarray, dtype: torch.dtype, dequantize: bool = False
) -> np.ndarray:
    """Float32 logits of transformers; `dequantize` when it loads, not as it runs."""
    options: dict[str, Any] = {"dtype": dtype}
    if dequantize:
        options["quantization_config"] = transformers.CompressedTensorsConfig(
            dequantize=True
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        with torch.inference_mode():
            out = reader.eval()(torch.asarray(tokens, dtype=torch.long)).logits
    return out.float().numpy()


if __name__ == "__main__":
    run(parse(Config, __doc__))
