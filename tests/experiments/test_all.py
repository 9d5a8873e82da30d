"""Every experiment has what the command line needs of it, and runs in small."""

import dataclasses
import inspect
import pathlib

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
# These write files that others read: data of the package, a picture.
MAKERS = {"models/pack_reference", "tokenization/plots"}
SHARED = {"common", "coding/other_coders"}
ALL = sorted(
    ".".join(path.with_suffix("").parts)
    for path in (path.relative_to(EXPERIMENTS) for path in EXPERIMENTS.rglob("*.py"))
    if path.stem not in ("__init__", "tables")
    and {path.parts[0], str(path.with_suffix(""))}.isdisjoint(SHARED | MAKERS)
)


@pytest.fixture
def module(request, experiment):
    try:
        return experiment(request.param)
    except ModuleNotFoundError as error:  # a peer's package
        if (error.name or "").partition(".")[0] in {"experiments", "jaxcompress"}:
            raise
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
