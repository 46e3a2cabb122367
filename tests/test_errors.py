from __future__ import annotations

import inspect

import pytest

from onnxcomp import errors

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_has_the_one_base_and_is_listed(cls):
    assert issubclass(cls, errors.OnnxcompError)
    assert cls.__name__ in errors.__all__
    assert cls.__doc__


@pytest.mark.parametrize(
    ("cls", "parent"),
    [
        (errors.ModelError, ValueError),
        (errors.DataError, ValueError),
        (errors.OptionError, ValueError),
        (errors.RequirementError, RuntimeError),
        (errors.OutputError, OSError),
        (errors.RuntimeFailure, RuntimeError),
        (errors.WorkerDied, errors.RuntimeFailure),
    ],
)
def test_can_be_caught_as_the_standard_error_it_is(cls, parent):
    assert issubclass(cls, parent)


def test_the_tree_in_the_docstring_names_every_class():
    assert all(cls.__name__ in (errors.__doc__ or "") for cls in CLASSES)


def test_the_names_are_sorted():
    assert errors.__all__ == sorted(errors.__all__)
