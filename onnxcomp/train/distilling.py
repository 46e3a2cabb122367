"""`distill`: train a student to give what its teacher gives, and put the weights back into the same graph."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

from onnxcomp import metrics
from onnxcomp.data import Dataset, ImageOptions, input_specs, open_data
from onnxcomp.errors import DataError, ModelError, OptionError, OutputError, RequirementError
from onnxcomp.metrics import Metric
from onnxcomp.model import Model, ModelSource
from onnxcomp.quality import Quality, Reference
from onnxcomp.resume import KEPT_DAYS, cache_folder
from onnxcomp.runtime import Runtime
from onnxcomp.torch_bridge import GraphModule, load
from onnxcomp.train.history import History
from onnxcomp.train.loop import Trainer, run_key
from onnxcomp.train.losses import Loss
from onnxcomp.train.options import Pruning, TrainOptions
from onnxcomp.train.processes import Processes
from onnxcomp.train.samples import find_augment
from onnxcomp.train.teacher import Teacher
from onnxcomp.workfolder import work_folder

__all__ = ["Trained", "distill"]

CLASS_METRICS = ("top1", "top5")
"""Labels that these are about are learnt from; those of other metrics only judge."""

FEWEST = 4
"""Samples without which nothing can be trained on some and judged on others."""


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        model: The student with its new weights; as it came, where they are no better on held-out samples.
        history: How training went.
        before: What the student lost to the teacher on held-out samples, through ONNX Runtime.
        after: What it loses now.
        changed: Names of the weights that are not what they were.
        kept: Whether the new weights were taken.
        rank: The number of this process, where several train one model; the first alone should write.
    """

    model: Model
    history: History
    before: Quality
    after: Quality
    changed: list[str]
    kept: bool
    rank: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All but the model as plain data."""
        names = ("history", "before", "after")
        figures = {name: dataclasses.asdict(getattr(self, name)) for name in names}
        return {**figures, "changed": self.changed, "kept": self.kept, "size_bytes": self.model.size_bytes}


def distill(
    teacher: ModelSource,
    student: ModelSource,
    data: Any,
    *,
    loss: Loss | None = None,
    options: TrainOptions | None = None,
    pruning: Pruning | None = None,
    metric: str | Callable[..., Any] | Metric | None = None,
    freeze: Sequence[str] = (),
    learn_scales: bool = False,
    latents: bool = True,
    resume: bool = True,
    log_dir: Path | None = None,
    allow_code: bool = False,
    image: ImageOptions | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train a student with its teacher's outputs, and with labels where there are any.

    Zeros of the student stay zeros, weights that share few values go on sharing them, integer codes stay on their grid,
    and BatchNormalization's statistics stay as they are.

    Args:
        teacher: The original; not changed. It runs in ONNX Runtime.
        student: What is trained: another form of the same model, or the model itself. Not changed.
        data: Samples, with or without labels; see `onnxcomp.data.open_data`.
        loss: What is learnt.
        options: How.
        pruning: What becomes zero on the way.
        metric: What labels are judged by; found out by their looks unless given.
        freeze: Patterns of names of weights that are not trained.
        learn_scales: Train scales of quantized weights and activations too.
        latents: Numbers behind integer codes begin where the teacher has them, within their codes.
        resume: Go on where the same training was interrupted.
        log_dir: Where TensorBoard's log goes.
        allow_code: Whether the user's functions may be called.
        image: How to read a folder of images.
        shapes: Sizes of dynamic inputs.
        progress: Called with a short line on what is going on.

    Raises:
        OnnxcompError: Something in the input is missing or wrong.

    Example:
        >>> import numpy as np
        >>> from onnx import parser
        >>> text = '''<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[N, 2] y)
        ...     <float[2] b = {1, VALUE}> { y = Add(x, b) }'''
        >>> models = [parser.parse_model(text.replace("VALUE", value)) for value in ("2", "1")]
        >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
        >>> found = distill(*models, {"x": x}, options=TrainOptions(epochs=50, learning_rate=0.05), resume=False)
        >>> found.before.error > 0.3, found.after.error < 0.02, found.model.weight("b").round(1).tolist()
        (True, True, [1.0, 2.0])
    """
    options, loss = options or TrainOptions(), loss or Loss()
    original, start = Model.load(teacher), Model.load(student)
    processes = Processes.found()
    tell = progress if processes.rank == 0 else lambda _: None
    _check_device(options.device)
    _check_pair(original, start)
    find_augment(options.augment, allow_code=allow_code)
    samples = _samples(data, start, allow_code=allow_code, image=image, shapes=shapes)
    opened = nullcontext() if samples is data else samples
    with opened, work_folder() as workdir, _threads(options.threads):
        judged = _metric(samples, metric, allow_code=allow_code)
        parts = samples.split({"train": 1 - options.held_out, "held_out": options.held_out}, options.seed)
        loss = loss.fitted(original, start)
        module = load(start, freeze=freeze, learn_scales=learn_scales, latents=original if latents else None)
        _check_weights(module, freeze)
        with Runtime(threads=options.threads) as runtime:
            instructor = Teacher(original, loss.watch, runtime, workdir, options.cache_mb * 1e6)
            held_out = parts["held_out"]
            tell(f"running the teacher on {held_out.size:,} held-out samples")
            expected = ([run[name] for name in instructor.outputs] for run in map(instructor.run, held_out.feeds()))
            reference = Reference(held_out, expected, judged, None, options.seed)
            labelled = judged is not None and judged.name in CLASS_METRICS
            looks = judged is None and reference.classes is not None
            loss = replace(loss, classes=loss.classes or labelled or looks)
            key = run_key(
                *(model.digest for model in (original, start)), samples.digest, options.described(),
                judged.name if judged else None,
                dataclasses.asdict(pruning) if pruning else None, repr(loss), [*freeze], learn_scales, latents,
                *(version(package) for package in ("onnxcomp", "torch", "onnxruntime")), processes.world,
            )  # fmt: skip
            checkpoint = _checkpoint(key, fresh=not resume)
            with _logger(log_dir if processes.rank == 0 else None) as log:
                trainer = Trainer(
                    module,
                    instructor,
                    loss,
                    watch=loss.watch,
                    data=parts["train"],
                    held_out=(reference, held_out),
                    use_labels=labelled,
                    options=options,
                    pruning=pruning,
                    checkpoint=checkpoint,
                    key=key,
                    allow_code=allow_code,
                    progress=tell,
                    log=log,
                    processes=processes,
                )
                history = trainer.fit()
            result = start.fork()
            changed = module.write_back(result)
            before, after = (_quality(each, reference, held_out, runtime, workdir) for each in (start, result))
        if checkpoint is not None and processes.rank == 0:
            checkpoint.unlink(missing_ok=True)
        processes.close()
    learnt = history.best is not None and history.best.step > 0 and _lost(after) <= _lost(before)
    kept = pruning is not None or (bool(changed) and learnt)
    return Trained(result if kept else start, history, before, after, changed if kept else [], kept, processes.rank)


