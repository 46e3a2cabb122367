"""The contract that every pass keeps, on models of every kind; a newly registered pass needs no line here."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.data import generate
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, registered_passes
from onnxcomp.runtime import Runtime
from onnxcomp_passes import Pack, Quantize, QuantizeWeights
from tests.models import batch_norm_weights, graph_model, mlp_model, random_weights, run
from tests.traps import conv

Array = np.ndarray[Any, Any]

LOSSLESS = 1e-5
"""Relative to the norm of the output: some dozens of float32 roundings (6e-8 each)."""

LOSSY_DB = 20.0
"""int8 codes alone give some 40 dB a layer; below 20 dB something other than rounding has gone wrong."""

CALIBRATION_SAMPLES = 16

PASSES = {name: cls for name, cls in registered_passes().items() if cls.requires <= {"data", "torch"}}
"""Those that need labels are tested in files of their own."""


# --- models -----------------------------------------------------------------------------------------------------------


def conv_net() -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, a residual Add, pooling, a classifier; any batch."""
    text = """g (float[N, 4, 12, 12] x) => (float[N, 10] y) {
        [stem] a = Conv<pads = [1, 1, 1, 1]>(x, W0, b0)
        [norm] n = BatchNormalization(a, scale, bias, mean, variance)
        [relu] r = Relu(n)
        [conv1] c = Conv<pads = [1, 1, 1, 1]>(r, W1, b1)
        [add] s = Add(c, r)
        [relu2] t = Relu(s)
        [pool] p = GlobalAveragePool(t)
        [flat] f = Flatten(p)
        [head] y = Gemm<transB = 1>(f, W2, b2)
    }"""
    weights = {
        **{"W0": random_weights(16, 4, 3, 3, scale=0.2), "b0": random_weights(16, seed=1), **batch_norm_weights(16)},
        **{"W1": random_weights(16, 16, 3, 3, seed=2, scale=0.1), "b1": random_weights(16, seed=3)},
        **{"W2": random_weights(10, 16, seed=4), "b2": random_weights(10, seed=5)},
    }
    return graph_model(text, weights)


def attention() -> onnx.ModelProto:
    """One head of self-attention over 6 tokens of 32 features, with its LayerNormalization and projection."""
    text = """g (float[N, 6, 32] x) => (float[N, 6, 32] y) {
        half = Constant<value_float = 0.1767767>()
        n = LayerNormalization(x, gain, shift)
        q = MatMul(n, Wq)
        k = MatMul(n, Wk)
        v = MatMul(n, Wv)
        kt = Transpose<perm = [0, 2, 1]>(k)
        raw = MatMul(q, kt)
        scores = Mul(raw, half)
        p = Softmax(scores)
        mixed = MatMul(p, v)
        o = MatMul(mixed, Wo)
        y = Add(x, o)
    }"""
    names = ("Wq", "Wk", "Wv", "Wo")
    weights = {name: random_weights(32, 32, seed=n, scale=0.18) for n, name in enumerate(names)}
    return graph_model(text, weights, gain=np.ones(32, np.float32), shift=np.zeros(32, np.float32))


def lstm() -> onnx.ModelProto:
    text = """g (float[7, N, 8] x) => (float[7, N, 4] y) {
        h = LSTM<hidden_size = 16>(x, W, R, B)
        one = Constant<value_ints = [1]>()
        s = Squeeze(h, one)
        y = MatMul(s, V)
    }"""
    weights = {"W": random_weights(1, 64, 8, scale=0.3), "R": random_weights(1, 64, 16, seed=1, scale=0.3)}
    return graph_model(text, weights, B=random_weights(1, 128, seed=2), V=random_weights(16, 4, seed=3))


def subgraph() -> onnx.ModelProto:
    """Both branches of an If and the outer graph read one initializer."""
    text = """g (bool condition, float[3, 24] x) => (float[3, 24] y) {
        h = MatMul(x, W)
        y = If(condition) <
            then_branch = yes () => (float[3, 24] a) { a = MatMul(h, W) },
            else_branch = no () => (float[3, 24] b) { t = Identity(h) u = MatMul(t, W) b = Relu(u) }
        >
    }"""
    return graph_model(text, W=random_weights(24, 24, scale=0.2))


