"""What is measured and where it is written: terminal, metrics.jsonl, TensorBoard."""

import contextlib
import errno
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mosaics_jax.board import Board
from mosaics_jax.config import CheckpointConfig, Config
from mosaics_jax.nn.model import matmul_weights

# Dense bfloat16 FLOP/s by `device_kind`, from the makers' data sheets. A device that is not here has no MFU.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}

MFU_FORMULA = (
    "MFU = (6 x matmul weights x tokens + 12 x heads x head width x visible pairs) / (seconds x devices x peak)"
)


def step_flops(config: Config, pairs: float) -> float:
    """FLOPs that one optimiser step must compute, forward and backward; `pairs` are summed over memories and layers."""
    model = config.model
    tokens = config.data.batch * config.data.context
    return 6.0 * matmul_weights(model) * tokens + 12.0 * model.heads * model.head_width * pairs


def peak_flops(config: Config) -> float | None:
    """Peak of all devices together, or None where it is not known (never a guess)."""
    device = jax.devices()[0]
    peak = PEAK_FLOPS.get(device.device_kind) if config.model.compute_dtype == "bfloat16" else None
    return None if peak is None else peak * jax.device_count()


def summarise(config: Config, step: int, raw: dict[str, Any], seconds: float, bytes_per_token: float) -> dict[str, Any]:
    """A flat record of one step's metrics. `raw` are the step's, on the host; `seconds` the time of one step."""
    tokens_per_step = config.data.batch * config.data.context
    record = {
        "step": step,
        "loss": float(raw["loss"]),
        "bits_per_byte": float(raw["loss"]) / math.log(2) / bytes_per_token,
        "grad_norm": float(raw["grad_norm"]),
        "learning_rate": float(raw["learning_rate"]),
        "tokens_per_second": tokens_per_step / seconds,
        "predicted_tokens": float(raw["tokens"]),
        "delay": int(raw["delay"]),
        "skipped": int(raw["skipped"]),
        "skipped_in_row": int(raw["skipped_in_row"]),
    }
    pairs = 0.0
    for memory, health in raw["health"].items():
        pairs += float(np.sum(health["pairs"]))
        for name, ranges in health.items():
            if name != "pairs":
                ranges = np.asarray(ranges).reshape(-1, 3)
                least, mean, greatest = ranges[:, 0].min(), ranges[:, 1].mean(), ranges[:, 2].max()
                record |= {
                    f"health/{memory}/{name}_min": float(least),
                    f"health/{memory}/{name}_mean": float(mean),
                    f"health/{memory}/{name}_max": float(greatest),
                }
    flops = step_flops(config, pairs)
    peak = peak_flops(config)
    return record | {"flops": flops, "mfu": "unknown" if peak is None else flops / seconds / peak}


class MetricWriter:
    """Appends records to metrics.jsonl and TensorBoard, and shows progress. Every process but the first is silent.

    A record has a kind, the wall clock's time, and `up`: seconds since the process began, of a clock that never jumps.
    The first record of every life is a "start". metrics.jsonl is the run's own: where it cannot be written the run
    ends. TensorBoard only watches (`board.Board`).
    """

    def __init__(self, workdir: pathlib.Path, saves: CheckpointConfig):
        """Raises OSError, as `write` does."""
        self._active = jax.process_index() == 0
        self._bar = tqdm(disable=True)  # until the run's length is known
        if not self._active:
            return
        self._path = workdir / "metrics.jsonl"
        with _named(self._path):
            _end_last_line(self._path)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._board: Board | None = None  # until it is known which steps are told anew
        devices = {"processes": jax.process_count(), "devices": jax.device_count()}
        try:
            self.write("start", {**devices, "interval": saves.local_every if saves.local_dir else saves.every})
        except OSError:
            os.close(self._file)
            raise

    def begin(self, total_steps: int, first_step: int) -> None:
        """Shows the bar. TensorBoard forgets the steps after `first_step` that a life before has told."""
        if self._active:
            self._board = Board(self._path.parent / "tensorboard", first_step + 1 if first_step else 0)
            shown = sys.stderr.isatty()
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not shown)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl: `kind` is "train", "eval" or an event such as "resume"."""
        if not self._active:
            return
        line = {"kind": kind, "time": round(time.time(), 3), "up": round(uptime(), 3), **_finite(record)}
        with _named(self._path):
            _append(self._file, self._path, (json.dumps(line) + "\n").encode())
        if self._board and "step" in record:
            self._board.add(kind, record)

    def advance(self, step: int, record: dict[str, Any] | None) -> None:
        """Moves the bar to `step`; a record is shown in it, or printed where the terminal is none."""
        if not self._active:
            return
        self._bar.update(step - self._bar.n)
        if record is not None:
            shown = (
                f"loss {record['loss']:.3f}  {record['bits_per_byte']:.3f} bits/byte  grad {record['grad_norm']:.2f}  "
                f"lr {record['learning_rate']:.1e}  {record['tokens_per_second']:,.0f} tok/s  "
                f"mfu {_percent(record['mfu'])}  data {record['data_wait']:.1%}"
            )
            self._bar.set_postfix_str(shown)
            if self._bar.disable:
                print(f"step {step}/{self._bar.total}  {shown}", flush=True)

    def say(self, text: str) -> None:
        if self._active:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._active:
            self._bar.close()
            if self._board:
                self._board.close()
            os.close(self._file)


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"metrics cannot be written: {error.strerror}", str(path)) from error


def _append(file: int, path: pathlib.Path, line: bytes) -> None:
    """The whole line, or none of it. Raises OSError, also where the file is no longer that of its path."""
    found = os.fstat(file)
    if not (path.exists() and os.path.samestat(found, path.stat())):
        raise OSError(errno.ENOENT, "it was moved or removed")
    try:
        while line:
            line = line[os.write(file, line) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, found.st_size)
        raise


_IMPORTED = time.monotonic()


def uptime() -> float:
    """Seconds since this process began, as Linux tells; elsewhere since this module was imported."""
    try:
        stat = pathlib.Path("/proc/self/stat").read_text()
        begun = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    except (OSError, ValueError, AttributeError):
        return time.monotonic() - _IMPORTED


def _end_last_line(path: pathlib.Path) -> None:
    """Ends the line that a killed process was writing: it stays, and does not spoil the next."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as stream:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")


def _percent(mfu: float | str) -> str:
    return mfu if isinstance(mfu, str) else f"{mfu:.1%}"


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a number that is not finite is written as a string."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
