"""The rooms keep their order: imports run downwards, one third-party package a room."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxcompress"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import from itself and from the rooms that stand on earlier lines.
ORDER = [
    ["types", "checks", "progress", "memory"],
    ["tree"],
    ["tracing", "coding"],
    ["storage"],
    ["calibration"],
    ["quantization", "pruning", "factorization"],
    ["running"],
    ["planning", "evaluation", "reporting"],
    ["training"],
    ["distillation"],
    ["tokenization"],
    ["models"],
    ["textcoding", "export"],
    ["shrinking", "plots"],
    ["cli"],
    ["__main__", "__init__"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

# Where a third-party package may be imported: room, or room/module.
PLACES = {
    "optax": [
        "quantization/learned",
        "quantization/adaround",
        "training",
        "distillation",
    ],
    "orbax": ["storage/orbax"],
    "sentencepiece": ["tokenization"],
    "tokenizers": ["tokenization"],
    "gguf": ["models", "export"],
    "huggingface_hub": ["models"],
    "safetensors": ["storage", "models", "export"],
    "zstandard": ["coding/zstd"],
    "matplotlib": ["plots"],
    "scipy": ["quantization/order_of_inputs"],
    "rich": ["progress", "reporting", "evaluation", "cli", "models"],
    "flax": [
        "tree/leaf",
        "tree/boxes",
        "tree/containers",
        "tree/state_dicts",
        "tracing/modules",
        "calibration/collect",
        "running",
        "distillation/features",
        "models",
    ],
}
FREE = {"jax", "numpy", "chex"}


def room_of(path: pathlib.Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("")
    return relative.parts[0]


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "jaxcompress":
                found.update(f"jaxcompress.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in RANK, f"{room} has no place in ORDER"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "jaxcompress" or len(parts) == 1:
            continue
        other = parts[1]
        if other not in RANK:
            continue  # a public name of the package itself
        assert other == room or RANK[other] < RANK[room], f"{room} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_party_packages_stay_in_their_rooms(path):
    module = str(path.relative_to(PACKAGE).with_suffix(""))
    import sys

    for name in imports(path):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top == "jaxcompress" or top in FREE:
            continue
        allowed = PLACES.get(top, [])
        assert any(
            module == a or module.startswith((f"{a}/", f"{a}_")) for a in allowed
        ), f"{module} imports {name}; allowed in {allowed}"
        assert "_src" not in name, f"{module} imports the private {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_is_small(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{lines} lines: two algorithms in one room?"
    assert path.stem not in {"utils", "helpers", "misc", "common"}


def test_only_evaluation_uses_pmap():
    users = [
        str(p.relative_to(PACKAGE))
        for p in MODULES
        if "jax.pmap" in p.read_text(encoding="utf-8")
    ]
    assert set(users) <= {"evaluation/batches.py"}
