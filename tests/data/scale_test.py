"""A trillion tokens, without one on disk: sparse shards are opened and read at random."""

import json
import os
import pathlib
import subprocess
import sys
import zlib

import made
import numpy as np
import pytest

from mosaics_jax.data.corpus import BLOCK, Manifest, Shard, Split
from mosaics_jax.data.tokenizer import ByteTokenizer

SHARDS, SHARD_TOKENS = 2_000, 500_000_000
ROOT = pathlib.Path(__file__).parent.parent.parent

# Opens, then draws batches at random steps; prints what it took.
PROBE = """
import itertools, json, os, resource, sys, time

limit = 600
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
from mosaics_jax.config import DataConfig
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.pipeline import batches

def resident():
    "The greatest so far, in bytes."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before, began = resident(), time.perf_counter()
corpora = Corpora(DataConfig(path=sys.argv[1], context=4096, batch=8, seed=1))
opened = time.perf_counter() - began
first = []
for step in (0, 7, 123_456, 20_000_000, 30_000_000):
    began = time.perf_counter()
    iterator = batches(corpora.training(), corpora.begin, batch=8, start_batch=step)
    batch = next(iterator)
    first.append(time.perf_counter() - began)
    iterator.close()
    assert batch.tokens.shape == (8, 4096)
for batch in itertools.islice(batches(corpora.training(), corpora.begin, batch=8), 200):
    pass
files = len(os.listdir("/dev/fd"))
print(json.dumps({"opened": opened, "first": first, "grown": resident() - before, "files": files, "limit": limit}))
"""


@pytest.fixture(scope="module")
def trillion(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """2,000 names of one sparse shard of zeros and its checksums: the reader cannot tell."""
    directory = tmp_path_factory.mktemp("trillion")
    ByteTokenizer().save(directory / "tokenizer")
    size = 4 * SHARD_TOKENS
    with (directory / "zeros").open("wb") as stream:
        stream.truncate(size)
    last = size % BLOCK or BLOCK
    sums = [zlib.crc32(bytes(BLOCK))] * (-(-size // BLOCK) - 1) + [zlib.crc32(bytes(last))]
    (directory / "sums").write_bytes(np.array(sums, "<u4").tobytes())
    shards = []
    for number in range(SHARDS):
        shard = Shard(f"train-{number:05d}.tokens", SHARD_TOKENS, 1, "0" * 64)
        os.link(directory / "zeros", directory / shard.file)
        os.link(directory / "sums", directory / shard.checksums_file)
        shards.append(shard)
    train = Split(SHARDS, SHARDS * SHARD_TOKENS, 1, 1.0, {}, tuple(shards))
    valid = made.write_split(directory, "valid", [[[1] * 40_000]], "uint32")
    Manifest(
        directory, "uint32", 128_256, made.BEGIN, made.END, "bytes", ByteTokenizer.fingerprint,
        {"train": train, "valid": valid}, {}, {},
    ).save()  # fmt: skip
    return directory


def test_a_trillion_tokens(trillion):
    assert Manifest.load(trillion).splits["train"].tokens == 10**12
    assert sum(f.stat().st_blocks * 512 for f in [trillion / "zeros", trillion / "sums"]) < 1 << 20
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(trillion)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    print(found)
    assert found["opened"] < 1
    assert found["grown"] < 100e6
    assert sorted(found["first"])[len(found["first"]) // 2] < 0.1
    assert found["limit"] / 4 < found["files"] < found["limit"] * 3 / 4
