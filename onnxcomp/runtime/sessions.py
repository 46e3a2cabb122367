"""Making and keeping sessions, in the worker. Every session in this package is made here."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import psutil

from onnxcomp.runtime.census import graphs, node_names
from onnxcomp.skeleton import load_skeleton

_KEPT = 2


@dataclass(frozen=True)
class Loaded:
    """A session and how long it took to make."""

    session: Any
    load_ms: float


class Sessions:
    """The sessions in use, the least recently used one given up first.

    Args:
        threads: Threads that one operator may use.
        config: Session configuration entries for every session.
        disabled: Names of ONNX Runtime's graph optimizers that are left out.
    """

    def __init__(self, threads: int, config: Mapping[str, str], disabled: Sequence[str] = ()) -> None:
        self._threads = threads
        self._config = config
        self._disabled = list(disabled)
        self._kept: OrderedDict[tuple[Any, ...], Loaded] = OrderedDict()

    def options(self, *, optimize: bool = True) -> Any:
        """The same options for every session, as an ``onnxruntime.SessionOptions``."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if self._threads > 1:
            # Threads that spin between operators take the machine from everyone else, and from the next model timed.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for key, value in self._config.items():
            options.add_session_config_entry(key, value)
        return options

    def make(self, model: str | bytes, options: Any) -> Any:
        """Make a session that is not kept."""
        # Large models are not worth keeping: a new one must fit beside what is left.
        if psutil.Process().memory_info().rss > psutil.virtual_memory().total / 4:
            self._kept.clear()
        return onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=self._disabled
        )

    def get(self, path: str, *, optimize: bool = True, observed: tuple[str, ...] = ()) -> Loaded:
        """The session of a model file; made now unless it is kept and the file has not changed.

        Args:
            path: An absolute path.
            optimize: False turns all graph optimizations off.
            observed: The tensors to give instead of the model's outputs; what they do not need is not run.
        """
        status = Path(path).stat() if Path(path).is_file() else None
        stamp = status and (status.st_mtime_ns, status.st_size, status.st_ino)
        key = (path, stamp, optimize, observed)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        while len(self._kept) >= _KEPT:
            self._kept.popitem(last=False)
        options = self.options(optimize=optimize)
        start = time.perf_counter()
        session = self._make_observed(path, observed, options) if observed else self.make(path, options)
        self._kept[key] = loaded = Loaded(session, (time.perf_counter() - start) * 1e3)
        return loaded

    def make_named(self, path: str, options: Any) -> Any:
        """Make a session that is not kept, of a model whose nodes all have the names of `node_names`."""
        model = load_skeleton(path)
        nodes = [node for graph in graphs(model.graph) for node in graph.node]
        renamed = False
        for node, name in zip(nodes, node_names(model.graph), strict=True):
            renamed |= node.name != name
            node.name = name
        return self.make_edited(model, path, options) if renamed else self.make(path, options)

    def write(self, path: str, output: Path, options: Any) -> None:
        """Write the optimized graph of a model, whose nodes all have the names of `node_names`.

        Args:
            path: The model file.
            output: An .ort file (ONNX Runtime's own format), or an .onnx file whose weights come to lie beside it.
            options: The session's.
        """
        options.optimized_model_filepath = str(output)
        options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of all weights, not written
        if output.suffix == ".ort":
            options.add_session_config_entry("session.save_model_format", "ORT")
            self.make(path, options)
            return
        # In a file of their own, so that a model beyond protobuf's 2 GB can be written.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{output.stem}.bin"
        )
        self.make_named(path, options)

    def make_edited(self, model: onnx.ModelProto, path: str, options: Any) -> Any:
        """Make a session of an edited model, whose external weights stay in the folder of `path`, its file."""
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(path).parent))
        return self.make(model.SerializeToString(), options)

    def _make_observed(self, path: str, names: tuple[str, ...], options: Any) -> Any:
        model = load_skeleton(path)
        declared = {output.name: output for output in model.graph.output}
        # A name is enough: ONNX Runtime infers the type.
        outputs = [declared.get(name, onnx.ValueInfoProto(name=name)) for name in names]
        keep_needed(model.graph, names)
        model.graph.output.extend(outputs)
        return self.make_edited(model, path, options)


def keep_needed(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Remove the outputs of a graph, and the nodes that make none of some tensors."""
    wanted, found = set(names), []
    for node in reversed(graph.node):
        if wanted.isdisjoint(node.output):
            continue
        found.append(node)
        wanted.update(node.input)
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                for inner in graphs(body):  # their own tensors are among these, which does no harm
                    wanted.update(info.name for info in inner.output)
                    wanted.update(name for each in inner.node for name in each.input)
    del graph.output[:], graph.node[:]
    graph.node.extend(reversed(found))
