"""Torch modules to export, made by functions without arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Convolutional(nn.Module):  # type: ignore[misc] # torch has no type information here
    """Conv and BatchNorm with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, image: Any) -> Any:
        inner = self.norm(self.first(image)).relu()
        return self.head((inner + self.second(inner)).mean((2, 3)))


class Transformer(nn.Module):  # type: ignore[misc] # torch has no type information here
    """An encoder of token ids with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Any, mask: Any) -> dict[str, Any]:
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=~mask)
        return {"hidden": hidden, "pooled": hidden.mean(1)}


class Recurrent(nn.Module):  # type: ignore[misc] # torch has no type information here
    """Two directions of LSTM and a GRU; gives a sequence and a state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 8, batch_first=True)

    def forward(self, x: Any) -> Any:
        sequence, (state, _) = self.lstm(x)
        return self.gru(sequence)[0], state


class Lambda(nn.Module):  # type: ignore[misc] # torch has no type information here
    """A function of one input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Optional(nn.Module):  # type: ignore[misc] # torch has no type information here
    """Takes a further input by name, behind one that may be left out."""

    def forward(self, ids: Any, types: Any = None, mask: Any = None) -> Any:
        assert types is None
        return ids * mask


class Any_(nn.Module):  # type: ignore[misc] # noqa: N801 - so as not to hide typing.Any
    """Takes any number of inputs."""

    def forward(self, *parts: Any) -> Any:
        return sum(parts), parts[0]


def convolutional() -> Any:
    torch.manual_seed(0)
    return Convolutional()


def convolutional_with_inputs() -> Any:
    return convolutional(), torch.randn(1, 3, 8, 8)


def transformer() -> Any:
    return Transformer(), (torch.randint(0, 50, (1, 12)), torch.ones(1, 12, dtype=torch.bool))


def recurrent() -> Any:
    return Recurrent(), (torch.randn(2, 7, 6),)


def random() -> Any:
    return Lambda(lambda x: x + torch.rand_like(x)), torch.randn(2, 3)


def batch_dependent() -> Any:
    """Is another function of four rows and more: what is exported is not what torch computes there."""
    return Lambda(lambda x: x if x.shape[0] < 4 else x + 1), torch.randn(3, 3)


def data_dependent() -> Any:
    return Lambda(lambda x: x if x.sum() > 0 else -x), torch.randn(2, 3)


def of_two_rows() -> Any:
    two = torch.randn(2, 3)
    return Lambda(lambda x: x + two), torch.randn(2, 3)


def writes_to_its_input() -> Any:
    return Lambda(lambda x: x.add_(1) * 2), torch.randn(2, 3)


def gives_a_number() -> Any:
    return Lambda(lambda x: (x, 3)), torch.randn(2, 3)


def gives_nothing() -> Any:
    return Lambda(lambda x: None), torch.randn(2, 3)


def gives_its_input() -> Any:
    return Lambda(lambda x: {"x": x, "sum": x.sum()}), torch.randn(2, 3)


def fails_inside() -> Any:
    def fail(x: Any) -> Any:
        message = "first line\nsecond line"
        raise KeyError(message)

    return Lambda(fail), torch.randn(2, 3)


def optional() -> Any:
    return Optional()


def any_number() -> Any:
    return Any_(), (torch.randn(2, 3), torch.randn(2, 3))


def raises() -> Any:
    message = "no luck\ntoday"
    raise ValueError(message)


def exits() -> Any:
    raise SystemExit(4)


def no_module() -> Any:
    return 3


def three() -> Any:
    return convolutional(), torch.randn(1), torch.randn(1)
