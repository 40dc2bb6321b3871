"""Text to a prepared corpus: token shards, the tokenizer, and a manifest that says what they are.

Two passes, each of many independent tasks that end in one rename, so that any number of workers gives the same bytes
and a killed run goes on from what is done:

1. every unit of the input is tokenized into a stage file (stage.py);
2. every shard is gathered from the stage files, its documents in an order that is computed (shards.py).

All of it happens in `OUTPUT.partial`, which becomes `OUTPUT` by one rename: a prepared corpus is whole or not there.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence

from mosaics_jax import paths, whole
from mosaics_jax.data.bpe import READING
from mosaics_jax.data.corpus import FILES, MANIFEST, SKIPPED, SPLITS, Manifest, Split, cannot_write, write_whole
from mosaics_jax.data.documents import Broken, read_parts
from mosaics_jax.data.inputs import PYTHON_CORPUS, Found, Unit, find_units
from mosaics_jax.data.pool import Pool
from mosaics_jax.data.shards import write_splits
from mosaics_jax.data.splits import assigned, other_rule
from mosaics_jax.data.stage import Reading, Stage, stage_name, token_type, write_stage
from mosaics_jax.data.tables import RECORD_FORMATS
from mosaics_jax.data.tokenizer import Tokenizer, make_tokenizer
from mosaics_jax.data.workplace import SETTINGS, Progress, Settings, UnusableError, workplace

_MOST_WORKERS = 1024
_MOST_BROKEN = 100_000  # each is listed, and held in memory until it is


def prepare(
    inputs: Sequence[str],
    output: str,
    tokenizer: str = "bytes",
    *,
    valid_fraction: float = 0.02,
    shard_tokens: int = 2**27,
    max_bytes: int | None = None,
    text_field: str = "text",
    record_format: str = "text",
    shuffle_seed: int | None = 0,
    tfds_dir: str | None = None,
    skip_bad_records: int = 0,
    workers: int = 0,
    progress: Callable[[Progress], None] = lambda state: None,
) -> Manifest:
    """Tokenizes `inputs` into the new directory `output`; the same call after a kill goes on from what is done.

    Args:
      inputs: files, globs, folders, tfds:NAME@SPLIT and the word `python`.
      output: directory to make; it may exist if it is empty.
      tokenizer: see `make_tokenizer`. A BPE is trained on the training documents only.
      valid_fraction: share of documents to hold out, by the hash of their text.
      shard_tokens: tokens of a shard, about: shards hold whole documents.
      max_bytes: stop after the document that brings the text (UTF-8) to so many bytes.
      text_field: field of a .jsonl object, column of a .parquet, feature of a TFDS data set.
      record_format: what a record of an ArrayRecord file is: text, or json (an object with `text_field`).
      shuffle_seed: names the order that documents are put in; None keeps the input's.
      tfds_dir: where TFDS data sets were prepared; None is TFDS's own default.
      skip_bad_records: so many records that hold no text are left out, counted, and listed in skipped.jsonl.
      workers: processes; 0 works in this one. The result is the same. They are spawned, so a script that asks for them
        needs `if __name__ == "__main__":`.
      progress: called now and then.

    Raises:
      ValueError: an input cannot be read, an argument is out of range, the documents cannot be divided, the disk
        refuses, `output` is not empty, or another run is writing it.
    """
    settings = Settings(tokenizer, valid_fraction, shard_tokens, max_bytes, text_field, record_format, shuffle_seed)
    _check(settings, skip_bad_records, workers)
    found = find_units(inputs, tfds_dir, text_field)
    target = paths.absolute(output)
    with workplace(target, settings) as partial:
        made, stages, splits, note = _passes(partial, settings, found.units, skip_bad_records, workers, progress)
        _list_files(found, len(stages), partial)
        manifest = Manifest(
            directory=partial, dtype=token_type(made).name, vocabulary=made.vocabulary, begin=made.begin, end=made.end,
            tokenizer_kind=made.kind, tokenizer_fingerprint=made.fingerprint, splits=splits,
            skipped=_skipped(stages, partial), arguments={"inputs": list(inputs), **dataclasses.asdict(settings)},
            command=_command(inputs, settings), note=note,
        )  # fmt: skip
        manifest.save()
        _clear(manifest)
        try:
            os.rename(partial, target)
        except OSError as error:
            raise cannot_write(target, error) from error
        (target / SETTINGS).unlink()  # the last: a run that is killed before the rename finds its workplace again
        whole.keep_names(target.parent)
    return dataclasses.replace(manifest, directory=target)


def _clear(manifest: Manifest) -> None:
    """Removes what only the making needed, and shards of another layout that a stopped run had begun."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    kept = {MANIFEST, SKIPPED, FILES, SETTINGS, manifest.tokenizer_directory.name}
    kept |= {name for shard in shards for name in (shard.file, shard.checksums_file, shard.documents_file)}
    for path in manifest.directory.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check(settings: Settings, skip_bad_records: int, workers: int) -> None:
    if not 0 < settings.valid_fraction < 1:
        raise ValueError(f"valid_fraction is {settings.valid_fraction}; legal: more than 0 and less than 1")
    for name, value in (("shard_tokens", settings.shard_tokens), ("max_bytes", settings.max_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; legal: an integer of 1 or more")
    if not 0 <= skip_bad_records <= _MOST_BROKEN:
        raise ValueError(f"skip_bad_records is {skip_bad_records}; legal: 0 to {_MOST_BROKEN}")
    if not 0 <= workers <= _MOST_WORKERS:
        raise ValueError(f"workers is {workers}; legal: 0 to {_MOST_WORKERS}")
    if settings.record_format not in RECORD_FORMATS:
        raise ValueError(f"record_format is {settings.record_format!r}; legal: {', '.join(RECORD_FORMATS)}")


def _passes(
    partial: pathlib.Path, settings: Settings, units: list[list[Unit]], most_broken: int, workers: int,
    progress: Callable[[Progress], None],
) -> tuple[Tokenizer, list[Stage], dict[str, Split], str]:  # fmt: skip
    """Both passes, the first again by another rule where it leaves a split empty; and what to say of that, or ""."""
    reading, note = settings.reading, ""
    while True:
        made = _tokenizer(partial, settings, reading, units, progress)
        with Pool(workers, partial / "tokenizer") as pool:
            stages = _stages(pool, units, partial / "stages", settings, reading, most_broken, progress)
            other = _other_reading(stages, settings, reading)
            if other is None:
                return made, stages, write_splits(pool, stages, partial, settings, token_type(made), progress), note
        reading, note = other


def _tokenizer(
    partial: pathlib.Path, settings: Settings, reading: Reading, units: list[list[Unit]],
    progress: Callable[[Progress], None],
) -> Tokenizer:  # fmt: skip
    """Makes the tokenizer, also when a run goes on: stages of another are not taken for its own."""

    def report(what: str, done: int, total: int) -> None:
        progress(Progress(what, "B" if what == READING else "s", done, total, 0))

    made = make_tokenizer(settings.tokenizer, _training_texts(units, settings.max_bytes, reading), report)
    shutil.rmtree(partial / "tokenizer", ignore_errors=True)
    made.save(partial / "tokenizer")
    return made


def _training_texts(units: list[list[Unit]], max_bytes: int | None, reading: Reading) -> Iterator[str]:
    taken = 0
    for unit in itertools.chain.from_iterable(units):
        parts = read_parts(unit, reading.text_field, reading.record_format, lambda size: None)
        for piece in assigned(parts, reading.rule):
            if isinstance(piece, Broken):
                continue  # the first pass counts it, or refuses it
            if piece.split == "train":
                yield piece.part.text
            taken += len(piece.part.utf8)
            if piece.ends and max_bytes is not None and taken >= max_bytes:
                return


def _other_reading(stages: list[Stage], settings: Settings, reading: Reading) -> tuple[Reading, str] | None:
    """How to read where a split is empty, and what to say of it; None where none is. Raises UnusableError."""
    documents = {name: sum(stage.documents[name] for stage in stages) for name in SPLITS}
    if all(documents.values()):
        return None
    size = sum(sum(stage.bytes.values()) for stage in stages)
    hashes = [number for stage in stages for number in stage.hashes]
    first = reading == settings.reading and hashes
    other = other_rule(settings.valid_fraction, documents, size, (min(hashes), max(hashes))) if first else None
    if other is None:
        raise UnusableError(
            f"{sum(documents.values())} documents cannot be divided into {' and '.join(SPLITS)}: they are all equal, "
            "or of one character; give more"
        )
    rule, note = other
    return dataclasses.replace(reading, rule=rule), note


def _stages(
    pool: Pool, units: list[list[Unit]], folder: pathlib.Path, settings: Settings, reading: Reading, most_broken: int,
    progress: Callable[[Progress], None],
) -> list[Stage]:  # fmt: skip
    """The first pass: a stage file for each unit, in the order of the input, as far as `max_bytes` reaches."""
    flat = [(number, unit) for number, group in enumerate(units) for unit in group]
    total = sum(unit.size for _, unit in flat)
    limit = settings.max_bytes

    def report(tokens: int, size: int) -> None:
        progress(Progress("tokenizing", "B", size, total, tokens))

    tasks = [(unit, folder, reading, most_broken, limit) for _, unit in flat]
    stages: list[Stage] = []
    taken = broken = 0
    for stage in pool.map(_stage_task, tasks, report):
        size = sum(stage.bytes.values())
        if limit is not None and taken + size > limit and taken:
            stage = _stage_task(pool.tokenizer, *tasks[len(stages)][:-1], limit - taken)
            size = sum(stage.bytes.values())
        stages.append(stage)
        taken, broken = taken + size, broken + len(stage.broken)
        if broken > most_broken:
            raise ValueError(
                f"{broken} records hold no text, the last of them {' '.join(stage.broken[-1])}; "
                f"skip_bad_records is {most_broken}"
            )
        if limit is not None and taken >= limit:
            break
    documents, seen = [0] * len(units), [0] * len(units)
    for (owner, _), stage in zip(flat, stages, strict=False):
        documents[owner] += sum(stage.documents.values())
        seen[owner] += 1
    for group, count, read in zip(units, documents, seen, strict=True):
        if not count and read == len(group):
            raise ValueError(f"input {group[0].path if group else PYTHON_CORPUS!r} holds no documents with text")
    return stages


def _stage_task(
    tokenizer: Tokenizer, unit: Unit, folder: pathlib.Path, reading: Reading, most_broken: int, limit: int | None,
    progress: Callable[[int, int], None] = lambda tokens, size: None,
) -> Stage:  # fmt: skip
    if stage := Stage.find(folder / stage_name(unit, tokenizer, reading, limit)):
        progress(0, unit.size)
        return stage
    return write_stage(unit, folder, tokenizer, reading, most_broken, limit, progress)


def _skipped(stages: list[Stage], folder: pathlib.Path) -> dict[str, int]:
    lines = [json.dumps({"where": where, "why": why}) + "\n" for stage in stages for where, why in stage.broken]
    write_whole(folder / SKIPPED, "".join(lines).encode())
    return {
        "empty": sum(stage.empty for stage in stages),
        "not_utf8": sum(stage.not_utf8 for stage in stages),
        "broken": len(lines),
    }


def _list_files(found: Found, reached: int, folder: pathlib.Path) -> None:
    """files.jsonl: every file that was read, and as what, and all that was left out, and why."""
    units = list(itertools.chain.from_iterable(found.units))
    read = {unit.path: unit.kind for unit in units[:reached]}
    lines = [{"path": path, "read": kind} for path, kind in read.items()]
    late = dict.fromkeys(unit.path for unit in units[reached:] if unit.path not in read)
    lines += [{"path": path, "left_out": "was not reached before --max_bytes"} for path in late]
    lines += [{"path": path, "left_out": why} for path, why in found.left_out]
    write_whole(folder / FILES, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _command(inputs: Sequence[str], settings: Settings) -> str:
    """The command line that gives this corpus: what differs from the defaults."""
    defaults = Settings()
    words = ["python", "-m", "launch.prepare", *(f"--input={name}" for name in inputs), "--output=DIR"]
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        if value != getattr(defaults, field.name):
            words.append("--noshuffle" if value is None else f"--{field.name}={value}")
    return shlex.join(words)
