"""`GraphModule`: an ONNX graph as a torch module whose Parameters are the graph's weights."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from onnx import TensorProto
from torch import Tensor, nn

from onnxcomp.errors import ModelError, RequirementError
from onnxcomp.model import Model, ModelSource, value_of
from onnxcomp.torch_bridge import operators
from onnxcomp.torch_bridge.codes import WITHIN, Code, codes_of, is_pruned
from onnxcomp.torch_bridge.dtypes import INTEGER_RANGES, as_tensor, onnx_type, torch_dtype
from onnxcomp.torch_bridge.fusion import fuse
from onnxcomp.torch_bridge.inlining import inlined_model, opsets_of
from onnxcomp.torch_bridge.operators.quantization import dequantize_linear, quantize_linear
from onnxcomp.torch_bridge.plan import Plan, Step, Values, compile_graph, missing_operators, run_plan, with_frees
from onnxcomp.torch_bridge.registry import NodeCall
from onnxcomp.torch_bridge.scales import find_scales, following
from onnxcomp.torch_bridge.weights import FLOATS, Held, find_constants, is_matrix, is_trainable, kind_of

__all__ = ["GraphModule", "load"]

Array = np.ndarray[Any, Any]

WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)
"""Types that are trained as they are."""

RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
"""Not computed once and for all, even from constants."""


def load(
    source: ModelSource, *, freeze: Sequence[str] = (), learn_scales: bool = False, latents: ModelSource | None = None
) -> GraphModule:
    """Make a torch module of an ONNX model.

    Args:
        source: A path, a ModelProto or a Model. It is not changed.
        freeze: Patterns of names of weights that are not trained.
        learn_scales: Train the scales of quantized weights and activations too (LSQ).
        latents: A float model with weights of the same names; where the model has codes, what they were rounded from.
            Each is brought within its code, so that not training changes nothing.

    Raises:
        ModelError: The model cannot be read, or holds what cannot be run.
        RequirementError: An operator is missing.

    Example:
        >>> from onnx import parser
        >>> import torch
        >>> text = '''<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[N, 2] y)
        ...     <float[2] b = {1, -5}> { h = Add(x, b)  y = Relu(h) }'''
        >>> module = load(parser.parse_model(text))
        >>> module(torch.ones(1, 2)).tolist(), [name for name, _ in module.named_parameters()]
        ([[2.0, 0.0]], ['b'])
    """
    model = Model.load(source)
    floats = Model.load(latents) if latents is not None else None
    return GraphModule(model, freeze=freeze, learn_scales=learn_scales, latents=floats)


class GraphModule(nn.Module):  # type: ignore[misc] # torch has no type information here
    """An ONNX graph as a module. Its Parameters have the names of the initializers, dots and all.

    Integer codes that a DequantizeLinear reads are trained as the float numbers behind them, rounded in each run;
    16-bit floats as 32-bit ones. BatchNormalization's statistics, limits, masks, exponents and, unless asked for,
    scales are never trained.

    Attributes:
        input_names: Of the inputs, those with a default among them.
        defaults: What inputs are that need not be given.
        output_names: Of the outputs.
        scale_names: Of the Parameters that are scales.
        code_names: Of the Parameters that are the numbers behind integer codes.
        rounded_names: Of those whose zeros are numbers that were rounded, not weights that were pruned.
        matrix_names: Of those that are matrices, kernels or tables of layers.
        plan: The steps, one a node; what runs is the same with some of them put together.
    """

    def __init__(
        self,
        model: Model,
        *,
        freeze: Sequence[str] = (),
        learn_scales: bool = False,
        latents: Model | None = None,
    ) -> None:
        super().__init__()
        inlined = inlined_model(model)
        _check_operators(inlined)
        own = None if inlined is model else {held.name for held in find_constants(model.fork().graph)}
        model = inlined if inlined is not model else model.fork()
        constants = find_constants(model.graph)
        plan = compile_graph(model.graph, opsets_of(model))
        self.input_names = tuple(plan.inputs)
        self.output_names = tuple(plan.outputs)
        self.defaults = {each.name: as_tensor(np.asarray(value_of(each))) for each in _defaults(model.graph)}
        self._output_types = {tensor.name: tensor.dtype for tensor in model.graph.outputs}
        self._kinds = {held.name: kind_of(held) for held in constants}
        self._codes: dict[str, Code] = {}
        scales, self._products = find_scales(constants) if learn_scales else (set(), {})
        # What stands in a function has no tensor of its own to be written back to.
        inside = () if own is None else [held.name for held in constants if held.name not in own]
        self._place(constants, [*freeze, *map(glob.escape, inside)], scales)
        self.matrix_names = frozenset(held.name for held in constants if is_matrix(held)) & self._parameters.keys()
        self.scale_names = frozenset(scales & self._parameters.keys())
        self._products = {
            name: each for name, each in self._products.items() if {each.first, each.second} & self.scale_names
        }
        self._first_scales = {name: self._parameters[name].detach().clone() for name in self.scale_names}
        self.plan = self._with_codes(plan, model.opset)
        self._start_codes(latents)
        self.plan = self._folded(self.plan)
        self._fast = fuse(self.plan, self._buffers, self._shapes())
        self._inside = _made(self.plan) - _made(self._fast)

    # --- setting up -----------------------------------------------------------------------------------------------

    def _place(self, constants: Sequence[Held], freeze: Sequence[str], scales: set[str]) -> None:
        """Make a Parameter or a buffer of each constant. Names with dots are theirs, so torch's check is passed by."""
        for held in constants:
            wanted = is_trainable(held) or held.name in scales
            # What an output shows is to be of the graph's type, not the numbers behind it.
            wanted = wanted and (held.name not in self.output_names or kind_of(held) in WIDE)
            if wanted and not any(fnmatch.fnmatchcase(held.name, pattern) for pattern in freeze):
                kind = kind_of(held)
                if kind in INTEGER_RANGES:
                    self._codes[held.name] = codes_of(held)
                value = np.asarray(value_of(held.constant))
                dtype = torch.float64 if kind == TensorProto.DOUBLE else torch.float32
                self._parameters[held.name] = nn.Parameter(as_tensor(value).to(dtype).clone())
            else:
                self._hold(held.name, held.constant)

    def _hold(self, name: str, constant: gs.Constant) -> None:
        try:
            self._buffers[name] = as_tensor(np.asarray(value_of(constant)))
        except (KeyError, TypeError) as error:
            message = f"the constant {name!r} is of type {constant.dtype}, which torch does not have"
            raise ModelError(message) from error
        self._non_persistent_buffers_set.add(name)

    def _with_codes(self, plan: Plan, opset: int) -> Plan:
        """The plan with the steps in front that make codes and 16-bit floats of Parameters; without Constant nodes."""
        first = following(self._products, {name: tuple(self._buffers[name].shape) for name in self._products})
        renamed: dict[str, str] = {}
        for name, code in self._codes.items():
            renamed[name] = f"{name}#codes"
            first.append(Step(quantize_linear, code.call, (name, *code.inputs), (renamed[name],)))
        for name in self._parameters:
            kind = self._kinds[name]
            if kind in {TensorProto.FLOAT16, TensorProto.BFLOAT16}:
                renamed[name] = f"{name}#half"
                call = NodeCall(name, "Cast", opset=opset, attrs={"to": kind})
                first.append(Step(_to_half, call, (name,), (renamed[name],)))
        held = self._parameters.keys() | self._buffers.keys()
        steps = [_renamed(step, renamed) for step in plan.steps if not held.issuperset(step.outputs)]
        return replace(plan, steps=with_frees([*first, *steps], plan.outputs))

    def _start_codes(self, floats: Model | None) -> None:
        """Put the numbers behind the codes in place of the codes, where they can be from a float model."""
        known = {} if floats is None else {held.name: held for held in find_constants(floats.graph)}
        rounded = set()
        for name, code in self._codes.items():
            parameter = self._parameters[name]
            codes = parameter.detach().clone()
            scale, *zero = (self._any(each).detach() for each in code.inputs if each)
            with torch.no_grad():
                parameter.copy_(dequantize_linear(code.back, codes, scale, *zero))
                pruned = is_pruned(dequantize_linear(code.back, codes, torch.ones_like(scale), *zero))
                if not pruned:
                    rounded.add(name)
                source = known.get(name)
                if source is not None and kind_of(source) in FLOATS and tuple(source.constant.shape) == codes.shape:
                    half = dequantize_linear(code.back, torch.full_like(codes, WITHIN), scale)
                    near = as_tensor(np.asarray(value_of(source.constant))).to(parameter.dtype)
                    near = torch.minimum(torch.maximum(near, parameter - half), parameter + half)
                    parameter.copy_(torch.where(parameter == 0, 0, near) if pruned else near)
        self.code_names, self.rounded_names = frozenset(self._codes), frozenset(rounded)

    def _load_from_state_dict(self, state: Any, prefix: str, *more: Any) -> None:
        """As in torch, which takes names with dots for those of inner modules, and so for unexpected."""
        super()._load_from_state_dict(state, prefix, *more)
        *_, unexpected, _ = more
        unexpected[:] = [name for name in unexpected if name.removeprefix(prefix) not in self._parameters]

    def _any(self, name: str) -> Tensor:
        """The present value of a Parameter, of a constant, or of a scale that follows from others."""
        product = self._products.get(name)
        if product is not None and self._has_moved(product.first, product.second):
            values = (self._any(product.first).reshape(-1) * self._any(product.second).reshape(-1)).detach()
            return values.expand(max(1, self._buffers[name].numel())).reshape(self._buffers[name].shape)
        found = self._parameters.get(name)
        return self._buffers[name] if found is None else found

    def _has_moved(self, *scales: str) -> bool:
        return any(
            name in self._first_scales and not torch.equal(self._parameters[name].cpu(), self._first_scales[name].cpu())
            for name in scales
        )

    def _folded(self, plan: Plan) -> Plan:
        """The plan without the steps that depend on nothing which is given or trained; their results become buffers."""
        values: Values = dict(self._buffers)
        steps: list[Step] = []
        with torch.no_grad():
            for step in plan.steps:
                if step.bodies or step.call.op in RANDOM or not values.keys() >= set(step.reads):
                    steps.append(step)
                    continue
                run_plan(Plan((), (), (), (replace(step, frees=()),)), values)
                if not all(isinstance(values[name], Tensor) for name in step.outputs if name):
                    steps.append(step)  # sequences are no buffers
                    for name in step.outputs:
                        values.pop(name, None)
        read = {name for step in steps for name in step.reads} | set(plan.outputs)
        for name in list(self._buffers):
            if name not in read:
                del self._buffers[name]
        for name, value in values.items():
            if name in read and name not in self._buffers and isinstance(value, Tensor):
                self._buffers[name] = value
                self._non_persistent_buffers_set.add(name)
        return replace(plan, steps=with_frees(steps, plan.outputs))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(each.shape) for name, each in (*self._parameters.items(), *self._buffers.items())}

    # --- running --------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor | Mapping[str, Tensor]) -> Any:
        """Run the graph.

        Args:
            inputs: The inputs in order, or one mapping of them by name.

        Returns:
            The output, or a tuple of them where there are several.

        Raises:
            ModelError: An operator fails; the message names the node.
        """
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            feed = dict(inputs[0])
        else:
            needed = [name for name in self.input_names if name not in self.defaults]
            feed = dict(zip(needed if len(inputs) == len(needed) else self.input_names, inputs, strict=True))
        found = self.run(feed)
        return found[self.output_names[0]] if len(self.output_names) == 1 else tuple(found.values())

    def run(self, feed: Mapping[str, Tensor], watch: Iterable[str] = ()) -> dict[str, Any]:
        """Run the graph on inputs by name.

        Args:
            feed: The inputs by name.
            watch: Names of inner tensors to give too.

        Returns:
            The outputs by name, then what is watched.

        Raises:
            ModelError: An operator fails, or there is no tensor of that name.
        """
        missing = [name for name in self.input_names if name not in feed and name not in self.defaults]
        if missing:
            message = f"the graph needs the input {missing[0]!r}; it was given {', '.join(feed) or 'none'}"
            raise ModelError(message)
        watched = tuple(watch)
        values: Values = {**self.defaults, **self._buffers, **self._parameters, **feed}
        run_plan(self._fast if self._inside.isdisjoint(watched) else self.plan, values, frozenset(watched))
        try:
            found = {name: values[name] for name in (*self.output_names, *watched)}
        except KeyError as error:
            message = f"the graph has no tensor {error.args[0]!r} outside of its subgraphs"
            raise ModelError(message) from error
        return {name: self._as_declared(name, value) for name, value in found.items()}

    def _as_declared(self, name: str, value: Any) -> Any:
        """Quantized values are floats inside; an output of an integer type is given as such."""
        kind = onnx_type(self._output_types.get(name))
        if kind not in INTEGER_RANGES or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(torch_dtype(kind))

    # --- writing back ---------------------------------------------------------------------------------------------

    def write_back(self, model: Model) -> list[str]:
        """Put the Parameters into a model that has the same weights; what was not trained does not change by a bit.

        Args:
            model: Changed in place.

        Returns:
            The names of the weights that changed.

        Raises:
            ModelError: The model lacks a weight, or has it in another shape.
        """
        constants = {held.name: held for held in find_constants(model.graph)} if self._parameters else {}
        changed = []
        for name, parameter in self._parameters.items():
            held = constants.get(name)
            if held is None or tuple(held.constant.shape) != tuple(parameter.shape):
                message = f"the model has no weight {name!r} of shape {list(parameter.shape)}"
                raise ModelError(message)
            before = np.asarray(value_of(held.constant))
            after = self._stored(name, before)
            if after.tobytes() != before.tobytes():
                held.constant.values = after
                changed.append(name)
        for name, product in self._products.items():
            if self._has_moved(product.first, product.second):
                held = constants[name]
                held.constant.values = _as_array(self._any(name), np.asarray(value_of(held.constant)))
                changed.append(name)
        return changed

    def _stored(self, name: str, before: Array) -> Array:
        """What the graph holds for a Parameter, in the type of what it held before."""
        parameter = self._parameters[name].detach()
        code = self._codes.get(name)
        if code is None:
            stored = parameter.to(as_tensor(before[:0] if before.ndim else before).dtype)
            return _as_array(stored, before)
        scale, *zero = (self._any(each).detach() for each in code.inputs if each)
        with torch.no_grad():
            found = quantize_linear(code.call, parameter, scale, *zero)
            old = as_tensor(before).to(parameter.dtype)
            same = parameter == dequantize_linear(code.back, old, scale, *zero)
        kind = self._kinds[name]
        low, high = INTEGER_RANGES[kind]
        whole = np.clip(found.double().cpu().numpy(), low, high).astype(np.int64)
        # Large int32 codes are more than a float can hold: those that were not trained stay as they were.
        return np.where(same.cpu().numpy(), before.astype(np.int64), whole).astype(before.dtype)


