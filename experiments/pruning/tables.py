"""Tables of the room's page: weights, units and filters removed."""

from collections.abc import Callable

from experiments.common.tables import Row, Table, percent, short, spread, where

SETTINGS = {"sparsity=0.5": "50 %", "sparsity=0.7": "70 %", "pattern='2:4'": "2:4"}
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def methods(model: str) -> Callable[[list[Row]], list[Row]]:
    """Join the settings of each method; the best last."""

    def joined(rows: list[Row]) -> list[Row]:
        found = spread(where(model=model, method=METHODS)(rows), "setting", "method")
        return sorted(found, key=lambda row: METHODS.index(row["method"]))

    return joined


def perplexity(setting: str, digits: int) -> Callable[[Row], str]:
    """Show the perplexity; one digit is enough of large ones."""
    return lambda row: short(row[setting]["perplexity"], digits)


def of_dense(setting: str) -> Callable[[Row], str]:
    """Show the perplexity over that of the dense model."""

    def cell(row: Row) -> str:
        ratio = row[setting]["ratio"]
        return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}"

    return cell


def value(setting: str, key: str, digits: int) -> Callable[[Row], str]:
    """Show a value of one setting."""
    return lambda row: f"{row[setting][key]:.{digits}f}"


def columns(digits: int) -> dict[str, Callable[[Row], str]]:
    """Show perplexity, divergence and loss of the layers for each setting."""
    found = {"method": lambda row: f"`{row['method']}`"}
    for setting, name in SETTINGS.items():
        found[f"{name}: perplexity"] = perplexity(setting, digits)
        found[f"{name}: of dense"] = of_dense(setting)
        found[f"{name}: KL"] = value(setting, "kl", 3)
        found[f"{name}: layer losses"] = value(setting, "heldout_layer_loss", 0)
        found[f"{name}: s"] = value(setting, "prune_processor_seconds", 0)
    return found


PAIRS = ("wanda < magnitude", "sparsegpt < wanda", "alps < sparsegpt")


def orders(rows: list[Row]) -> list[Row]:
    """Take apart the summaries of losses of layers: measured on, calibrated on."""
    return [
        {"model": row["model"], "setting": row["setting"], "on": on} | row[key]
        for row in where(summary="order of layer losses")(rows)
        for key, on in (
            ("heldout_layer_losses", "measured on"),
            ("layer_losses", "calibrated on"),
        )
    ]


def layers(pair: str) -> Callable[[Row], str]:
    """Count the layers in this order, and list those in the other one."""

    def cell(row: Row) -> str:
        of = row[pair]
        others = ", ".join(f"`{x.removesuffix('/kernel')}`" for x in of["exceptions"])
        return f"{of['layers']} of {of['of']}" + f" (not {others})" * bool(others)

    return cell


def recipe(row: Row) -> str:
    """Write a recipe without the patterns of names."""
    return ", then values ".join(f"`{stage[0][1]}`" for stage in row["recipe"]).replace(
        "pattern=", "nm="
    )


def units(by: str) -> Callable[[list[Row]], list[Row]]:
    """Join what is removed without and with least squares."""

    def joined(rows: list[Row]) -> list[Row]:
        named = [
            row | {"name": "refitted" if row["made_up"] else "alone"}
            for row in where(by=by)(rows)
        ]
        return spread(named, "name", "kind", "fraction")

    return joined


def pass_time(name: str) -> Callable[[Row], str]:
    """Show the time of a pass over that of the dense model."""

    def cell(row: Row) -> str:
        of = row[name]
        dense = of["dense_forward_processor_seconds"]
        return f"{of['forward_processor_seconds'] / dense:.2f}"

    return cell


