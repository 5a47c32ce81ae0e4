"""The examples in the docstrings of the package."""

import doctest
import importlib
import pkgutil

import pytest

import moedist.placement

MODULES = [name for _, name, _ in pkgutil.iter_modules(moedist.placement.__path__, "moedist.placement.")]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0
