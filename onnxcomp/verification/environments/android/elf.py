"""Makes a shared library that was linked for Android loadable on Linux with glibc."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

__all__ = ["without_android"]

_HEADER = b"\x7fELF\x02\x01"
"""64 bits, little endian."""

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_SYMTAB, _DT_GNU_HASH = 0, 1, 5, 6, 0x6FFFFEF5
_VERSION_TAGS = frozenset({0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF})
"""DT_VERSYM, DT_VERDEF, DT_VERDEFNUM, DT_VERNEED, DT_VERNEEDNUM."""
_IGNORED = 0x6000001F
"""A tag in the range for operating systems that no loader knows."""
_SYMBOL_BYTES = 24


def without_android(library: bytes, renamed: Iterable[str]) -> bytes:
    """Make a library forget the Android libraries that it was linked with.

    It then needs no library and no version of a symbol: the program that loads it must have all that it calls. The
    program's own functions stand for those that differ; the references to these get a capital first letter.

    Args:
        library: The shared library.
        renamed: The functions to which references get a capital first letter; those that it does not call are none.

    Returns:
        The library, of the same size.

    Raises:
        ValueError: It is no 64-bit little-endian shared library as lld links it, or a name cannot be changed alone.
    """
    data = bytearray(library)
    if not data.startswith(_HEADER):
        message = "no 64-bit little-endian ELF file"
        raise ValueError(message)
    try:
        image = _Image(data)
        image.rename(frozenset(renamed))
        for place, tag, _ in image.dynamic():
            if tag == _DT_NEEDED or tag in _VERSION_TAGS:
                struct.pack_into("<q", data, place, _IGNORED)
    except (struct.error, KeyError) as error:
        message = f"no shared library with a table of its symbols ({error})"
        raise ValueError(message) from error
    return bytes(data)


class _Image:
    """The parts of a shared library that are changed."""

    def __init__(self, data: bytearray) -> None:
        self._data = data
        (table,) = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        headers = [struct.unpack_from("<IIQQQQ", data, table + size * index) for index in range(count)]
        self._loads: list[tuple[int, int, int]] = [
            (address, offset, length) for kind, _, offset, address, _, length in headers if kind == _PT_LOAD
        ]
        self._dynamic: int = {kind: offset for kind, _, offset, _, _, _ in headers}[_PT_DYNAMIC]
        self._values: dict[int, int] = {tag: value for _, tag, value in self.dynamic()}

    def dynamic(self) -> Iterator[tuple[int, int, int]]:
        """The entries of the dynamic section: where, tag, value."""
        place = self._dynamic
        while True:
            tag, value = struct.unpack_from("<qQ", self._data, place)
            if tag == _DT_NULL:
                return
            yield place, tag, value
            place += 16

    def rename(self, names: frozenset[str]) -> None:
        """Give references to these symbols a capital first letter."""
        strings, symbols = self._at(_DT_STRTAB), self._at(_DT_SYMTAB)
        _, defined_from = struct.unpack_from("<II", self._data, self._at(_DT_GNU_HASH))
        for index in range(1, defined_from):  # the hash table has those that are defined, which lld puts last
            (offset,) = struct.unpack_from("<I", self._data, symbols + index * _SYMBOL_BYTES)
            start = strings + offset
            name = self._data[start : self._data.index(0, start)].decode()
            if name not in names:
                continue
            if self._data[start - 1]:
                message = f"the name {name!r} is the end of another name, and cannot be changed alone"
                raise ValueError(message)
            self._data[start] = ord(name[0].upper())

    def _at(self, tag: int) -> int:
        """Where in the file the table of this tag begins."""
        address = self._values[tag]
        for begin, offset, length in self._loads:
            if begin <= address < begin + length:
                return offset + address - begin
        message = f"the table with the tag {tag:#x} lies outside the file"
        raise ValueError(message)