UNITS = {
    "removed": lambda row: f"{100 * row['fraction']:.0f} % of {row['kind']}",
    "rise, not compensated": "{alone[rise]:.4f}",
    "least squares": "{refitted[rise]:.4f}",
    "quotient": lambda row: f"{row['refitted']['rise'] / row['alone']['rise']:.2f}",
    "parameters": "{alone[parameters]:,} of {alone[dense_parameters]:,}",
    "bytes": "{alone[bytes]:,} of {alone[dense_bytes]:,}",
    "time of a pass, of dense": lambda row: (
        f"{pass_time('alone')(row)}, {pass_time('refitted')(row)}"
    ),
}


def filters(row: Row) -> str:
    """Name what was done to how many filters or channels."""
    if "removed" in row:
        done = "" if row["made_up"] else ", not compensated"
        if row["method"] in (
            "filters by activation",
            "filters by activation, norms again",
        ):
            done = ", readers refitted" if row["made_up"] else done
        name = row["method"].replace("filters by activation", "")
        return f"{100 * row['removed']:.0f} % of the filters by activation{name}{done}"
    if "share_of_channels" in row:
        share = f"{100 * row['share_of_channels']:.0f} % of the channels"
        if row["method"] == "cp":
            return f"cp, as many numbers as with {share}"
        return f"{row['method']}, {share}"
    return row["method"]


PRUNED = "pruning.pruned"
SMOL_OPTIONS = " SmolLM2.gguf text.txt --tokens 512 --calibration 64 --windows 12"

TABLES = {
    "reference": Table(
        "pruned", f"{PRUNED} --calibration 128", columns(2), methods("reference")
    ),
    "smollm2": Table("pruned", PRUNED + SMOL_OPTIONS, columns(1), methods(SMOL)),
    "orders": Table(
        "pruned",
        PRUNED,
        {
            "model": lambda row: row["model"].partition("-")[0],
            "setting": lambda row: row["setting"].replace("pattern", "nm"),
            "text": "{on}",
            **{f"`{pair}`": layers(pair) for pair in PAIRS},
        },
        orders,
    ),
    "recovered": Table(
        "recovered",
        "pruning.recovered --windows 24 --calibration 96 --steps 60",
        {
            "pruned by": "{method}",
            "to": lambda row: ", then ".join(
                f"{100 * x:.0f} %" for x in row["sparsities"]
            ),
            "perplexity after the first pruning": "{first_perplexity:.2f}",
            "in the end": "{perplexity:.2f}",
            "of dense": "{ratio:.3f}",
            "KL": "{kl:.3f}",
        },
    ),
    "disk": Table(
        "sparse_cost",
        "pruning.sparse_cost",
        {
            "kernels": recipe,
            "file, bytes": "{file_bytes:,}",
            "bits per weight": "{bits_per_weight:.2f}",
            "perplexity": "{perplexity:.2f}",
            "KL": lambda row: (
                f"{row['kl']:.4f}" if row["kl"] < 0.05 else f"{row['kl']:#.3g}"
            ),
        },
        where(table="disk"),
        files=2,
    ),
    "time": Table(
        "sparse_cost",
        "pruning.sparse_cost --only time",
        {
            "pattern": "{pattern}",
            "processor time, of dense": "{of_dense:.2f}",
            "bytes in memory": "{memory_bytes:,}",
        },
        where(table="time"),
    ),
    "units": Table(
        "structured",
        "pruning.structured --calibration 100 --windows 48",
        UNITS,
        units("loss"),
    ),
    "units_by_activation": Table(
        "structured",
        "pruning.structured --calibration 100 --windows 48 --by activation",
        UNITS,
        units("activation"),
    ),
    "layers": Table(
        "structured",
        "pruning.structured --calibration 100 --windows 48 --only layers",
        {
            "asked for": percent("fraction"),
            "rise": "{rise:.3f}",
            "parameters": "{parameters:,} of {dense_parameters:,}",
            "time of a pass, of dense": lambda row: pass_time("row")({"row": row}),
        },
        where(by="influence"),
    ),
    "filters": Table(
        "filters",
        "pruning.filters --filters 16 --epochs 15",
        {
            "network": filters,
            "accuracy": "{accuracy:.3f}",
            "parameters": "{parameters:,}",
        },
    ),
}
