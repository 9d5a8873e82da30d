"""Tables of the room's page: archives, differences, damaged files."""

from collections.abc import Callable

from experiments.common.tables import Row, Table, percent, scaled, spread


def stage(name: str, peak: bool) -> Callable[[Row], str]:
    """Show seconds passed, of the processor, and the peak of memory."""

    def cell(row: Row) -> str:
        seconds, own = row[f"{name}_seconds"], row[f"{name}_processor_seconds"]
        memory = f", {row[f'{name}_peak_mb']:.0f}" if peak else ""
        return f"{seconds:.1f} ({own:.1f}){memory}"

    return cell


def rates(rows: list[Row]) -> list[Row]:
    """Join the numbers of steps of each dtype and rate; bfloat16 first."""
    joined = spread(rows, "steps", "kind", "rate")
    return sorted(joined, key=lambda row: (row["kind"] != "bfloat16", row["rate"]))


def bits(steps: int) -> Callable[[Row], str]:
    """Show bits against the base, and alone."""

    def cell(row: Row) -> str:
        of = row[str(steps)]
        return f"{of['bits_against_base']:.2f} ({of['bits_alone']:.2f})"

    return cell


TABLES = {
    "packed_checkpoint": Table(
        "packed_checkpoint",
        "storage.packed_checkpoint --folder FOLDER --sizes 0.75,1.5,3",
        {
            "GB": scaled("bytes", 1e-9, 2),
            "packed": percent("packed_share", 1),
            "pack: s passed (of the processor), peak MB": stage("pack", True),
            "verify": stage("verify", True),
            "unpack": stage("unpack", True),
        },
        lambda rows: sorted(rows, key=lambda row: round(row["bytes"], -7)),
        files=2,
    ),
    "faults": Table(
        "faults",
        "storage.faults",
        {
            "commit": lambda row: row.get("commit", "not recorded"),
            "altered files": "{files:,}",
            "digests as written": "{digests as written:,}",
            "forged": "{forged digests:,}",
            "`FileDamaged`": lambda row: f"{row['refused: FileDamaged']:,}",
            "`ValueError`": lambda row: f"{row['refused: ValueError']:,}",
            "without the file's name": lambda row: str(
                row["refused: ValueError without the file's name"]
            ),
            "what was written": "{right:,}",
            "other numbers, forged": lambda row: "{:,}".format(
                row.get("other numbers, forged")
                or row["other numbers behind forged digests"]
            ),
            "memory grew, MB": "{resident_growth_mb:.0f}",
        },
        files=2,
    ),
    "delta": Table(
        "delta",
        "storage.delta",
        {
            "weights": "{kind}",
            "rate": lambda row: f"{row['rate']:.0e}",
            "1 step (alone)": bits(1),
            "4": bits(4),
            "16": bits(16),
            "64": bits(64),
        },
        rates,
        files=2,
    ),
}
