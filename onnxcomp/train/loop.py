"""The training loop."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from onnxcomp.data import Batch, Dataset
from onnxcomp.errors import ModelError, OptionError
from onnxcomp.quality import Quality, Reference
from onnxcomp.torch_bridge import GraphModule
from onnxcomp.train.checkpoint import load_checkpoint, save_checkpoint
from onnxcomp.train.compute import as_arrays, autocast, find_device, learning_rate, make_optimizer
from onnxcomp.train.fixed import Fixed, masked
from onnxcomp.train.history import Evaluation, History
from onnxcomp.train.options import Pruning, TrainOptions
from onnxcomp.train.processes import Processes
from onnxcomp.train.pruner import Pruner
from onnxcomp.train.samples import Part, Samples, find_augment
from onnxcomp.train.teacher import Teacher, real_rows

__all__ = ["LossFunction", "Trainer", "run_key"]

LossFunction = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor | None], Tensor]
"""Of the student's outputs, the teacher's, and labels, each with what is watched."""


IMAGE_AXES = 4
STRINGS = "OUS"

LOST, SLOWER = 1.5, 0.3
"""Where held-out samples lose more, and their error is so many times the best, the learning rate becomes this part."""

SMALLEST_SCALE = 1e-12
"""Scales stay above zero."""


class Trainer:
    """Trains a student to give what its teacher gives.

    Args:
        module: The student; its Parameters are trained in place.
        teacher: The original.
        loss: The loss.
        watch: Inner tensors that the loss wants.
        data: Samples to train on.
        held_out: The teacher's outputs on samples that judge the training, and these samples.
        options: How.
        use_labels: Whether the loss gets the samples' labels.
        pruning: What becomes zero on the way.
        checkpoint: The file to go on from and to write to; None: no checkpoints.
        key: What tells this training from others that might have left a checkpoint there.
        allow_code: Whether the user's functions may be called.
        progress: Told what is going on.
        log: Called with (name, value, step) for each figure.
        processes: Those that share the work.
    """

    def __init__(
        self,
        module: GraphModule,
        teacher: Teacher,
        loss: LossFunction,
        *,
        data: Dataset,
        held_out: tuple[Reference, Dataset],
        options: TrainOptions,
        watch: Sequence[str] = (),
        use_labels: bool = False,
        pruning: Pruning | None = None,
        checkpoint: Path | None = None,
        key: str = "",
        allow_code: bool = False,
        progress: Callable[[str], None] = lambda _: None,
        log: Callable[[str, float, int], None] = lambda *_: None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.device = find_device(options.device)
        self.module = module.to(self.device)
        self._format = torch.contiguous_format
        if any(each.ndim == IMAGE_AXES for each in module.parameters()):  # a quarter less time for Conv nets on a CPU
            self._format = torch.channels_last
            module.to(memory_format=self._format)
        self.options = options
        self._teacher, self._loss, self._watch = teacher, loss, tuple(watch)
        self._reference, self._held_out = held_out
        self._use_labels = use_labels
        self._trained_on = data.size
        self._augment = find_augment(options.augment, allow_code=allow_code)
        self._samples = Samples(
            data,
            batch_size=options.batch_size,
            accumulate=options.accumulate,
            seed=options.seed,
            augment=self._augment,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        self.total_steps = max(1, round(options.epochs * self._samples.steps))
        self._parameters = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        self.fixed = Fixed(
            self._parameters,
            codes=module.code_names,
            rounded=module.rounded_names,
            matrices=module.matrix_names,
        )
        self._pruner = Pruner(self.fixed, pruning, self.total_steps) if pruning else None
        self._max_drop = pruning.max_drop if pruning else 0.0
        self._optimizer = make_optimizer(self._parameters, options, module.scale_names)
        self._average = {name: each.detach().clone() for name, each in self._parameters} if options.ema else {}
        self._best: dict[str, Tensor] = {}
        self._checkpoint, self._progress, self._log = checkpoint, progress, log
        self._key = key
        self._runner = self.processes.wrapped(_Runner(module))
        self.history = History()
        self._losses: list[float] = []
        self._before = 0.0
        self._pace = 1.0

    def fit(self) -> History:
        """Train; the best weights by the held-out samples are in the module when this ends.

        Raises:
            ModelError: An operator fails.
            OptionError: The checkpoint is of another training, or the loss is no number.
        """
        self._resume()
        started = saved = time.monotonic() - self._before
        every = max(1, self.total_steps // self.options.evaluations)
        if not self.history.evaluations:
            self._evaluate(started)
        saved = time.monotonic()
        for step, parts in self._steps(self.history.steps):
            self._one_step(step, parts)
            self.history.steps = step + 1
            if (step + 1) % every == 0 or step + 1 == self.total_steps:
                self._evaluate(started)
                self._go_back_if_lost()
                if self._is_stuck():
                    break
            if time.monotonic() - saved >= self.options.checkpoint_seconds:
                self._save(started)
                saved = time.monotonic()
        with torch.no_grad():
            for name, parameter in self._parameters:
                parameter.copy_(self._best.get(name, parameter))
        return self.history

    def _steps(self, first: int) -> Iterator[tuple[int, list[Part]]]:
        """The steps that are left, in epochs."""
        epoch, skip = divmod(first, self._samples.steps)
        step = first
        while True:
            for place, parts in enumerate(self._samples.epoch(epoch)):
                if place < skip:
                    continue
                if step >= self.total_steps:
                    return
                yield step, parts
                step += 1
            epoch, skip = epoch + 1, 0

    def _one_step(self, step: int, parts: Sequence[Part]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.options, step, self.total_steps) * group["pace"] * self._pace
        if self._pruner is not None:
            self._pruner.before_step(step)
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, part in enumerate(parts):
            with self.processes.in_step(self._runner, is_last=index == len(parts) - 1):
                loss = self._loss_of(part) * part.share
                if self._pruner is not None and index == len(parts) - 1:
                    loss = loss + self._pruner.penalty(step)
                if not loss.requires_grad:
                    self._refuse_unreached()
                loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            self._refuse(step)
        self.fixed.before_step()
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_([each for _, each in self._parameters], self.options.clip_norm)
        self._optimizer.step()
        self.fixed.after_step()
        with torch.no_grad():
            for name in self.module.scale_names:
                self.module._parameters[name].clamp_min_(SMALLEST_SCALE)
        for name, average in self._average.items():
            decay = min(self.options.ema, (1 + step) / (10 + step))  # not held back by where it began
            average.lerp_(self.module._parameters[name].detach(), 1 - decay)
        self._losses.append(total)

    def _refuse(self, step: int) -> None:
        message = f"the loss is no number any more at step {step + 1}; give a smaller learning rate"
        if not step:
            message = "the loss is no number from the start: look for outputs that are not finite"
        raise OptionError(message)

    def _refuse_unreached(self) -> NoReturn:
        """Say that training can do nothing: all operators on the way round, compare or count."""
        names = ", ".join(name for name, _ in self._parameters[:3])
        more = f" and {len(self._parameters) - 3} more" if len(self._parameters) > 3 else ""
        message = f"no gradient of the loss reaches the weights that are to be trained: {names}{more}"
        raise ModelError(message)

    def _loss_of(self, part: Part) -> Tensor:
        batch = part.batch
        if self._augment is None:
            wanted = self._teacher.recall(part.indices, batch.inputs, batch.count)
        else:
            wanted = real_rows(self._teacher.run(batch.inputs), batch.inputs, batch.count)
        with autocast(self.device, mixed=self.options.mixed_precision):
            return self._compared(self._runner(self._tensors(batch.inputs), self._watch), wanted, batch)

    def _compared(self, found: Mapping[str, Any], wanted: Mapping[str, Any], batch: Batch) -> Tensor:
        """The loss of a batch's outputs."""
        labels = None
        if self._use_labels and batch.labels is not None:
            labels = torch.from_numpy(np.array(batch.labels)).to(self.device)
        found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        wanted = {name: value for name, value in wanted.items() if _is_of_numbers(value)}
        return self._loss(real_rows(found, batch.inputs, batch.count), self._tensors(wanted), labels)

    def _tensors(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors on the device; strings, which torch has none of, as they are."""
        return {name: each if each.dtype.kind in STRINGS else self._tensor(each) for name, each in arrays.items()}

    def _tensor(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(np.array(array)).to(self.device)
        return tensor.contiguous(memory_format=self._format) if tensor.ndim == IMAGE_AXES else tensor

    # --- judging --------------------------------------------------------------------------------------------------

    def _evaluate(self, started: float) -> None:
        """Ask the held-out samples, and remember the weights where they are the best so far."""
        weights = self._judged()
        quality, loss = self._quality(weights)
        step = self.history.steps
        found = Evaluation(
            step=step,
            loss=float(np.mean(self._losses)) if self._losses else math.nan,
            held_out_loss=loss,
            drop=quality.drop,
            error=quality.error,
            agreement=quality.agreement,
            sparsity=self.fixed.sparsity(),
            seconds=time.monotonic() - started,
        )
        self._losses.clear()
        self.history.evaluations.append(found)
        if self._pruner is not None:
            self._pruner.waits = bool(self._max_drop) and step > 0 and found.score[0] > self._max_drop
        counts = self._pruner is None or self._pruner.is_done or step == self.total_steps
        best = self.history.best
        if counts and (best is None or found.score < best.score):
            self.history.best = found
            self._best = {name: each.detach().clone() for name, each in weights.items()}
        for name in ("loss", "held_out_loss", "drop", "error", "agreement", "sparsity"):
            value = getattr(found, name)
            if value is not None and math.isfinite(value):
                self._log(name, value, step)
        self._tell(found, started)

    def _judged(self) -> dict[str, Tensor]:
        """The weights that are judged: the average, with the zeros that there are."""
        if not self._average:
            return dict(self._parameters)
        masks = self.fixed.masks
        return {name: masked(each, masks[name]) if name in masks else each for name, each in self._average.items()}

    @torch.no_grad()  # type: ignore[untyped-decorator] # torch has no type information here
    def _quality(self, weights: Mapping[str, Tensor]) -> tuple[Quality, float]:
        """What held-out samples lose, and their mean loss."""
        own = {name: each.detach().clone() for name, each in self._parameters} if self._average else {}
        for name, parameter in self._parameters:
            if own:
                parameter.copy_(weights[name])
        losses: list[tuple[float, int]] = []
        quality = self._reference.compare(self._held_out_outputs(losses), self._held_out)
        for name, parameter in self._parameters:
            if own:
                parameter.copy_(own[name])
        return quality, sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    def _held_out_outputs(self, losses: list[tuple[float, int]]) -> Iterator[list[Any]]:
        """The student's outputs, batch by batch; their losses are noted with the number of samples."""
        first = 0
        for batch in self._held_out.batches():
            # Held-out samples are numbered on from those that are trained on.
            indices = np.arange(first, first + batch.count) + self._trained_on
            found = self.module.run(self._tensors(batch.inputs), self._watch)
            wanted = self._teacher.recall(indices, batch.inputs, batch.count)
            losses.append((float(self._compared(found, wanted, batch)), batch.count))
            first += batch.count
            yield [as_arrays(found[name]) for name in self.module.output_names]

    def _go_back_if_lost(self) -> None:
        """Take up the best weights again, at a lower pace, where the rate was too high for this model."""
        best, found = self.history.best, self.history.evaluations[-1]
        if self._pruner is not None or best is None or found.score[0] <= best.score[0]:
            return
        if found.error <= LOST * best.error:
            return
        with torch.no_grad():
            for name, parameter in self._parameters:
                parameter.copy_(self._best[name])
                if name in self._average:
                    self._average[name].copy_(self._best[name])
        self._optimizer.state.clear()
        self._pace *= SLOWER
        self._progress(
            f"training: the error has grown by half, so it goes back, with {self._pace:.2g} of the learning rate"
        )

    def _is_stuck(self) -> bool:
        best, patience = self.history.best, self.options.patience
        if not patience or best is None:
            return False
        return sum(each.step > best.step for each in self.history.evaluations) >= patience

    def _tell(self, found: Evaluation, started: float) -> None:
        spent = time.monotonic() - started
        left = spent / found.step * (self.total_steps - found.step) if found.step else math.nan
        told = [f"training: step {found.step:,} of {self.total_steps:,}"]
        if math.isfinite(found.loss):
            told.append(f"loss {found.loss:.4g}")
        told.append(f"error {found.error:.2%}" if found.drop is None else f"drop {found.drop:+.4f}")
        if self._pruner is not None:
            told.append(f"{found.sparsity:.1%} zeros")
        if math.isfinite(left):
            told.append(f"{left:.0f} s left")
        self._progress(", ".join(told))

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, started: float) -> None:
        """Write all that training goes on from."""
        if self._checkpoint is None or self.processes.rank:
            return
        tensors = {f"parameter/{name}": each for name, each in self._parameters}
        for group, values in (("average", self._average), ("best", self._best), ("mask", self.fixed.masks)):
            tensors.update((f"{group}/{name}", each) for name, each in values.items())
        for name, parameter in self._parameters:
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{key}/{name}"] = value
        pruner = self._pruner
        state = {
            "key": self._key,
            "history": asdict(self.history),
            "losses": self._losses,
            "seconds": time.monotonic() - started,
            "pace": self._pace,
            "pruner": None if pruner is None else [pruner.position, pruner.waits, pruner._from],
        }
        save_checkpoint(self._checkpoint, tensors, state)

    def _resume(self) -> None:
        """Take over a checkpoint of the same training, if there is one."""
        if self._checkpoint is None or not self._checkpoint.exists():
            return
        tensors, state = load_checkpoint(self._checkpoint)
        if state["key"] != self._key:
            message = f"{self._checkpoint}: is of another training; delete it, or name another folder"
            raise OptionError(message)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor.to(self.device)
        with torch.no_grad():
            for name, parameter in self._parameters:
                parameter.copy_(groups["parameter"][name])
        self._average.update(groups.get("average", {}))
        self._best = groups.get("best", {})
        for name, mask in groups.get("mask", {}).items():
            self.fixed.set_mask(name, mask)
        by_name = dict(self._parameters)
        for name, tensor in groups.get("optimizer", {}).items():
            key, _, parameter_name = name.partition("/")
            # torch keeps the count of steps on the CPU.
            self._optimizer.state[by_name[parameter_name]][key] = tensor.cpu() if key == "step" else tensor
        if self._pruner is not None:
            self._pruner.position, self._pruner.waits, self._pruner._from = state["pruner"]
        kept = state["history"]
        self.history.evaluations = [Evaluation(**each) for each in kept["evaluations"]]
        self.history.best = Evaluation(**kept["best"]) if kept["best"] else None
        self.history.steps = self.history.resumed_at = kept["steps"]
        self._losses = state["losses"]
        self._before, self._pace = state["seconds"], state["pace"]


def _is_of_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in STRINGS


class _Runner(nn.Module):  # type: ignore[misc] # torch has no type information here
    """What DistributedDataParallel wraps: outputs and what is watched, by name."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, feed: Mapping[str, Tensor], watch: Sequence[str]) -> dict[str, Tensor]:
        """Run the graph."""
        return self.module.run(feed, watch)


def run_key(*parts: object) -> str:
    """A hash of what decides a training."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
