"""The graph before and after: how many nodes of each operator, and the nodes around each node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxcomp.report.page.kinds import KINDS, kind_of
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from onnxcomp.ledger import Report

__all__ = ["MOST_NODES", "Operator", "graph_data", "graph_summary", "left_out", "operator_chart", "operators"]

MOST_NODES = 10_000
"""Nodes of each graph that the page holds. Of a larger one it holds those that changed, and what is next to them."""

MOST_BARS = 30
"""Operators in the chart; the table has all."""

SIDES = ("before", "after")
INSIDE = {"body_operators": "in bodies", "function_operators": "in functions"}

Table = Mapping[str, Any]
"""One graph, as `onnxcomp.graph_table` lists it."""


@dataclass(frozen=True)
class Operator:
    """How many nodes of an operator there are. `inside`: how many of those are in bodies or functions, in words."""

    name: str
    kind: str
    before: int
    after: int
    inside: tuple[str, str]

    @property
    def change(self) -> str:
        """What became of them: "new", "gone", "+4", "-2", or nothing."""
        if self.before == self.after:
            return ""
        return "new" if not self.before else "gone" if not self.after else f"{self.after - self.before:+d}"

    @property
    def number(self) -> int:
        """The place of its kind."""
        return list(KINDS).index(self.kind)


def operators(report: Report) -> list[Operator]:
    """The operators of both graphs, by kind, the most frequent first."""
    if report.graph is None:
        return []
    tables = [report.graph[side] for side in SIDES]
    counts = [_counts(table) for table in tables]
    found = [
        Operator(
            printable(name),
            kind_of(name),
            counts[0].get(name, 0),
            counts[1].get(name, 0),
            (_inside(tables[0], name), _inside(tables[1], name)),
        )
        for name in dict.fromkeys([*counts[0], *counts[1]])
    ]
    return sorted(found, key=lambda each: (each.number, -max(each.before, each.after), each.name))


def _counts(table: Table) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in ("operators", *INSIDE):
        for name, count in table[part].items():
            counts[name] = counts.get(name, 0) + count
    return counts


def _inside(table: Table, name: str) -> str:
    return ", ".join(f"{table[part][name]:,} {words}" for part, words in INSIDE.items() if table[part].get(name))


def graph_summary(found: Sequence[Operator]) -> str:
    """How many nodes there are before and after, and of which operators there are others now.

    Example:
        >>> none = ("", "")
        >>> graph_summary([Operator("Conv", "compute", 2, 2, none), Operator("Relu", "elementwise", 2, 0, none)])
        '4 nodes before, 2 after. Gone: Relu (2).'
    """
    before, after = sum(each.before for each in found), sum(each.after for each in found)
    parts = [f"{before:,} node{'' if before == 1 else 's'} before, {after:,} after."]
    for title, chosen in (
        ("New", [f"{each.name} ({each.after:,})" for each in found if each.change == "new"]),
        ("Gone", [f"{each.name} ({each.before:,})" for each in found if each.change == "gone"]),
        ("Changed", [f"{each.name} ({each.change})" for each in found if each.change[:1] in {"+", "-"}]),
    ):
        parts += [f"{title}: {', '.join(chosen)}."] if chosen else []
    return " ".join(parts if len(parts) > 1 else [*parts, "As many of each operator."])


def operator_chart(found: Sequence[Operator]) -> list[dict[str, Any]]:
    """The chart of the counts: the operators that there are most of, and first of all those whose number changed."""
    if not found:
        return []
    ranked = sorted(found, key=lambda each: (not each.change, -max(each.before, each.after)))[:MOST_BARS]
    shown = [each for each in found if each in set(ranked)]
    return [
        {
            "bars": [[each.name, each.number, each.before, each.after, each.change] for each in shown],
            "kinds": list(KINDS),
            "hidden": len(found) - len(shown),
        }
    ]


# --- nodes ------------------------------------------------------------------------------------------------------------


def graph_data(report: Report) -> dict[str, Any] | None:
    """Both graphs as the page holds them: texts once and without what they share, nodes as small numbers.

    Returns:
        None without graphs. Else `names`, sorted: for each how many letters it shares with the one before, and the
        place of the rest in `rests`; `ops` as pairs of name and kind; `kinds` and `types`; and each side, as `_side`
        writes it.
    """
    if report.graph is None:
        return None
    tables = [report.graph[side] for side in SIDES]
    chosen = [_chosen(*tables), _chosen(*tables[::-1])]
    names: dict[str, str] = {}
    for table, nodes in zip(tables, chosen, strict=True):
        used = {table["tensors"][place] for node in nodes for place in _tensors(node)}
        names.update((name, printable(name)) for name in used.union(node["name"] for node in nodes))
    texts = sorted(set(names.values()))
    rank = {text: index for index, text in enumerate(texts)}
    numbers = {name: rank[text] for name, text in names.items()}
    ops, types, rests = _Numbers(), _Numbers(), _Numbers()
    sides = {
        side: _side(table, nodes, numbers, ops, types)
        for side, table, nodes in zip(SIDES, tables, chosen, strict=True)
    }  # fmt: skip
    return {
        "names": [part for shared, rest in _front_coded(texts) for part in (shared, rests[rest])],
        "rests": list(rests),
        "ops": [[printable(op), list(KINDS).index(kind_of(op))] for op in ops],
        "kinds": list(KINDS),
        "types": [printable(text) for text in types],
        **sides,
    }


def left_out(report: Report) -> list[str]:
    """What the page does not have of the graphs, in sentences."""
    if report.graph is None:
        return []
    told = []
    if any(report.graph[side][part] for side in SIDES for part in INSIDE):
        told.append("Nodes inside of bodies and functions are counted, and not listed here.")
    sizes = [len(report.graph[side]["nodes"]) for side in SIDES]
    if max(sizes) > MOST_NODES:
        told.append(
            f"Of a graph of more than {MOST_NODES:,} nodes the page has those that changed and what is next to them, "
            f"{MOST_NODES:,} at most. The JSON report has all."
        )
    return told


class _Numbers(dict[str, int]):
    """A number for each text, in the order in which they are asked for."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _side(
    table: Table, nodes: Sequence[Table], numbers: Mapping[str, int], ops: _Numbers, types: _Numbers
) -> dict[str, Any]:
    """One graph. Tensors are numbered in the order in which nodes name them, so that near ones have near numbers.

    Returns:
        `forms`: operator and how many inputs, outputs and captured tensors, each combination once. `nodes`: for each
        the step from the last one's name to its own, its form, and its tensors, as how many came since it; 0 is a new
        one, and -1 none. `tensors`: the steps from name to name. `about`: twice the type, and 1 more for a constant.
        `inputs` and `outputs`: which tensors these are. `all`: how many nodes the graph has.
    """
    forms: dict[tuple[int, ...], int] = {}
    here: dict[int, int] = {}
    flat: list[int] = []
    last = 0
    for node in nodes:
        parts = (node["inputs"], node["outputs"], node.get("captured", ()))
        form = forms.setdefault((ops[node["op"]], *map(len, parts)), len(forms))
        flat += [numbers[node["name"]] - last, form]
        last = numbers[node["name"]]
        for place in (place for part in parts for place in part):
            flat.append(-1 if place is None else len(here) - here.setdefault(place, len(here)))
    constants = set(table["constants"])
    named = [numbers[table["tensors"][place]] for place in here]
    return {
        "forms": [list(form) for form in forms],
        "nodes": flat,
        "tensors": [number - before for before, number in zip([0, *named], named, strict=False)],
        "about": [2 * types[table["types"][table["tensor_types"][place]]] + (place in constants) for place in here],
        **{key: [here[place] for place in table[key] if place in here] for key in ("inputs", "outputs")},
        "all": len(table["nodes"]),
    }


