"""Turns text into token shards and a manifest, and looks at what was made.

python -m launch.prepare --input=python --output=data/python
python -m launch.prepare --input='web/*.jsonl.zst' --input=books.parquet --output=data/mine --tokenizer=bpe:32768
python -m launch.prepare --input=tfds:wiki40b/en@train --tfds_dir=/datasets --output=data/wiki
python -m launch.prepare --pack=data/mine --context=4096         (once, for data.packing=best_fit)
python -m launch.prepare --verify=data/mine
python -m launch.prepare --inspect=data/mine --row=17
"""

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from absl import flags
from tqdm import tqdm

from launch import command

if TYPE_CHECKING:
    from mosaics_jax.data.workplace import Progress

_INPUTS = flags.DEFINE_multi_string(
    "input",
    ["python"],
    "file (.txt, .jsonl, .parquet, also .gz, .xz, .zst; .array_record; source code), glob, folder, tfds:NAME@SPLIT, or "
    "the word python: the source of this Python's standard library; give it again for more",
)
_OUTPUT = command.define_path("output", "", "directory to make; the same command again finishes one that was stopped")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    "bytes",
    "bytes, bpe:N (trained on the spot), the tokenizer/ folder of a prepared corpus, or the path of a tokenizer.json "
    "(Hugging Face) or tokenizer.model (tiktoken)",
)
_VALID_FRACTION = flags.DEFINE_float("valid_fraction", 0.02, "share of documents held out, chosen by content")
_SHARD_TOKENS = flags.DEFINE_integer("shard_tokens", 2**27, "tokens of a shard, about")
_MAX_BYTES = flags.DEFINE_integer("max_bytes", None, "stop after the document that brings the text to so many bytes")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "field of a .jsonl object, column of a .parquet, TFDS feature")
_RECORD_FORMAT = flags.DEFINE_string("record_format", "text", "what a record of an .array_record file is: text or json")
_SHUFFLE = flags.DEFINE_bool("shuffle", True, "put documents in a random order; else they keep the input's")
_SHUFFLE_SEED = flags.DEFINE_integer("shuffle_seed", 0, "names that order")
_TFDS_DIR = command.define_path("tfds_dir", None, "where TFDS data sets were prepared (default: TFDS's own)")
_SKIP = flags.DEFINE_integer(
    "skip_bad_records", 0, "leave out up to so many records that hold no text (at most 100,000), and list them"
)
_WORKERS = flags.DEFINE_integer("workers", None, "processes (default: one for each core); the result is the same")
_PACK = command.define_path("pack", "", "instead: plan best-fit rows of --context for this corpus")
_VERIFY = command.define_path("verify", "", "instead: check everything in this corpus")
_INSPECT = command.define_path("inspect", "", "instead: print what this corpus holds, or with --row what a row holds")
_ROW = flags.DEFINE_integer("row", None, "row to inspect")
_SPLIT = flags.DEFINE_string("split", "train", "split of that row")
_CONTEXT = flags.DEFINE_integer("context", 4096, "positions of a row, for --pack and --inspect")
_PACKING = flags.DEFINE_string("packing", "concat", "how rows are made, for --inspect: concat or best_fit")


def main() -> None:
    modes = {"--output": _OUTPUT, "--pack": _PACK, "--verify": _VERIFY, "--inspect": _INSPECT}
    given = [name for name, flag in modes.items() if flag.value]
    if not given:
        raise ValueError("--output is not set; legal: a directory to make (or --pack, --verify, --inspect of one)")
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are set; legal: one of {', '.join(modes)}")
    {"--output": _prepare, "--pack": _pack, "--verify": _verify, "--inspect": _inspect}[given[0]]()


