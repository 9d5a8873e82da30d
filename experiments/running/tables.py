"""Tables of the room's page: speed and memory of compressed models."""

from collections.abc import Callable

from experiments.common.tables import Row, Table, last, named, spread


def calls(rows: list[Row]) -> list[Row]:
    """Join the calls of each way."""
    return spread(
        [row | {"name": f"{row['call']}{row['batch']}"} for row in rows], "name", "way"
    )


def version(row: Row) -> list[int]:
    """Return the version of jax as numbers."""
    return [int(part) for part in row["jax"].split(".")]


def rate(call: str) -> Callable[[Row], str]:
    """Show tokens per second of processor time."""

    def cell(row: Row) -> str:
        value = row[call]["tokens_per_processor_second"]
        return f"{value:.1f}" if value < 30 else f"{value:.0f}"

    return cell


TABLES = {
    "batch_one": Table(
        "batch_one",
        "running.batch_one --rounds 5 --tokens 16 --only ...",
        {
            "way": "{way}",
            "jax": "{jax}",
            "milliseconds": "{milliseconds:.1f}",
            "times float32": "{times_float32:.2f}",
            "processor time, times float32": "{processor_times_float32:.2f}",
            "bits a weight in memory": "{bits_per_weight:.2f}",
            "temporaries, MiB": "{temporary_mib:.1f}",
        },
        lambda rows: sorted(last(rows, "jax", "way"), key=version),
    ),
    "generation": Table(
        "generation",
        "running.generation --rounds 4 --tokens 60",
        {
            "way": "{way}",
            "processor time, times the step": "{processor_times_step:.2f}",
        },
    ),
    "factor_speed": Table(
        "factor_speed",
        "running.factor_speed",
        {
            "inputs": "{rows}",
            "wall time": "{ratio:.2f}",
            "processor time": "{ratio_processor:.2f}",
            "factors made dense, wall": "{ratio_materialized:.1f}",
        },
    ),
    "integer_speed": Table(
        "integer_speed",
        "running.integer_speed --layers 6 --tokens 512 --length 64 --rounds 5",
        {
            "way": "{way}",
            "forward 1": rate("forward1"),
            "forward 64": rate("forward64"),
            "decode 1": rate("decode1"),
            "decode 64": rate("decode64"),
            "parameters": "{forward1[parameters_mib]:.0f}",
            "temporaries, in this order": "{forward1[temporary_mib]:.0f}, "
            "{forward64[temporary_mib]:.0f}, {decode1[temporary_mib]:.0f}, "
            "{decode64[temporary_mib]:.0f}",
        },
        calls,
    ),
    "low_memory": Table(
        "low_memory",
        "running.low_memory [--fast]",
        {
            "jax": lambda row: row.get("jax") or row["versions"]["jax"],
            "layers": "{config[layers]}",
            "model": "{model}",
            "weights": named(
                "way",
                dict.fromkeys(
                    ("streaming", "low memory"), "compressed, inside `low_memory()`"
                ),
            ),
            "parameters, MiB": "{parameters_mib:.1f}",
            "temporaries, MiB": "{temporary_mib:.1f}",
            "largest weight, MiB": "{largest_weight_mib:.0f}",
            "compilation, s": "{compile_seconds:.1f}",
        },
    ),
}
