"""The first run of the original, by the judge, on samples that it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onnxcomp.data import Dataset
from onnxcomp.errors import DataError, RuntimeFailure
from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.trial_runs import Trial

__all__ = ["SHARES", "first_judge", "written_file"]

SHARES = {"calibrate": 0.5, "select": 0.25, "confirm": 0.25}
"""Ranges are fitted, layers chosen and the final figures measured on samples of their own."""


def first_judge(
    make: Callable[..., Judge], samples: Dataset, trial: Trial, check_loads: Callable[[], None]
) -> tuple[Judge, Dataset, dict[str, Dataset]]:
    """Make the judge, which runs the original for the first time.

    Args:
        make: Makes a judge of `select` and `confirm`.
        samples: What the original is to be run on.
        trial: Finds others where the original refuses them.
        check_loads: Refuses a model that no samples help.

    Returns:
        The judge, the samples that the original takes, and their parts by the names of `SHARES`.

    Raises:
        ModelError: ONNX Runtime does not load the original.
        DataError: It does not run on generated inputs.
        RuntimeFailure: It does not run on the user's.
    """

    def judged(fed: Dataset) -> tuple[Judge, dict[str, Dataset]]:
        parts = dict.fromkeys(SHARES, fed) if fed.generated else fed.split(SHARES, trial.seed)
        return make(select=parts["select"], confirm=parts["confirm"]), parts

    try:
        (judge, parts), taken = trial.use(samples, judged)
    except RuntimeFailure as error:
        if not samples.generated:
            raise
        check_loads()
        feed = next(samples.feeds())
        shapes = ", ".join(f"{name}={','.join(map(str, array.shape))}" for name, array in feed.items())
        reason = str(error).partition(": ")[2]
        message = f"the model does not run on inputs made up for it ({shapes}); give --data or --shape: {reason}"
        raise DataError(message) from error
    return judge, taken, parts


def written_file(original: Model, file: Path | None, folder: Path) -> Path:
    """The file of a model, or one that is written for it."""
    if file is not None:
        return file
    path = folder / "first run.onnx"
    original.save(path, durable=False)
    return path
