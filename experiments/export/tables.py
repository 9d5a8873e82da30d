"""Tables of the room's page: exports in the programs that read them."""

from typing import Any

from experiments.common.tables import Row, Table

MODELS = {
    "reference": "reference",
    "SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2",
    "gemma3-270m.gguf": "Gemma 3 270M",
}


def model(row: Row) -> str:
    return MODELS[row["model"]]


def by_model(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: list(MODELS).index(row["model"]))


def of_layers(row: Row) -> str:
    if row["layout"].startswith("nvfp4"):
        return f"all by up to {row['largest_relative_difference']:.1e}"
    return f"{row['tensors_differing']} of {row['layers']}"


def on_tpu(row: Row) -> str:
    return f"{row['tpu_inference_differing']} of {row['tpu_inference_layers']}"


def relative(row: Row) -> str:
    return f"{row['difference_to_ours'] / row['largest_logit']:.1e}"


def agreeing(row: Row) -> str:
    return f"{row['same_greedy_tokens']} of 64"


def tensors(row: Row) -> str:
    return f"{row['tensors_differing']} of {row['tensors']}"


def unlike(row: Row) -> str:
    return f"{100 * (row['perplexity_ratio'] - 1):+.3f} %"


COLUMNS: dict[str, Any] = {
    "model": model,
    "row": "{row}",
    "layout": "{layout}",
    "layers that differ": of_layers,
    "in tpu-inference": on_tpu,
    "logits, to ours": relative,
    "to the dense directory": "{difference_to_dense:.2g}",
    "in bfloat16": "{bfloat16_difference_to_dense:.2g}",
}
TABLES = {
    "directories": Table("directories", "export.directories", COLUMNS, by_model),
    "gguf_files": Table(
        "gguf_files",
        "export.gguf_files --calibration 48",
        {
            "model": model,
            "row": "{row}",
            "bytes": "{bytes}",
            "tensors that differ": tensors,
            "same greedy tokens": agreeing,
            "perplexity here": "{perplexity_ours:.4f}",
            "in llama.cpp": "{perplexity_llama_cpp:.4f}",
            "apart": unlike,
            "likeliest token agrees": "{top1_agreement:.1%}",
            "KL here": "{kl_ours:.5f}",
            "KL in llama.cpp": "{kl_llama_cpp:.5f}",
        },
        by_model,
    ),
}
