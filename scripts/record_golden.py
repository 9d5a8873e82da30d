"""What logits does Hugging Face transformers compute for tiny models of each family?

Writes, for each, a Hugging Face directory of random weights with `golden.npz` (tokens
[batch, tokens] and float32 logits [batch, tokens, vocabulary]) into `--output`; the
tests load them and must agree. Needs torch and transformers:

    python scripts/record_golden.py --output tests/data/golden
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The scalings are set so that they matter within the 20 recorded tokens.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    ),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    output: str = "golden"
    batch: int = 2
    tokens: int = 20
    seed: int = 0


def run(config: Config) -> dict[str, float]:
    """Record every model; returns the standard deviation of each one's logits."""
    return {name: record(name, config) for name in MODELS}


def record(name: str, config: Config) -> float:
    import torch
    import transformers

    family, options = MODELS[name]
    torch.manual_seed(config.seed)
    settings = getattr(transformers, f"{family}Config")(**SIZES | options)
    settings._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Large enough that attention is far from uniform and biases matter; norms
            # around one. Rounded, so that the stored bfloat16 weights are exact.
            noise = torch.randn_like(parameter) * 0.3
            value = noise + 1 if "norm" in parameter_name else noise
            parameter.copy_(value.bfloat16().float())
    generator = np.random.default_rng(config.seed)
    tokens = generator.integers(0, SIZES["vocab_size"], (config.batch, config.tokens))
    with torch.no_grad():
        logits = model(torch.asarray(tokens), use_cache=False).logits.numpy()
    directory = Path(config.output) / name
    model.bfloat16().save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        directory / "golden.npz", tokens=tokens.astype(np.int32), logits=logits
    )
    return float(logits.std())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Config):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default
        )
    print(run(Config(**vars(parser.parse_args()))))
