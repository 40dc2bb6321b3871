"""PyTorch's FlexAttention on the problems of `gpu_bench`: checked, and timed with CUDA events."""

import dataclasses
import math
import time
from typing import Any

import numpy as np

from launch import gpu_bench
from launch.gpu_report import OUT_OF_TIME, WHAT
from pallas_kernels.retrieval import peers


def reads(quick: bool, deadline: float, record: gpu_bench.Record) -> None:
    todo = gpu_bench.places(quick)
    try:
        import torch
    except ImportError as error:
        for place in todo:
            for what in WHAT:
                record("figure", by="flex", **dataclasses.asdict(place), what=what, **gpu_bench.missing(error))
        return
    try:
        _check(torch, quick, record)
    except Exception as error:
        record("error", message=f"the check of values: {gpu_bench.first_line(error)}")
    for place in todo:
        torch._dynamo.reset()  # no shape counts against the compiler's limit of variants
        problem = gpu_bench.Problem(place)
        for what in WHAT:
            fields = {"by": "flex", **dataclasses.asdict(place), "what": what}
            if time.monotonic() > deadline:
                record("figure", **fields, missing=OUT_OF_TIME, failed=False)
                continue
            try:
                figures = gpu_bench.spread(_milliseconds(torch, _call(torch, problem, what), 0.3 if quick else 2.0))
                rate = problem.flops(what) / figures["milliseconds"] / 1e9
                record("figure", **fields, **figures, pairs=problem.pairs, tflops=rate)
            except Exception as error:
                record("figure", **fields, **gpu_bench.missing(error))
            torch.cuda.empty_cache()


def _tensors(torch: Any, problem: gpu_bench.Problem) -> tuple[Any, Any, list[Any]]:
    """The read, the cotangent, and query, key and value: [B, H, T, K] in bfloat16."""

    def turned(array: Any) -> Any:
        tensor = torch.from_numpy(np.asarray(array).astype(np.float32)).transpose(1, 2).contiguous().cuda()
        return tensor if tensor.ndim == 3 else tensor.to(torch.bfloat16)

    start, stop = (torch.from_numpy(np.array(end)).cuda() for end in problem.interval)
    read = peers.flex_attention(turned(problem.bandwidth_BTH), start, stop, start.shape[1])
    key, value = turned(problem.key_BTHK), turned(problem.value_BTHV)
    return read, turned(problem.cotangent_BTHV), [key, key.clone(), value]


def _call(torch: Any, problem: gpu_bench.Problem, what: str) -> gpu_bench.Call:
    read, cotangent, arrays = _tensors(torch, problem)
    if what == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return read(*arrays)

        return forward
    arrays = [array.requires_grad_() for array in arrays]
    return lambda: torch.autograd.grad(read(*arrays), arrays, cotangent)


def _check(torch: Any, quick: bool, record: gpu_bench.Record) -> None:
    """Values, and the gradients of keys and values; the bandwidth gets none (`peers.flex_attention`)."""
    for memory in dict.fromkeys(place.memory for place in gpu_bench.places(quick)):
        torch._dynamo.reset()
        rows = "packed"  # an unpacked row is one of its documents, and each shape takes long to compile
        problem, expected = gpu_bench.small(memory, rows)
        read, cotangent, arrays = _tensors(torch, problem)
        arrays = [array.requires_grad_() for array in arrays]
        output = read(*arrays)
        query_grad, key_grad, value_grad = torch.autograd.grad(output, arrays, cotangent)
        found = {"output": output, "d_key": query_grad.float() + key_grad.float(), "d_value": value_grad}
        measured = {name: found[name].detach().float().transpose(1, 2).cpu().numpy() for name in found}
        record("check", by="flex", memory=memory, rows=rows, **gpu_bench.errors(measured, expected))


def _milliseconds(torch: Any, call: gpu_bench.Call, limit: float) -> list[float]:
    """As `gpu_bench.milliseconds`, by events on the device."""

    def round_of(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls

    round_of(1)  # compiles
    single = max(round_of(1), 1e-3)
    calls = max(1, min(200, math.ceil(20 / single)))
    rounds = max(3, min(30, int(limit * 1e3 / (single * calls))))
    return [round_of(calls) for _ in range(rounds)]
