from __future__ import annotations

import contextlib
import string
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp import passes
from onnxcomp.errors import OptionError
from onnxcomp.passes import Changes, Pass, option
from onnxcomp.recipe import dump_recipe, load_recipe, make_pass, parse_pass
from onnxcomp.stages import Stage
from onnxcomp.values import parse_duration, parse_share


@dataclass(frozen=True, kw_only=True)
class Sample(Pass):
    """A pass with an option of each type."""

    name: ClassVar[str] = "sample"
    flag: bool = option(True, "A flag.")
    count: int = option(3, "A count.", minimum=-5)
    share: float = option(0.5, "A share.", minimum=0, maximum=1)
    kind: str = option("plain", "A text.")
    where: tuple[str, ...] = option((), "Texts.")
    sizes: tuple[int, ...] = option((1, 2), "Numbers.")
    limit: float | None = option(None, "A number, or none.")

    def rewrite(self, model, context):
        return Changes()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    passes.registered_passes()
    monkeypatch.setitem(passes._registry, "sample", Sample)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sample", Sample()),
        ("sample:flag=false", Sample(flag=False)),
        ("sample:flag=TRUE, count=-4", Sample(count=-4)),
        ("sample:share=1e-3", Sample(share=0.001)),
        ("sample:share=1", Sample(share=1.0)),
        ("sample:kind=a|b", Sample(kind="a|b")),
        ("sample:kind=a=b:c", Sample(kind="a=b:c")),
        ("sample:kind='a, b'", Sample(kind="a, b")),
        ('sample:kind="it\'s"', Sample(kind="it's")),
        ("sample:kind=", Sample(kind="")),
        ("sample:where=/a/*|/b", Sample(where=("/a/*", "/b"))),
        ("sample:where='a,b'|\"c|d\",count=1", Sample(where=("a,b", "c|d"), count=1)),
        ("sample:where=", Sample(where=())),
        ("sample:where=''", Sample(where=("",))),
        ("sample:sizes=3|4|5", Sample(sizes=(3, 4, 5))),
        ("sample:limit=0.5", Sample(limit=0.5)),
        ("sample:limit=none", Sample(limit=None)),
    ],
)
def test_reads_values_by_the_type_of_the_option(text, expected):
    assert parse_pass(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampel", "no pass is called 'sampel'; did you mean 'sample'?"),
        ("sample:", "'sample:' has a colon and no option after it; expected NAME or NAME:option=value,..."),
        ("sample:cuont=1", "the pass 'sample' has no option 'cuont'; did you mean 'count'?"),
        ("sample:count", "'sample:count': expected option=value, got 'count'"),
        ("sample:=1", "'sample:=1': expected option=value, got '1'"),
        ("sample:count=1,,flag=true", "'sample:count=1,,flag=true': expected option=value, got ''"),
        ("sample:count=1.5", "sample: count must be a whole number, got '1.5'"),
        ("sample:count=-6", "sample: count must be at least -5, got -6"),
        ("sample:share=half", "sample: share must be a number, got 'half'"),
        ("sample:share=1.5", "sample: share must be from 0 to 1, got 1.5"),
        ("sample:flag=1", "sample: flag must be true or false, got '1'"),
        ("sample:sizes=1|b", "sample: sizes must be a whole number, got 'b'"),
        ("sample:count=1,count=2", "sample: the option 'count' is given twice; give it once"),
        ("sample:kind='a", "\"sample:kind='a\": a quote ' is not closed"),
    ],
)
def test_says_what_is_wrong_with_a_pass(text, message):
    with pytest.raises(OptionError) as caught:
        parse_pass(text)
    assert str(caught.value) == message


@given(st.text(alphabet=string.printable, max_size=30))
def test_any_text_is_a_pass_or_an_option_error(text):
    with contextlib.suppress(OptionError):  # anything else fails the test
        assert isinstance(parse_pass(f"sample:{text}"), Sample)


