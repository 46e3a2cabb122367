"""What `inspect` and `compare` print: tables, with rich on a terminal and as plain text anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcomp.report.plain import plain_table
from onnxcomp.report.rows import Row, figure_rows
from onnxcomp.report.text import bytes_text, count_text, error_text, percent, printable, shortened

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.advice import Advice
    from onnxcomp.comparison import Comparison
    from onnxcomp.facts import ModelFacts
    from onnxcomp.layer_table import LayerRow

__all__ = ["print_comparison", "print_facts"]

ROWS_SHOWN = 20
"""Lines of a table that are shown without -v."""

OPERATORS_SHOWN = 10
"""Kinds of operators that are named without -v."""


@dataclass(frozen=True)
class _Section:
    """A table, or lines below a title. Columns after the first `left` are numbers, aligned to the right."""

    title: str
    head: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    left: int = 1
    more: str = ""


# --- inspect ----------------------------------------------------------------------------------------------------------


def print_facts(facts: ModelFacts, advice: Sequence[Advice], console: Console, *, verbose: bool = False) -> None:
    """Show what is in a model, and what would suit it."""
    head = [printable(facts.path or "model"), _about(facts)]
    _show(console, head, list(_fact_sections(facts, advice, verbose=verbose)))


def _about(facts: ModelFacts) -> str:
    opsets = [f"opset {facts.opset}"]
    opsets += [f"{domain} {version}" for domain, version in facts.opsets.items() if domain != "ai.onnx"]
    parts = [bytes_text(facts.size_bytes), *opsets, f"IR {facts.ir_version}", facts.producer and f"by {facts.producer}"]
    parts.append("quantized" if facts.quantized else "")
    return printable(", ".join(part for part in parts if part))


def _fact_sections(facts: ModelFacts, advice: Sequence[Advice], *, verbose: bool) -> Iterator[_Section]:
    ends = [(printable(end.name), printable(end.type)) for end in facts.inputs]
    yield _Section("inputs", rows=ends, left=2)
    yield _Section("outputs", rows=[(printable(end.name), printable(end.type)) for end in facts.outputs], left=2)
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
    yield _Section("contents", rows=totals, left=2)
    yield _layers(facts, verbose=verbose)
    if advice:
        rows = [(item.technique, printable(f"{item.reason}; {item.estimate}{_installed(item)}")) for item in advice]
        yield _Section("advice", rows=rows, left=2)
    if facts.notes:
        shown = facts.notes if verbose else facts.notes[:3]
        more = (
            f"and {len(facts.notes) - len(shown)} more notes (-v shows them)" if len(shown) < len(facts.notes) else ""
        )
        yield _Section("notes", rows=[(printable(note),) for note in shown], left=1, more=more)


def _operators(facts: ModelFacts, *, verbose: bool) -> str:
    listed = [f"{count} {printable(op)}" for op, count in facts.operators.items()]
    hidden = 0 if verbose else max(0, len(listed) - OPERATORS_SHOWN)
    shown = listed[: len(listed) - hidden]
    return f"{sum(facts.operators.values())}: {', '.join(shown)}{f' and {hidden} other kinds' if hidden else ''}"


def _installed(item: Advice) -> str:
    return "" if item.available else " (no such pass is installed)"


def _layers(facts: ModelFacts, *, verbose: bool) -> _Section:
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
    return _Section("layers", ("layer", "op", "weight", "type", "bytes", "zeros", "MACs"), rows, 4, more)


# --- compare ----------------------------------------------------------------------------------------------------------


def print_comparison(comparison: Comparison, console: Console, *, verbose: bool = False) -> None:
    """Show how one model differs from another."""
    data = printable(comparison.data["description"])
    threads = f"{comparison.threads} thread{'s' * (comparison.threads != 1)}"
    head = [
        f"{printable(comparison.original)} -> {printable(comparison.new)}",
        f"target {comparison.target}, {data}, {threads}",
    ]
    sections = []
    if len(comparison.sqnr_db) > 1:
        rows = [(printable(name), _decibels(value)) for name, value in comparison.sqnr_db.items()]
        sections.append(_cut(_Section("SQNR of each output", rows=rows), verbose=verbose))
    sections.append(_cut(_kernels(comparison), verbose=verbose))
    if comparison.layers is not None:
        sections += [_cut(section, verbose=verbose) for section in _layer_errors(comparison.layers, verbose=verbose)]
    _show(console, head, sections, figures=figure_rows(comparison), warnings=comparison.warnings)


def _decibels(value: float) -> str:
    return "exact" if value == float("inf") else "no match" if value == float("-inf") else f"{value:.1f} dB"


def _kernels(comparison: Comparison) -> _Section:
    """The kernels of both models; those that both run equally often are left out."""
    old, new = comparison.before.kernels, comparison.after.kernels
    names = [*old, *(name for name in new if name not in old)]
    rows = [
        (printable(name), str(old.get(name, 0)), str(new.get(name, 0)))
        for name in names
        if old.get(name, 0) != new.get(name, 0)
    ]
    return _Section("kernels", ("kernel", "before", "after"), rows, more="" if rows else "the same in both")


def _layer_errors(layers: Sequence[LayerRow], *, verbose: bool) -> Iterator[_Section]:
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
    yield _Section("layers", head, rows, 5, "" if rows else "none has a Conv, Gemm, MatMul or the like")
    missed = [(name(row), printable(row.reason)) for row in layers if row.reason]
    yield _Section("quantized layers without an int8 kernel", rows=missed, left=2)


def _layer_decibels(row: LayerRow) -> str:
    if row.where != "both":
        return f"not in both: {row.where} only"
    return "not in both" if row.sqnr_db is None else _decibels(row.sqnr_db)


def _change(before: str | None, after: str | None, row: LayerRow) -> str:
    """What was and what became of it, in as few words as tell it."""
    if row.where != "both":
        return after or before or "-"
    return before or "-" if before == after else f"{before or '-'} -> {after or '-'}"


def _bytes(size: int | None) -> str | None:
    return None if size is None else bytes_text(size)


def _shape(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _cut(section: _Section, *, verbose: bool) -> _Section:
    hidden = 0 if verbose else max(0, len(section.rows) - ROWS_SHOWN)
    if not hidden:
        return section
    more = f"and {hidden} more (-v shows them)"
    return _Section(section.title, section.head, section.rows[:ROWS_SHOWN], section.left, more)


# --- showing ----------------------------------------------------------------------------------------------------------


def _show(
    console: Console,
    head: Sequence[str],
    sections: Sequence[_Section],
    *,
    figures: Sequence[Row] = (),
    warnings: Sequence[str] = (),
) -> None:
    sections = [section for section in sections if section.rows or section.more]
    if console.is_terminal:
        _show_rich(console, head, sections, figures, warnings)
        return
    lines = [*head, ""]
    if figures:
        lines += [*plain_table(figures), ""]
    for section in sections:
        lines += [section.title, *_plain(section), *([f"  {section.more}"] if section.more else []), ""]
    lines += [f"warning: {printable(text)}" for text in warnings]
    text = "\n".join(lines).rstrip("\n") + "\n"
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    console.file.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _plain(section: _Section) -> Iterator[str]:
    table = [section.head, *section.rows] if section.head and section.rows else section.rows
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))] if table else []
    for line in table:
        cells = [f"{cell:<{width}}" if index < section.left else f"{cell:>{width}}"
                 for index, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        yield f"  {'  '.join(cells)}".rstrip()


def _show_rich(
    console: Console,
    head: Sequence[str],
    sections: Sequence[_Section],
    figures: Sequence[Row],
    warnings: Sequence[str],
) -> None:
    from rich.table import Table
    from rich.text import Text

    from onnxcomp.report.terminal import figures_table

    console.print(Text(head[0].replace(" -> ", " → "), "bold"))
    console.print(Text("\n".join(head[1:]), "dim"))
    if figures:
        console.print(figures_table(figures))
    else:
        console.print()
    for section in sections:
        table = Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=bool(section.head)
        )
        for index in range(len(section.rows[0]) if section.rows else 0):
            title = section.head[index] if section.head else ""
            table.add_column(title, justify="left" if index < section.left else "right", overflow="fold")
        for row in section.rows:
            table.add_row(
                *(Text(cell, "bold" if index == 0 and section.left > 1 else "") for index, cell in enumerate(row))
            )
        console.print(Text(section.title, "cyan"))
        if section.rows:
            console.print(table)
        if section.more:
            console.print(Text(section.more, "dim"))
        console.print()
    for text in warnings:
        console.print(Text(f"⚠ {printable(text)}", "yellow"))
