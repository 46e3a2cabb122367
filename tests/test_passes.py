from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import onnx_graphsurgeon as gs
import pytest

from onnxcomp import passes
from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, find_pass, option, register, registered_passes


@dataclass(frozen=True, kw_only=True)
class Sample(Pass):
    """A pass with an option of each kind."""

    name: ClassVar[str] = "sample"

    share: float = option(0.5, "A share.", minimum=0, maximum=1)
    count: int = option(3, "A count.", minimum=1)
    most: float = option(0.0, "A number with a maximum alone.", maximum=9)
    method: str = option("fast", "A way.", choices=("fast", "best"))
    label: str = option("", "Any text.")
    deep: bool = option(False, "A switch.")
    skip: tuple[str, ...] = option((), "Names.")
    limit: int | None = option(None, "A limit, or none.")

    def rewrite(self, model: Model, context: Context) -> Changes:
        return Changes()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type[Pass]]]:
    """A registry of its own, filled as the real one, for tests that register."""
    monkeypatch.setattr(passes, "_registry", dict(registered_passes()))
    yield passes._registry
    passes._load_plugins.cache_clear()
    monkeypatch.undo()
    passes._load_plugins()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "sample: share must be from 0 to 1, got 1.5"),
        ({"share": -0.1}, "sample: share must be from 0 to 1, got -0.1"),
        ({"share": float("nan")}, "sample: share must be from 0 to 1, got nan"),
        ({"share": "half"}, "sample: share must be a number, got 'half'"),
        ({"share": True}, "sample: share must be a number, got True"),
        ({"share": None}, "sample: share must be a number, got None"),
        ({"count": 0}, "sample: count must be at least 1, got 0"),
        ({"count": 1.5}, "sample: count must be a whole number, got 1.5"),
        ({"count": False}, "sample: count must be a whole number, got False"),
        ({"most": 10}, "sample: most must be at most 9, got 10"),
        ({"method": "slow"}, "sample: method must be one of fast, best, got 'slow'"),
        ({"method": ["fast"]}, "sample: method must be one of fast, best, got ['fast']"),
        ({"label": 3}, "sample: label must be text, got 3"),
        ({"deep": 1}, "sample: deep must be true or false, got 1"),
        ({"skip": "conv1"}, "sample: skip must be a tuple, got 'conv1'"),
    ],
)
def test_refuses_an_option_that_is_not_what_it_declares(options: dict[str, Any], message: str):
    with pytest.raises(OptionError) as caught:
        Sample(**options)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options",
    [{"share": 0}, {"share": 1.0}, {"count": 1}, {"most": -5}, {"method": "best"}, {"skip": ("a",)}, {"limit": 4}],
)
def test_takes_what_is_in_range(options: dict[str, Any]):
    assert Sample(**options).options() == {**Sample().options(), **options}


def test_the_options_are_listed_by_name():
    assert list(Sample().options()) == ["share", "count", "most", "method", "label", "deep", "skip", "limit"]


def test_an_option_carries_its_description():
    assert dataclasses.fields(Sample)[0].metadata["description"] == "A share."


def test_the_defaults_are_checked_too():
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Sample):
        """A default outside of its own limits."""

        share: float = option(2.0, "A share.", maximum=1)

    with pytest.raises(OptionError, match=r"share must be at most 1, got 2\.0"):
        Wrong()


def test_a_pass_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample().share = 0.1  # type: ignore[misc]


def test_a_pass_has_no_weaker_form_unless_it_says_so():
    assert list(Sample().weaker()) == []


# --- the registry -----------------------------------------------------------------------------------------------------


def test_the_passes_that_come_with_it_are_a_plugin_and_sorted():
    assert list(registered_passes()) == sorted(registered_passes())
    assert {"quantize", "quantize-weights", "simplify"} <= set(registered_passes())


def test_a_registered_pass_is_found_by_its_name(registry: dict[str, type[Pass]]):
    assert register(Sample) is Sample
    assert find_pass("sample") is Sample


def test_registering_the_same_class_again_is_harmless(registry: dict[str, type[Pass]]):
    register(Sample)

    assert register(Sample) is Sample


def test_refuses_two_passes_of_one_name(registry: dict[str, type[Pass]]):
    first = register(Sample)
    second = type("Sample", (Sample,), {"__module__": "elsewhere"})

    with pytest.raises(OptionError, match=r"two passes are called 'sample': .*test_passes and elsewhere$"):
        register(second)

    assert find_pass("sample") is first


@pytest.mark.parametrize(
    ("class_name", "name", "expected"),
    [("LowRank", "lowrank", "low-rank"), ("Prune", "Prune", "prune"), ("Fp16", None, "fp16")],
)
def test_refuses_a_name_that_is_not_the_class_name(
    registry: dict[str, type[Pass]], class_name: str, name: str | None, expected: str
):
    cls = type(class_name, (Pass,), {} if name is None else {"name": name})

    with pytest.raises(OptionError, match=f"^the pass {class_name} must be called '{expected}', got {name!r}$"):
        register(cls)


def test_an_unknown_name_is_met_with_the_closest_one():
    with pytest.raises(OptionError, match=r"^no pass is called 'quantise'; did you mean 'quantize'\?$"):
        find_pass("quantise")


def test_a_name_like_no_other_is_met_with_the_list():
    with pytest.raises(
        OptionError,
        match=r"^no pass is called 'zzz'; there are .*quantize, quantize-dynamic, quantize-weights, simplify",
    ):
        find_pass("zzz")


def test_a_plugin_that_cannot_be_imported_is_named(registry: dict[str, type[Pass]], monkeypatch: pytest.MonkeyPatch):
    broken = EntryPoint("mine", "no_such_package_anywhere", passes.ENTRY_POINT_GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [broken])
    passes._load_plugins.cache_clear()

    with pytest.raises(OptionError, match=r"^the plugin 'mine' \(no_such_package_anywhere\) cannot be imported: "):
        registered_passes()


# --- what a pass says and may use -------------------------------------------------------------------------------------


def test_changes_count_what_changed_and_not_what_was_left():
    changes = Changes()
    changes.add("conv1", "made smaller")
    changes.leave("conv2", "is shared")

    assert changes.count == 1
    assert [(change.where, change.what) for change in changes.changed] == [("conv1", "made smaller")]
    assert [(left.where, left.why) for left in changes.left] == [("conv2", "is shared")]


def test_changes_share_nothing():
    Changes().add("conv1", "made smaller")

    assert Changes().count == 0


@pytest.mark.parametrize(
    ("name", "output", "excluded"),
    [
        ("/head/conv", "y", True),
        ("/head/deep/conv", "y", True),
        ("/Head/conv", "y", False),  # case counts
        ("/neck/conv", "y", False),
        ("last", "y", True),
        ("", "/head/y", True),  # a node without a name goes by its output
        ("", "y", False),
    ],
)
def test_excludes_nodes_by_patterns_of_their_names(name: str, output: str, excluded: bool):
    node = gs.Node("Relu", name, outputs=[gs.Variable(output)])

    assert Context(exclude=("/head/*", "last")).excludes(node) is excluded


def test_excludes_nothing_by_default():
    assert not Context().excludes(gs.Node("Relu", "r"))


def test_there_is_always_time_without_a_deadline():
    assert not Context().out_of_time()
    assert not Context(deadline=time.monotonic() + 60).out_of_time()
    assert Context(deadline=time.monotonic()).out_of_time()


def test_two_contexts_draw_the_same_numbers():
    assert Context().rng.integers(1 << 30) == Context().rng.integers(1 << 30)
