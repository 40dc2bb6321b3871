"""PyTorch's FlexAttention on the same problems: checked, and timed with CUDA events. jax runs on the CPU here."""

import dataclasses
import math
from typing import Any

import numpy as np

from launch.gpu import problem as lib
from launch.gpu.parts import read_programs
from launch.gpu.parts.context import Context, errors, spread
from launch.gpu.parts.reads import answer_name
from launch.gpu.programs import WHAT
from pallas_kernels.retrieval import peers


def run(context: Context) -> None:
    groups = lib.places(context.setting)
    for place in (*groups["reads_long"], *groups["reads_short_and_packed"]):
        for what in WHAT:
            with context.attempt(by="flex", **dataclasses.asdict(place), what=what):
                _measure(context, place, what)


def _measure(context: Context, place: lib.Place, what: str) -> None:
    import torch

    torch._dynamo.reset()  # no shape counts against the compiler's limit of variants
    setting, fields = context.setting, {"by": "flex", **dataclasses.asdict(place), "what": what}
    call, check = _entry(torch, context, place, what)
    with context.record.running(f"flex, {what}, {place}"):
        context.record("check", **fields, **check(call()))
    figures = spread(_milliseconds(torch, call, setting.seconds))
    count = lib.pairs(lib.interval(setting, place))
    rate = lib.flops(setting, count, what) / figures["milliseconds"] / 1e9
    context.record("figure", **fields, **figures, pairs=count, tflops=rate)


def _entry(torch: Any, context: Context, place: lib.Place, what: str) -> tuple[Any, Any]:
    """A call, and the check of what it returns; bandwidths are the model's, as ours."""
    setting = context.setting
    device = "cpu" if setting.interpret else "cuda"

    def turned(array: Any) -> Any:
        """[B, T, H, ...] of jax or numpy -> [B, H, T, ...] of torch, bfloat16 where it has features."""
        tensor = torch.from_numpy(np.array(array).astype(np.float32)).transpose(1, 2).contiguous().to(device)
        return tensor if tensor.ndim == 3 else tensor.to(torch.bfloat16)

    made = context.bundle.load(_inputs(setting, place.time)).call()
    bandwidth = lib.model_bandwidth(setting, place)
    start, stop = (torch.from_numpy(np.array(end)).to(device) for end in lib.interval(setting, place))
    read = peers.flex_attention(turned(bandwidth), start, stop, place.time, compiled=not setting.interpret)
    cotangent, key, value = map(turned, made)
    arrays = [key, key.clone(), value]

    def back(tensor: Any) -> np.ndarray:
        return tensor.detach().float().transpose(1, 2).cpu().numpy()

    def check(results: Any) -> dict[str, Any]:
        expected = context.bundle.answers(answer_name(place, "hopper"))
        expected = lib.of_one_array(expected or lib.answer(setting, place, bandwidth))
        if what == "forward":
            measured = {"output": back(results)}
        else:
            query_grad, key_grad, value_grad = results
            measured = {"d_key": back(query_grad.float() + key_grad.float()), "d_value": back(value_grad)}
        return errors(lib.sampled(measured, place.time), expected)

    if what == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return read(*arrays)

        return forward, check
    arrays = [array.requires_grad_() for array in arrays]
    return lambda: torch.autograd.grad(read(*arrays), arrays, cotangent), check


def _inputs(setting: lib.Setting, time: int) -> Any:
    """The program of the inputs; jax is on the CPU here, where a carried program of the card does not load."""
    return dataclasses.replace(read_programs.arrays(setting, time), carried=False)


def _milliseconds(torch: Any, call: Any, limit: float) -> list[float]:
    """As `context.by_turns`, by events on the device."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")

    def round_of(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls

    single = max(round_of(1), 1e-3)
    calls = max(1, min(200, math.ceil(20 / single)))
    rounds = max(3, min(30, int(limit * 1e3 / (single * calls))))
    return [round_of(calls) for _ in range(rounds)]
