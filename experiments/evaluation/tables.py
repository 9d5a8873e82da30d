"""Tables of the room's page: agreement with transformers, and speed."""

from experiments.common.tables import Table, scaled

TABLES = {
    "memory": Table(
        "memory",
        "evaluation.memory gemma-3-270m.gguf",
        {
            "job": "{job}",
            "model": "{model}",
            "pieces": "{pieces:,}",
            "tokens a window": "{tokens}",
            "windows": "{batch}",
            "parameters, MiB": "{parameters:.0f}",
            "peak after imports": "{imports:.0f}",
            "after loading": "{loaded:.0f}",
            "at the end": "{peak:.0f}",
        },
    ),
    "parity": Table(
        "parity",
        "evaluation.parity SmolLM2.gguf text.txt",
        {
            "windows": "{windows}",
            "tokens": "{tokens}",
            "perplexity": "{perplexity:.5f}",
            "of transformers": "{perplexity_transformers:.5f}",
            "largest difference of a token's loss": "{largest_loss_difference:.1e}",
            "transformers": "{versions[transformers]}",
        },
    ),
    "speed": Table(
        "speed",
        "evaluation.speed SmolLM2.gguf text.txt",
        {
            "windows a batch": "{batch}",
            "tokens": "{tokens}",
            "seconds": "{seconds:.3f}",
            "of transformers": "{seconds_transformers:.3f}",
            "times as fast": "{ratio:.2f}",
            "by processor time": "{ratio_processor:.2f}",
        },
    ),
    "last_words": Table(
        "last_words",
        "evaluation.last_words SmolLM2.gguf text.txt --files 60MB.safetensors "
        "42MB.safetensors",
        {
            "file": "{variant}",
            "MB": scaled("file_bytes", 1e-6, 1),
            "text": "{text}",
            "words": "{items:,}",
            "right, float": lambda row: f"{row['float_right'] / row['items']:.1%}",
            "right, compressed": lambda row: f"{row['small_right'] / row['items']:.1%}",
            "lost": "{lost}",
            "gained": "{gained}",
            "p": "{p:.1e}",
        },
        files=3,
    ),
}
