"""What `deploy` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxcomp.report.sections import Section, show
from onnxcomp.report.text import bytes_text, printable
from onnxcomp.report.verification import finding_sections

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.deployment import Package

__all__ = ["print_package"]


def print_package(package: Package, console: Console, *, verbose: bool = False) -> None:
    """Show what was written."""
    model, target = package.manifest["model"], package.manifest["target"]
    folder = package.folder
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [(printable(path.relative_to(folder)), bytes_text(path.stat().st_size)) for path in files]
    head = [
        f"{printable(folder)}: {printable(model['file'])} for {target}, {bytes_text(model['bytes'])}",
        f"sha256 {model['sha256']}",
    ]
    show(console, head, [Section("files", rows=rows), *finding_sections(package.findings, verbose=verbose)])