def weights_as_inputs() -> onnx.ModelProto:
    """IR version 4 and later: the caller may feed W0 instead."""
    proto = mlp_model((24, 32, 8))
    proto.graph.input.append(helper.make_tensor_value_info("W0", TensorProto.FLOAT, [24, 32]))
    return proto


def old_ir() -> onnx.ModelProto:
    """IR version 3 and opset 8: every initializer must be listed as an input."""
    weights = {"W": random_weights(8, 4, 3, 3, scale=0.2), "V": random_weights(8, 20, seed=1)}
    text = """g (float[2, 4, 6, 6] x, float[8, 4, 3, 3] W, float[8, 20] V) => (float[2, 20] y) {
        [c] c = Conv(x, W)
        [p] p = GlobalMaxPool(c)
        [f] f = Flatten(p)
        [m] y = MatMul(f, V)
    }"""
    return graph_model(text, weights, opset=8, ir_version=3)


def opset_11() -> onnx.ModelProto:
    text = """g (float[N, 4, 8, 8] x) => (float[N, 12] y) {
        low = Constant<value = float {0.0}>()
        high = Constant<value = float {6.0}>()
        [conv] c = Conv(x, W, b)
        [clip] r = Clip(c, low, high)
        [pool] p = GlobalAveragePool(r)
        [squeeze] s = Squeeze<axes = [2, 3]>(p)
        [head] y = Gemm(s, V, d)
    }"""
    weights = {"W": random_weights(16, 4, 3, 3, scale=0.3), "b": random_weights(16, seed=1)}
    return graph_model(text, weights, opset=11, ir_version=6, V=random_weights(16, 12), d=random_weights(12))


def quantized() -> onnx.ModelProto:
    """A MatMul between DequantizeLinear nodes, then one in float."""
    text = """g (float[N, 24] x) => (float[N, 24] y) {
        scale = Constant<value = float {0.02}>()
        zero = Constant<value = uint8 {128}>()
        weight_zero = Constant<value = int8 {0}>()
        q = QuantizeLinear(x, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        w = DequantizeLinear(W8, scale, weight_zero)
        h = MatMul(d, w)
        y = MatMul(h, V)
    }"""
    codes = np.random.default_rng(0).integers(-127, 128, (24, 24)).astype(np.int8)
    return graph_model(text, W8=codes, V=random_weights(24, 24))


def strings() -> onnx.ModelProto:
    text = """g (string[N] words, float[N, 24] x) => (string[N] out, float[N, 24] y) {
        out = Identity(words)
        h = Identity(x)
        y = MatMul(h, W)
    }"""
    return graph_model(text, W=random_weights(24, 24))


def outputs_of_all_kinds() -> onnx.ModelProto:
    """An input that is an output, a weight that is one, an output that another node reads."""
    text = """g (float[N, 24] x) => (float[N, 24] h, float[24, 24] W, float[N, 24] y) {
        h = MatMul(x, W)
        r = Relu(h)
        y = MatMul(r, V)
    }"""
    return graph_model(text, W=random_weights(24, 24, scale=0.2), V=random_weights(24, 24, seed=1))


def low_rank() -> onnx.ModelProto:
    """A Conv, a batched MatMul and a Gemm whose weights are of low rank, and a table that is not."""

    def thin(*shape: int, rank: int, seed: int) -> Array:
        first, second = random_weights(*shape[:-1], rank, seed=seed), random_weights(rank, shape[-1], seed=seed + 1)
        return (0.1 * first @ second).astype(np.float32)

    text = """g (int64[N, 6] words) => (float[N, 20] y) {
        e = Gather(table, words)
        m = MatMul(e, W)
        a = Add(m, b)
        r = Relu(a)
        t = Transpose<perm = [0, 2, 1]>(r)
        c = Conv<pads = [1, 1]>(t, K, k)
        s = Relu(c)
        p = GlobalMaxPool(s)
        f = Flatten(p)
        y = Gemm<transB = 1>(f, V, v)
    }"""
    kernel = thin(32, 40 * 3, rank=5, seed=2).reshape(32, 40, 3)
    weights = {"table": random_weights(80, 24), "W": thin(24, 40, rank=4, seed=4), "K": kernel}
    weights |= {"V": random_weights(20, 32, seed=6, scale=0.2), "v": random_weights(20, seed=7)}
    return graph_model(text, weights, b=random_weights(40, seed=8), k=random_weights(32, seed=9))


