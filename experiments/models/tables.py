"""Table of the room's page: how well the reference model learned."""

from experiments.common.tables import Table

TABLES = {
    "train_reference": Table(
        "train_reference",
        "models.train_reference",
        {
            "weights": "{weights:,}",
            "steps": "{steps:,}",
            "training tokens": "{training_tokens:,}",
            "epochs": "{epochs:.1f}",
            "held-out bytes": "{heldout_bytes:,}",
            "bits per byte": "{bits_per_byte:.3f}",
            "in bfloat16": "{bits_per_byte_bfloat16:.3f}",
            "`xz -9e`": "{bits_per_byte_xz:.3f}",
            "minutes": lambda row: f"{row['training_seconds'] / 60:.0f}",
        },
    ),
}
