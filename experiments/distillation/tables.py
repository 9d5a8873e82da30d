"""Tables of the room's page: students, and what a step of distillation takes."""

from experiments.common.tables import Row, Table, named, percent, where

OBJECTIVES = {
    "before training": "nothing",
    "hard": "labels",
    "soft": "the teacher's predictions",
    "cached": "its 16 likeliest tokens from a cache, in memory",
    "soft+hidden": "predictions and hidden states",
    "soft+hidden+attention": "predictions, hidden states, attention maps",
}
DEPTH = {
    "trained with": named("row", OBJECTIVES),
    "steps": "{steps:,}",
    "held-out loss, nats": "{loss:.3f}",
    "bits per byte": "{bits_per_byte:.3f}",
    "KL to the teacher": "{kl:.3f} ± {kl_standard_error:.3f}",
    "processor seconds": "{processor_seconds:.1f}",
}


def with_teacher(rows: list[Row]) -> list[Row]:
    """Add the teacher's own row."""
    teacher = rows[0] | {"row": "(teacher)", "loss": rows[0]["teacher_loss"]}
    teacher["bits_per_byte"] = rows[0]["teacher_bits_per_byte"]
    for key in ("kl", "processor_seconds", "steps"):
        del teacher[key]
    return [*rows, teacher]


TABLES = {
    "depth": Table(
        "depth",
        "distillation.depth --steps 2000",
        DEPTH,
        lambda rows: with_teacher(where(device="NVIDIA H200")(rows)),
    ),
    "depth_short": Table(
        "depth",
        "distillation.depth --steps 120 --batch 4 --windows 24",
        DEPTH,
        lambda rows: with_teacher(where(device="cpu")(rows)),
    ),
    "sentences": Table(
        "sentences",
        "distillation.sentences all-MiniLM-L6-v2 text.txt",
        {
            "student": named(
                "row", {"every second layer": "every second layer, untrained"}
            ),
            "steps": "{steps}",
            "mean cosine with the teacher's embedding": "{cosine:.3f}",
            "nearest neighbour is the teacher's": percent(
                "nearest_neighbour_agreement", 1
            ),
        },
    ),
    "speed": Table(
        "speed",
        "distillation.speed",
        {
            "step with": named("row", OBJECTIVES),
            "processor seconds": "{processor_seconds:.3f}",
            "to a step with labels": "{ratio:.2f}",
        },
        lambda rows: [row for row in rows if "ratio" in row],
    ),
    "devices": Table(
        "speed",
        "distillation.speed",
        {
            "one device and two fake ones": "{row}",
            "steps": "{steps}",
            "largest relative difference of losses": lambda row: (
                f"{row['largest_relative_difference_of_losses']:.1e}".replace(
                    "e-0", "e-"
                )
            ),
        },
        lambda rows: [row for row in rows if "ratio" not in row],
    ),
    "on_policy": Table(
        "on_policy",
        "distillation.on_policy --warmup 1000 --steps 500",
        {
            "goes on with": named("row", {"warmed up": "(warmed up)"}),
            "held-out loss": "{loss:.3f}",
            "KL": "{kl:.3f} ± {kl_standard_error:.3f}",
            "reverse KL on its own texts": "{reverse_kl_on_own_texts:.3f}",
        },
    ),
}
