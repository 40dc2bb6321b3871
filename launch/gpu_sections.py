"""One section of the GPU suite, in a process of its own (`launch/gpu.py` starts it).

python -m launch.gpu_sections NAME RECORDS SECONDS [quick]

Every record is a line of JSON, written as soon as it is known: what a crash leaves behind is read all the same.
"""

import functools
import json
import math
import pathlib
import statistics
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent


class Recorder:
    """record(kind, **fields) appends a line."""

    def __init__(self, path: str):
        self._path = path

    def __call__(self, kind: str, **fields: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite({"kind": kind} | fields)) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as a string."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Cases:
    """A plugin of pytest: how each case ended, and none begun after the deadline."""

    def __init__(self, record: Any, deadline: float):
        self._record, self._deadline = record, deadline

    def pytest_runtest_setup(self, item: Any) -> None:
        import pytest

        if time.monotonic() > self._deadline:
            pytest.skip("out of time")
        self._record("case", name=item.name, outcome="started")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            message = "" if report.passed else _reason(report)
            self._record("case", name=report.nodeid.split("::")[-1], outcome=report.outcome, message=message)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._record("case", name=report.nodeid, outcome="failed", message=_reason(report))


def _reason(report: Any) -> str:
    """What went wrong, in a few words."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split("--------------------")[0].split())[:400]  # what jax adds about its tracebacks is cut


def cases(keyword: str, seconds: float, record: Recorder) -> None:
    """The tests marked gpu whose names hold the keyword."""
    import pytest

    code = pytest.main(
        [
            str(ROOT / "tests" / "pallas_kernels"), f"--rootdir={ROOT}", "-m", "gpu", "-k", keyword, "--tb=line",
            "--continue-on-collection-errors", "-p", "no:cacheprovider",
            "-W", "default",  # a warning of another version of jax is no error of a kernel
        ],
        plugins=[Cases(record, time.monotonic() + seconds)],
    )  # fmt: skip
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        record("error", message=f"pytest ended with {pytest.ExitCode(code).name}")


def train(quick: bool, record: Recorder) -> None:
    """The train step of configs/small.py: the recipe's rows of 4,096 tokens, and of its batch what one GPU holds.

    That is the greatest power of two, at most 8, whose compiled step fits the device's memory by the compiler's own
    account, and does. One step is one batch: nothing is accumulated.
    """
    import jax

    limit = jax.local_devices()[0].memory_stats()["bytes_limit"]
    for rows in [8, 4, 2, 1] if limit > 100e9 else [4, 2, 1]:
        try:
            return _train(rows, 3 if quick else 10, limit, record)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            record("note", message=f"a batch of {rows} rows: {str(error)[:200]}")
    raise MemoryError("a batch of one row does not fit")


def _train(rows: int, steps: int, limit: int, record: Recorder) -> None:
    import jax
    import numpy as np

    from configs import small
    from mosaics_jax import metrics
    from mosaics_jax.config import Config
    from mosaics_jax.data.source import pack
    from mosaics_jax.step import init_state, make_train_step

    values = small.get_config().to_dict()
    recipe_rows, values["data"]["batch"] = values["data"]["batch"], rows
    config = Config.from_dict(values)
    shape = (rows, config.data.context + 1)
    window = np.random.default_rng(0).integers(1, config.model.vocabulary, shape, dtype=np.int32)
    batch = jax.device_put(pack(window, begin=0))
    init = jax.jit(functools.partial(init_state, config))
    compiled = jax.jit(make_train_step(config), donate_argnums=0).lower(jax.eval_shape(init), batch).compile()
    memory: Any = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    needed -= memory.alias_size_in_bytes
    if needed > limit:
        raise MemoryError(f"it needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f}")
    state = init()
    seconds, losses = [], []
    for _ in range(2 + steps):
        start = time.perf_counter()
        state, raw = compiled(state, batch)
        losses.append(float(raw["loss"]))  # waits
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    # The recipe's own record; bytes per token, which say bits per byte, play no part here.
    summary = metrics.summarise(config, len(losses), jax.device_get(raw), median, 1.0)
    record(
        "train", rows=rows, rows_of_the_recipe=recipe_rows, context=config.data.context, remat=config.model.remat,
        steps_timed=steps, seconds_per_step=median, tokens_per_second=summary["tokens_per_second"], mfu=summary["mfu"],
        peak_gibibytes=jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30,
        compiled_gibibytes=needed / 2**30, losses=losses, formula=metrics.MFU_FORMULA,
        hopper_kernels_in_the_program=(compiled.as_text() or "").count("mosaic_gpu"),
    )  # fmt: skip
    if not all(map(math.isfinite, losses)):
        record("error", message=f"the loss is not finite: {losses}")


def main() -> None:
    name, path, seconds, *rest = sys.argv[1:]
    record, quick, deadline = Recorder(path), rest == ["quick"], time.monotonic() + float(seconds)
    try:
        if name.endswith("_cases"):
            cases("test_" + name.removesuffix("_cases"), float(seconds), record)
        elif name == "train":
            train(quick, record)
        elif name == "flex":
            from launch import gpu_flex

            gpu_flex.reads(quick, deadline, record)
        elif name == "recurrence":
            from launch import gpu_recurrence

            gpu_recurrence.recurrence(quick, deadline, record)
        else:
            from launch import gpu_reads

            gpu_reads.reads(name, quick, deadline, record)
    except Exception as error:
        lines = str(error).strip().splitlines()
        record("error", message=f"{type(error).__name__}: {lines[0][:300] if lines else ''}")


if __name__ == "__main__":
    main()
