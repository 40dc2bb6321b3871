"""Turns text into token shards and a manifest.

python -m launch.prepare --input=python --output=data/python
python -m launch.prepare --input=books.jsonl.xz --input=more/ --output=data/books --tokenizer=bpe:8192
"""

from absl import flags

from launch import command

_INPUTS = flags.DEFINE_multi_string(
    "input",
    ["python"],
    ".txt or .jsonl file (also .xz, .gz, .zst), a folder of source files, or the word python: the source of this "
    "Python's standard library; give it again for more",
)
_OUTPUT = flags.DEFINE_string("output", None, "directory to make")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    "bytes",
    "bytes, bpe:N (trained on the spot), or the path of a tokenizer.json (Hugging Face) or tokenizer.model (tiktoken)",
)
_VALID_FRACTION = flags.DEFINE_float("valid_fraction", 0.02, "share of documents held out, chosen by content")
_MAX_BYTES = flags.DEFINE_integer("max_bytes", None, "stop after so many bytes of text")


def main() -> None:
    if not _OUTPUT.value:
        raise ValueError("--output is not set; legal: a directory to make")
    from mosaics_jax.data.prepare import prepare

    manifest = prepare(
        _INPUTS.value, _OUTPUT.value, tokenizer=_TOKENIZER.value, valid_fraction=_VALID_FRACTION.value,
        max_bytes=_MAX_BYTES.value,
    )  # fmt: skip
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes, "
            f"bigram entropy {split.bigram_entropy:.3f} bits per byte"
        )
    print(f"wrote {_OUTPUT.value} (vocabulary {manifest.vocabulary}; set --config.model.vocabulary to it or more)")


if __name__ == "__main__":
    command.run(main)
