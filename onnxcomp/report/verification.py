"""What `verify` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from onnxcomp.report.sections import Section, cut, show
from onnxcomp.report.text import duration_text, error_text, percent, printable, signed

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.lints import Finding
    from onnxcomp.verification import Difference, LayerResult, Verification

__all__ = ["finding_sections", "print_verification"]

PLACES_SHOWN = 3
"""Places of one lint that are named without -v."""


def print_verification(found: Verification, console: Console, *, verbose: bool = False) -> None:
    """Show what `verify` found."""
    head = [
        f"{printable(found.new)} for {found.target}: {_verdict(found)}",
        f"against {printable(found.original)}, {printable(found.data['description'])}, {duration_text(found.seconds)}",
    ]
    show(console, head, list(_sections(found, verbose=verbose)), warnings=found.warnings)


def _verdict(found: Verification) -> str:
    """The whole in a line: what failed, else on which layers it holds, and which were not run."""
    failed = _names(found, "failed")
    errors = dict.fromkeys(finding.id for finding in found.findings if finding.severity == "error")
    if failed or errors:
        told = [f"layer {name}" for name in failed] + [f"lint {name}" for name in errors]
        return f"FAILED: {', '.join(told)}"
    skipped = _names(found, "skipped")
    ran = [name for name in _names(found, "ran") if name not in skipped]
    return f"verified on {', '.join(ran) or 'nothing'}" + (f"; NOT on {', '.join(skipped)}" if skipped else "")


def _names(found: Verification, status: str) -> list[str]:
    return list(dict.fromkeys(layer.name for layer in found.layers if layer.status == status))


def _sections(found: Verification, *, verbose: bool) -> Iterator[Section]:
    yield Section("loss against the original, on all samples", rows=list(_loss(found)), left=2)
    columns = ("layer", "what ran", "status", "to the original", "to the CPU here", "same class", "samples")
    yield Section("layers", columns, [_layer(layer) for layer in found.layers], 3)
    reasons = [(layer.name, layer.what, printable(layer.reason)) for layer in found.layers if layer.reason]
    yield Section("why", rows=reasons, left=3)
    yield Section("nodes by execution provider", rows=list(_nodes(found.layers, verbose=verbose)), left=4)
    differing = [
        (layer.name, printable(node.node), node.op, f"{node.steps} step{'s' * (node.steps != 1)}", percent(node.share))
        for layer in found.layers
        for node in layer.differing
    ]
    head = ("layer", "node", "op", "differs by", "of its values")
    yield cut(Section("nodes where a difference to the CPU here begins", head, differing, 3), verbose=verbose)
    yield Section("operators that a provider has, by ONNX Runtime's lists", rows=list(_coverage(found)), left=2)
    yield from finding_sections(found.findings, verbose=verbose)
    yield Section("cannot be verified here", rows=[(printable(text),) for text in found.unverified])


def _loss(found: Verification) -> Iterator[tuple[str, str]]:
    quality = found.quality
    if quality["drop"] is not None:
        interval = quality["interval"]
        spread = f", 95% interval {signed(interval[0])} to {signed(interval[1])}" if interval else ""
        yield "drop" if quality["kind"] == "metric" else "drop, expected", signed(quality["drop"]) + spread
    if quality["agreement"] is not None:
        yield "same class", percent(quality["agreement"])
    yield "relative error", error_text(quality["error"])
    yield "SQNR", _decibels(quality["sqnr_db"])


def _layer(layer: LayerResult) -> tuple[str, ...]:
    cpu = layer.versus_cpu
    return (
        layer.name,
        printable(layer.what),
        layer.status,
        _gap(layer.versus_original),
        _gap(cpu),
        "-" if cpu is None or cpu.agreement is None else percent(cpu.agreement),
        str(cpu.samples) if cpu else "-",
    )


def _gap(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return "equal bits" if difference.equal else _decibels(difference.sqnr_db)


def _decibels(value: float) -> str:
    return "no error" if math.isinf(value) and value > 0 else f"{value:.1f} dB"


def _nodes(layers: Sequence[LayerResult], *, verbose: bool) -> Iterator[tuple[str, str, str, str]]:
    for layer in layers:
        for provider, operators in layer.nodes.items():
            listed = [f"{count} {op.rpartition(':')[2]}" for op, count in operators.items()]
            shown = listed if verbose else listed[:6]
            more = f" and {len(listed) - len(shown)} other kinds" if len(shown) < len(listed) else ""
            yield layer.name, layer.what, f"{provider} {sum(operators.values())}", ", ".join(shown) + more


def _coverage(found: Verification) -> Iterator[tuple[str, str]]:
    for covered in found.coverage:
        if covered.reason:
            yield covered.provider, printable(covered.reason)
            continue
        lacks = f"; lacks {', '.join(op.removeprefix('ai.onnx:') for op in covered.unsupported)}"
        parts = f" in {covered.partitions} part{'s' * (covered.partitions != 1)}" if covered.partitions else ""
        told = f"{covered.supported} of {covered.nodes} nodes{parts}"
        yield covered.provider, told + (lacks if covered.unsupported else "")


def finding_sections(findings: Sequence[Finding], *, verbose: bool) -> Iterator[Section]:
    """What lints found: one section a lint, with its places, what comes of it, and what to do."""
    for name, group in groupby(findings, key=lambda finding: finding.id):
        places = list(group)
        shown = places if verbose else places[:PLACES_SHOWN]
        rows = [(printable(place.where), printable(place.what)) for place in shown]
        if len(shown) < len(places):
            rows.append(("...", f"and {len(places) - len(shown)} more (-v shows them)"))
        first = places[0]
        yield Section(f"{first.severity}: {name}", rows=[*rows, ("why", first.why), ("fix", first.fix)], left=2)
