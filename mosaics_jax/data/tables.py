"""Records out of parquet, ArrayRecord and TFDS: their libraries are imported when the first such input is read."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from mosaics_jax import paths
from mosaics_jax.data.documents import MOST_RECORD_BYTES, Broken, Part, as_document, from_json, from_text
from mosaics_jax.data.files import Advance, damaged, guarded, open_plain
from mosaics_jax.data.inputs import TFDS_PREFIX, Unit, suffixes
from mosaics_jax.data.parquet_pages import DamagedPageError, footer_limit, largest_page
from mosaics_jax.data.record_chunks import check_chunks
from mosaics_jax.data.unpacked import TooLargeError

if TYPE_CHECKING:
    import pyarrow.parquet

RECORD_FORMATS = ("text", "json")
_ROWS = 64
_BATCH_BYTES = 1 << 26
# A compressed parquet is unpacked onto the disk: so much, or so many times its size.
_FREE_BYTES = 1 << 30
_EXPANSION = 256


def parquet_units(whole: Unit, most_bytes: int) -> Iterator[Unit]:
    """Runs of row groups of about `most_bytes` each."""
    with _open_parquet(whole) as (file, _):
        metadata = file.metadata
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= most_bytes or group + 1 == metadata.num_row_groups:
            share = (group + 1 - start) * whole.size // metadata.num_row_groups
            yield dataclasses.replace(whole, start=start, stop=group + 1, size=share)
            start, size = group + 1, 0


@contextlib.contextmanager
def _open_parquet(unit: Unit) -> Iterator[tuple["pyarrow.parquet.ParquetFile", BinaryIO]]:
    """The parquet file, and the bytes that it is read from."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{unit.path!r} needs pyarrow; pip install 'mosaics_jax[parquet]'") from None
    path = pathlib.Path(unit.path)
    with contextlib.ExitStack() as stack:
        try:
            packed = suffixes(path)[1] != ""
            source: Any = stack.enter_context(tempfile.TemporaryFile() if packed else path.open("rb"))  # noqa: SIM115
            if packed:  # its end must be read first
                _unpack(path, source)
            limit = footer_limit(source.fileno(), os.fstat(source.fileno()).st_size)
            # Without pre_buffer a row group is read in pieces, not whole.
            file = pyarrow.parquet.ParquetFile(
                source, pre_buffer=False, buffer_size=1 << 20, thrift_container_size_limit=limit
            )
            yield stack.enter_context(file), source
        except (pyarrow.ArrowException, OSError, TooLargeError, DamagedPageError) as error:
            raise damaged(path, error) from error


def _unpack(path: pathlib.Path, target: BinaryIO) -> None:
    most = max(_FREE_BYTES, _EXPANSION * path.stat().st_size)
    with open_plain(path, lambda size: None) as stream:
        while piece := guarded(path, lambda: stream.read(1 << 20)):
            target.write(piece)
            if target.tell() > most:
                raise TooLargeError(f"it unpacks to more than {_EXPANSION} times its size, which would fill the disk")


