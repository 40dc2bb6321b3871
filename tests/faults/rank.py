"""One process of a run with a fault inside it: `python rank.py FAULT[:STEP] flags of launch.train`.

The faults that no signal from outside can make; what is patched is named here, and the product knows nothing of it.
"""

import os
import pathlib
import runpy
import signal
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parents[2]


def _kill_run() -> None:
    """All ranks, as a node's power would end them: the first to come to the place ends itself, and the job the rest."""
    os.kill(os.getpid(), signal.SIGKILL)


def _spoil(batch_of, step: int) -> None:
    """Puts `batch_of(batch)` in the place of the batch of one step."""
    from mosaics_jax import loop

    real = loop.batches

    def spoiled(*args, **kwargs):
        first = kwargs.get("start_batch", 0)
        training = "start_batch" in kwargs
        for number, batch in enumerate(real(*args, **kwargs)):
            yield batch_of(batch) if training and first + number + 1 == step else batch

    loop.batches = spoiled


def nan(step: int) -> None:
    """A batch whose loss is not a number."""
    import numpy as np

    _spoil(lambda batch: batch._replace(weight=np.full_like(batch.weight, np.nan)), step)


def explode(step: int) -> None:
    """A batch of noise: its loss is finite, and far above those before it."""
    import numpy as np

    def noise(batch):
        draw = np.random.default_rng(0)
        return batch._replace(
            tokens=draw.integers(0, 256, batch.tokens.shape, np.int32),
            targets=draw.integers(0, 256, batch.targets.shape, np.int32),
        )

    _spoil(noise, step)


def left_out(step: int) -> None:
    """What a skipped batch should be: the step is counted, and nothing is computed."""
    from mosaics_jax import loop

    real = loop.Loop._compile

    def compiled(self, state, first_step):
        run = real(self, state, first_step)

        def step_or_not(state, batch):
            if int(state.step) + 1 != step:
                return run(state, batch)
            one = state.step + (state.step // state.step)  # on the devices
            skipped = one - state.step
            _, raw = run(_copy(state), batch)
            return state._replace(step=one, skipped=state.skipped + skipped, skipped_in_row=skipped), raw

        return step_or_not

    loop.Loop._compile = compiled


def _copy(state):
    import jax

    return jax.tree.map(lambda leaf: leaf.copy(), state)


def kill_in_commit(step: int) -> None:
    """The checkpoint is written, and its rename has not happened."""
    _on_rename(step, before=True)


def kill_after_commit(step: int) -> None:
    """The checkpoint is renamed, and not yet verified."""
    from mosaics_jax.checkpoint import Checkpoints

    real = Checkpoints._verify

    def verify(self, saving, seconds):
        if saving.step >= step:
            _kill_run()
        return real(self, saving, seconds)

    Checkpoints._verify = verify


def kill_in_restore(step: int) -> None:
    """In the midst of reading a checkpoint."""
    from mosaics_jax.checkpoint import Checkpoints

    real = Checkpoints._restore

    def restore(self, at, **items):
        if "params" in items:
            threading.Timer(0.02, _kill_run).start()
        return real(self, at, **items)

    Checkpoints._restore = restore


def _on_rename(step: int, before: bool) -> None:
    def patched(real):
        def rename(source, target, *args, **kwargs):
            here = pathlib.Path(os.fspath(target))
            if here.name.isdigit() and int(here.name) >= step and here.parent.name == "checkpoints" and before:
                _kill_run()
            return real(source, target, *args, **kwargs)

        return rename

    os.rename, os.replace = patched(os.rename), patched(os.replace)


def disk_full_of_one(step: int) -> None:
    """From one save on, no file of process 1 can grow beyond 4 KiB."""
    if "--process=1" in sys.argv:
        disk_full(step, 4 << 10)


def disk_full(step: int, limit: int = 40 << 10) -> None:
    """From one save on, no file can grow beyond a limit."""
    import resource

    from mosaics_jax.checkpoint import Checkpoints

    real = Checkpoints.save

    def save(self, state, at, record):
        if at >= step:
            self._commit()  # the save before is not to meet the limit
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return real(self, state, at, record)

    Checkpoints.save = save


def clock(step: int) -> None:
    """The wall clock goes back a day at a step, and forward two, four steps later."""
    real, real_ns, shift = time.time, time.time_ns, 0

    def to(seconds: int):
        def jump(batch):
            nonlocal shift
            shift = seconds
            return batch

        return jump

    _spoil(to(-86400), step)
    _spoil(to(86400), step + 4)
    time.time = lambda: real() + shift
    time.time_ns = lambda: real_ns() + shift * 10**9


def none(step: int) -> None:
    """No fault."""


def _keep_programs() -> None:
    """Every process finds its compiled programs again, as on GPUs, where jax's key for them is that of all processes.

    On CPUs the key holds the process, and only process 0 may write.
    """
    from jax._src import compiler, distributed

    real, state = compiler._cache_write, distributed.global_state

    def write(*args, **kwargs):
        mine, state.process_id = state.process_id, 0
        try:
            return real(*args, **kwargs)
        finally:
            state.process_id = mine

    compiler._cache_write = write


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.path.pop(1)  # this folder
    _keep_programs()
    fault, _, at = sys.argv.pop(1).partition(":")
    {f.__name__: f for f in (nan, explode, left_out, kill_in_commit, kill_after_commit, kill_in_restore, disk_full,
                             disk_full_of_one, clock, none)}[fault](int(at or 0))  # fmt: skip
    runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
