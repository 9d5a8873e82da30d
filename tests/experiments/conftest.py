"""Experiments by the names of their modules."""

import importlib

import pytest


@pytest.fixture
def experiment():
    """Import `experiments.<name>`."""
    return lambda name: importlib.import_module(f"experiments.{name}")
