"""What a parquet file's pages claim, read before its library takes memory for them.

A column's chunk is a sequence of pages, each a header in Thrift's compact protocol and what it tells of. The library
takes as much as a header says a page unpacks to, and for a dictionary as many entries as it says there are.
https://parquet.apache.org/docs/file-format/data-pages and thrift-compact-protocol.md
"""

import os
from typing import TYPE_CHECKING, NamedTuple

from mosaics_jax.data.unpacked import TooLargeError

if TYPE_CHECKING:
    import pyarrow.parquet

# A page over the first must be large on disk too, and none may be over the second.
_FREE_PAGE = 1 << 26
_LARGEST_PAGE = 1 << 30
_EXPANSION = 256
_MOST_ENTRIES = 1 << 24  # of a dictionary, 16 bytes each
_MOST_FOOTER = 1 << 24
_LONGEST_HEADER = 1 << 20
_DICTIONARY, _DATA_2 = 2, 3  # kinds of pages; all others are as the first one, 0
# Whose lengths the library unpacks all at once, as many as the page says there are.
_UNBOUNDED = {6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY"}


class _Page(NamedTuple):
    kind: int
    size: int  # bytes that it unpacks to
    packed: int
    values: int
    encoding: int


class DamagedPageError(ValueError):
    """A page is not as the format says."""


def footer_limit(handle: int, size: int) -> int:
    """How many things of a kind the file's description can hold. Raises TooLargeError where it is itself too large."""
    footer = int.from_bytes(os.pread(handle, 4, max(0, size - 8)), "little")
    if _MOST_FOOTER < footer < size:  # one that is longer than the file is damage, which the library tells
        raise TooLargeError(f"its description has {footer} bytes; legal: up to {_MOST_FOOTER}. Divide the file")
    return max(1 << 10, footer // 32)


def largest_page(handle: int, size: int, chunk: "pyarrow.parquet.ColumnChunkMetaData") -> int:
    """Bytes of the largest page of a column's chunk.

    Raises TooLargeError where a page takes memory that its size on disk does not speak for, and DamagedPageError.
    """
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    stop, largest = min(size, start + chunk.total_compressed_size), 0
    if not 0 <= start <= stop:
        raise DamagedPageError("a column lies outside of the file")
    while start < stop:
        page, length = _page_at(handle, start)
        if min(page.size, page.packed, page.values) < 0 or start + length + page.packed > size:
            raise DamagedPageError(f"the page at byte {start} is longer than the file")
        _check(page, start)
        largest, start = max(largest, page.size), start + length + page.packed
    return largest


def _check(page: _Page, start: int) -> None:
    where = f"its page at byte {start}"
    if page.size > min(_LARGEST_PAGE, max(_FREE_PAGE, _EXPANSION * page.packed)):
        raise TooLargeError(
            f"{where} unpacks from {page.packed} to {page.size} bytes; legal: up to {_FREE_PAGE}, and up to "
            f"{_LARGEST_PAGE} for one that shrank less than {_EXPANSION} times. Write it with smaller pages"
        )
    if page.kind == _DICTIONARY and page.values > min(page.size // 4, _MOST_ENTRIES):
        raise TooLargeError(f"{where} claims {page.values} entries in {page.size} bytes")
    if page.encoding in _UNBOUNDED:
        raise TooLargeError(
            f"{where} is of the encoding {_UNBOUNDED[page.encoding]}; legal: PLAIN and RLE_DICTIONARY, which most write"
        )


def _page_at(handle: int, start: int) -> tuple[_Page, int]:
    """The page whose header begins at byte `start`, and the header's length."""
    size = 1 << 8
    while True:
        content = os.pread(handle, size, start)
        try:
            return _header(content)
        except IndexError:
            if len(content) < size or size >= _LONGEST_HEADER:
                raise DamagedPageError(f"the page at byte {start} has no header") from None
        size *= 16


def _header(content: bytes) -> tuple[_Page, int]:
    fields, at = _struct(content, 0, 0)
    kind, size, packed = (fields.get(number, -1) for number in (1, 2, 3))
    inner = fields.get({_DICTIONARY: 7, _DATA_2: 8}.get(kind, 5), {}) if isinstance(kind, int) else {}
    inner = inner if isinstance(inner, dict) else {}
    found = [kind, size, packed, inner.get(1, -1), inner.get(4 if kind == _DATA_2 else 2, 0)]
    if not all(isinstance(number, int) for number in found):
        raise DamagedPageError("a page's header is of other types")
    return _Page(*found), at


def _struct(content: bytes, at: int, depth: int) -> tuple[dict[int, object], int]:
    """The integers and structs of a struct, by their numbers, and where it ends. IndexError where the bytes end."""
    if depth > 8:
        raise DamagedPageError("a page's header is nested too deep")
    fields: dict[int, object] = {}
    number = 0
    while (head := content[at]) & 15:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(content, at)
        fields[number], at = _value(content, at, head & 15, depth)
    return fields, at + 1


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[object, int]:
    """A value of one of Thrift's kinds, None for what no page is judged by, and where it ends."""
    match kind:
        case 1 | 2:  # true and false, which are all in the kind
            return None, at
        case 3 | 7:  # a byte, a double
            return None, at + (1 if kind == 3 else 8)
        case 4 | 5 | 6:
            return _integer(content, at)
        case 8:
            length, at = _varint(content, at)
            return None, at + length
        case 9 | 10:
            head, at = content[at], at + 1
            count = head >> 4
            if count == 15:
                count, at = _varint(content, at)
            for _ in range(count):
                inner = head & 15
                _, at = _value(content, at, 3 if inner in (1, 2) else inner, depth + 1)
            return None, at
        case 12:
            return _struct(content, at, depth + 1)
    raise DamagedPageError(f"a page's header has a field of kind {kind}")


def _integer(content: bytes, at: int) -> tuple[int, int]:
    number, at = _varint(content, at)
    return number >> 1 ^ -(number & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte, at = content[at], at + 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        if (shift := shift + 7) > 63:
            raise DamagedPageError("a page's header has a number of more than 64 bits")
