"""The lines of a package's README in the languages of apps: compiled against, or run with, what apps use."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from onnxcomp import deploy
from onnxcomp.verification.environments.android import installing
from tests.models import mlp_model

pytestmark = pytest.mark.slow

USE = """inline fun <T : AutoCloseable, R> T.use(block: (T) -> R): R {
    try { return block(this) } finally { close() }
}
"""
"""What Kotlin's library has from 1.8 on; Debian's compiler is older."""


@pytest.fixture(scope="module")
def java_api(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes of ONNX Runtime for Android, out of the build that the layer `android` runs."""
    folder = tmp_path_factory.mktemp("api")
    with tarfile.open(installing.fetch(folder)) as package:
        member = package.extractfile(installing.ARCHIVE)
        assert member is not None
        (folder / "onnxruntime.aar").write_bytes(member.read())
    with zipfile.ZipFile(folder / "onnxruntime.aar") as archive:
        archive.extract("classes.jar", folder)
    return folder / "classes.jar"


@pytest.mark.skipif(not shutil.which("kotlinc"), reason="there is no kotlinc; Debian's package is kotlin")
@pytest.mark.parametrize("target", ["arm64", "xnnpack", "nnapi", "qnn"])
def test_the_kotlin_lines_compile_against_the_android_build(java_api, tmp_path, target):
    readme = (deploy(mlp_model(), target, tmp_path / "app").folder / "README.md").read_text()
    code = re.findall(r"```kotlin\n(.*?)```", readme, re.DOTALL)
    assert len(code) == 1
    (tmp_path / "load.kt").write_text(code[0])
    (tmp_path / "use.kt").write_text(USE)
    command = ["kotlinc", "load.kt", "use.kt", "-cp", str(java_api), "-d", "out.jar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "out.jar") as classes:
        assert "Model.class" in classes.namelist()
