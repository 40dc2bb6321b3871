"""What a hostile input costs: `prepare` stays below 2 GiB, and ends in one line or leaves a record out."""

import gzip
import json
import lzma
import pathlib
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import pytest
import tokenizers
import zstandard

from mosaics_jax.data import tables, unpacked
from mosaics_jax.data.documents import Part
from mosaics_jax.data.files import guarded, open_plain
from mosaics_jax.data.inputs import find_units
from mosaics_jax.data.prepare import prepare

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

ROOT = pathlib.Path(__file__).parent.parent.parent
PROMISED = 2 << 30  # docs/data_format.md
MIB = 1 << 20

# Bound twice: what is in memory at the most is measured, and more address space than promised is refused.
CHILD = """
import pathlib, resource, sys
import numpy, pyarrow.parquet, tiktoken, tokenizers
from mosaics_jax.data.prepare import prepare
mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = mapped + int(sys.argv[3]) + (1 << 30)  # Arrow reserves a GiB of addresses, which it does not fill
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    prepare([sys.argv[1]], sys.argv[2], max_bytes=1, skip_bad_records=int(sys.argv[4]))
    print("made")
except ValueError as error:
    print(str(error))
# Its own: ru_maxrss is never below what the process had that started it.
(peak,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


def _prepared(path: pathlib.Path, skipped: int = 0) -> tuple[str, int]:
    """What `prepare` of the file says, and the most memory that its process had."""
    command = [sys.executable, "-c", CHILD, str(path), str(path.with_name("out")), str(PROMISED), str(skipped)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert (done.returncode, done.stderr) == (0, "")
    *message, peak = done.stdout.splitlines()
    assert len(message) == 1, message
    return message[0], int(peak)


def _zstd_of_one_byte(blocks: int, window_log: int) -> bytes:
    """A frame of so many blocks of 128 KiB, 4 bytes each."""
    parts = [struct.pack("<I", 0xFD2FB528), bytes([0, (window_log - 10) << 3])]
    for block in range(blocks):
        parts.append((131072 << 3 | 1 << 1 | (block == blocks - 1)).to_bytes(3, "little") + b"a")
    return b"".join(parts)


def _zeros(pack: Callable[[bytes], bytes], flush: Callable[[], bytes], mebibytes: int) -> bytes:
    return b"".join([*(pack(bytes(MIB)) for _ in range(mebibytes)), flush()])


def _xz_with_a_large_dictionary(content: bytes) -> bytes:
    """The header of a block says that it looks back 4 GiB."""
    whole = bytearray(lzma.compress(content, check=lzma.CHECK_NONE))
    size = (whole[12] + 1) * 4
    at = whole.index(b"\x21\x01", 12, 12 + size)
    whole[at + 2] = 40
    whole[12 + size - 4 : 12 + size] = zlib.crc32(whole[12 : 12 + size - 4]).to_bytes(4, "little")
    return bytes(whole)


def _footer(body: bytes) -> bytes:
    return b"PAR1" + body + struct.pack("<I", len(body)) + b"PAR1"


def _table(path: pathlib.Path, column: object, **settings: object) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, **settings)


def _repeated(path: pathlib.Path) -> None:
    """One text of 30 MiB, which a thousand rows name by its number."""
    numbers = pyarrow.array([0] * 1000, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["ab " * (10 * MIB)]))
    _table(path, texts, compression="zstd", store_schema=False)


def _records(path: pathlib.Path) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1000")
    for _ in range(100):
        writer.write(bytes(MIB))
    writer.close()


_SCHEMA = b"\x15\x02\x19\x2c\x48\x06schema\x15\x02\x00\x15\x0c\x25\x02\x18\x04text\x00\x16\x02"
_MILLION = b"\xbf\x84\x3d"
_NESTED = b"[" * 100_000
_LISTS = b'{"text":"some words","a":[' + b"{}," * ((32 * MIB - 100) // 3) + b"0]}\n"

# name: what writes it, what is said of it
HOSTILE: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "far.jsonl.zst": (lambda p: p.write_bytes(_zstd_of_one_byte(16_384, 31)), "looks farther back than 128 MiB"),
    "line.jsonl.zst": (lambda p: p.write_bytes(_zstd_of_one_byte(8192, 17)), "is longer than 33,554,432 bytes"),
    "word.txt.zst": (lambda p: p.write_bytes(_zstd_of_one_byte(160, 17)), "made"),
    "zeros.jsonl.gz": (
        lambda p: p.write_bytes(_zeros((c := zlib.compressobj(1, wbits=31)).compress, c.flush, 300)),
        "is longer than 33,554,432 bytes",
    ),
    "zeros.jsonl.xz": (
        lambda p: p.write_bytes(_zeros((c := lzma.LZMACompressor(preset=0)).compress, c.flush, 300)),
        "is longer than 33,554,432 bytes",
    ),
    "dictionary.txt.xz": (
        lambda p: p.write_bytes(_xz_with_a_large_dictionary(b"some text")),
        "cannot be read: it looks farther back than 128 MiB; pack it with xz -9",
    ),
    "nulls.parquet": (lambda p: _table(p, pyarrow.nulls(20_000_000, pyarrow.string())), "is not a string"),
    "repeated.parquet": (_repeated, "made"),
    "page.parquet": (
        lambda p: _table(p, ["x" * (100 * MIB)], compression="zstd", use_dictionary=False),
        r"its page at byte 4 unpacks from \d+ to 1\d+ bytes; legal: up to 67108864",
    ),
    "delta.parquet": (
        lambda p: _table(p, ["a"], use_dictionary=False, column_encoding={"text": "DELTA_LENGTH_BYTE_ARRAY"}),
        "of the encoding DELTA_LENGTH_BYTE_ARRAY; legal",
    ),
    "lists.parquet": (lambda p: _table(p, [[""] * 1000]), "list<.*> in its column 'text'; legal: strings"),
    "fields.parquet": (lambda p: p.write_bytes(_footer(b"\x15\x02\x19\xfc" + _MILLION + bytes(3000))), "Exceeded size"),
    "groups.parquet": (
        lambda p: p.write_bytes(_footer(_SCHEMA + b"\x19\xfc" + _MILLION + bytes(3000))), "Exceeded size limit",
    ),
    "columns.parquet": (
        lambda p: p.write_bytes(_footer(_SCHEMA + b"\x19\x1c\x19\xfc" + _MILLION + bytes(3000))), "Exceeded size limit",
    ),
    "chunk.array_record": (_records, r"its chunk at byte \d+ unpacks from \d+ to 104857600 bytes; legal"),
    "nested.jsonl": (lambda p: p.write_bytes(_NESTED + b"\n"), "is not JSON"),
    "lists.jsonl": (lambda p: p.write_bytes(_LISTS), "made"),
    "lists.json": (lambda p: p.write_bytes(_LISTS), "made"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_is_bounded(tmp_path: pathlib.Path, name: str) -> None:
    write, message = HOSTILE[name]
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 40 * MIB
    said, peak = _prepared(tmp_path / name, skipped=100_000 if name == "nulls.parquet" else 0)
    assert re.search(message, said), said
    assert peak < PROMISED, f"{peak / MIB:.0f} MiB"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_streams_follow_each_other(tmp_path: pathlib.Path, suffix: str) -> None:
    """What appending and padding tools write; a stream that is cut short, or followed by something else, is damaged."""
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    between = {".gz": bytes(5), ".xz": bytes(8), ".zst": struct.pack("<II", 0x184D2A50, 5) + b"other"}[suffix]
    first, second = bytes(range(256)) * 3000, b"second"
    path = tmp_path / f"a.txt{suffix}"

    def read() -> bytes:
        with open_plain(path, lambda size: None) as stream:
            return guarded(path, stream.read)

    path.write_bytes(pack(first) + between + pack(second) + pack(b"") + between)
    assert read() == first + second
    for damaged in (pack(first)[:-3], pack(first) + pack(second)[:-3], pack(first) + b"something else"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="the file is damaged or not what its suffix says"):
            read()


def test_a_frame_that_looks_far_back_may_be_large(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by what it unpacks to, and not by what its header says."""
    monkeypatch.setattr(unpacked, "_WINDOW", 1 << 16)
    path, content = tmp_path / "a.txt.zst", bytes(range(256)) * 8000
    parameters = zstandard.ZstdCompressionParameters(window_log=24)
    for text, legal in ((content, False), (random.Random(0).randbytes(20_000) * 20, True), (b"ab" * 20_000, True)):
        path.write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(text))
        with open_plain(path, lambda size: None) as stream:
            if legal:
                assert guarded(path, stream.read) == text
            else:
                with pytest.raises(ValueError, match="unpacks to more than 256 times its size; pack it without --long"):
                    guarded(path, stream.read)


