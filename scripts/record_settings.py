"""What does each setting of a configuration do to the logits transformers computes?

For every family in `jaxcompress.models.families`, and every key that `affects` the
model, builds the family's base configuration with the recorded alternative, fills the
model with weights that depend on names and shapes alone, and writes the logits of two
positions, float32 [2, vocabulary], to `--output`/FAMILY.npz (hidden states for an
encoder). The tests build the same weights and must agree. Needs torch and transformers:

    python scripts/record_settings.py --output tests/data/settings
"""

import argparse
import copy
import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

POSITIONS = (9, 19)
TOKENS = np.random.default_rng(7).integers(0, 48, (1, 20)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Config:
    output: str = "settings"
    families: str = ""  # separated by commas; all where empty


def weight(name: str, shape: tuple[int, ...], center: float = 1.0) -> np.ndarray:
    """The float32 weight of this name: norms around `center`, others around zero."""
    noise = np.random.default_rng(zlib.crc32(f"{name} {shape}".encode())).normal(
        size=shape
    )
    norm = name.endswith("weight") and ("norm" in name.lower() or "ln_" in name)
    return (0.3 * noise + (center if norm else 0.0)).astype(np.float32)


def cases(family: str) -> dict[str, Mapping[str, Any]]:
    """The recorded cases of a family by name: changes of its base configuration."""
    from jaxcompress.models.families import FAMILIES
    from jaxcompress.models.shared_settings import ROPE_TABLES

    tables = {"": FAMILIES[family].table}
    if family == "LlamaForCausalLM":  # the families share these
        tables |= {f"{kind}.": table for kind, table in ROPE_TABLES.items()}
    return {"base": {}} | {
        prefix + key: setting.alternative
        for prefix, table in tables.items()
        for key, setting in table.items()
        if setting.alternative
    }


def run(config: Config) -> dict[str, float]:
    """Record every family; returns the least effect of any setting, by family."""
    from jaxcompress.models.families import FAMILIES

    names = config.families.split(",") if config.families else list(FAMILIES)
    return {name: record(name, Path(config.output)) for name in names}


def record(family: str, output: Path) -> float:
    from jaxcompress.models.families import FAMILIES

    outputs = {}
    for case, change in cases(family).items():
        outputs[case] = logits(family, {**FAMILIES[family].base, **change})
        print(family, case, outputs[case].shape, flush=True)
    effects = {
        case: difference(array, outputs["base"])
        for case, array in outputs.items()
        if case != "base"
    }
    if idle := [case for case, effect in effects.items() if effect < 1e-3]:
        raise ValueError(f"{family}: the alternatives of {idle} change nothing")
    output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(output / f"{family}.npz", **outputs)
    return min(effects.values(), default=0.0)


def logits(family: str, settings: Mapping[str, Any]) -> np.ndarray:
    import torch
    import transformers

    from jaxcompress.models.families import FAMILIES

    config = transformers.AutoConfig.for_model(KINDS[family], **copy.deepcopy(settings))
    config._attn_implementation = "eager"
    model = getattr(transformers, family)(config).eval()
    center = 1 - FAMILIES[family].norm_offset
    with torch.no_grad():
        for name, array in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if "experts" in name:
                continue
            array.copy_(torch.asarray(weight(name, tuple(array.shape), center)))
        for name, array in model.state_dict().items():
            if "experts" in name:
                array.copy_(torch.asarray(stacked(name, array.shape)))
    model.tie_weights()
    with torch.no_grad():
        result = model(torch.asarray(TOKENS.astype(np.int64)))
    states = result.logits if "logits" in result else result.last_hidden_state
    return states[0, list(POSITIONS)].numpy().astype(np.float32)


def stacked(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """All experts' weights [E, outputs, inputs], from their names on disk."""
    prefix, _, kind = name.rpartition(".")
    parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
    size = (shape[1] // len(parts), shape[2])
    return np.stack(
        [
            np.concatenate(
                [weight(f"{prefix}.{i}.{part}.weight", size) for part in parts]
            )
            for i in range(shape[0])
        ]
    )


KINDS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "BertModel": "bert",
    "Gemma3ForCausalLM": "gemma3_text",
    "GPT2LMHeadModel": "gpt2",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference; infinite where the shapes differ."""
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Config):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default
        )
    print(run(Config(**vars(parser.parse_args()))))
