"""Quantization-aware training: the model learns to answer well through its rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcomp import analysis
from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, option, register
from onnxcomp_passes._few_bits import EIGHT, WIDTHS, quantize_layers
from onnxcomp_passes._training import Training
from onnxcomp_passes.quantize import Quantize

__all__ = ["Qat"]


@register
@dataclass(frozen=True, kw_only=True)
class Qat(Training):
    """Train a quantized model through its QuantizeLinear and DequantizeLinear nodes; quantize a float one first.

    ::

        before   Y = MatMul(X, W)
        after    Y = MatMul(DQ(Q(X)), DQ(W4'))    W4': codes that answer as the original

    Rounding passes gradients straight through; scales are learnt too (Esser et al. 2020, "Learned step size
    quantization"). A model that an earlier pass has quantized keeps its grids. A float one is quantized as `quantize`
    does it, all layers that can be; with 4-bit activations, for which ONNX Runtime has no kernels, by one pair of nodes
    before each layer: such a model computes in float and is slower, but shows what a device with such kernels gives.

    Left alone: the model, where the weights that were learnt are no better on samples held out from training.
    """

    name: ClassVar[str] = "qat"
    requires: ClassVar[frozenset[str]] = frozenset({"data", "torch"})
    idempotent: ClassVar[bool] = False
    mends: ClassVar[bool] = True

    weight_bits: int = option(
        8, "Bits of weights, 4 or 8, of a float model; the first and the last layer have 8.", minimum=4, maximum=8
    )
    activation_bits: int = option(8, "Bits of what layers read, 4 or 8, of a float model.", minimum=4, maximum=8)
    learn_scales: bool = option(True, "Train scales too.")
    temperature: float = option(2.0, "Evens out class probabilities.", minimum=0.01)
    alpha: float = option(
        0.9, "Weight of the original's answers against labels, where there are any.", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            OptionError: There is no type of so many bits.
        """
        super().__post_init__()
        for name in ("weight_bits", "activation_bits"):
            if getattr(self, name) not in WIDTHS:
                message = f"qat: {name} must be 4 or 8, got {getattr(self, name)}"
                raise OptionError(message)

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        from onnxcomp.train import Loss

        changes, came = Changes(), model.fork()
        if not analysis.is_quantized(model):
            if not self._quantize(model, context, changes):
                return changes
        elif (self.weight_bits, self.activation_bits) != (EIGHT, EIGHT):
            changes.notes.append("the model is quantized already, and keeps its grids")
        loss = Loss(temperature=self.temperature, alpha=self.alpha)
        self._train(model, context, changes, loss, came, learn_scales=self.learn_scales)
        return changes

    def _quantize(self, model: Model, context: Context, changes: Changes) -> bool:
        """Put a float model's layers onto grids; whether there were any."""
        if self.activation_bits != EIGHT:
            bits = {"weights": self.weight_bits, "activations": self.activation_bits}
            return bool(quantize_layers(model, context, changes, **bits))
        done = Quantize(weight_bits=self.weight_bits, choose=False, remedies=("round-weights",)).rewrite(model, context)
        changes.changed += done.changed
        changes.left += done.left
        return bool(done.changed)
