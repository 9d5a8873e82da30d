"""The pages of the site: every public name has one, and what they name and link exists.

Nothing is computed here; `test_pages_run` executes what the pages show.
"""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

import jaxcompress as jc
from experiments import figures
from experiments.common.tables import read_rows

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def resolve(path):
    """Import the object of a dotted path, its longest prefix that is a module first."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise AttributeError(path)


def entries():
    """The page, the path and the heading of each entry of the reference."""
    for page in sorted((DOCS / "api").glob("*.md")):
        text = page.read_text("utf-8")
        for path, heading in re.findall(
            r"^::: (\S+)\n    options:\n      heading: (\S+)$", text, re.MULTILINE
        ):
            yield page, path, heading
        assert text.count("\n::: ") == len(re.findall(r"(?m)^      heading: ", text))


def public():
    """Every public name, and what it stands for."""
    modules = {
        name for _, name, _ in pkgutil.walk_packages(jc.__path__, "jaxcompress.")
    }
    for name in [*sorted(modules - {"jaxcompress.__main__"}), "jaxcompress"]:
        module = importlib.import_module(name)
        for each in getattr(module, "__all__", ()):
            found = getattr(module, each)
            if each != "__version__" and not inspect.ismodule(found):
                yield f"{name}.{each}", found


def test_every_public_name_has_a_page():
    documented = {id(resolve(path)) for _, path, _ in entries()}
    missing = [name for name, found in public() if id(found) not in documented]
    assert not missing, "add these to a page in docs/api"


def test_entries_are_what_their_headings_say():
    wrong = []
    for page, path, heading in entries():
        *modules, name = heading.split(".")
        if modules[0] == "jc":
            home = functools.reduce(getattr, modules[1:], jc)
        else:
            home = importlib.import_module(".".join(["jaxcompress", *modules]))
        if getattr(home, name) is not resolve(path):
            wrong.append((name_of(page), path, heading))
    assert not wrong


def test_an_entry_stands_on_one_page():
    paths = [path for _, path, _ in entries()]
    assert len(paths) == len(set(paths)) > 200


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_exist(page):
    """`jc.x.y` in text or code is a name of the package."""
    text = page.read_text("utf-8")
    unknown = set()
    for dotted in set(re.findall(r"\bjc((?:\.[A-Za-z_]\w*)+)", text)):
        found = jc
        for part in dotted[1:].split("."):
            if not inspect.ismodule(found) and not inspect.isclass(found):
                break
            if not hasattr(found, part):
                unknown.add(f"jc{dotted}")
                break
            found = getattr(found, part)
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_are_alive(page):
    """Relative links, as in the repository; the build of the site checks its own."""
    targets = LINK.findall(FENCE.sub("", page.read_text("utf-8")))
    paths = [x.split("#")[0] for x in targets if not re.match(r"[a-z]+:|#", x)]
    dead = [path for path in paths if not (page.parent / path).exists()]
    assert not dead


def test_own_links_with_an_address_are_alive():
    """Addresses of this repository's files, in the README above all."""
    own = (
        r"https://(?:raw\.githubusercontent|github)\.com/jaxcompress/jaxcompress/"
        r"(?:blob/|tree/|raw/)?main/([^\s)\"'>#]+)"
    )
    dead = [
        (name_of(page), path)
        for page in PAGES
        for path in re.findall(own, page.read_text("utf-8"))
        if not (ROOT / path).exists()
    ]
    assert not dead


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert listed == pages | {"experiments/README.md"}  # its rooms: docs/hooks.py


def test_tables_taken_from_experiments_exist():
    for page in PAGES:
        for room, table in re.findall(
            r"<!-- table from (\w+): (\S+) -->", page.read_text("utf-8")
        ):
            text = (ROOT / "experiments" / room / "README.md").read_text("utf-8")
            assert f"<!-- table: {table} -->" in text, (name_of(page), room, table)


def test_numbers_of_the_readme_are_those_of_the_experiments():
    """Each row of its table of sizes is in one row of a page that results made."""
    text = (ROOT / "README.md").read_text("utf-8")
    lines = [
        set(re.findall(r"\d+\.\d+", line))
        for page in (ROOT / "experiments").glob("*/README.md")
        for line in page.read_text("utf-8").splitlines()
    ]
    rows = re.findall(r"^\| (\d+\.\d+ \|.*)\|[^|]*\|$", text, re.MULTILINE)
    assert 5 < len(rows) <= 8
    for row in rows:
        # Two digits of the bits are shown; pages have two or three.
        size, bits, *numbers = re.findall(r"\d+\.\d+", row)
        found = [x for x in lines if {size, *numbers} <= x]
        assert any(f"{float(y):.2f}" == bits for x in found for y in x), row


def test_the_picture_is_drawn_from_rows():
    rows = read_rows(figures.ROWS)
    for text in figures.TEXTS:
        for variant, *_ in figures.SERIES.values():
            assert len(figures.points(rows, variant, text)) > 1
    for theme in figures.INK:
        assert 10_000 < figures.path(theme).stat().st_size < 100_000