def _samples(data: Any, student: Model, **how: Any) -> Dataset:
    samples = data if isinstance(data, Dataset) else open_data(data, input_specs(student.proto()), **how)
    if samples.size < FEWEST:
        message = f"{samples.description}: training needs at least {FEWEST}, to train on some and judge on others"
        raise DataError(message)
    return samples


def _metric(samples: Dataset, asked: Any, *, allow_code: bool) -> Metric | None:
    """What labels are judged by; None: they are not used."""
    metric = None if asked is None else metrics.get_metric(asked, allow_code=allow_code)
    if samples.has_labels:
        return metric or metrics.metric_for_labels(samples.labels())
    if metric is not None and metric.name != "top1":  # which the teacher's own answers tell well enough
        message = f"metric {metric.name!r} needs labels; give data that have them under 'label'"
        raise DataError(message)
    return None


def _check_device(name: str) -> None:
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in there and not there[name]():
        message = f"the device {name!r} is not there, or this torch is not built for it; take 'auto' or 'cpu'"
        raise RequirementError(message)


def _check_pair(teacher: Model, student: Model) -> None:
    """Refuse two models of which one cannot be asked what the other was, or whose answers cannot be compared."""
    wanted = {spec.name for spec in input_specs(teacher.proto())}
    given = {spec.name for spec in input_specs(student.proto())}
    if wanted != given:
        _refuse("inputs", wanted, given)
    answers = [[tensor.name for tensor in model.graph.outputs] for model in (teacher, student)]
    if answers[0] != answers[1]:
        _refuse("outputs", *answers)


def _refuse(what: str, teacher: Collection[str], student: Collection[str]) -> NoReturn:
    names = [", ".join(map(repr, each if isinstance(each, list) else sorted(each))) for each in (teacher, student)]
    order = " in the same order" if what == "outputs" else ""
    message = (
        f"teacher and student must have the same {what}{order}: the teacher has {names[0]}, the student {names[1]};"
        " rename the student's"
    )
    raise ModelError(message)


def _check_weights(module: GraphModule, freeze: Sequence[str]) -> None:
    if any(each.requires_grad for each in module.parameters()):
        return
    if freeze:
        message = f"nothing is left to train: freeze ({', '.join(freeze)}) covers every weight of the student"
        raise OptionError(message)
    message = "the student has no weights that can be trained"
    raise ModelError(message)


def _quality(model: Model, reference: Reference, data: Dataset, runtime: Runtime, workdir: Path) -> Quality:
    path = workdir / "student.onnx"
    path.unlink(missing_ok=True)
    saved = model.fork()
    saved.path = None
    saved.save(path)
    return reference.compare(runtime.run(path, data.feeds()), data)


def _lost(quality: Quality) -> float:
    return quality.error if quality.drop is None else quality.drop


def _checkpoint(key: str, *, fresh: bool) -> Path | None:
    """Where this training's checkpoint is, in the user's cache folder; None where nothing can be written there."""
    try:
        folder = cache_folder() / "training"
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(folder)
        path = folder / f"{key[:32]}.safetensors"
        if fresh:
            path.unlink(missing_ok=True)
    except OSError:
        return None
    return path


def _remove_old(folder: Path) -> None:
    """Remove checkpoints that nobody came back for."""
    limit = time.time() - KEPT_DAYS * 86400
    for path in folder.glob("*.safetensors"):
        if path.stat().st_mtime < limit:
            path.unlink(missing_ok=True)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _logger(folder: Path | None) -> Iterator[Callable[[str, float, int], None]]:
    """What writes TensorBoard's log."""
    if folder is None:
        yield lambda *_: None
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        message = "a TensorBoard log needs tensorboardX: pip install 'onnxcomp[train]'"
        raise RequirementError(message) from error
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        message = f"{folder}: the log cannot be written ({error.strerror})"
        raise OutputError(message) from error
    try:
        yield writer.add_scalar
    finally:
        writer.close()
