"""Compressed bytes unpacked in small pieces: a few bytes may stand for gigabytes, which are never in memory at once."""

import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import zstandard

# How far back a stream may look, which is memory that it takes. Only .zst may look farther (`zstd --long=31`: 2 GiB),
# where the file is large enough for that to be meant.
_WINDOW = 1 << 27
_WIDEST = 1 << 31
_EXPANSION = 256
# A block of zstd is at least 4 bytes and at most 128 KiB: so many bytes give 8 MiB.
_PIECE = 1 << 8
_MOST_READY = 1 << 20
_HEADER = 18  # of a frame of zstd, at most


class TooLargeError(Exception):
    """A file asks for more memory than its size speaks for."""


# What the decompressors raise for a file that is damaged or is not of its suffix's format.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, TooLargeError)


class _Decoder(Protocol):
    """One stream of a file."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def needs_input(self) -> bool:
        """Whether more than what it was given is wanted."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes:
        """What follows the stream's end."""


class _Streams(io.RawIOBase):
    """What the streams of a file, one after the other, hold; EOFError where one is cut short."""

    def __init__(self, file: BinaryIO, begin: Callable[[bytes], _Decoder], padding: bytes = b""):
        """`begin` makes the decoder of the stream that begins so; `padding` may stand between two of them."""
        self._file, self._begin, self._padding = file, begin, padding
        self._decoder: _Decoder | None = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._decoder is None and not self._next():
                return 0
            assert self._decoder is not None
            data = b""
            if self._decoder.needs_input:
                data, self._compressed = self._compressed or self._file.read(_PIECE), b""
                if not data:
                    raise EOFError("it ends inside a compressed stream")
            self._ready = memoryview(self._decoder.decompress(data, _MOST_READY))
            if self._decoder.eof:
                self._compressed, self._decoder = self._decoder.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _next(self) -> bool:
        """Begins the next stream; False where the file ends."""
        while len(self._compressed) < _HEADER:
            if not (more := self._file.read(_PIECE)):
                break
            self._compressed = (self._compressed + more).lstrip(self._padding)
        self._compressed = self._compressed.lstrip(self._padding)
        if self._compressed:
            self._decoder = self._begin(self._compressed)
        return bool(self._compressed)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Zstd:
    needs_input = True

    def __init__(self, start: bytes):
        self._wide = zstandard.get_frame_parameters(start).window_size > _WINDOW
        self._frame = zstandard.ZstdDecompressor(max_window_size=_WIDEST).decompressobj()
        self._read = self._written = 0

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """More than `max_length`, but of _PIECE bytes no more than 8 MiB."""
        found = self._frame.decompress(data)
        self._read, self._written = self._read + len(data), self._written + len(found)
        if self._wide and self._written > max(_WINDOW, _EXPANSION * self._read):
            raise TooLargeError(
                f"it looks farther back than {_WINDOW >> 20} MiB, and unpacks to more than {_EXPANSION} times its "
                "size; pack it without --long"
            )
        return found

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data


class _Xz:
    def __init__(self, start: bytes):
        self._stream = lzma.LZMADecompressor(memlimit=_WINDOW + (1 << 22))

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            return self._stream.decompress(data, max_length)
        except lzma.LZMAError as error:
            if "memory" not in str(error).lower():
                raise
            raise TooLargeError(
                f"it looks farther back than {_WINDOW >> 20} MiB; pack it with xz -9, which takes 64"
            ) from error

    @property
    def needs_input(self) -> bool:
        return self._stream.needs_input

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data


def unpacked_zst(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Streams(file, _Zstd))


def unpacked_xz(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Streams(file, _Xz, padding=b"\0"))
