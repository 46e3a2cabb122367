"""Kinds of operators: what the page's colours of the graph stand for."""

from __future__ import annotations

__all__ = ["KINDS", "OTHER", "kind_of"]

OTHER = "other"

_WORDS = {
    "compute": (
        "Attention Conv ConvInteger ConvTranspose DFT DeformConv Einsum FusedConv FusedGemm FusedMatMul GRU Gemm "
        "GroupQueryAttention LSTM MatMul MatMulInteger MatMulIntegerToFloat MatMulNBits MultiHeadAttention "
        "QAttention QGemm QLinearConv QLinearMatMul RNN STFT"
    ),
    "quantization": "DequantizeLinear DynamicQuantizeLinear QuantizeLinear",
    "layout and shape": (
        "BitCast Cast CastLike CenterCropPad Col2Im Compress Concat Constant ConstantOfShape DepthToSpace Expand "
        "EyeLike Flatten Gather GatherElements GatherND GridSample Identity NonZero OneHot Pad Range Reshape "
        "Resize ReverseSequence Scatter ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze "
        "TensorScatter Tile Transpose Trilu Unsqueeze Upsample"
    ),
    "elementwise": (
        "Abs Acos Acosh Add And Asin Asinh Atan Atanh BiasGelu BitShift BitwiseAnd BitwiseNot BitwiseOr "
        "BitwiseXor Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp FastGelu Floor Gelu Greater "
        "GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod "
        "Mul Neg Not Or PRelu Pow QLinearAdd QLinearLeakyRelu QLinearMul QLinearSigmoid QuickGelu Reciprocal Relu "
        "RotaryEmbedding Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh "
        "ThresholdedRelu Where Xor"
    ),
    "normalization": (
        "BatchNormalization GroupNormalization Hardmax InstanceNormalization LRN LayerNormalization LogSoftmax "
        "LpNormalization MeanVarianceNormalization QLinearSoftmax RMSNormalization SimplifiedLayerNormalization "
        "SkipLayerNormalization SkipSimplifiedLayerNormalization Softmax"
    ),
    OTHER: "",
}

KINDS: dict[str, frozenset[str]] = {kind: frozenset(words.split()) for kind, words in _WORDS.items()}
"""Kind -> its operators; pooling, reduction, control flow and what is not known is `OTHER`."""

_KIND = {op: kind for kind, ops in KINDS.items() for op in ops}


def kind_of(op: str) -> str:
    """The kind of an operator, whatever domain it is of.

    Example:
        >>> kind_of("Conv"), kind_of("com.microsoft.QuantizeLinear"), kind_of("MaxPool")
        ('compute', 'quantization', 'other')
    """
    return _KIND.get(op.rpartition(".")[2], OTHER)
