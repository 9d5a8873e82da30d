"""Every experiment has what the command line needs of it, and runs in small."""

import dataclasses
import importlib
import inspect
import pathlib

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
SHARED = {"command", "library_text", "other_coders"}
# These write files that others read: data of the package and of the tests, a picture.
MAKERS = {"pack_reference", "record_golden", "record_settings", "tokenizers_plots"}
ALL = sorted(
    str(path.relative_to(EXPERIMENTS).with_suffix(""))
    for path in EXPERIMENTS.rglob("*.py")
    if path.stem not in SHARED | MAKERS
)


@pytest.fixture
def module(request, monkeypatch):
    path = EXPERIMENTS / request.param
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.syspath_prepend(str(path.parent))
    try:
        return importlib.import_module(path.name)
    except ModuleNotFoundError as error:  # a peer's package
        pytest.skip(str(error))


each = pytest.mark.parametrize("module", ALL, indirect=True)


@each
def test_it_has_a_configuration_and_runs_on_it(module):
    assert module.__doc__
    assert dataclasses.is_dataclass(module.Config)
    assert module.Config.__dataclass_params__.frozen
    fields = {field.name: field for field in dataclasses.fields(module.Config)}
    assert fields["fast"].default is False
    assert next(iter(inspect.signature(module.run).parameters)) == "config"


@pytest.mark.nightly
@each
def test_it_runs_in_small(module, tmp_path):
    names = {field.name for field in dataclasses.fields(module.Config)}
    options = {"results": str(tmp_path / "rows.jsonl")} if "results" in names else {}
    rows = module.run(module.Config(fast=True, **options))
    assert rows
