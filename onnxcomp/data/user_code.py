"""Functions that a user names as ``module:function``."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from onnxcomp.data.specs import suggestion
from onnxcomp.errors import OptionError


def is_reference(text: str) -> bool:
    """Whether a text looks like ``module:function``."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) is not None


def load_function(text: str, allow_code: bool) -> Any:
    """Import what ``module:function`` names; modules in the current folder are found too.

    Raises:
        OptionError: Running code is not allowed, or there is no such module or function, or importing it fails.
    """
    if not allow_code:
        message = f"{text!r} names code to run, which is not allowed here"
        raise OptionError(message)
    module_name, _, path = text.partition(":")
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything at import
        message = f"{text!r}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        raise OptionError(message) from error
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
    for name in path.split("."):
        if not hasattr(value, name):
            message = f"{text!r}: there is no {name!r} in {module_name!r}{suggestion(name, dir(value))}"
            raise OptionError(message)
        value = getattr(value, name)
    if not callable(value):
        message = f"{text!r} is not a function but a {type(value).__name__}"
        raise OptionError(message)
    return value
