"""What a package index, a type checker and a bug report read of the package."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import jaxcompress as jc
from jaxcompress.storage.checkpoint import versions

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_literal_is_the_version():
    """Setuptools reads a literal without importing the package, and so without JAX."""
    tree = ast.parse((ROOT / "jaxcompress" / "__init__.py").read_text(encoding="utf-8"))
    found = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    ]
    assert found == [jc.__version__]
    assert PROJECT["project"]["dynamic"] == ["version"]
    attribute = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "jaxcompress.__version__"
    assert versions()["jaxcompress"] == jc.__version__, "of the package that runs"


def test_the_command_line_says_its_version():
    command = [sys.executable, "-m", "jaxcompress", "--version"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == f"jaxcompress {jc.__version__}\n"


def test_types_are_announced():
    assert (ROOT / "jaxcompress" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["jaxcompress"]
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_type_checkers_see_the_public_names():
    """A lazy table hides names from them: the stub repeats it as imports."""
    stub = ast.parse((ROOT / "jaxcompress" / "__init__.pyi").read_text("utf-8"))
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    wanted = {name: f"jaxcompress.{home}.{name}" for name, home in jc._HOMES.items()}
    wanted |= {name: f"jaxcompress.{home}" for name, home in jc._MODULES.items()}
    assert seen == wanted
    packed = PROJECT["tool"]["setuptools"]["package-data"]["jaxcompress"]
    assert "__init__.pyi" in packed


def test_importing_the_package_stays_light():
    """What is heavy is imported where it is used first; see the table of names."""
    heavy = [
        "orbax",
        "flax.nnx",
        "matplotlib",
        "sentencepiece",
        "optax",
        "tokenizers",
        "gguf",
    ]
    code = f"import jaxcompress, sys; print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