def _prepare() -> None:
    from mosaics_jax.data.check import files_read, skipped_records
    from mosaics_jax.data.prepare import prepare

    workers = (os.cpu_count() or 1) if _WORKERS.value is None else _WORKERS.value
    shown = _Shown()
    try:
        manifest = prepare(
            _INPUTS.value, _OUTPUT.value, tokenizer=_TOKENIZER.value, valid_fraction=_VALID_FRACTION.value,
            shard_tokens=_SHARD_TOKENS.value, max_bytes=_MAX_BYTES.value, text_field=_TEXT_FIELD.value,
            record_format=_RECORD_FORMAT.value, shuffle_seed=_SHUFFLE_SEED.value if _SHUFFLE.value else None,
            tfds_dir=_TFDS_DIR.value, skip_bad_records=_SKIP.value, workers=workers, progress=shown,
        )  # fmt: skip
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again, it would say so again
        shown.close()
        print("interrupted; the same command goes on from what is done", file=sys.stderr)
        sys.exit(130)
    finally:
        shown.close()
    for line in files_read(manifest):
        print(line)
    if manifest.note:
        print(manifest.note)
    for record in skipped_records(manifest):
        print(f"left out: {record}")
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes, "
            f"bigram entropy {split.bigram_entropy:.3f} bits per byte"
        )
    print(f"wrote {_OUTPUT.value} (vocabulary {manifest.vocabulary}; set --config.model.vocabulary to it or more)")


class _Shown:
    """A bar with tokens per second and the time left; where there is no terminal, lines: after one second, then ten."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._pass = ""
        self._began = self._next = time.monotonic()

    def __call__(self, state: "Progress") -> None:
        now = time.monotonic()
        done = min(state.done, state.total) if state.total else state.done  # some bytes are read twice
        if state.pass_ != self._pass:
            self.close()
            self._pass, self._began, self._next = state.pass_, now, now + 1
            self._bar = tqdm(
                total=state.total or None, desc=state.pass_, unit=state.unit, unit_scale=True,
                disable=not sys.stderr.isatty(),
            )  # fmt: skip
        assert self._bar is not None
        self._bar.update(done - self._bar.n)
        seconds = max(now - self._began, 1e-3)
        speed = f"{state.tokens / seconds / 1e6:.2f} M tokens/s"
        if state.pass_ == "tokenizing":
            self._bar.set_postfix_str(speed, refresh=False)
        if self._bar.disable and now >= self._next and done:
            self._next = now + 10
            if not state.total:
                print(f"{state.pass_}: {seconds:,.0f} s", flush=True)
                return
            left = state.total - done if state.unit == "s" else seconds * (state.total - done) / done
            said = f"{speed}, " if state.tokens else ""
            print(f"{state.pass_}: {done / state.total:.1%}, {said}{left:,.0f} s left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _pack() -> None:
    from mosaics_jax.data.corpus import Manifest
    from mosaics_jax.data.packing import plan_rows

    for name, fill in plan_rows(Manifest.load(_PACK.value), _CONTEXT.value).items():
        print(f"{name}: rows of {_CONTEXT.value} are {fill:.2%} full")


def _verify() -> None:
    from mosaics_jax.data.check import problems
    from mosaics_jax.data.corpus import Manifest

    manifest = Manifest.load(_VERIFY.value)
    count = 0
    for problem in problems(manifest):
        print(problem)
        count += 1
    if count:
        raise ValueError(f"{_VERIFY.value} has {count} problem{'s' * (count > 1)}, listed above")
    shards = sum(len(split.shards) for split in manifest.splits.values())
    tokens = sum(split.tokens for split in manifest.splits.values())
    print(f"{_VERIFY.value}: {shards:,} shards, {tokens:,} tokens, every checksum, id and count as the manifest says")


def _inspect() -> None:
    from mosaics_jax.data.check import describe_row, summary
    from mosaics_jax.data.corpus import Manifest

    manifest = Manifest.load(_INSPECT.value)
    if _ROW.value is None:
        print(summary(manifest))
    else:
        print(describe_row(manifest, _SPLIT.value, _ROW.value, _CONTEXT.value, _PACKING.value))


if __name__ == "__main__":
    command.run(main)
