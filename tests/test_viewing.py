"""`onnxcomp view`: netron serves a model to this machine, and its page is kept from the network."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import struct
import subprocess
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import netron
import netron.server
import onnx
import pytest
from click.testing import CliRunner
from playwright.sync_api import sync_playwright

from onnxcomp import viewing
from onnxcomp.cli import main
from onnxcomp.errors import ModelError, OptionError, RequirementError
from onnxcomp.viewing import POLICY, serve
from tests.models import external_model, mlp_model
from tests.test_demo_runs import CHROMIUM, QUIET


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    netron.stop()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(mlp_model(), path)
    return path


def listening() -> list[tuple[str, int]]:
    """Where netron's servers listen; one that was stopped may still have its thread for a moment."""
    servers = [thread.server for thread in netron.server._threads()]
    return [server.socket.getsockname() for server in servers if server.fileno() != -1]


def got(address: str, path: str = "/", **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    """What the server answers to a GET."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def test_netrons_page_names_the_model_and_its_bytes_are_those_of_the_file(model):
    address = serve(model)
    status, page, _ = got(address)

    assert status == 200
    assert b'<meta name="file" content="/data/model.onnx">' in page
    assert got(address, "/data/model.onnx")[1] == model.read_bytes()


def test_the_browser_is_told_to_ask_nobody_else(model):
    _, _, headers = got(serve(model))
    assert headers["Content-Security-Policy"] == POLICY
    assert "connect-src 'self' data: blob:;" in POLICY
    assert "default-src 'self';" in POLICY
    assert headers["Set-Cookie"].startswith("consent=")


def test_it_listens_to_this_machine_only(model):
    address = serve(model)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
    assert listening() == [("127.0.0.1", urlsplit(address).port)]


def test_a_model_behind_a_link_is_given_out_with_its_external_data(tmp_path):
    store, shelf = tmp_path / "store", tmp_path / "shelf"
    store.mkdir()
    shelf.mkdir()
    real = external_model(store)
    link = shelf / "link.onnx"
    link.symlink_to(real)

    address = serve(link)

    for file in store.iterdir():
        assert got(address, f"/data/{file.name}")[1] == file.read_bytes()


def test_what_is_refused_or_broken_off_prints_no_traceback(model, capfd):
    address = serve(model)
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request("POST", "/")
    assert connection.getresponse().status == 501
    connection.close()
    with socket.create_connection(("127.0.0.1", urlsplit(address).port or 0)) as broken:
        broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a closed page
        broken.sendall(b"GET /")
    assert got(address)[0] == 200

    assert "Traceback" not in capfd.readouterr().err


def test_other_files_of_the_folder_are_not_given_out(model):
    (model.parent / "secret.txt").write_text("secret")
    address = serve(model)
    assert got(address, "/data/secret.txt")[:2] == (404, b"")
    assert got(address, "/data/./secret.txt")[0] == 404
    assert got(address, "/data/%2e/secret.txt")[0] == 404


def test_external_data_are_given_out(tmp_path):
    path = external_model(tmp_path)
    [data] = [file for file in tmp_path.iterdir() if file != path]
    assert got(serve(path), f"/data/{data.name}")[1] == data.read_bytes()


def test_a_page_from_elsewhere_whose_name_points_here_gets_nothing(model):
    address = serve(model)
    assert got(address, "/data/model.onnx", Host="elsewhere.example")[:2] == (403, b"")
    assert got(address, "/data/model.onnx", Host=f"localhost:{urlsplit(address).port}")[0] == 200


def test_a_name_of_a_file_means_nothing_in_the_page_or_in_an_address(model):
    odd = model.rename(model.with_name('a"><b>#?%41.onnx'))
    address = serve(odd)
    _, page, _ = got(address)
    [file] = re.findall(rb'<meta name="file" content="([^"]*)">', page)

    assert b"<b>" not in page
    assert got(address, file.decode())[1] == odd.read_bytes()


def test_a_port_that_is_taken_is_told(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"port {port} of 127.0.0.1: Address already in use; give another"):
            serve(model, port=port)
    assert serve(model, port=port).endswith(f":{port}")


@pytest.mark.parametrize(
    ("name", "told"),
    [("none.onnx", "expected a model file, got none"), ("broken.onnx", "is not an ONNX model"),
     (".", "expected a model file, got a folder")],
)  # fmt: skip
def test_what_is_no_model_is_told_in_one_line(tmp_path, name, told):
    (tmp_path / "broken.onnx").write_bytes(b"\x08nothing")
    with pytest.raises(ModelError, match=told):
        serve(tmp_path / name)
    assert listening() == []


def test_a_netron_whose_answers_do_not_carry_the_policy_is_not_used(model, monkeypatch):
    monkeypatch.setattr(viewing, "HEADERS", ())
    with pytest.raises(RequirementError, match=f"netron {netron.__version__} cannot be kept from the network"):
        serve(model)
    assert listening() == []


def test_a_netron_of_another_make_is_not_used(model, monkeypatch):
    monkeypatch.delattr(netron.server, "_HTTPRequestHandler")
    with pytest.raises(RequirementError, match="cannot be kept from the network"):
        serve(model)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), ("--no-browser",)])
def test_the_command_opens_the_browser_unless_told_not_to(model, monkeypatch, extra):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(viewing, "wait", lambda: None)
    result = CliRunner().invoke(main, ["view", str(model), *extra])
    address = result.output.split()[1]

    assert result.exit_code == 0
    assert result.output == f"{model}: {address} (Ctrl-C ends it)\n"
    assert opened == ([] if extra else [address])


def test_without_netron_the_command_says_how_to_install_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "netron", None)
    result = CliRunner().invoke(main, ["view", str(model)])
    assert (result.exit_code, result.output) == (1, "Error: viewing needs netron: pip install 'onnxcomp[view]'\n")


def test_ctrl_c_ends_it(model):
    command = [sys.executable, "-m", "onnxcomp", "view", str(model), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[1]
        assert got(address)[0] == 200
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")
    with pytest.raises(ConnectionRefusedError):
        got(address)


@pytest.mark.slow
def test_a_browser_shows_the_graph_and_asks_nobody_else(model):
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no chromium: apt-get install chromium")
    address = serve(model)
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        context = browser.new_context()
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.goto(address)
        page.locator("#node-id-0, g.node").first.wait_for()
        page.wait_for_timeout(1000)
        nodes = page.locator("g.node").count()
        browser.close()
    assert nodes >= len(onnx.load(model).graph.node)
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == {
        urlsplit(address).netloc
    }