def _made(plan: Plan) -> set[str]:
    return {name for step in plan.steps for name in step.outputs}


def _defaults(graph: gs.Graph) -> list[gs.Constant]:
    """The initializers that inputs may override."""
    return list(vars(graph).get("default_values", ()))


def _to_half(call: NodeCall, x: Tensor) -> Tensor:
    return x.to(torch_dtype(call.attrs["to"]))


def _renamed(step: Step, names: Mapping[str, str]) -> Step:
    """A step that reads other names, in its subgraphs too."""
    inputs = tuple(names.get(name, name) for name in step.inputs)
    bodies = {key: _renamed_plan(body, names) for key, body in step.bodies.items()}
    return replace(step, inputs=inputs, bodies=bodies)


def _renamed_plan(plan: Plan, names: Mapping[str, str]) -> Plan:
    captures, outputs = (tuple(names.get(name, name) for name in group) for group in (plan.captures, plan.outputs))
    return replace(plan, captures=captures, outputs=outputs, steps=tuple(_renamed(step, names) for step in plan.steps))


def _as_array(tensor: Tensor, before: Array) -> Array:
    """A tensor as an array of the dtype and shape of another; 0-d stays 0-d."""
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.float().cpu().numpy()).astype(before.dtype)
    return np.asarray(tensor.cpu().numpy(), before.dtype).reshape(before.shape)


def _check_operators(model: Model) -> None:
    missing = missing_operators(model.graphs())
    if not missing:
        return
    told = ", ".join(f"{node.op} (node {node.name or node.outputs[0].name!r})" for node in missing)
    first = missing[0]
    domain = f", domain={first.domain!r}" if first.domain else ""
    message = (
        f"this model cannot be trained: there is no torch operator for {told}; register a function of a NodeCall and"
        f" the inputs with @onnxcomp.torch_bridge.operator({first.op!r}{domain})"
    )
    raise RequirementError(message)


_ = operators  # importing them registers them
