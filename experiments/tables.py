"""Write the tables of all rooms' pages anew, from the rows in `results/`.

python -m experiments.tables           # the pages that changed
python -m experiments.tables --check   # fails where a page is out of date
"""

import argparse

from experiments.common.tables import page, refresh, rooms


def main(check: bool = False) -> list[str]:
    """Refresh the pages, or only compare them; returns the rooms that changed."""
    changed = []
    for room in rooms():
        text = refresh(room)
        if text != page(room).read_text(encoding="utf-8"):
            changed.append(room)
            if not check:
                page(room).write_text(text, encoding="utf-8")
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tables of the pages anew.")
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    changed = main(check)
    print("out of date:" if check else "written:", ", ".join(changed) or "none")
    raise SystemExit(check and bool(changed))
