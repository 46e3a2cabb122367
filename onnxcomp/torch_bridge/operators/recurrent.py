"""LSTM, GRU and RNN: torch's fused kernels where a node's options allow, a loop over the steps otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], State]

DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
ORDERS = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""Where torch's gates are among ONNX's: ifgo in iofc, rzn in zrh."""

ALPHAS = {"Affine": 1.0, "Elu": 1.0, "HardSigmoid": 0.2, "LeakyRelu": 0.01, "ScaledTanh": 1.0, "ThresholdedRelu": 1.0}
BETAS = {"Affine": 0.0, "HardSigmoid": 0.5, "ScaledTanh": 1.0}


@operator("LSTM")
def _lstm(
    call: NodeCall,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _recurrent(call, x, weight, recurrence, bias, lengths, (hidden, cell), peepholes)


@operator("GRU", "RNN")
def _gru_or_rnn(
    call: NodeCall,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _recurrent(call, x, weight, recurrence, bias, lengths, (hidden,), None)


def _recurrent(
    call: NodeCall,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    initial: tuple[Tensor | None, ...],
    peepholes: Tensor | None,
) -> tuple[Tensor, ...]:
    by_batch = bool(call.get("layout", 0))
    if by_batch:
        x = x.transpose(0, 1)
    directions, size, batch = weight.shape[0], recurrence.shape[2], x.shape[1]
    states = [
        x.new_zeros(directions, batch, size) if state is None else state.transpose(0, 1) if by_batch else state
        for state in initial
    ]
    if _is_plain(call, directions) and lengths is None and peepholes is None:
        y, last = _fused(call, x, weight, recurrence, bias, states)
    else:
        y, last = _unrolled(call, x, weight, recurrence, bias, lengths, states, peepholes)
    if not by_batch:
        return (y, *last)
    return (y.permute(2, 0, 1, 3), *(each.transpose(0, 1) for each in last))


def _names(call: NodeCall, directions: int) -> list[str]:
    given = call.get("activations")
    if not given:
        return list(DEFAULTS[call.op]) * directions
    # Case does not count in ONNX.
    return [_text(each).lower() for each in given]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _direction(call: NodeCall) -> str:
    return _text(call.get("direction", "forward"))


# --- torch's kernels --------------------------------------------------------------------------------------------------


def _is_plain(call: NodeCall, directions: int) -> bool:
    """Whether torch's kernels compute what the node asks for."""
    names = [name.lower() for name in _names(call, directions)]
    usual = names == [name.lower() for name in DEFAULTS[call.op]] * directions
    if call.op == "RNN" and not usual:
        usual = names == ["relu"] * directions
    if call.op == "GRU" and not call.get("linear_before_reset", 0):
        return False
    return usual and not call.get("clip") and not call.get("input_forget", 0)


def _fused(
    call: NodeCall, x: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor | None, states: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    order = ORDERS[call.op]
    flat: list[Tensor] = []
    for direction in range(weight.shape[0]):
        flat += [_ordered(weight[direction], order), _ordered(recurrence[direction], order)]
        if bias is not None:
            flat += [_ordered(half, order) for half in bias[direction].chunk(2)]
    backward = _direction(call) == "reverse"
    if backward:
        x = x.flip(0)
    two = weight.shape[0] == 2
    more = (flat, bias is not None, 1, 0.0, torch.is_grad_enabled(), two, False)
    if call.op == "LSTM":
        y, *last = torch._VF.lstm(x, tuple(states), *more)
    elif call.op == "GRU":
        y, *last = torch._VF.gru(x, states[0], *more)
    else:
        relu = _names(call, weight.shape[0])[0].lower() == "relu"
        y, *last = (torch._VF.rnn_relu if relu else torch._VF.rnn_tanh)(x, states[0], *more)
    if backward:
        y = y.flip(0)
    steps, batch = y.shape[:2]
    return y.reshape(steps, batch, weight.shape[0], -1).transpose(1, 2), tuple(last)


def _ordered(gates: Tensor, order: Sequence[int]) -> Tensor:
    if len(order) == 1:
        return gates
    parts = gates.chunk(len(order))
    return torch.cat([parts[index] for index in order])


# --- step by step -----------------------------------------------------------------------------------------------------


def _unrolled(
    call: NodeCall,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    states: Sequence[Tensor],
    peepholes: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    directions = weight.shape[0]
    functions = _activations(call, directions)
    each = len(functions) // directions
    ys, ends = [], []
    for index in range(directions):
        backward = _direction(call) == "reverse" or index == 1
        halves = (None, None) if bias is None else bias[index].chunk(2)
        own = functions[each * index : each * (index + 1)]
        peep = None if peepholes is None else peepholes[index].chunk(3)
        step, gates = _step(call, x, weight[index], recurrence[index], halves, own, peep)
        y, last = _run(step, gates, tuple(state[index] for state in states), lengths, backward)
        ys.append(y)
        ends.append(last)
    return torch.stack(ys, 1), tuple(torch.stack(state) for state in zip(*ends, strict=True))


def _run(step: Step, gates: Tensor, state: State, lengths: Tensor | None, backward: bool) -> tuple[Tensor, State]:
    """All steps; behind an example's end its state stays, and its output is 0."""
    count = gates.shape[0]
    rows: list[Tensor] = [gates] * count
    for time in reversed(range(count)) if backward else range(count):
        fresh = step(gates[time], state)
        if lengths is None:
            state, rows[time] = fresh, fresh[0]
        else:
            alive = (time < lengths).unsqueeze(1)
            state = tuple(torch.where(alive, new, old) for new, old in zip(fresh, state, strict=True))
            rows[time] = torch.where(alive, fresh[0], 0)
    return torch.stack(rows), state


def _step(
    call: NodeCall,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    halves: Sequence[Tensor | None],
    functions: Sequence[Activation],
    peepholes: Sequence[Tensor] | None,
) -> tuple[Step, Tensor]:
    """One step, and for all of them what the inputs add to the gates."""
    own, other = halves
    clip = call.get("clip") or 0.0
    f = functions[0]

    def clipped(value: Tensor) -> Tensor:
        return value.clamp(-clip, clip) if clip else value

    if call.op == "RNN":

        def rnn(gates: Tensor, state: State) -> State:
            return (f(clipped(gates + F.linear(state[0], recurrence, other))),)

        return rnn, F.linear(x, weight, own)
    g = functions[1]
    if call.op == "GRU":
        size = recurrence.shape[1]
        linear_first = bool(call.get("linear_before_reset", 0))
        outer, inner = recurrence[: 2 * size], recurrence[2 * size :]
        outer_bias, inner_bias = (None, None) if other is None else (other[: 2 * size], other[2 * size :])

        def gru(gates: Tensor, state: State) -> State:
            hidden = state[0]
            both = f(clipped(gates[:, : 2 * size] + F.linear(hidden, outer, outer_bias)))
            update, reset = both.chunk(2, 1)
            if linear_first:
                seen = reset * F.linear(hidden, inner, inner_bias)
            else:
                seen = F.linear(reset * hidden, inner, inner_bias)
            new = g(clipped(gates[:, 2 * size :] + seen))
            return (new + update * (hidden - new),)

        return gru, F.linear(x, weight, own)
    h = functions[2]
    coupled = bool(call.get("input_forget", 0))

    def lstm(gates: Tensor, state: State) -> State:
        hidden, cell = state
        i, o, forget, c = (gates + F.linear(hidden, recurrence, other)).chunk(4, 1)
        if peepholes is not None:
            i, forget = i + peepholes[0] * cell, forget + peepholes[2] * cell
        i = f(clipped(i))
        forget = 1 - i if coupled else f(clipped(forget))
        cell = forget * cell + i * g(clipped(c))
        if peepholes is not None:
            o = o + peepholes[1] * cell
        return f(clipped(o)) * h(cell), cell

    return lstm, F.linear(x, weight, own)


def _activations(call: NodeCall, directions: int) -> list[Activation]:
    alphas, betas = list(call.get("activation_alpha") or []), list(call.get("activation_beta") or [])
    found = []
    for name in _names(call, directions):
        known = {key.lower(): key for key in FUNCTIONS}.get(name.lower())
        if known is None:
            message = f"the activation {name!r}"
            raise NotImplementedError(message)
        alpha: Any = alphas.pop(0) if known in ALPHAS and alphas else ALPHAS.get(known)
        beta: Any = betas.pop(0) if known in BETAS and betas else BETAS.get(known)
        found.append(FUNCTIONS[known](alpha, beta))
    return found


FUNCTIONS: dict[str, Callable[[Any, Any], Activation]] = {
    "Affine": lambda alpha, beta: lambda x: alpha * x + beta,
    "Elu": lambda alpha, beta: lambda x: F.elu(x, alpha),
    "HardSigmoid": lambda alpha, beta: lambda x: (alpha * x + beta).clamp(0, 1),
    "LeakyRelu": lambda alpha, beta: lambda x: F.leaky_relu(x, alpha),
    "Relu": lambda alpha, beta: torch.relu,
    "ScaledTanh": lambda alpha, beta: lambda x: alpha * torch.tanh(beta * x),
    "Sigmoid": lambda alpha, beta: torch.sigmoid,
    "Softplus": lambda alpha, beta: F.softplus,
    "Softsign": lambda alpha, beta: F.softsign,
    "Tanh": lambda alpha, beta: torch.tanh,
    "ThresholdedRelu": lambda alpha, beta: lambda x: F.threshold(x, alpha, 0.0),
}