def read_parquet(unit: Unit, text_field: str, advance: Advance) -> Iterator[Part | Broken]:
    with _open_parquet(unit) as (file, source):
        if text_field not in file.schema_arrow.names:
            raise ValueError(
                f"{unit.path!r} has no column {text_field!r}; its columns are "
                f"{', '.join(map(repr, file.schema_arrow.names))} (--text_field names another)"
            )
        groups = range(file.metadata.num_row_groups)[unit.start : unit.stop]
        row = first = sum(file.metadata.row_group(group).num_rows for group in range(unit.start or 0))
        total = max(1, sum(file.metadata.row_group(group).num_rows for group in groups))
        _check_text(file, text_field, unit)
        rows = _rows_at_once(file, source, groups, text_field)
        for batch in file.iter_batches(rows, row_groups=list(groups), columns=[text_field], use_threads=False):
            done = row - first
            for value in batch.column(0):
                yield _of_value(value, f"'{unit.path}' row {row}", f"a string in {text_field!r}")
                row += 1
            advance(unit.size * (row - first) // total - unit.size * done // total)


def _check_text(file: "pyarrow.parquet.ParquetFile", text_field: str, unit: Unit) -> None:
    """ValueError for a column that holds something else than texts: a single list may be larger than memory."""
    import pyarrow

    kind = file.schema_arrow.field(text_field).type
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(
        getattr(pyarrow.types, f"is_{name}")(inner)
        for name in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    ):
        raise ValueError(
            f"{unit.path!r} has {kind} in its column {text_field!r}; legal: strings (--text_field names another column)"
        )


def _rows_at_once(file: "pyarrow.parquet.ParquetFile", source: BinaryIO, groups: range, text_field: str) -> int:
    """As many rows as fit into memory if each is as large as the largest page, which a dictionary can make of it."""
    largest, size = 1, os.fstat(source.fileno()).st_size
    for group in map(file.metadata.row_group, groups):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema == text_field:
                largest = max(largest, largest_page(source.fileno(), size, chunk))
    return max(1, min(_ROWS, _BATCH_BYTES // largest))


def _of_value(value: Any, where: str, what: str) -> Part | Broken:
    """The document of a cell of a column of strings."""
    if hasattr(value, "dictionary"):  # one of a dictionary column
        value = value.value
    if not value.is_valid:
        return Broken(where, f"is not {what}")
    utf8 = value.as_buffer()
    if utf8.size > MOST_RECORD_BYTES:
        return Broken(where, f"is longer than {MOST_RECORD_BYTES:,} bytes")
    return as_document(utf8.to_pybytes(), where)


def read_array_record(unit: Unit, text_field: str, record_format: str, advance: Advance) -> Iterator[Part | Broken]:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        with open(unit.path, "rb") as stream:
            check_chunks(stream.fileno(), os.fstat(stream.fileno()).st_size)
        reader = ArrayRecordReader(unit.path, options="readahead_buffer_size:0")
        count = reader.num_records()
        for index in range(count):
            (record,) = reader.read(index, index + 1)  # read([index]) takes time linear in the file
            where = f"'{unit.path}' record {index}"
            if len(record) > MOST_RECORD_BYTES:
                yield Broken(where, f"is longer than {MOST_RECORD_BYTES:,} bytes")
            elif record_format == "json":
                yield from_json(record, text_field, where)
            else:
                yield as_document(record, where)
            advance(unit.size * (index + 1) // count - unit.size * index // count)
        reader.close()  # tells too of a file that could not be opened
    except (RuntimeError, ValueError, OSError, IndexError, TooLargeError) as error:
        raise damaged(unit.path, error) from error


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError:
        raise ValueError(f"input {TFDS_PREFIX}... needs TFDS; pip install 'mosaics_jax[tfds]'") from None
    return tensorflow_datasets


def _builder(name: str, tfds_dir: str | None) -> Any:
    tfds = _tfds()
    try:
        if pathlib.Path(name).is_dir():
            return tfds.builder_from_directory(name)
        return tfds.builder(name, data_dir=tfds_dir)
    except Exception as error:  # of many kinds, and long
        raise ValueError(
            f"TFDS has no data set {name!r} ({str(error).strip().splitlines()[0]}); "
            "--tfds_dir says where it was prepared"
        ) from error


def tfds_units(spec: str, tfds_dir: str | None) -> Iterator[Unit]:
    """A unit for each file of a split of a data set that was prepared as array_record."""
    name, at, split = spec.rpartition("@")  # the last: a folder may have others in its name
    if not at:
        name, split = spec, ""
    if name.startswith("~"):
        name = str(paths.absolute(name))
    builder = _builder(name, tfds_dir)
    splits = builder.info.splits
    if split not in splits:
        legal = ", ".join(f"{TFDS_PREFIX}{name}@{known}" for known in splits)
        if not legal:
            raise ValueError(
                f"TFDS data set {name!r} is not prepared below {builder.data_dir}; "
                "tfds.builder(NAME, file_format='array_record').download_and_prepare() does it"
            )
        raise ValueError(f"input {TFDS_PREFIX}{spec} names no split; legal: {legal}")
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"TFDS data set {name!r} is prepared as {builder.info.file_format.value}, which needs TensorFlow; "
            "prepare it with file_format='array_record'"
        )
    start = 0
    for path, count in zip(splits[split].filepaths, splits[split].shard_lengths, strict=True):
        found = pathlib.Path(path).stat()
        where = f"{builder.data_dir}@{split}"
        yield Unit(where, "tfds", start, start + count, size=found.st_size, stamp=found.st_mtime_ns)
        start += count


def read_tfds(unit: Unit, text_field: str, advance: Advance) -> Iterator[Part | Broken]:
    directory, _, split = unit.path.rpartition("@")
    builder = _builder(directory, None)
    if text_field not in builder.info.features:
        raise ValueError(
            f"TFDS data set {directory!r} has no feature {text_field!r}; its features are "
            f"{', '.join(map(repr, builder.info.features))} (--text_field names another)"
        )
    source = builder.as_data_source(split=split)
    start, stop = unit.start or 0, unit.stop or 0
    for first in range(start, stop, _ROWS):
        last = min(first + _ROWS, stop)
        for index, record in zip(range(first, last), source.__getitems__(list(range(first, last))), strict=True):
            yield from_text(record[text_field], f"'{unit.path}' record {index}", f"a text in {text_field!r}")
        share = unit.size / (stop - start)
        advance(int(share * (last - start)) - int(share * (first - start)))