def _tensors(node: Table) -> Iterator[int]:
    for part in (node["inputs"], node["outputs"], node.get("captured", ())):
        yield from (place for place in part if place is not None)


def _chosen(table: Table, other: Table) -> Sequence[Table]:
    """The nodes of a graph that the page holds: all, or those that the other has otherwise and their neighbours."""
    nodes: Sequence[Table] = table["nodes"]
    if len(nodes) <= MOST_NODES:
        return nodes
    known = dict(_signatures(other))
    changed = {index for index, (name, made) in enumerate(_signatures(table)) if known.get(name) != made}
    near = {tensor for index in changed for tensor in _tensors(nodes[index])}
    near -= set(table["constants"])  # two nodes that have only a weight in common are not next to each other
    wanted = [node for index, node in enumerate(nodes) if index in changed or not near.isdisjoint(_tensors(node))]
    return wanted[:MOST_NODES]


def _signatures(table: Table) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What each node is, by its name: the operator and the names of what it reads and writes."""
    tensors = table["tensors"]
    for node in table["nodes"]:
        yield node["name"], (node["op"], *(tensors[place] for place in _tensors(node)))


def _front_coded(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """How many letters each of sorted texts shares with the one before, and the rest of it.

    Example:
        >>> list(_front_coded(["/a/Conv", "/a/Relu", "/b"]))
        [(0, '/a/Conv'), (3, 'Relu'), (1, 'b')]
    """
    last = ""
    for text in texts:
        pairs = enumerate(zip(last, text, strict=False))
        shared = next((index for index, (one, other) in pairs if one != other), min(len(last), len(text)))
        yield shared, text[shared:]
        last = text
