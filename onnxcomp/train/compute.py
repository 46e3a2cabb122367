"""What training computes with: a device, its number format, an optimizer and its pace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from onnxcomp.train.options import TrainOptions

__all__ = ["as_arrays", "autocast", "find_device", "learning_rate", "make_optimizer"]


def as_arrays(value: Any) -> Any:
    """A tensor's values, or those of each in a sequence."""
    if isinstance(value, list | tuple):
        return [as_arrays(each) for each in value]
    return value.cpu().numpy() if isinstance(value, Tensor) else value


def find_device(name: str) -> Any:
    """The device of this name; of "auto" the fastest that torch finds."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: Any, *, mixed: bool) -> Any:
    """16 bits where the device is made for them."""
    if not mixed or device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16)


def make_optimizer(
    parameters: Sequence[tuple[str, nn.Parameter]], options: TrainOptions, scales: frozenset[str]
) -> Any:
    """Scales go at a pace of their own size: a step of Adam is as large as the learning rate, whatever the gradient."""
    plain = [each for name, each in parameters if name not in scales]
    groups = [
        {"params": [each for each in plain if each.ndim >= 2], "weight_decay": options.weight_decay, "pace": 1.0},
        {"params": [each for each in plain if each.ndim < 2], "weight_decay": 0.0, "pace": 1.0},
    ]
    groups += [
        {"params": [each], "weight_decay": 0.0, "pace": float(each.detach().abs().mean())}
        for name, each in parameters
        if name in scales
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=options.learning_rate, foreach=True)


def learning_rate(options: TrainOptions, step: int, steps: int) -> float:
    """Up in a line, then down along a cosine.

    Example:
        >>> options = TrainOptions(learning_rate=1.0, warmup=0.1)
        >>> [round(learning_rate(options, step, 100), 2) for step in (0, 9, 10, 55, 99)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    rising = round(options.warmup * steps)
    if step < rising:
        return options.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
