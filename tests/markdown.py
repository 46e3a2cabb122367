"""What the documents show: their code blocks, commands, tables and links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "benchmarks/README.md",
    "docs/gallery/README.md",
    *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))),
)

EXIT_CODE = re.compile(r"#\s*exits with (\d+)\s*$")
FILE_NAME = re.compile(r"# ([\w.]+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        """The file that it says to be, in a comment in its first line."""
        match = FILE_NAME.match(self.text)
        return match[1] if match else None


@dataclass(frozen=True)
class Command:
    """A line of a shell block, and the exit code that it is said to have."""

    line: str
    exit_code: int

    @property
    def words(self) -> list[str]:
        """The line as the shell divides it, without its comment."""
        return shlex.split(self.line, comments=True)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    return [Block(*match) for match in re.findall(r"^```(\w+)\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)]


def commands(block: Block) -> list[Command]:
    found = []
    for line in block.text.splitlines():
        code = EXIT_CODE.search(line)
        found.append(Command(line, int(code[1]) if code else 0))
    return found


def shell_commands(document: str) -> list[Command]:
    return [command for block in blocks(document) if block.language == "sh" for command in commands(block)]


def section(document: str, title: str) -> str:
    """The text under a heading, up to the next one of its level."""
    pattern = rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)"
    match = re.search(pattern, read(document), re.MULTILINE | re.DOTALL)
    assert match, f"{document} has no section {title!r}"
    return match[2]


def table(text: str) -> list[dict[str, str]]:
    """The first table in a text, a row a dict by the names of its columns."""
    match = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = match[0].splitlines() if match else []
    head, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def links(document: str) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(document: str) -> set[str]:
    """The headings as links name them."""
    text = re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