def test_takes_lists_for_tuples_as_json_holds_them():
    assert make_pass("sample", {"where": ["a"], "sizes": [1], "share": 1}) == Sample(
        where=("a",), sizes=(1,), share=1.0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "a"}, r"sample: where must be a list \(text\), got 'a'"),
        ({"where": [1]}, "sample: where must be text, got 1"),
        ({"flag": 1}, "sample: flag must be true or false, got 1"),
        ({"count": True}, "sample: count must be a whole number, got True"),
        ({"kind": 1}, "sample: kind must be text, got 1"),
    ],
)
def test_refuses_values_of_another_type(options, message):
    with pytest.raises(OptionError, match=message):
        make_pass("sample", options)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("1h 30m", 5400), ("5 min", 300), ("7", 7)]
)
def test_reads_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "5x", "m", "1h30", "ten", "1d", "nan", "inf"])
def test_refuses_what_is_no_duration(text):
    with pytest.raises(OptionError, match="expected a time such as 90s, 10m or 1h, got"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "share"), [("0.5%", 0.005), ("0.005", 0.005), ("0", 0), ("5 %", 0.05), (".5", 0.5)])
def test_reads_shares(text, share):
    assert parse_share(text) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("text", ["", "-1", "half", "nan", "inf", "1%%", "0,5"])
def test_refuses_what_is_no_share(text):
    with pytest.raises(OptionError, match=r"expected a share of at least 0, such as 0.5% or 0.005, got"):
        parse_share(text)


# --- files ------------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_budget_options_and_stages(tmp_path):
    recipe = load_recipe(
        write(
            tmp_path,
            """
            [budget]
            max_drop = 0.01
            [options]
            target = "arm64"
            exclude = ["/head/*"]
            time_limit = "10m"
            shapes = {image = [1, 3, 8, 8]}
            [[stage]]
            passes = ["simplify"]
            [[stage]]
            passes = ["quantize-weights", {name = "sample", flag = false, where = ["a", "b"]}]
            share = 0.4
            """,
        )
    )
    assert recipe.max_drop == 0.01
    assert recipe.max_error is None
    assert recipe.options == {
        "target": "arm64",
        "exclude": ("/head/*",),
        "time_limit": 600.0,
        "shapes": {"image": (1, 3, 8, 8)},
    }
    assert [stage.name for stage in recipe.stages] == ["simplify", "quantize-weights + sample"]
    assert recipe.stages[1].passes[1] == Sample(flag=False, where=("a", "b"))
    assert recipe.stages[1].share == 0.4


