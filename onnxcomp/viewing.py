"""A model's whole graph in the browser, as netron shows it: from this machine, to this machine, and nothing else.

Netron's page asks a service where its reader is, and sends what it is used for. Each answer of the server here carries
a Content-Security-Policy that allows the browser to ask nobody but this server, which gives out the model's own files
and no others of their folder.
"""

from __future__ import annotations

import contextlib
import html
import http.server
import logging
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from onnxcomp.errors import ModelError, OptionError, RequirementError
from onnxcomp.structure import model_files

__all__ = ["serve", "wait"]

HOST = "127.0.0.1"

POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'none'"
)
HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    # Netron's page asks whether it may send data on its use, and goes on only then. It cannot send any.
    ("Set-Cookie", "consent=none; Path=/; SameSite=Strict"),
)
DATA = "/data/"
"""Where netron's server has the files of the model's folder."""


def serve(path: str | Path, *, port: int | None = None) -> str:
    """Serve a model to netron's page, until `wait` has been interrupted or the process ends.

    Args:
        path: An .onnx file, with its external data beside it, or an .ort file.
        port: Where to listen on 127.0.0.1; a free one is found if it is left out.

    Returns:
        The address of the page.

    Raises:
        ModelError: The file is missing or is no model.
        RequirementError: Netron is not installed, or is one whose page cannot be kept from the network.
        OptionError: The port is taken.
    """
    path = Path(path)
    if not path.is_file():
        message = f"{path}: expected a model file, got {'a folder' if path.is_dir() else 'none'}"
        raise ModelError(message)
    path = path.resolve()  # netron gives out nothing that a link leads to from its folder
    names = {path.name, *(file.resolve().relative_to(path.parent).as_posix() for file in model_files(path)[1:])}
    netron = _netron()
    logging.getLogger("netron").setLevel(logging.WARNING)
    handler = netron.server._HTTPRequestHandler
    netron.server._HTTPRequestHandler = guarded = _guarded(handler, names)
    try:
        _, port = netron.start(str(path), address=(HOST, port), browse=False)
    except OSError as error:
        message = f"port {port} of {HOST}: {error.strerror}; give another with --port, or leave it out"
        raise OptionError(message) from error
    finally:
        netron.server._HTTPRequestHandler = handler
    # Netron writes these into its page as they are: a name may hold what means something in an address or in HTML.
    guarded.content.base = urllib.parse.quote(path.name)
    guarded.content.name = guarded.content.identifier = html.escape(path.name)
    address = f"http://{HOST}:{port}"
    if not _is_guarded(address):
        netron.stop((HOST, port))
        raise RequirementError(_unknown(netron))
    return address


def wait() -> None:
    """Serve until Ctrl-C."""
    _netron().wait()


def _netron() -> Any:
    try:
        import netron
        import netron.server
    except ImportError as error:
        message = "viewing needs netron: pip install 'onnxcomp[view]'"
        raise RequirementError(message) from error
    if not issubclass(getattr(netron.server, "_HTTPRequestHandler", object), http.server.BaseHTTPRequestHandler):
        raise RequirementError(_unknown(netron))
    return netron


def _unknown(netron: Any) -> str:
    return (
        f"netron {netron.__version__} cannot be kept from the network as the versions that onnxcomp knows: "
        "pip install --upgrade 'onnxcomp[view]'"
    )


def _guarded(base: Any, names: set[str]) -> Any:
    """Netron's handler of requests: it gives out only these files of the model's folder, to this machine only."""

    class Guarded(base):  # type: ignore[misc]
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a page that was closed while it was loading is no error
                super().handle()

        def log_message(self, *args: object) -> None:
            """Say nothing: netron's own fails where it is told of an error."""

        def do_GET(self) -> None:  # noqa: N802 - the standard library's name
            host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            if host not in {HOST, "localhost"}:  # a page from elsewhere that had its own name point here
                self._refuse(403)
            elif path.startswith(DATA) and path.removeprefix(DATA) not in names:
                self._refuse(404)
            else:
                super().do_GET()

        def _refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def end_headers(self) -> None:
            for name, value in HEADERS:
                self.send_header(name, value)
            super().end_headers()

    return Guarded


def _is_guarded(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy has anything to do with this
    with opener.open(address, timeout=10) as answer:
        return bool(answer.headers.get("Content-Security-Policy") == POLICY)
