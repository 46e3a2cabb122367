"""`onnxcomp distill` as a user runs it, and what it says of bad input: one line, the right exit code, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnxcomp.train import Loss, Pruning, TrainOptions
from tests.test_cli import one_error_line, run
from tests.training import LENET, WEIGHTS, arrays, pruned

FEW = ("--epochs", "1", "--batch-size", "32")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher, a student and data, in the current folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("teacher.onnx").write_bytes(LENET.read_bytes())
    pruned().save("student.onnx")
    np.savez("data.npz", **arrays(160))
    return here


def distil(*options: object, student: str = "student.onnx", data: str = "data.npz") -> Any:
    return run("distill", "teacher.onnx", student, "--data", data, *FEW, *options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def changed(folder: Path, change: Callable[[onnx.ModelProto], None], name: str = "changed.onnx") -> str:
    """The student with something else in its graph."""
    proto = onnx.load(folder / "student.onnx")
    change(proto)
    onnx.save(proto, folder / name)
    return name


def renamed(proto: onnx.ModelProto, old: str, new: str) -> None:
    for node in proto.graph.node:
        for group in (node.input, node.output):
            group[:] = [new if name == old else name for name in group]
    for tensor in (*proto.graph.input, *proto.graph.output):
        tensor.name = new if tensor.name == old else tensor.name


def with_last_node(proto: onnx.ModelProto, op: str, domain: str) -> None:
    """A node between the graph and its output."""
    output = proto.graph.output[0].name
    for node in proto.graph.node:
        node.output[:] = ["inner" if name == output else name for name in node.output]
    proto.graph.node.append(helper.make_node(op, ["inner"], [output], name="odd", domain=domain))
    proto.opset_import.append(helper.make_opsetid(domain, 1))


# --- what it does -----------------------------------------------------------------------------------------------------


def test_trains_a_student_and_writes_it_beside_the_other(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    result = distil("--epochs", "6")

    assert result.exit_code == 0, result.output
    assert names(folder) == ["data.npz", "student.distilled.onnx", "student.onnx", "teacher.onnx"]
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    lines = result.stdout.splitlines()
    assert lines[0].startswith("student.onnx -> student.distilled.onnx: 6 weights trained, ")
    assert lines[1].startswith("before: drop ")
    assert lines[2].startswith("after:  drop ")
    assert lines[4].split() == ["step", "loss", "drop", "error", "agreement", "zeros", "time"]
    assert result.stderr == ""
    image = arrays(64)["image"]
    answers = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]
        for path in ("teacher.onnx", "student.onnx", "student.distilled.onnx")
    ]
    came, left = (float(np.square(answer - answers[0]).mean()) for answer in answers[1:])
    assert left < 0.95 * came


def test_writes_json_and_nothing_else_to_stdout(folder: Path):
    document = json.loads(distil("--json", "-").stdout)

    assert document["output"] == "student.distilled.onnx"
    assert document["size_bytes"] == (folder / "student.distilled.onnx").stat().st_size
    assert document["kept"] is True
    assert set(WEIGHTS) <= set(document["changed"])
    first, *_, last = document["history"]["evaluations"]
    assert (first["step"], first["loss"], last["step"]) == (0, None, document["history"]["steps"])
    assert document["after"]["error"] < document["before"]["error"]


def test_the_fields_of_the_json_are_in_the_docs(folder: Path):
    from tests.markdown import section

    document = json.loads(distil("--json", "-").stdout)
    text = section("docs/cli.md", "onnxcomp distill")
    inner = {*document["history"], *document["history"]["evaluations"][0], *document["before"]}
    assert {name for name in {*document, *inner} if f"`{name}`" not in text} == set()


def test_quiet_prints_nothing(folder: Path):
    result = distil("-q", "--json", "r.json", "-o", "out.onnx")

    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert names(folder) == ["data.npz", "out.onnx", "r.json", "student.onnx", "teacher.onnx"]


def test_verbose_tells_progress_on_stderr(folder: Path):
    lines = distil("-v").stderr.splitlines()

    assert lines[0].endswith("running the teacher on 16 held-out samples")
    assert "training: step 4 of 4, loss " in lines[-1]


def test_a_student_that_gains_nothing_is_written_as_it_was(folder: Path):
    result = distil("--learning-rate", "0.5", "-o", "out.onnx", student="teacher.onnx")

    assert result.exit_code == 0, result.output
    assert "-> out.onnx: training made it no better, it stays as it was" in result.stdout
    assert (folder / "out.onnx").read_bytes() == (folder / "teacher.onnx").read_bytes()


def test_prunes_on_the_way(folder: Path):
    result = distil("--prune", "80%", "--prune-how", "once", "--prune-end", "0.5", student="teacher.onnx")

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].split()[-3] == "80.0%"


def test_every_option_of_training_reaches_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    def distill(teacher: Path, student: Path, data: str, **arguments: Any) -> None:
        seen.update(arguments, models=[teacher.name, student.name], data=data)
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcomp.train.distill", distill)
    (folder / "terms_of_mine.py").write_text("def loss(*_): ...\n")
    monkeypatch.syspath_prepend(str(folder))
    result = distil(
        *("--epochs", "2.5", "--batch-size", "8", "--learning-rate", "0.1", "--optimizer", "sgd", "--accumulate", "2"),
        *("--weight-decay", "0.2", "--ema", "0.9", "--held-out", "20%", "--patience", "3", "--augment", "shift:1,flip"),
        *("--temperature", "3", "--alpha", "0.5", "--features", "1", "--attention", "2", "--relational", "3"),
        *(
            "--graph",
            "4",
            "--tensor",
            "a",
            "--tensor",
            "b",
            "--loss",
            "terms_of_mine:loss",
            "--allow-code",
            "--prune",
            "0.9",
        ),
        *("--prune-how", "penalty", "--prune-end", "0.7", "--max-drop", "1%", "--freeze", "x*", "--learn-scales"),
        *("--device", "cpu", "--log-dir", "logs", "--no-resume", "--shape", "image=4,1,28,28", "--seed", "5"),
        *("--threads", "2", "--metric", "top5"),
    )

    assert result.exit_code == 130, result.output
    assert seen["options"] == TrainOptions(
        epochs=2.5, batch_size=8, learning_rate=0.1, optimizer="sgd", accumulate=2, weight_decay=0.2, ema=0.9,
        held_out=0.2, patience=3, augment="shift:1,flip", device="cpu", seed=5, threads=2,
    )  # fmt: skip
    assert seen["loss"] == Loss(
        temperature=3.0, alpha=0.5, features=1.0, attention=2.0, relational=3.0, graph=4.0, tensors=("a", "b"),
        user="terms_of_mine:loss", allow_code=True,
    )  # fmt: skip
    assert seen["pruning"] == Pruning(sparsity=0.9, how="penalty", end=0.7, max_drop=0.01)
    assert (seen["freeze"], seen["learn_scales"], seen["resume"]) == (("x*",), True, False)
    assert (seen["log_dir"], seen["shapes"], seen["metric"]) == (Path("logs"), {"image": (4, 1, 28, 28)}, "top5")
    assert (seen["models"], seen["data"]) == (["teacher.onnx", "student.onnx"], "data.npz")


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "0"], "Invalid value for '--learning-rate': expected a number above 0, got 0"),
        (["--learning-rate", "nan"], "Invalid value for '--learning-rate': expected a number above 0, got nan"),
        (["--learning-rate", "fast"], "Invalid value for '--learning-rate': 'fast' is not a valid float"),
        (["--epochs", "inf"], "Invalid value for '--epochs': expected a number above 0, got inf"),
        (["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--optimizer", "adam"], "Invalid value for '--optimizer'"),
        (["--weight-decay", "-1"], "Invalid value for '--weight-decay': expected a number of at least 0, got -1"),
        (["--ema", "1"], "Invalid value for '--ema': expected a number of at least 0 and below 1, got 1"),
        (["--accumulate", "0"], "Invalid value for '--accumulate'"),
        (["--held-out", "0"], "Invalid value for '--held-out': expected a share above 0 and below 1"),
        (["--held-out", "100%"], "Invalid value for '--held-out': expected a share above 0 and below 1"),
        (["--patience", "-1"], "Invalid value for '--patience'"),
        (["--temperature", "0"], "Invalid value for '--temperature': expected a number above 0, got 0"),
        (["--alpha", "2"], "Invalid value for '--alpha'"),
        (["--features", "-1"], "Invalid value for '--features': expected a number of at least 0, got -1"),
        (["--prune", "150%"], "Invalid value for '--prune': expected a share above 0 and below 1, such as 10%"),
        (["--prune", "0"], "Invalid value for '--prune': expected a share above 0 and below 1"),
        (["--prune", "50%", "--prune-end", "2"], "Invalid value for '--prune-end'"),
        (["--prune", "50%", "--max-drop", "much"], "Invalid value for '--max-drop': expected a share of at least 0"),
        (["--prune-how", "once"], "--prune-how is of pruning; give --prune too"),
        (["--max-drop", "1%"], "--max-drop is of pruning; give --prune too"),
        (["--tensor", "a"], "--tensor names what is compared by --features, --attention, --relational, --graph or"),
        (["--augment", "nonsense"], "augment must be shift:N, flip, both divided by a comma, or module:function"),
        (["--augment", "shift:0"], "augment must be shift:N"),
        (["--augment", "mine:move"], "--augment 'mine:move' names code to run; allow it with --allow-code"),
        (["--loss", "mine:loss"], "--loss 'mine:loss' names code to run; allow it with --allow-code"),
        (["--loss", "nowhere:loss", "--allow-code"], "'nowhere:loss': module 'nowhere' cannot be imported"),
        (["--loss", "mine"], "loss: user must be module:function, got 'mine'"),
        (["--metric", "nonsense"], "no metric is called 'nonsense'"),
        (["--metric", "mine:score"], "--metric 'mine:score' names code to run; allow it with --allow-code"),
        (["--data", "mine:load"], "--data 'mine:load' names code to run; allow it with --allow-code"),
        (["--freeze", "*"], "nothing is left to train: freeze (*) covers every weight of the student"),
        (["--attention", "1"], "loss: tensors must be one of rank 3 or 4 for attention"),
        (["--shape", "y=1"], "the model has no input 'y' to give a shape to"),
        (["--shape", "y"], "'y' is not a shape"),
        (["--json", "student.distilled.onnx"], "-o and --json both name 'student.distilled.onnx'"),
        (["--bogus"], "No such option"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2_and_say_what_was_expected(folder: Path, options: list[str], message: str):
    result = distil(*options)

    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert names(folder) == ["data.npz", "student.onnx", "teacher.onnx"]


def test_needs_data(folder: Path):
    result = run("distill", "teacher.onnx", "student.onnx")

    assert result.exit_code == 2
    assert one_error_line(result) == "Error: --data is missing: there is nothing to train on without samples"


def test_needs_torch(folder: Path):
    code = "import sys; sys.modules['torch'] = None\nfrom onnxcomp.cli import main; main()"
    arguments = ["distill", "teacher.onnx", "student.onnx", "--data", "data.npz"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "Error: training needs torch: pip install 'onnxcomp[train]'\n"
    assert names(folder) == ["data.npz", "student.onnx", "teacher.onnx"]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-o", "--json"])
@pytest.mark.parametrize("name", ["teacher.onnx", "student.onnx", "data.npz"])
def test_no_input_is_overwritten(folder: Path, option: str, name: str):
    before = (folder / name).read_bytes()

    result = distil(option, name)

    assert result.exit_code == 1
    assert one_error_line(result) == f"Error: {name}: the output would overwrite the input; choose another name with -o"
    assert (folder / name).read_bytes() == before


@pytest.mark.parametrize("option", ["-o", "--json"])
def test_a_missing_folder_is_told_before_any_work(folder: Path, option: str):
    result = distil(option, "no/out")

    assert result.exit_code == 1
    assert one_error_line(result).endswith("does not exist")


def test_a_log_that_cannot_be_written_is_told(folder: Path):
    result = distil("--log-dir", "data.npz")

    assert result.exit_code == 1
    assert one_error_line(result) == "Error: data.npz: the log cannot be written (Not a directory)"


def test_missing_and_broken_files_are_failures(folder: Path):
    (folder / "broken.onnx").write_bytes((folder / "student.onnx").read_bytes()[:300])

    assert one_error_line(distil(student="no.onnx")) == "Error: no.onnx: cannot be read (No such file or directory)"
    assert "is not an ONNX model, or is cut short" in one_error_line(distil(student="broken.onnx"))
    assert one_error_line(distil(data="no.npz")) == "Error: no.npz: there is no such file or folder"
    assert distil(data="no.npz").exit_code == distil(student="broken.onnx").exit_code == 1


# --- what does not fit ------------------------------------------------------------------------------------------------


def failure(result: Any) -> str:
    assert result.exit_code == 1, result.output
    return one_error_line(result)


def test_an_operator_that_the_bridge_lacks_is_named_with_its_node_and_the_way_to_add_it(folder: Path):
    student = changed(folder, lambda proto: with_last_node(proto, "Nonsense", "my"))

    assert failure(distil("-v", student=student)) == (
        "Error: this model cannot be trained: there is no torch operator for Nonsense (node 'odd'); register a function"
        " of a NodeCall and the inputs with @onnxcomp.torch_bridge.operator('Nonsense', domain='my')"
    )
    assert not (folder / "changed.distilled.onnx").exists()


def test_what_is_wrong_is_told_before_the_teacher_is_run(folder: Path):
    for options in (["--augment", "nonsense"], ["--freeze", "*"], ["--metric", "nonsense"]):
        one_error_line(distil("-v", *options))  # no line of progress


def test_a_teacher_that_cannot_be_run_is_told_without_our_own_paths(folder: Path):
    changed(folder, lambda proto: with_last_node(proto, "Nonsense", "my"), "teacher.onnx")

    message = failure(distil())

    assert message.startswith("Error: the teacher cannot be run: ")
    assert "Nonsense" in message
    assert ".onnx" not in message


def test_models_of_other_inputs_are_refused(folder: Path):
    student = changed(folder, lambda proto: renamed(proto, "image", "picture"))

    assert failure(distil(student=student)) == (
        "Error: teacher and student must have the same inputs: the teacher has 'image', the student 'picture'; rename"
        " the student's"
    )


def test_models_of_other_outputs_are_refused(folder: Path):
    student = changed(folder, lambda proto: renamed(proto, "logits", "scores"))

    assert failure(distil(student=student)) == (
        "Error: teacher and student must have the same outputs in the same order: the teacher has 'logits', the student"
        " 'scores'; rename the student's"
    )


def test_outputs_of_another_shape_are_refused(folder: Path):
    def cut(proto: onnx.ModelProto) -> None:
        with_last_node(proto, "Slice", "")
        del proto.opset_import[-1]
        for name, value in (("from", 0), ("to", 5), ("axis", 1)):
            proto.graph.node[-1].input.append(name)
            proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
        proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5

    assert "the output 'logits' must have the teacher's shape [" in failure(distil(student=changed(folder, cut)))


def test_data_that_do_not_fit_are_refused(folder: Path):
    image = arrays(16)["image"]
    for name, held in (
        ("name", {"picture": image}),
        ("shape", {"image": image[:, :, :14]}),
        ("few", {"image": image[:3]}),
        ("classes", {"image": image, "label": np.full(16, 77)}),
    ):
        np.savez(f"{name}.npz", **held)

    assert "there is nothing for input 'image'; found 'picture'" in failure(distil(data="name.npz"))
    assert "input 'image' expects float32 (batch, 1, 28, 28)" in failure(distil(data="shape.npz"))
    assert "training needs at least 4" in failure(distil(data="few.npz"))
    assert "labels: expected classes from 0 to 9, got 77" in failure(distil(data="classes.npz"))


def test_a_metric_of_labels_needs_labels(folder: Path):
    message = "Error: metric 'mse' needs labels; give data that have them under 'label'"
    assert failure(distil("--metric", "mse")) == message
    assert distil("--metric", "top1").exit_code == 0


def test_a_tensor_that_is_not_there_is_named(folder: Path):
    message = failure(distil("--features", "1", "--tensor", "nowhere"))
    assert message == "Error: the original has no tensor 'nowhere' to learn from"


def test_a_device_that_is_not_there_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert failure(distil("--device", "cuda")).startswith("Error: the device 'cuda' is not there")


def test_a_student_without_weights_is_told(folder: Path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[batch,1,28,28] image) => (float[batch,1,28,28] y)'
        "{ y = Relu(image) }"
    )
    onnx.save(proto, "teacher.onnx")

    assert failure(distil(student="teacher.onnx")) == "Error: the student has no weights that can be trained"


def test_a_loss_that_fails_is_told_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "losses_of_mine.py").write_text("def loss(student, teacher, labels):\n    return student['nowhere']\n")
    monkeypatch.syspath_prepend(str(folder))

    result = distil("--loss", "losses_of_mine:loss", "--allow-code")

    assert result.exit_code == 2
    assert one_error_line(result) == "Error: the loss 'losses_of_mine:loss' failed: KeyError: 'nowhere'"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_nobody_came_back_for_is_removed(folder: Path, tmp_path: Path):
    training = tmp_path / "cache" / "onnxcomp" / "training"
    training.mkdir(parents=True)
    for name, days in (("old", 8), ("new", 6)):
        path = training / f"{name}.safetensors"
        path.touch()
        os.utime(path, (time.time() - days * 86400,) * 2)

    assert distil("-q").exit_code == 0

    assert names(training) == ["new.safetensors"]


OFTEN = """
from onnxcomp.train import TrainOptions
TrainOptions.__init__.__kwdefaults__["checkpoint_seconds"] = 0.02
from onnxcomp.cli import main
main()
"""


def test_ctrl_c_stops_at_once_and_the_same_command_goes_on(folder: Path, tmp_path: Path):
    arguments = ["distill", "teacher.onnx", "student.onnx", "--data", "data.npz", "--epochs", "60", "-v"]
    process = subprocess.Popen(
        [sys.executable, "-c", OFTEN, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "training: step 12 " not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)

    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "Stopped."
    assert "Traceback" not in err
    assert out == ""
    assert names(folder) == ["data.npz", "student.onnx", "teacher.onnx"]
    training = tmp_path / "cache" / "onnxcomp" / "training"
    assert len(list(training.iterdir())) == 1

    result = run(*arguments)

    assert result.exit_code == 0, result.output
    assert "note: went on from step " in result.stdout
    assert list(training.iterdir()) == []
