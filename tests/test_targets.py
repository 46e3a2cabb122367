from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

from onnxcomp import targets
from onnxcomp.errors import OptionError
from onnxcomp.targets import TARGETS, QuantizationRules, Target, cpu_features, find_target, host_target

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> typing.Iterator[pytest.MonkeyPatch]:
    """Lets a test pretend to be on another machine: what is remembered of this one is forgotten before and after."""
    host_target.cache_clear()
    cpu_features.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    host_target.cache_clear()
    cpu_features.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, features: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(targets, "cpu_features", lambda: features)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_targets_are_those_of_the_documentation():
    assert list(TARGETS) == ["x86-vnni", "x86", "arm64", "xnnpack", "nnapi", "coreml", "qnn", "web"]


@every_target
def test_a_target_is_found_by_its_name(target: Target):
    assert find_target(target.name) is target


@every_target
def test_a_description_is_one_line_for_the_help(target: Target):
    assert target.description
    assert "\n" not in target.description
    assert len(target.description) < 80


@every_target
def test_the_runtime_floor_is_a_version_and_matches_the_opset(target: Target):
    assert re.fullmatch(r"1\.\d+", target.min_runtime)
    assert (target.min_runtime, target.max_opset, target.max_ir_version) == ("1.16", 19, 9)  # as ONNX Runtime documents


@every_target
def test_every_target_is_verified_on_the_cpu_first(target: Target):
    assert target.verify_layers[0] == "cpu"


@every_target
def test_an_ort_artifact_is_verified_as_one(target: Target):
    assert (target.artifact == "ort") == ("ort" in target.verify_layers)


@pytest.mark.parametrize("name", ["arm64", "xnnpack"])
def test_arm_wants_signed_activations_and_a_host_that_fuses_them(name: str):
    target = TARGETS[name]

    assert target.rules is not None
    assert target.rules.activations == "int8"
    assert dict(target.session_config) == {"session.qdqisint8allowed": "1"}


def test_all_other_targets_want_unsigned_activations():
    signed = {name for name, target in TARGETS.items() if target.rules and target.rules.activations == "int8"}

    assert signed == {"arm64", "xnnpack"}


def test_android_and_qualcomm_take_one_scale_for_the_weight_of_a_matrix_product():
    rules = {name: target.rules for name, target in TARGETS.items() if target.rules}
    single = {name for name in rules if not rules[name].channel_scales("MatMul")}

    assert single == {"nnapi", "qnn"}
    assert single == {name for name in rules if not rules[name].channel_scales("Gemm")}
    assert all(each.channel_scales("Conv") for each in rules.values())


def test_on_request_no_operator_has_a_scale_a_channel():
    assert not QuantizationRules(per_channel=False).channel_scales("Conv")


@pytest.mark.parametrize(
    ("name", "operator", "expected"),
    [
        ("x86", "Gemm", True),
        ("xnnpack", "Conv", True),
        ("xnnpack", "MaxPool", True),
        ("xnnpack", "Gemm", False),
        ("xnnpack", "Softmax", False),  # uint8 only, and the activations are int8
        ("nnapi", "Add", True),
        ("nnapi", "Sigmoid", False),
        ("qnn", "Sigmoid", True),
    ],
)
def test_a_target_says_which_operators_it_has_kernels_for(name: str, operator: str, *, expected: bool):
    rules = TARGETS[name].rules

    assert rules is not None
    assert rules.supports(operator) == expected


def test_only_x86_without_vnni_reduces_the_range():
    assert [target.name for target in TARGETS.values() if target.rules and target.rules.reduce_range] == ["x86"]


def test_only_qualcomm_has_kernels_for_16_bit_activations():
    assert {target.name for target in TARGETS.values() if target.rules and target.rules.wide} == {"qnn"}


def test_coreml_has_no_kernels_for_quantized_models():
    assert TARGETS["coreml"].rules is None


def test_accelerators_want_static_shapes():
    static = {target.name for target in TARGETS.values() if target.static_shapes}

    assert static == {"xnnpack", "nnapi", "coreml", "qnn"}
    assert {target.name for target in TARGETS.values() if target.dynamic_batch} == {"xnnpack"}


# --- finding ----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_met_with_the_closest_one():
    with pytest.raises(OptionError, match=r"^no target is called 'arm46'; did you mean 'arm64'\?$"):
        find_target("arm46")


def test_a_name_like_no_other_is_met_with_the_list():
    with pytest.raises(OptionError, match=r"there are x86-vnni, x86, arm64, xnnpack, nnapi, coreml, qnn, web$"):
        find_target("toaster")


def test_a_target_cannot_be_changed():
    with pytest.raises(AttributeError):
        TARGETS["web"].name = "other"  # type: ignore[misc]


# --- the host ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", ("avx2",), "x86"),
        ("x86_64", ("avx2", "avx512_vnni"), "x86-vnni"),
        ("x86_64", ("avx_vnni",), "x86-vnni"),
        ("AMD64", (), "x86"),
        ("arm64", (), "arm64"),
        ("aarch64", ("asimddp",), "arm64"),
    ],
)
def test_the_host_is_told_by_its_processor(
    fresh: pytest.MonkeyPatch, machine: str, features: tuple[str, ...], expected: str
):
    pretend(fresh, machine, features)

    assert host_target().name == expected


def test_only_the_host_is_measured_by_this_clock(fresh: pytest.MonkeyPatch):
    pretend(fresh, "aarch64")

    assert [target.name for target in TARGETS.values() if target.is_host] == ["arm64"]


def test_a_loss_is_exaggerated_only_by_a_host_that_saturates(fresh: pytest.MonkeyPatch):
    pretend(fresh, "x86_64", ("avx2",))
    told = {target.name for target in TARGETS.values() if target.saturates_here}

    assert told == set(TARGETS) - {"x86", "coreml"}


def test_a_host_with_vnni_exaggerates_no_loss(fresh: pytest.MonkeyPatch):
    pretend(fresh, "x86_64", ("avx_vnni",))

    assert not any(target.saturates_here for target in TARGETS.values())


def read_features(monkeypatch: pytest.MonkeyPatch, text: str | None) -> tuple[str, ...]:
    def read(_path: Path, **_options: object) -> str:
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    return cpu_features()


@pytest.mark.parametrize("key", ["flags\t\t", "Features\t"])
def test_the_features_are_those_that_matter_to_kernels(fresh: pytest.MonkeyPatch, key: str):
    text = f"processor\t: 0\n{key}: fpu avx2 avx_vnni asimddp\n\nprocessor\t: 1\n"

    assert read_features(fresh, text) == ("asimddp", "avx2", "avx_vnni")


@pytest.mark.parametrize("text", [None, "", "processor : 0\n"])
def test_a_system_that_does_not_tell_its_features_has_none(fresh: pytest.MonkeyPatch, text: str | None):
    assert read_features(fresh, text) == ()
