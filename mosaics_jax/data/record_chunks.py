"""What the chunks of an ArrayRecord file claim, read before its library takes memory for them.

A chunk, which may hold many records, is unpacked whole. Chunks follow each other; a header of 24 bytes stands at every
64 KiB of the file, also inside a chunk. https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

import os

from mosaics_jax.data.unpacked import TooLargeError

_BLOCK, _BLOCK_HEADER, _HEADER = 1 << 16, 24, 40
_FREE_CHUNK = 1 << 26
_LARGEST_CHUNK = 1 << 30
_EXPANSION = 256


class DamagedChunkError(ValueError):
    """A chunk is not as the format says."""


def check_chunks(handle: int, size: int) -> None:
    """Raises TooLargeError for a chunk that takes memory which its size does not speak for, and DamagedChunkError."""
    place = 0
    while place < size:
        header = _read(handle, place, _HEADER)
        packed, unpacked = (int.from_bytes(header[at : at + 8], "little") for at in (8, 32))
        records = int.from_bytes(header[25:32], "little")
        stop = max(_after(place, _HEADER + packed), place + records)
        if len(header) < _HEADER or stop > size:
            raise DamagedChunkError(f"the chunk at byte {place} is longer than the file")
        if unpacked > min(_LARGEST_CHUNK, max(_FREE_CHUNK, _EXPANSION * packed)):
            raise TooLargeError(
                f"its chunk at byte {place} unpacks from {packed} to {unpacked} bytes; legal: up to {_FREE_CHUNK}, and "
                f"up to {_LARGEST_CHUNK} for one that shrank less than {_EXPANSION} times. Write it with group_size:1"
            )
        # No chunk begins inside the header of a block.
        place = stop - stop % _BLOCK + _BLOCK_HEADER if 0 < stop % _BLOCK < _BLOCK_HEADER else stop


def _after(place: int, count: int) -> int:
    """The place after `count` bytes of content from `place` on, the headers of blocks between them left out."""
    content = _BLOCK - _BLOCK_HEADER
    before = place // _BLOCK * content + max(0, place % _BLOCK - _BLOCK_HEADER)
    blocks, rest = divmod(before + count - 1, content)
    return blocks * _BLOCK + _BLOCK_HEADER + rest + 1


def _read(handle: int, place: int, count: int) -> bytes:
    found = b""
    while len(found) < count:
        place += _BLOCK_HEADER if place % _BLOCK == 0 else 0
        piece = os.pread(handle, min(count - len(found), _BLOCK - place % _BLOCK), place)
        if not piece:
            break
        found, place = found + piece, place + len(piece)
    return found
