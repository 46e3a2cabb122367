"""Which sessions the worker keeps."""

from pathlib import Path
from types import SimpleNamespace

import onnx
import psutil
import pytest

from onnxcomp.runtime.sessions import Sessions
from tests.models import mlp_model


@pytest.mark.parametrize(("resident", "reused"), [(1, True), (20, False)])
def test_sessions_of_large_models_give_way_to_the_one_that_writes_the_optimized_graph(
    resident: int, reused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "model.onnx")
    onnx.save(mlp_model((8, 8)), path)
    sessions = Sessions(1, {})
    kept = sessions.get(path).session
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=24))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=resident))

    sessions.write(path, tmp_path / "optimized.onnx", sessions.options())

    assert (sessions.get(path).session is kept) == reused
