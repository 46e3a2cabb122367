"""`Stage`: passes that are judged together, and the stages that run by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxcomp.errors import OptionError
from onnxcomp.passes import Pass, find_pass

__all__ = ["Stage", "default_stages", "joined"]


@dataclass(frozen=True)
class Stage:
    """Passes that pay together: they run one after the other, and one verdict falls at the end.

    Attributes:
        passes: The passes, in order.
        share: The part of the accuracy budget that the stage may spend, in (0, 1].

    Example:
        >>> from onnxcomp.passes import find_pass
        >>> Stage((find_pass("simplify")(),)).name
        'simplify'
    """

    passes: tuple[Pass, ...]
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.passes:
            message = "a stage needs at least one pass, got none"
            raise OptionError(message)
        for item in self.passes:
            if not isinstance(item, Pass):
                message = f"a stage holds passes, got {item!r}; make one with its options, as in Simplify()"
                raise OptionError(message)
        is_number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not is_number or not 0 < self.share <= 1:
            message = f"the share of a stage must be above 0 and at most 1, got {self.share!r}"
            raise OptionError(message)

    @property
    def name(self) -> str:
        """The names of its passes."""
        return " + ".join(item.name for item in self.passes)

    @property
    def lossless(self) -> bool:
        """Whether all of its passes claim equal results."""
        return all(item.lossless for item in self.passes)

    @property
    def lossless_passes(self) -> tuple[Pass, ...]:
        """Those of its passes that claim equal results."""
        return tuple(item for item in self.passes if item.lossless)

    @property
    def required(self) -> bool:
        """Whether the model does not run on its target without it."""
        return any(item.required for item in self.passes)

    @property
    def rounds(self) -> bool:
        """Whether its passes change nothing in weights but how they are rounded."""
        return all(item.lossless or item.rounds for item in self.passes)


def joined(items: Sequence[Pass | Stage]) -> list[Stage]:
    """The stages of passes that are given one by one: a stage each, but for those that pay only with a later one.

    Such a pass (`Pass.pays_with`) is judged together with the next one of that name and with what is between them. One
    that trains (`Pass.mends`) is judged together with all lossy ones before it, back to the last that trains. Stages
    are taken as they are, and no pass is joined across one.

    Example:
        >>> from onnxcomp.passes import find_pass
        >>> [stage.name for stage in joined([find_pass(name)() for name in ("simplify", "cluster", "quantize")])]
        ['simplify', 'cluster', 'quantize']
    """
    stages: list[Stage] = []
    first = 0
    while first < len(items):
        item = items[first]
        if isinstance(item, Stage):
            stages.append(item)
            first += 1
            continue
        last = here = first
        while here <= last:
            last = max(last, _partner(items, here))
            here += 1
        stages.append(Stage(tuple(items[first : last + 1])))  # type: ignore[arg-type]  # Stage refuses what is no pass
        first = last + 1
    return stages


def _partner(items: Sequence[Pass | Stage], index: int) -> int:
    """Where the last pass is that this one is judged with; its own place if there is none before the next stage."""
    item = items[index]
    if not isinstance(item, Pass):
        return index
    stage = next((place for place in range(index, len(items)) if isinstance(items[place], Stage)), len(items))
    later = [other for other in items[index + 1 : stage] if isinstance(other, Pass)]
    pays = next((place for place, other in enumerate(later) if other.name == item.pays_with), -1)
    lossy = not (item.lossless or item.mends)
    mended = next((place for place, other in enumerate(later) if lossy and other.mends), -1)
    return index + 1 + max(pays, mended)


BYTES_SHARE = 0.8
"""The part of the budget that may be used up once zeros and few values are made: losses are estimates on few samples,
and the last of the budget is not risked for bytes. Of 0.6, 0.8 and 1.0 the largest with which the models of
benchmarks/README.md held their budgets on test data."""


def default_stages(*, data: bool, fit: bool = False) -> list[Stage]:
    """The stages that run when the user names none, in order.

    Args:
        data: Whether there are samples to calibrate with.
        fit: Whether the model has what its target does not take, as lints found.
    """
    stages: list[tuple[tuple[str, dict[str, bool]], ...]] = [
        # First, since every pass after it then sees the real graph: constants where they count, BatchNormalization
        # gone into the weights, no dead nodes.
        (("simplify", {}),),
        # Whatever else is done is worth nothing where the model does not run.
        *([(("fit-target", {}),)] if fit else []),
        # The floor under every result: a quarter of the bytes at unchanged speed and next to no loss, without data.
        (("quantize-weights", {}),),
    ]
    if data:
        # Takes over the int8 codes where computing in int8 pays; what it gives back to float stays stored small.
        stages.append((("quantize", {}),))
        # What fixed ranges cost too much for may hold with ranges found at each run.
        stages.append((("quantize-dynamic", {}),))
    # Weights that 8 bits are too few for lose half of their bytes, and next to nothing else.
    stages.append((("float16", {"storage_only": True}),))
    # Last, since nothing looks into packed weights: zeros and few values, in whatever form the weights have by now.
    # It saves bytes alone, so it takes what the stages for speed have left of a part of the budget. Without data, on
    # which alone they can be chosen, zeros and few values are left to those that are there already.
    stages.append((("prune", {}), ("cluster", {}), ("pack", {})))
    made = [Stage(tuple(find_pass(name)(**options) for name, options in stage)) for stage in stages]
    return [*made[:-1], replace(made[-1], share=BYTES_SHARE)]
