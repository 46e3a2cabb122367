"""What tests of training share: trained models, few samples, and forms of the models that have lost something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data import Dataset, input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.train import TrainOptions

SAMPLES = Path(__file__).parents[1] / "sample_models"
LENET = SAMPLES / "fashion_lenet.onnx"
WEIGHTS = ("1.weight", "3.weight", "5.weight")

QUICK = TrainOptions(epochs=12, batch_size=16, held_out=0.2, evaluations=4)


def arrays(count: int = 240, *, labels: bool = False) -> dict[str, Any]:
    """The first of the test images, as a user's arrays."""
    with np.load(SAMPLES / "fashion_test.npz") as held:
        found = {"image": held["image"][:count]}
        return {**found, "label": held["label"][:count]} if labels else found


def dataset(count: int = 240, *, labels: bool = False) -> Dataset:
    return open_data(arrays(count, labels=labels), input_specs(Model.load(LENET).proto()))


def pruned(sparsity: float = 0.7) -> Model:
    """LeNet without its smallest weights."""
    model = Model.load(LENET)
    for name in WEIGHTS:
        weight = model.weight(name)
        model.set_weight(name, np.where(np.abs(weight) > np.quantile(np.abs(weight), sparsity), weight, 0))
    return model


def clustered(values: int = 9) -> Model:
    """LeNet with few values in each weight."""
    model = Model.load(LENET)
    for name in WEIGHTS:
        weight = model.weight(name)
        grid = np.linspace(weight.min(), weight.max(), values).astype(np.float32)
        model.set_weight(name, grid[np.abs(weight[..., None] - grid).argmin(axis=-1)])
    return model


def halved() -> Model:
    """LeNet with weights of half the size: wrong, and easily learnt again."""
    model = Model.load(LENET)
    for name in WEIGHTS:
        model.set_weight(name, model.weight(name) * np.float32(0.5))
    return model