def overflow() -> onnx.ModelProto:
    """One of two convolutions gives infinity, which a Sigmoid makes finite again."""
    text = """g (float[N, 4, 8, 8] x) => (float[N, 16, 6, 6] y, float[N, 8, 6, 6] z) {
        [fine] y = Conv(x, W)
        r = Abs(x)
        [huge] h = Conv(r, B)
        z = Sigmoid(h)
    }"""
    return graph_model(text, W=random_weights(16, 4, 3, 3), B=np.full((8, 4, 3, 3), 1e38, np.float32))


def static_mlp() -> onnx.ModelProto:
    """A fixed batch of 4, and an MLP without a name on any node."""
    proto = mlp_model((24, 48, 16))
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 4
    return proto


def packed() -> onnx.ModelProto:
    """An MLP of few weights that are not zero, packed."""
    model = Model.load(mlp_model((24, 48, 16)))
    for constant in list(model.constants()):
        constant.values = np.where(np.abs(constant.values) < np.quantile(np.abs(constant.values), 0.9), 0, 1).astype(
            "f4"
        )
    Pack().rewrite(model, Context())
    return model.to_proto()


def silent_channels() -> onnx.ModelProto:
    """Half of the channels between two convolutions, with a depthwise one between them, are always zero."""
    text = """g (float[N, 4, 8, 8] x) => (float[N, 6, 4, 4] y) {
        [wide] a = Conv(x, W0, b0)
        [depthwise] d = Conv<group = 16>(a, W1)
        r = Relu(d)
        [narrow] y = Conv<kernel_shape = [1, 1]>(r, W2)
    }"""
    weights = {"W0": random_weights(16, 4, 3, 3, scale=0.2), "b0": random_weights(16, seed=1)}
    weights["W0"][::2], weights["b0"][::2] = 0, 0
    return graph_model(text, weights, W1=random_weights(16, 1, 3, 3, seed=2), W2=random_weights(6, 16, 1, 1, seed=3))


BUILDERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "conv net": conv_net,
    "mlp": lambda: mlp_model((24, 48, 16)),
    "attention": attention,
    "lstm": lstm,
    "subgraph": subgraph,
    "weights as inputs": weights_as_inputs,
    "old ir": old_ir,
    "opset 11": opset_11,
    "quantized": quantized,
    "strings": strings,
    "outputs": outputs_of_all_kinds,
    "overflow": overflow,
    "low rank": low_rank,
    "static mlp": static_mlp,
    "packed": packed,
    "silent channels": silent_channels,
    "float bias": lambda: conv(bias="float"),
}

COMPUTES_WITH_FLOATS = [name for name in BUILDERS if name != "quantized"]


def build(model: str) -> onnx.ModelProto:
    """The model, with metadata that must survive."""
    proto = BUILDERS[model]()
    proto.doc_string = "what it is for"
    proto.metadata_props.add(key="labels", value="cat,dog")
    proto.graph.input[0].doc_string = "the first input"
    return proto


# --- applying ---------------------------------------------------------------------------------------------------------


class Applied(NamedTuple):
    """A pass was applied to a model."""

    proto: onnx.ModelProto
    model: Model
    changes: Changes
    source_digests: tuple[str, str]
    """Of the model that was forked for the pass: before and after."""

    @property
    def result(self) -> onnx.ModelProto:
        return self.model.to_proto()