def test_a_parquet_that_fills_the_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_FREE_BYTES", 1 << 20)
    path = tmp_path / "a.parquet.zst"
    path.write_bytes(_zstd_of_one_byte(64, 17))
    with pytest.raises(ValueError, match=r"unpacks to more than 256 times its size, which would fill the disk"):
        list(tables.read_parquet(find_units([str(path)]).units[0][0], "text", lambda size: None))


def test_rows_of_large_pages_are_read(tmp_path: pathlib.Path) -> None:
    """Fewer at a time, and the same: pages of several MiB, nulls among them, and dictionaries."""
    texts = [f"{i} " * (300_000 * (i % 3)) + "end" if i % 5 else None for i in range(40)]
    for number, settings in enumerate(({"use_dictionary": False}, {}, {"data_page_version": "2.0"})):
        path = tmp_path / f"{number}.parquet"
        _table(path, texts, row_group_size=25, **settings)
        found = list(tables.read_parquet(find_units([str(path)]).units[0][0], "text", lambda size: None))
        assert [part.text if isinstance(part, Part) else None for part in found] == texts


def test_a_document_too_long_for_a_tokenizer_json(tmp_path: pathlib.Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=258, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["some words"], trainer)
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a " * (5 * MIB // 2)}) + "\n")
    with pytest.raises(ValueError, match=r"a document of more than 4,194,304 bytes, too long for a tokenizer.json"):
        prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), str(tmp_path / "tokenizer.json"))
