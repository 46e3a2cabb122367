"""Store float weights as integers of 2 to 8 bits, at unchanged speed, or compute with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import onnx_graphsurgeon as gs

from onnxcomp.errors import ModelError, OptionError, RequirementError
from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.quality import Quality
from onnxcomp.targets import host_target
from onnxcomp.weights import Spool
from onnxcomp_passes._codes import OPSET_OF_TYPE, Width
from onnxcomp_passes._encoding import Encoder, Held, Weight, find_weights, wanted, write
from onnxcomp_passes._nbits import KERNEL
from onnxcomp_passes._products import layer_inputs, observed
from onnxcomp_passes._search import costliest_first, expected_fewest, fewest, most_worth_ranking
from onnxcomp_passes._stored import lift_constants

__all__ = ["QuantizeWeights"]

NODE_OVERHEAD_BYTES = 80
"""What a node and its extra initializer add to the file, about."""

STORAGE_SHARE = 0.6
"""The part of the accuracy budget that storage may spend where it has to choose: int8 computation needs the rest."""

MUL_OPSET = 7
"""The first opset with a Mul that ONNX Runtime has a kernel for."""

PER_CHANNEL_OPSET = 13
BLOCK_OPSET = 21
"""The first opsets whose DequantizeLinear has an axis, and blocks."""

MIN_BLOCK = 16


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Store float weights as integers with a scale per output channel or block.

    ::

        before   Y = Conv(X, W)                          W: float32
        after    Y = Conv(X, Mul(Cast(W8), scale))       W8: int8, same shape; scale: float32, one per output channel
        after    Y = MatMul(X, DequantizeLinear(W4, scale))    form=compute; W4: int4, scale: one per block and column

    In the form "load" ONNX Runtime folds the decoding when it loads the model: inference computes in float32 as before,
    at the same speed and from a file a quarter the size. In the form "compute" it makes a MatMulNBits of the two nodes:
    codes stay packed in memory and are decoded in the kernel, which rounds its input to 8 bits; weights of other
    operators than MatMul and Gemm, and those that several nodes read, are stored in the form "load". Codes take the
    smallest type of 2, 4 or 8 bits that the opset has. Memory is needed for one weight at a time.

    Left alone: weights that are not float32, that are too small for the nodes to pay, that hold NaN or infinity,
    that live in a subgraph, that are a graph output, and whatever ONNX Runtime is seen not to fold.
    """

    name: ClassVar[str] = "quantize-weights"
    rounds: ClassVar[bool] = True

    bits: int = option(8, "Bits of a code, 2 to 8.", minimum=2, maximum=8)
    block: int = option(
        0, "Weights that share a scale, along the reduction axis: a power of two from 16 on; 0: a channel.", minimum=0
    )
    symmetric: bool = option(True, "False gives each scale a zero point.")
    form: str = option("load", "Decoded at load, or in the kernel (MatMulNBits).", choices=("load", "compute"))
    method: str = option(
        "nearest",
        "How codes are found; gptq needs data, and is for MatMul and Gemm.",
        choices=("nearest", "hqq", "gptq"),
    )
    max_opset: int = option(0, "The newest opset that may be asked for; 0: that of the target's runtime.", minimum=0)
    per_channel: bool = option(True, "One scale per output channel (or table row) instead of one per weight.")
    min_elements: int = option(128, "Weights with fewer elements stay float.", minimum=1)
    choose: bool = option(True, "Return weights to float by measurement; false stores every weight that can be.")
    skip: tuple[str, ...] = option((), "Names of weights that stay float.")

    def __post_init__(self) -> None:
        """See the base class; a block must be one that the kernels have, and "gptq" asks for data.

        Raises:
            OptionError: An option has the wrong type or is out of range.
        """
        super().__post_init__()
        if self.block and (self.block < MIN_BLOCK or self.block & (self.block - 1)):
            message = f"{self.name}: block must be 0 or a power of two from {MIN_BLOCK} on, got {self.block}"
            raise OptionError(message)
        if self.method == "gptq":
            object.__setattr__(self, "requires", frozenset({"data"}))

    def weaker(self) -> Iterator[Self]:
        """Eight bits, then decoded at load."""
        if self.bits < 8:
            yield replace(self, bits=8)
        if self.form == "compute":
            yield replace(self, bits=8, form="load")

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        if self.method == "gptq" and (context.data is None or context.runtime is None or context.workdir is None):
            message = "quantize-weights: the method gptq needs data, and ONNX Runtime to run them; give --data"
            raise RequirementError(message)
        base = model.fork()
        lift_constants(base.graph)
        weights = wanted(base, context, changes, skip=self.skip, min_elements=self.min_elements)
        stored_bits = self._prepare(base, context, changes) if weights else None
        if stored_bits is None:
            return changes
        names = {weight.name for weight in weights}
        weights = [weight for weight in find_weights(base) if weight.name in names]  # raising the opset makes new ones
        width = Width(self.bits, self.symmetric)
        encoder = Encoder(width, stored_bits, self.block, self.per_channel, self.method, Spool())
        held = self._encode_all(base, weights, encoder, context, changes)
        held = self._without_unfolded(base, held, encoder, context, changes)
        if held and context.judge is not None and self.choose:
            held = self._within_budget(base, held, context, context.judge, changes)
        if not held:
            return changes
        for weight in weights:
            if weight.name in held:
                changes.add(weight.name, self._told(weight, held[weight.name], stored_bits))
        others = sum(form.method != self.method for form in held.values())
        if others:
            noun = "weight is" if others == 1 else "weights are"
            changes.notes.append(f"gptq is for MatMul and Gemm: {others} other {noun} rounded to nearest")
        if stored_bits > self.bits and any(not form.compute for form in held.values()):
            changes.notes.append(f"codes of {self.bits} bits are held in {stored_bits}: nothing packs them yet")
        if base.opset != model.opset:
            changes.notes.append(f"the opset is {base.opset}, was {model.opset}: the first that can decode them")
        model.become(self._built(base, held))
        return changes

    # --- before -------------------------------------------------------------------------------------------------------

    def _prepare(self, base: Model, context: Context, changes: Changes) -> int | None:
        """Raise the opset as far as the form and the type of the codes need; the bits of that type, or None."""
        target = context.target or host_target()
        allowed = max(base.opset, self.max_opset or target.max_opset)
        bits = Width(self.bits).stored_bits(allowed)
        needed = OPSET_OF_TYPE[bits] if bits < 8 else MUL_OPSET
        if self.form == "compute":
            needed = max(needed, BLOCK_OPSET if self.block else PER_CHANNEL_OPSET)
        if needed > allowed:
            why = f"needs opset {needed}; {target.name} is made for ONNX Runtime {target.min_runtime}, opset {allowed}"
            changes.leave("the model", f"{why}: allow it with max_opset={needed}")
            return None
        try:
            base.raise_opset(needed)
        except ModelError as error:
            if self.form == "compute":
                changes.leave("the model", str(error))
                return None
            return 8
        return bits

    # --- encoding -----------------------------------------------------------------------------------------------------

    def _encode_all(
        self, base: Model, weights: list[Weight], encoder: Encoder, context: Context, changes: Changes
    ) -> dict[str, Held]:
        """Encode every weight that is worth it, one in memory at a time."""
        held: dict[str, Held] = {}
        inputs = layer_inputs(base, weights) if self.method == "gptq" else {}
        for batch, products in observed(base, weights, inputs, context):
            for weight in batch:
                context.progress(f"rounding {weight.name} to {self.bits} bits")
                compute = self.form == "compute" and encoder.computes(weight)
                form = encoder.encode(weight, compute=compute, products=products.get(weight.name))
                if form is None:
                    changes.leave(weight.name, "holds NaN or infinity")
                elif form.encoded.nbytes + NODE_OVERHEAD_BYTES * form.nodes >= weight.constant._values.nbytes:
                    nodes = {1: "a node", 2: "two nodes"}.get(form.nodes, f"{form.nodes} nodes")
                    changes.leave(weight.name, f"too small for int{self.bits} codes, scales and {nodes} to be smaller")
                else:
                    held[weight.name] = form
        return held

    def _built(self, base: Model, held: Mapping[str, Held]) -> Model:
        """The model with these weights in integers."""
        fork = base.fork()
        write(fork, held, per_channel=self.per_channel)
        return fork

    def _told(self, weight: Weight, form: Held, stored_bits: int) -> str:
        """What was done to a weight, in words."""
        shape = "x".join(map(str, weight.shape))
        groups = f" in blocks of {form.block}" if form.block else ""
        how = "" if form.method == "nearest" else f" by {form.method}"
        kind = f"{'' if self.symmetric else 'u'}int{self.bits}"
        where = f", computed by {KERNEL}" if form.compute else ""
        held = f" (held in {stored_bits} bits)" if stored_bits > self.bits else ""
        return f"{shape} float32 stored as {kind}{groups}{how}{held}{where}"

    # --- after --------------------------------------------------------------------------------------------------------

    def _without_unfolded(
        self, base: Model, held: dict[str, Held], encoder: Encoder, context: Context, changes: Changes
    ) -> dict[str, Held]:
        """Without the weights whose decoding would run at each inference; the compute form gives way to "load"."""
        if not held or context.runtime is None or context.workdir is None:
            return held
        alive = self._decoded_at_run(base, held, context)
        again = {name for name in alive if held[name].compute}
        if again:
            constants = {weight.name: weight for weight in find_weights(base)}
            retried = {name: encoder.encode(constants[name], compute=False) for name in again}
            held = {**held, **{name: form for name, form in retried.items() if form is not None}}
            alive = self._decoded_at_run(base, held, context)
        for name in alive:
            changes.leave(name, "ONNX Runtime does not fold its decoding")
        return {name: form for name, form in held.items() if name not in alive}

    def _decoded_at_run(self, base: Model, held: Mapping[str, Held], context: Context) -> set[str]:
        """The weights whose decoding is left in ONNX Runtime's optimized graph."""
        assert context.runtime is not None
        assert context.workdir is not None
        built = self._built(base, held)
        path = context.workdir / "stored.onnx"
        built.save(path, durable=False)
        try:
            made = {name for node in context.runtime.census(path).nodes for name in node.outputs}
        finally:
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()
        makers = {tensor.name: tensor for node in built.graph.nodes for tensor in node.outputs}
        return {name for name in held if name in makers and made & _decoding(makers[name])}

    def _within_budget(
        self, base: Model, held: dict[str, Held], context: Context, judge: Judge, changes: Changes
    ) -> dict[str, Held]:
        """Return weights to float, those with most output error per byte first, until the budget holds."""
        share = STORAGE_SHARE * context.share

        def without(chosen: list[str]) -> dict[str, Held]:
            return {name: form for name, form in held.items() if name not in chosen}

        def measured(chosen: list[str]) -> Quality:
            built = self._built(base, without(chosen))
            quality = judge.quality(built)
            judge.forget(built)
            return quality

        whole = measured([])
        if judge.allows(whole, share):
            return held

        saved = {w.name: float(w.constant._values.nbytes) for w in find_weights(base) if w.name in held}
        errors: dict[str, float] = {}
        for name in most_worth_ranking(saved, context):
            context.progress(f"measuring what storing {name} costs")
            alone = self._built(base, {name: held[name]})
            errors[name] = judge.rough_error(alone)
            judge.forget(alone)
        order = costliest_first(saved, errors)

        def holds(count: int) -> bool:
            context.progress(f"trying {len(order) - count} of {len(order)} weights stored")
            return judge.allows(measured(order[:count]), share)

        expected = expected_fewest([errors.get(name) for name in order], judge.budget.excess(whole, share))
        chosen = order[: fewest(len(order), holds, context, expected=expected)]
        for name in chosen:
            changes.leave(name, "costs too much accuracy")
        changes.resolved = {"choose": False, "skip": [*self.skip, *chosen]}
        return without(chosen)


def _decoding(weight: gs.Tensor) -> set[str]:
    """The tensors that lead from codes to a weight."""
    found: set[str] = set()
    tensors = [weight]
    while tensors:
        tensor = tensors.pop()
        found.add(str(tensor.name))
        tensors.extend(t for node in tensor.inputs for t in node.inputs if t.inputs)
    return found
