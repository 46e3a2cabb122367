"""Finished stages of a run that was interrupted: the same command goes on after them.

They lie in the user's cache folder, not beside the output: an interrupted run leaves nothing there. A run that ends
removes its own; what nobody came back for is removed after a week.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import OnnxcompError, OutputError
from onnxcomp.ledger import Attempt, PassEntry, StageEntry
from onnxcomp.model import Model, model_files

if TYPE_CHECKING:
    from onnxcomp.data import Dataset
    from onnxcomp.judge import Judge
    from onnxcomp.run_options import Options
    from onnxcomp.stages import Stage
    from onnxcomp.verdict import Kept

__all__ = ["Finished", "cache_folder", "run_key"]

KEPT_DAYS = 7


def cache_folder() -> Path:
    """The user's cache folder for this tool (XDG_CACHE_HOME is honoured, if it is absolute, as its standard says).

    Raises:
        OutputError: The user has no home folder, as in some containers.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "onnxcomp"
    except RuntimeError as error:
        message = "there is no home folder to keep files in; set XDG_CACHE_HOME to a folder"
        raise OutputError(message) from error


def run_key(judge: Judge, options: Options, samples: Dataset, stages: Sequence[Stage]) -> str:
    """A hash of all that decides the outcome of a run: model, data, options, passes and versions."""
    described = {field.name: str(getattr(options, field.name)) for field in dataclasses.fields(options) if field.repr}
    parts = [
        judge.original_digest,
        samples.digest,
        json.dumps(described, sort_keys=True),
        json.dumps([[(step.name, step.options()) for step in stage.passes] for stage in stages], default=str),
        json.dumps([(stage.share) for stage in stages]),
        *(version(package) for package in ("onnxcomp", "onnxruntime", "onnx")),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Finished:
    """The finished stages of one run, by their place.

    Args:
        key: What tells this run from others; None: nothing is kept or taken over.
    """

    def __init__(self, key: str | None) -> None:
        self._folder: Path | None = None
        self._complete = True
        self._mapped = False
        with contextlib.suppress(OutputError):  # without a place nothing is kept, and the run goes on
            root = cache_folder() / "runs"
            self._folder = root / key[:32] if key else None
            _remove_old(root)

    def load(self, index: int) -> tuple[Model | None, StageEntry] | None:
        """A finished stage: its model (None: it changed nothing) and its entry.

        Stages are asked for in order. After one that is missing none is taken over: they were built on it.
        """
        found = self._load(index) if self._complete else None
        self._complete = found is not None
        return found

    def _load(self, index: int) -> tuple[Model | None, StageEntry] | None:
        path = self._folder / f"{index}.json" if self._folder else None
        if path is None:
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            entry = _entry(saved["entry"])
            model = Model.load(path.with_suffix(".onnx")) if saved["changed"] else None
        except (OSError, ValueError, KeyError, TypeError, OnnxcompError):
            return None  # a damaged record is as good as none: the stage runs again
        self._mapped |= model is not None and len(model_files(path.with_suffix(".onnx"))) > 1
        return model, entry

    def store(self, index: int, kept: Kept) -> None:
        """Remember that a stage is finished."""
        if self._folder is None:
            return
        entry = kept.stages[-1]
        if entry.verdict == "skipped":
            return  # another run may have the time
        changed = entry.verdict in {"kept", "forced"}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if changed:
                kept.model.save(self._folder / f"{index}.onnx")
            text = json.dumps({"entry": dataclasses.asdict(entry), "changed": changed})
            temporary = self._folder / f"{index}.json.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._folder / f"{index}.json")
        except OSError:
            self._folder = None  # no room for the cache is no reason to fail: the run goes on without it

    def remove(self) -> None:
        """The run has ended: forget it."""
        if self._folder is None:
            return
        for record in self._folder.glob("*.json"):
            record.unlink(missing_ok=True)
        if self._mapped:  # weights of the result are still read from the files in there
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)


def _entry(saved: dict[str, Any]) -> StageEntry:
    attempts = [
        Attempt(**{**attempt, "passes": [PassEntry(**item) for item in attempt["passes"]]})
        for attempt in saved["attempts"]
    ]
    return StageEntry(**{**saved, "attempts": attempts})


def _remove_old(root: Path) -> None:
    limit = time.time() - KEPT_DAYS * 86400
    for folder in root.glob("*"):
        with contextlib.suppress(OSError):  # another run has just removed it
            if folder.is_dir() and folder.stat().st_mtime < limit:
                shutil.rmtree(folder, ignore_errors=True)