STAGE = '[[stage]]\npasses = ["simplify"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "stage must be a list of at least one table, [[stage]], got None"),
        ("stage = 3", "stage must be a list of at least one table, [[stage]], got 3"),
        ("[[stage]]\n", "stage[0].passes must be a list of at least one pass, got None"),
        ("[[stage]]\npasses = [3]", 'stage[0].passes[0] must be the name of a pass, or {name = "...", option = value}'),
        (
            '[[stage]]\npasses = ["simplfy"]',
            "stage[0].passes[0]: no pass is called 'simplfy'; did you mean 'simplify'?",
        ),
        (
            STAGE + '[[stage]]\npasses = [{name = "sample", share = 7}]',
            "stage[1].passes[0]: sample: share must be from 0 to 1, got 7",
        ),
        (
            '[[stage]]\npasses = [{name = "sample", foo = 7}]',
            "stage[0].passes[0]: the pass 'sample' has no option 'foo'",
        ),
        (STAGE + "share = 0", "stage[0].share must be above 0 and at most 1, got 0"),
        (STAGE + "shar = 1", "there is no key 'stage[0].shar'; did you mean 'share'?"),
        (STAGE + "[budgt]", "there is no key 'budgt'; did you mean 'budget'?"),
        (STAGE + "[budget]\nmax_drop = -1", "budget.max_drop must be a number of at least 0, got -1"),
        (STAGE + '[budget]\nmax_drop = "1%"', "budget.max_drop must be a number of at least 0, got '1%'"),
        (STAGE + "[budget]\nmaxdrop = 1", "there is no key 'budget.maxdrop'; did you mean 'max_drop'?"),
        (STAGE + "[options]\nsede = 1", "there is no key 'options.sede'; did you mean 'seed'?"),
        (STAGE + "[options]\nseed = -1", "options.seed must be a whole number of at least 0, got -1"),
        (STAGE + "[options]\nforce = 1", "options.force must be true or false, got 1"),
        (STAGE + '[options]\nexclude = "a"', "options.exclude must be a list of texts, got 'a'"),
        (STAGE + '[options]\ntime_limit = "x"', "options.time_limit: expected a time such as 90s, 10m or 1h, got 'x'"),
        (STAGE + "[options]\nshapes = {x = [0]}", "options.shapes.x must be a list of sizes of at least 1, got [0]"),
        ("a = [", "is not TOML: "),
        ("a = " + 5000 * "[" + 5000 * "]", "is not TOML: nested too deeply"),
        (STAGE + "share = " + 5000 * "9", "is not TOML: "),
        (STAGE + "[budget]\nmax_drop = 1" + 400 * "0", "budget.max_drop must be a number of at least 0, got 1000"),
        (STAGE + "[options]\ntime_limit = 1" + 400 * "0", "options.time_limit must be seconds, or a time such as"),
        (
            '[[stage]]\npasses = [{name = "sample", share = 1' + 400 * "0" + "}]",
            "stage[0].passes[0]: sample: share must be a number, got 1000",
        ),
    ],
)
def test_names_the_file_the_key_and_what_was_expected(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(OptionError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_data_with_a_name_too_long_for_a_file_are_taken_by_that_name(tmp_path):
    recipe = load_recipe(write(tmp_path, STAGE + f'[options]\ndata = "{"a" * 5000}"'))

    assert recipe.options["data"] == "a" * 5000


def test_a_missing_recipe_is_an_option_error(tmp_path):
    with pytest.raises(OptionError, match=r"no\.toml: cannot be read \(No such file or directory\)"):
        load_recipe(tmp_path / "no.toml")


def test_a_recipe_that_is_not_text_is_an_option_error(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="is not TOML"):
        load_recipe(path)


@pytest.mark.parametrize("key", ["data", "metric"])
def test_names_code_only_when_that_is_allowed(tmp_path, key):
    path = write(tmp_path, f'{STAGE}[options]\n{key} = "mine:load"')
    with pytest.raises(OptionError, match=f"options.{key} names code to run, 'mine:load'; allow it with --allow-code"):
        load_recipe(path)
    assert load_recipe(path, allow_code=True).options == {key: "mine:load"}


def test_finds_data_beside_the_recipe(tmp_path):
    (tmp_path / "calib.npz").touch()
    path = write(tmp_path, f'{STAGE}[options]\ndata = "calib.npz"')
    assert load_recipe(path).options == {"data": str(tmp_path / "calib.npz")}


# Surrogates are no text that a file can hold.
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
samples = st.builds(
    Sample,
    flag=st.booleans(),
    count=st.integers(-5, 10**12),
    share=st.floats(0, 1),
    kind=texts,
    where=st.lists(texts, max_size=3).map(tuple),
    sizes=st.lists(st.integers(-9, 9), max_size=3).map(tuple),
    limit=st.none() | st.floats(allow_nan=False),
)
stages = st.builds(
    Stage,
    st.lists(samples, min_size=1, max_size=3).map(tuple),
    st.floats(0, 1, exclude_min=True, allow_subnormal=False),
)


@given(
    stages=st.lists(stages, min_size=1, max_size=3),
    max_drop=st.none() | st.floats(0, 1e6),
    exclude=st.lists(texts, max_size=2).map(tuple),
    shapes=st.dictionaries(texts.filter(bool), st.lists(st.integers(1, 9), max_size=3).map(tuple), max_size=2),
)
def test_what_is_written_reads_back_the_same(tmp_path_factory, stages, max_drop, exclude, shapes):
    options = {"exclude": exclude, "shapes": shapes, "seed": 3, "force": False}
    text = dump_recipe(stages, max_drop=max_drop, options=options)
    recipe = load_recipe(write(tmp_path_factory.mktemp("recipe"), text))
    assert list(recipe.stages) == stages
    assert recipe.max_drop == max_drop
    assert recipe.options == options
