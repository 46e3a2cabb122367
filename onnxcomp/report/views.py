"""What `inspect` and `compare` print: tables, with rich on a terminal and as plain text anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnxcomp.report.rows import figure_rows, kernel_changes
from onnxcomp.report.sections import ROWS_SHOWN, Section, cut, show
from onnxcomp.report.text import bytes_text, count_text, decibels_text, error_text, percent, printable, shortened

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.advice import Advice
    from onnxcomp.comparison import Comparison
    from onnxcomp.facts import ModelFacts
    from onnxcomp.layer_table import LayerRow

__all__ = ["comparison_sections", "print_comparison", "print_facts"]

OPERATORS_SHOWN = 10
"""Kinds of operators that are named without -v."""


# --- inspect ----------------------------------------------------------------------------------------------------------


def print_facts(facts: ModelFacts, advice: Sequence[Advice], console: Console, *, verbose: bool = False) -> None:
    """Show what is in a model, and what would suit it."""
    head = [printable(facts.path or "model"), _about(facts)]
    show(console, head, list(_fact_sections(facts, advice, verbose=verbose)))


def _about(facts: ModelFacts) -> str:
    opsets = [f"opset {facts.opset}"]
    opsets += [f"{domain} {version}" for domain, version in facts.opsets.items() if domain != "ai.onnx"]
    parts = [bytes_text(facts.size_bytes), *opsets, f"IR {facts.ir_version}", facts.producer and f"by {facts.producer}"]
    parts.append("quantized" if facts.quantized else "")
    return printable(", ".join(part for part in parts if part))


def _fact_sections(facts: ModelFacts, advice: Sequence[Advice], *, verbose: bool) -> Iterator[Section]:
    ends = [(printable(end.name), printable(end.type)) for end in facts.inputs]
    yield Section("inputs", rows=ends, left=2)
    yield Section("outputs", rows=[(printable(end.name), printable(end.type)) for end in facts.outputs], left=2)
    zeros = facts.parameters - facts.nonzeros
    stored = ", ".join(f"{bytes_text(size)} {dtype}" for dtype, size in facts.weight_bytes.items())
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in facts.mac_shapes.items())
    totals = [
        ("nodes", _operators(facts, verbose=verbose)),
        ("weights", stored or "none"),
        ("parameters", f"{count_text(facts.parameters)}, {percent(zeros / max(1, facts.parameters))} of them zero"),
        ("MACs", f"{count_text(facts.total_macs)} for {printable(shapes)}" if shapes else count_text(facts.total_macs)),
    ]
    if facts.functions:
        totals.append(("functions", f"{facts.functions} of the model's own"))
    yield Section("contents", rows=totals, left=2)
    yield _layers(facts, verbose=verbose)
    if advice:
        rows = [(item.technique, printable(f"{item.reason}; {item.estimate}{_installed(item)}")) for item in advice]
        yield Section("advice", rows=rows, left=2)
    if facts.notes:
        shown = facts.notes if verbose else facts.notes[:3]
        more = (
            f"and {len(facts.notes) - len(shown)} more notes (-v shows them)" if len(shown) < len(facts.notes) else ""
        )
        yield Section("notes", rows=[(printable(note),) for note in shown], left=1, more=more)


def _operators(facts: ModelFacts, *, verbose: bool) -> str:
    listed = [f"{count} {printable(op)}" for op, count in facts.operators.items()]
    hidden = 0 if verbose else max(0, len(listed) - OPERATORS_SHOWN)
    shown = listed[: len(listed) - hidden]
    return f"{sum(facts.operators.values())}: {', '.join(shown)}{f' and {hidden} other kinds' if hidden else ''}"


def _installed(item: Advice) -> str:
    return "" if item.available else " (no such pass is installed)"


def _layers(facts: ModelFacts, *, verbose: bool) -> Section:
    """The operators with weights: the largest part of the work and of the bytes first."""
    largest: dict[str, tuple[str, list[str], int, int, int, set[str]]] = {}
    for row in facts.weights:
        op, shapes, size, elements, zeros, types = largest.get(row.node, (row.op, [], 0, 0, 0, set()))
        if len(row.shape) > 1:
            shapes = [*shapes, "x".join(map(str, row.shape))]
        if len(row.shape) > 1 or not types:
            types = types | {row.dtype}
        largest[row.node] = (op, shapes, size + row.bytes, elements + row.elements, zeros + row.zeros, types)
    total, size_all = max(1, facts.total_macs), max(1, facts.size_bytes)
    layers = sorted(largest, key=lambda node: -(facts.macs.get(node, 0) / total + largest[node][2] / size_all))
    shown = layers if verbose else layers[:ROWS_SHOWN]
    rows = []
    for node in shown:
        op, shapes, size, elements, zeros, types = largest[node]
        macs = facts.macs.get(node)
        rows.append(
            (
                printable(node),
                printable(op),
                " ".join(shapes[:2]),
                "/".join(sorted(types)),
                bytes_text(size),
                percent(zeros / elements) if elements else "-",
                "-" if macs is None else percent(macs / total),
            )
        )
    more = f"and {len(layers) - len(shown)} smaller ones (-v shows them)" if len(shown) < len(layers) else ""
    head = ("layer", "op", "weight", "type", "bytes", "zeros", "MACs")
    bars: dict[str, list[float | None]] = {
        "bytes": [largest[node][2] for node in shown],
        "MACs": [facts.macs.get(node) for node in shown],
    }
    return Section("layers", head, rows, 4, more, bars, ("type", "zeros", "weight"))


# --- compare ----------------------------------------------------------------------------------------------------------


def print_comparison(comparison: Comparison, console: Console, *, verbose: bool = False, verdict: str = "") -> None:
    """Show how one model differs from another; `verdict` is the answer in a line, where there is one."""
    data = printable(comparison.data["description"])
    threads = f"{comparison.threads} thread{'s' * (comparison.threads != 1)}"
    told = f": {printable(verdict)}" if verdict else ""
    head = [
        f"{printable(comparison.original)} -> {printable(comparison.new)}{told}",
        f"target {comparison.target}, {data}, {threads}",
    ]
    sections = list(comparison_sections(comparison, verbose=verbose))
    show(console, head, sections, figures=figure_rows(comparison), warnings=comparison.warnings)


def comparison_sections(comparison: Comparison, *, verbose: bool, rows: int = ROWS_SHOWN) -> Iterator[Section]:
    """The outputs, kernels and layers of two models side by side."""
    if len(comparison.sqnr_db) > 1:
        outputs = [(printable(name), decibels_text(value)) for name, value in comparison.sqnr_db.items()]
        yield cut(Section("SQNR of each output", rows=outputs), verbose=verbose, rows=rows)
    yield cut(_kernels(comparison), verbose=verbose, rows=rows)
    if comparison.layers is not None:
        for section in _layer_errors(comparison.layers, verbose=verbose):
            yield cut(section, verbose=verbose, rows=rows)


def _kernels(comparison: Comparison) -> Section:
    """The kernels of both models; those that both run equally often are left out."""
    changes = kernel_changes(comparison.before, comparison.after)
    rows = [(name, str(before), str(after)) for name, before, after in changes]
    return Section("kernels", ("kernel", "before", "after"), rows, more="" if rows else "the same in both")


def _layer_errors(layers: Sequence[LayerRow], *, verbose: bool) -> Iterator[Section]:
    """The layers, the worst first, and why quantized ones do not run in int8."""

    def name(row: LayerRow) -> str:
        return printable(row.name) if verbose else shortened(printable(row.name))

    rows = [
        (
            name(row),
            printable(row.op),
            _change(row.kernel_before, row.kernel_after, row),
            _shape(row.output_shape),
            _shape(row.weight_shape),
            _change(_bytes(row.weight_bytes_before), _bytes(row.weight_bytes_after), row),
            _layer_decibels(row),
            "" if row.error is None else error_text(row.error),
        )
        for row in layers
    ]
    head = ("layer", "op", "kernel", "output", "weight", "bytes", "SQNR", "error")
    bars = {"error": [row.error for row in layers]}
    yield Section(
        "layers",
        head,
        rows,
        5,
        "" if rows else "none has a Conv, Gemm, MatMul or the like",
        bars,
        ("output", "weight", "SQNR", "bytes"),
    )
    missed = [(name(row), printable(row.reason)) for row in layers if row.reason]
    yield Section("quantized layers without an int8 kernel", rows=missed, left=2)


def _layer_decibels(row: LayerRow) -> str:
    if row.where != "both":
        return f"not in both: {row.where} only"
    if row.sqnr_db is None:
        return "exact" if row.error == 0 else "not in both"  # infinity is null in JSON
    return decibels_text(row.sqnr_db)


def _change(before: str | None, after: str | None, row: LayerRow) -> str:
    """What was and what became of it, in as few words as tell it."""
    if row.where != "both":
        return after or before or "-"
    return before or "-" if before == after else f"{before or '-'} -> {after or '-'}"


def _bytes(size: int | None) -> str | None:
    return None if size is None else bytes_text(size)


def _shape(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"
