"""The lines of a package's README in the languages of apps: compiled against, or run with, what apps use."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from onnxcomp import deploy
from onnxcomp.verification.environments.android import installing
from onnxcomp.verification.environments.web import Web
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
    assert done.returncode == 0, done.stderr[-500:]
    with zipfile.ZipFile(tmp_path / "out.jar") as classes:
        assert "Model.class" in classes.namelist()


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node")
def test_the_javascript_lines_run_and_give_what_is_expected(tmp_path):
    web = Web()
    web.install(lambda _: None)
    package = deploy(mlp_model(), "web", tmp_path / "app")
    readme = (package.folder / "README.md").read_text()
    [code] = re.findall(r"```js\n(.*?)```", readme, re.DOTALL)
    library = web.folder / "ort.wasm.min.mjs"
    assert code.count('"onnxruntime-web"') == 1
    (package.folder / "load.mjs").write_text(code.replace('"onnxruntime-web"', json.dumps(library.as_uri())))
    sample = package.manifest["samples"][0]
    source, result = (next(iter(sample[side].values()))["file"] for side in ("inputs", "outputs"))
    (package.folder / "run.mjs").write_text(
        'import { readFileSync } from "node:fs";\n'
        f"import {{ env }} from {json.dumps(library.as_uri())};\n"
        'import { Model } from "./load.mjs";\n'
        "env.wasm.numThreads = 1; // the browser's build counts cores in a way that Node has not\n"
        "globalThis.fetch = async (path) => new Response(readFileSync(path)); // there is no server here\n"
        "const numbers = (path) => new Float32Array(new Uint8Array(readFileSync(path)).buffer);\n"
        f"const model = await Model.load();\nconst found = await model.run(numbers({json.dumps(source)}));\n"
        f"const expected = numbers({json.dumps(result)});\n"
        "const gap = Math.max(...expected.map((value, index) => Math.abs(value - found[index])));\n"
        "if (!(found.length === expected.length && gap < 1e-4)) throw new Error(`differs by ${gap}`);\n"
    )
    done = subprocess.run(
        ["node", "run.mjs"], cwd=package.folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
