"""How fast rows are read beside plain numpy, and that a run's rows do not depend on who reads them.

python -m launch.bench_data --path=data/stories --context=4096
python -m launch.bench_data --path=data --mixture='{"stories": 0.7, "longdocs": 0.3}' --context=4096 --hashes
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from launch import command

if TYPE_CHECKING:
    from mosaics_jax.data.corpora import Corpora

_PATH = command.define_path("path", "data/python", "corpus, or the folder that the mixture's lie in")
_MIXTURE = flags.DEFINE_string("mixture", "{}", "JSON {name: weight}")
_PACKING = flags.DEFINE_string("packing", "concat", "concat or best_fit")
_CONTEXT = flags.DEFINE_integer("context", 4096, "positions of a row")
_BATCH = flags.DEFINE_integer("batch", 8, "rows of a batch")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "repetitions; the median is printed")
_HASHES = flags.DEFINE_bool("hashes", False, "print hashes of whole runs for every way of reading them, instead")
_STEPS = flags.DEFINE_integer("steps", 24, "steps of such a run")


def main() -> None:
    from mosaics_jax.config import DataConfig
    from mosaics_jax.data.corpora import Corpora

    try:
        mixture = json.loads(_MIXTURE.value)
    except ValueError as error:
        raise ValueError(f"--mixture is {_MIXTURE.value!r}; legal: JSON {{name: weight}}") from error
    config = DataConfig(
        path=_PATH.value, mixture=mixture, packing=_PACKING.value, context=_CONTEXT.value, batch=_BATCH.value
    )
    corpora = Corpora(config)
    (_hashes if _HASHES.value else _speed)(corpora)


def _speed(corpora: "Corpora") -> None:
    import numpy as np

    from mosaics_jax.data.pipeline import batches

    context, batch = _CONTEXT.value, _BATCH.value
    name, manifest = next(iter(corpora.manifests.items()))
    shard = manifest.split("train").shards[0]
    count = min(400, shard.tokens // (context + 1))
    if not count:
        raise ValueError(f"the first shard of {str(manifest.directory)!r} is shorter than a row of {context}")
    places = np.random.default_rng(0).integers(0, shard.tokens - context, count)
    mapped = np.memmap(manifest.directory / shard.file, manifest.stored, "r")
    tokens = corpora.tokens(name)
    rows = corpora.training()
    steps = max(1, count // batch)

    def plain() -> int:
        return sum(len(mapped[place : place + context + 1].astype(np.int32)) - 1 for place in places)

    def checked() -> int:
        return sum(len(tokens.read(int(place), context + 1)) - 1 for place in places)

    def in_order() -> int:
        return sum(rows[k].shape[-1] for k in range(count))

    def whole() -> int:
        made = batches(rows, corpora.begin, batch=batch)
        total = sum(next(made).tokens.size for _ in range(steps))
        made.close()  # type: ignore[attr-defined]
        return total

    kinds: dict[str, Callable[[], int]] = {
        "numpy memmap, the same windows": plain,
        "windows, every block checked": checked,
        f"rows of the run ({_PACKING.value})": in_order,
        "batches of all fields, made ahead": whole,
    }
    # By turns, so that what else the machine does falls on all alike.
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    sizes = {kind: read() for kind, read in kinds.items()}
    for _ in range(_ROUNDS.value):
        for kind, read in kinds.items():
            began = time.perf_counter()
            read()
            seconds[kind].append(time.perf_counter() - began)
    speeds = {kind: sizes[kind] / float(np.median(times)) for kind, times in seconds.items()}
    first = next(iter(speeds.values()))
    print(f"context {context}, batch {batch}, {manifest.dtype}, warm files, one process, medians of {_ROUNDS.value}\n")
    print("| what | M tokens/s | of numpy |\n|---|---|---|")
    for kind, speed in speeds.items():
        print(f"| {kind} | {speed / 1e6:.1f} | {speed / first:.2f} |")


def _hashes(corpora: "Corpora") -> None:
    import numpy as np

    from mosaics_jax.data.pipeline import batches

    steps, batch = _STEPS.value, _BATCH.value
    if batch % 8 or steps < 12:
        raise ValueError(f"--batch is {batch} and --steps {steps}; legal: a multiple of 8, and 12 or more")

    def read(processes: int, workers: int, start: int, stop: int) -> list[bytes]:
        """A digest of every global batch, as `processes` processes put it together."""
        share = batch // processes
        parts = []
        for process in range(processes):
            made = batches(
                corpora.training(), corpora.begin, batch=batch, start_batch=start, workers=workers,
                share=range(share * process, share * (process + 1)),
            )  # fmt: skip
            parts.append(list(itertools.islice(made, stop - start)))
            made.close()  # type: ignore[attr-defined]
        digests = []
        for pieces in zip(*parts, strict=True):
            sha = hashlib.sha256()
            for field in zip(*pieces, strict=True):
                sha.update(np.concatenate(field).tobytes())
            digests.append(sha.digest())
        return digests

    runs = [[(p, w, 0, steps)] for w in (0, 4) for p in (1, 2, 4, 8)]
    runs.append([(4, 0, 0, 5), (2, 4, 5, steps)])
    runs.append([(8, 4, 0, 3), (1, 0, 3, 11), (2, 2, 11, steps)])
    print(f"context {_CONTEXT.value}, batch {batch}, {steps} steps, {_PACKING.value}\n")
    print("| steps: processes x workers | sha256 of all global batches |\n|---|---|")
    for run in runs:
        digests = [digest for part in run for digest in read(*part)]
        how = "; ".join(f"{start} to {stop}: {p} x {w}" for p, w, start, stop in run)
        print(f"| {how} | {hashlib.sha256(b''.join(digests)).hexdigest()[:16]} |", flush=True)


if __name__ == "__main__":
    command.run(main)