class Bench:
    """Applies passes to models, and remembers the outcome."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._runtime = runtime
        self._folder = folder
        self._known: dict[tuple[str, str], Applied] = {}

    def context(self, cls: type[Pass], proto: onnx.ModelProto) -> Context:
        """What the pass may use: data only where it says that it needs them."""
        data = None
        if "data" in cls.requires:
            data = generate(proto, count=CALIBRATION_SAMPLES)
        return Context(data=data, runtime=self._runtime, workdir=self._folder)

    def rewrite(self, name: str, model: Model) -> Changes:
        """Apply a pass in its default form."""
        return PASSES[name]().rewrite(model, self.context(PASSES[name], model.to_proto()))

    def applied(self, name: str, model: str) -> Applied:
        """The outcome of a pass on a model."""
        if (name, model) not in self._known:
            proto = build(model)
            source = Model.load(proto)
            before = source.digest
            fork = source.fork()
            changes = self.rewrite(name, fork)
            self._known[name, model] = Applied(proto, fork, changes, (before, source.digest))
        return self._known[name, model]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as running:
        yield running


@pytest.fixture(scope="module")
def bench(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(runtime, tmp_path_factory.mktemp("every-pass"))


def feeds(proto: onnx.ModelProto) -> list[dict[str, Array]]:
    """A few inputs that a model can take."""
    return [dict(feed) for feed in generate(proto, count=4, seed=1).feeds()]


def both_runs(applied: Applied, *, optimized: bool) -> Iterator[tuple[Array, Array]]:
    """Each output, before and after."""
    for feed in feeds(applied.proto):
        before = run(applied.proto, feed, optimized=optimized)
        after = run(applied.result, feed, optimized=optimized)
        yield from zip(map(np.asarray, before), map(np.asarray, after), strict=True)


def relative(before: Array, after: Array) -> float:
    """The norm of the difference over that of the original."""
    noise = float(np.linalg.norm((before - after).astype(np.float64)))
    return noise / float(np.linalg.norm(before.astype(np.float64))) if noise else 0.0


every_pass = pytest.mark.parametrize("name", PASSES)
every_model = pytest.mark.parametrize("model", BUILDERS)

# --- the contract -----------------------------------------------------------------------------------------------------


@every_pass
@every_model
def test_the_result_is_valid(bench: Bench, name: str, model: str):
    onnx.checker.check_model(bench.applied(name, model).result, full_check=True)


@every_pass
@every_model
def test_the_result_loads_with_and_without_optimizations(
    bench: Bench, runtime: Runtime, tmp_path: Path, name: str, model: str
):
    path = tmp_path / "model.onnx"
    bench.applied(name, model).model.save(path)

    loaded = [runtime.check(path, optimize=optimize) for optimize in (False, True)]

    assert [info.name for info in loaded[0].outputs] == [info.name for info in loaded[1].outputs]


@every_pass
@every_model
def test_inputs_outputs_and_metadata_are_kept(bench: Bench, name: str, model: str):
    applied = bench.applied(name, model)
    weights = {tensor.name for tensor in applied.proto.graph.initializer} if applied.proto.ir_version < 4 else set()
    listed = {tensor.name for tensor in applied.result.graph.initializer} if applied.proto.ir_version < 4 else set()

    before, after = applied.proto.graph, applied.result.graph
    assert [info for info in after.input if info.name not in listed] == [
        info for info in before.input if info.name not in weights
    ]
    assert list(after.output) == list(before.output)
    assert list(applied.result.metadata_props) == list(applied.proto.metadata_props)
    assert applied.result.doc_string == applied.proto.doc_string


@every_pass
@every_model
def test_changes_are_honest(bench: Bench, name: str, model: str):
    applied = bench.applied(name, model)

    assert (applied.changes.count == 0) == (applied.model.digest == Model.load(applied.proto).digest)
    for change in applied.changes.changed:
        assert change.where
        assert change.what
    for left in applied.changes.left:
        assert left.where
        assert left.why


@every_pass
@every_model
def test_the_model_that_was_forked_is_not_touched(bench: Bench, name: str, model: str):
    before, after = bench.applied(name, model).source_digests

    assert before == after


@every_pass
@every_model
def test_the_same_model_gives_the_same_result(bench: Bench, name: str, model: str):
    again = Model.load(build(model))

    bench.rewrite(name, again)

    assert again.digest == bench.applied(name, model).model.digest


@every_pass
@every_model
def test_a_second_time_changes_nothing_where_declared(bench: Bench, name: str, model: str):
    if not PASSES[name].idempotent:
        pytest.skip("does not claim to be idempotent")
    twice = bench.applied(name, model).model.fork()
    digest = twice.digest

    changes = bench.rewrite(name, twice)

    assert (changes.count, twice.digest) == (0, digest)


@every_pass
@every_model
def test_the_result_survives_the_file(bench: Bench, tmp_path: Path, name: str, model: str):
    applied = bench.applied(name, model)
    applied.model.save(tmp_path / "model.onnx")

    assert Model.load(tmp_path / "model.onnx").digest == applied.model.digest


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@every_pass
@every_model
def test_types_and_shapes_of_outputs_are_kept_and_values_where_declared(
    bench: Bench, name: str, model: str, optimized: bool
):
    for before, after in both_runs(bench.applied(name, model), optimized=optimized):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        if before.dtype.kind != "f":
            np.testing.assert_array_equal(after, before)
        elif PASSES[name].lossless:
            assert relative(before, after) <= LOSSLESS


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("name", [cls.name for cls in (Quantize, QuantizeWeights)])
@pytest.mark.parametrize("model", COMPUTES_WITH_FLOATS)
def test_what_int8_loses_is_rounding(bench: Bench, name: str, model: str, optimized: bool):
    for before, after in both_runs(bench.applied(name, model), optimized=optimized):
        if before.dtype.kind == "f":
            error = relative(before, after)
            assert not error or -20 * math.log10(error) >= LOSSY_DB


def test_a_layer_that_overflows_keeps_no_other_from_int8(bench: Bench):
    changes = bench.applied("quantize", "overflow").changes

    assert [change.where for change in changes.changed] == ["fine"]
    assert "huge" in [left.where for left in changes.left]


@pytest.mark.parametrize("name", [name for name in PASSES if name != "distill"])
def test_some_model_is_changed(bench: Bench, name: str):
    """Else every test above would be vacuous. Without a judge `distill` has the model itself for a teacher."""
    assert any(bench.applied(name, model).changes.count for model in BUILDERS)


@pytest.mark.parametrize("name", [name for name, cls in PASSES.items() if not cls.lossless])
@every_model
def test_a_lossy_pass_leaves_alone_what_the_user_excludes(bench: Bench, name: str, model: str):
    excluding = Model.load(build(model))
    context = bench.context(PASSES[name], excluding.to_proto())
    context.exclude = ("*",)

    changes = PASSES[name]().rewrite(excluding, context)

    assert (changes.count, excluding.digest) == (0, Model.load(build(model)).digest)


# --- how it is documented ---------------------------------------------------------------------------------------------

documented = pytest.mark.parametrize("cls", registered_passes().values(), ids=registered_passes())


@documented
def test_the_docstring_shows_before_and_after_and_what_is_left_alone(cls: type[Pass]):
    text = inspect.getdoc(cls) or ""

    assert text.splitlines()[0].endswith(".")
    for part in ("    before ", "    after ", "Left alone: "):
        assert part in text


@documented
def test_every_option_has_a_default_and_a_description(cls: type[Pass]):
    for declared in dataclasses.fields(cls):
        assert declared.metadata.get("description"), f"{cls.name}: {declared.name} has no description"
    cls()


@documented
def test_one_name_in_three_spellings(cls: type[Pass]):
    assert inspect.getmodule(cls) is not None
    assert cls.__module__.rpartition(".")[2] == cls.name.replace("-", "_")
    assert cls.__name__ == cls.name.replace("-", " ").title().replace(" ", "")


@documented
def test_only_known_things_are_required(cls: type[Pass]):
    assert cls.requires <= {"data", "labels", "torch"}


@documented
def test_a_pass_is_frozen_and_can_be_compared(cls: type[Pass]):
    assert cls() == cls()
    assert hash(cls()) == hash(cls())


@documented
def test_weaker_forms_are_other_forms_of_the_same_pass(cls: type[Pass]):
    forms = [cls(), *cls().weaker()]

    assert len(set(forms)) == len(forms)
    assert {type(form) for form in forms} == {cls}


# --- the contract can fail --------------------------------------------------------------------------------------------


def test_the_comparison_notices_a_wrong_model():
    proto = mlp_model((24, 48, 16))
    wrong = Model.load(proto)
    wrong.set_weight("b1", wrong.weight("b1") + np.float32(0.001))
    applied = Applied(proto, wrong, Changes(), ("", ""))

    assert all(relative(before, after) > LOSSLESS for before, after in both_runs(applied, optimized=False))
