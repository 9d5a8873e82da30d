"""Pages of the site that are kept elsewhere: experiments, the changelog, pictures."""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
TABLE = re.compile(r"<!-- table from (\w+): (\S+) -->")


def on_config(config):
    """List the rooms of experiments behind their index."""
    for entry in config.nav:
        if "Numbers" in entry:
            entry["Numbers"] += [
                path.relative_to(ROOT).as_posix()
                for path in sorted((ROOT / "experiments").glob("*/README.md"))
            ]
    return config


def on_files(files, config):
    """Add the pages of experiments under the paths that they have in the repository."""
    for path in sorted((ROOT / "experiments").rglob("README.md")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, content=path.read_text("utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in the tables that a page takes from the pages of experiments, whose folder
    is beside `docs` in the repository and in it on the site.
    """
    if page.file.src_uri.startswith("experiments/"):
        return markdown.replace("../../docs/", "../../")
    markdown = markdown.replace("../experiments/", "experiments/")
    return TABLE.sub(lambda match: table(match[1], match[2]), markdown)


def table(room, name):
    """Return a table of a room's page, with the line that says how it was measured."""
    text = (ROOT / "experiments" / room / "README.md").read_text("utf-8")
    found = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    if not found:
        raise ValueError(f"experiments/{room}/README.md has no table {name!r}")
    return found[1]
