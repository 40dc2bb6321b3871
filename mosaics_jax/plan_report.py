"""The planner's page: memory, FLOPs, collectives and the time of a step, with all that was assumed."""

import collections
import dataclasses

from mosaics_jax import roofline, sharding
from mosaics_jax.config import Config, MeshConfig
from mosaics_jax.plan import Program, compile_step
from mosaics_jax.roofline import Estimate, Target

_SHOWN = 20  # lines of a sweep


def plan(config: Config, target: str, devices: int, document: int) -> str:
    """The page for the mesh that the config names, compiled."""
    mesh = sharding.sizes(config.mesh, devices)
    kind = roofline.TARGETS[target]
    program = compile_step(config, target, devices)
    estimate = roofline.estimate(config, mesh, kind, document)
    parts = [
        _title(config, mesh, devices),
        f"Compiled for {program.how}; {program.kernels} calls of Mosaic GPU kernels; {program.seconds:.0f} s.",
        _memory(program, kind),
        _flops(program, estimate, document),
        _collectives(program, estimate, mesh, kind),
        _time(config, estimate, kind),
        _assumptions(kind),
    ]
    return "\n\n".join(parts)


def sweep(config: Config, target: str, devices: int, document: int) -> str:
    """All meshes with every number of micro-batches, quickest first; of each mesh the best that fits, if one does."""
    kind = roofline.TARGETS[target]
    best: dict[MeshConfig, tuple[bool, float, int, Estimate]] = {}
    for mesh, micro in roofline.meshes(config, devices, kind):
        tried = dataclasses.replace(config, run=dataclasses.replace(config.run, accumulation=micro))
        estimate = roofline.estimate(tried, mesh, kind, document)
        fits = estimate.fits(kind)
        # Of those that fit the quickest; of those that do not, the smallest.
        rank = (not fits, estimate.seconds if fits else sum(estimate.held.values()), micro, estimate)
        if mesh not in best or rank[:2] < best[mesh][:2]:
            best[mesh] = rank
    if not best:
        raise ValueError(f"no mesh of {devices} devices divides this model and its batch of {config.data.batch} rows")
    ordered = sorted(best.items(), key=lambda item: (item[1][0], item[1][3].seconds))
    lines = [
        f"{len(ordered)} meshes of {devices} devices, by estimate alone (none is compiled), quickest first.",
        "",
        " data  fsdp  seq tensor micro     GB  s/step tok/s/GPU    MFU",
    ]
    for mesh, (too_large, _, micro, estimate) in ordered[:_SHOWN]:
        lines.append(
            f"{mesh.data:5} {mesh.fsdp:5} {mesh.sequence:4} {mesh.tensor:6} {micro:5} "
            f"{sum(estimate.held.values()) / 1e9:6.1f} {estimate.seconds:7.3f} {estimate.tokens_per_device:9,.0f} "
            f"{estimate.mfu(kind):6.1%}{'  does not fit' if too_large else ''}"
        )
    left = len(ordered) - _SHOWN
    return "\n".join([*lines, *([f"({left} more)"] if left > 0 else []), "", _assumptions(kind)])


def _title(config: Config, mesh: MeshConfig, devices: int) -> str:
    tokens = config.data.batch * config.data.context
    return (
        f"{config.model.architecture}, {config.model.layers} layers of width {config.model.width}, on {devices} "
        f"devices: data {mesh.data} x fsdp {mesh.fsdp} x sequence {mesh.sequence} x tensor {mesh.tensor}\n"
        f"{tokens:,} tokens a step ({config.data.batch} rows of {config.data.context:,}, "
        f"{config.run.accumulation} micro-batches), remat {config.model.remat}"
    )


def _memory(program: Program, target: Target) -> str:
    room = target.memory - target.reserve
    lines = ["Memory of a device, GB:"]
    sources = {
        "weights": "exact, float32",
        "optimizer": "exact: two moments, float32",
        "gradients": "exact, float32",
        "activations": "exact: what the scan over depth keeps for backward, of one micro-batch",
        "temporary": "the rest of the compiler's peak: weights in use, logits, one layer's work",
    }
    lines += [f"  {name:<12} {program.held[name] / 1e9:7.2f}  {source}" for name, source in sources.items()]
    verdict = "fits" if program.peak <= room else "DOES NOT FIT"
    lines.append(
        f"  {'peak':<12} {program.peak / 1e9:7.2f}  by the compiler; {verdict} in {target.memory / 1e9:.0f} less "
        f"{target.reserve / 1e9:.0f} for CUDA, NCCL and fragments"
    )
    return "\n".join(lines)


def _flops(program: Program, estimate: Estimate, document: int) -> str:
    return (
        f"FLOPs of a step: {estimate.model_flops:.3e} that the model must compute "
        f"(6 x matmul weights x tokens + 12 x heads x head width x visible pairs, of documents of "
        f"{document:,} tokens);\n"
        f"  {estimate.hardware_flops:.3e} with what is computed again. "
        f"The compiled program's matrix products, without reads: {program.matmul_flops:.3e} a device."
    )


def _collectives(program: Program, estimate: Estimate, mesh: MeshConfig, target: Target) -> str:
    sums: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in program.collectives:
        entry = sums[one.kind, " x ".join(one.axes) or "none", one.dtype]
        for place, amount in enumerate((one.count, one.bytes * one.count, one.sent)):
            entry[place] += amount
    lines = ["Collectives of a step, as compiled; GB that a device sends, by ring:"]
    for (kind, axes, dtype), (count, _, sent) in sorted(sums.items(), key=lambda item: -item[1][2]):
        lines.append(f"  {kind:<18} {axes:<24} {dtype:<5} {count:7,.0f} times {sent / 1e9:9.3f}")
    everything = sum(one.sent for one in program.collectives)
    beside = sum(one.sent for one in program.collectives if one.is_async) / everything if everything else 1.0
    lines.append(f"  {beside:.1%} of these bytes are sent while other work may go on, as compiled")
    for axis, seconds in estimate.communication.items():
        speed = target.bandwidth(mesh, axis) / 1e9
        compiled = sum(one.sent for one in program.collectives if one.axes[:1] == (axis,)) / 1e9
        lines.append(
            f"  along {axis}: {compiled:.1f} GB compiled, {estimate.sent[axis] / 1e9:.1f} by the formula, "
            f"{speed:.0f} GB/s: {seconds * 1e3:.0f} ms"
        )
    return "\n".join(lines)


def _time(config: Config, estimate: Estimate, target: Target) -> str:
    everything = sum(estimate.communication.values())
    share = estimate.hidden / everything if everything else 1.0
    budget = config.run.steps * estimate.tokens
    hours = config.run.steps * estimate.seconds / 3600
    return "\n".join(
        [
            "Estimate of a step (roofline, not measured):",
            f"  matrix products {estimate.matmul * 1e3:8.0f} ms",
            f"  reads           {estimate.reads * 1e3:8.0f} ms",
            f"  memory-bound    {estimate.memory_bound * 1e3:8.0f} ms",
            f"  communication   {everything * 1e3:8.0f} ms, of which {share:.1%} can hide under compute",
            f"  step            {estimate.seconds * 1e3:8.0f} ms",
            f"  {estimate.tokens_per_device:,.0f} tokens/s/GPU, MFU {estimate.mfu(target):.1%}; {budget:.3e} tokens in "
            f"{hours / 24:.1f} days, {hours * estimate.devices:,.0f} GPU-hours",
        ]
    )


def _assumptions(target: Target) -> str:
    return "\n".join(
        [
            f"Assumed ({target.device}; the makers' figures, and shares of them that are guesses until measured):",
            f"  {target.peak / 1e12:.0f} TFLOP/s bfloat16, of which matrix products reach {target.matmul_share:.0%} "
            f"and reads {target.read_share:.0%} (counted on visible pairs)",
            f"  memory {target.memory_speed / 1e12:.2f} TB/s at {target.memory_share:.0%}; about 40 arrays of the "
            "model width and 6 of the feed-forward width pass for each token and layer",
            f"  {target.node} GPUs a node, NVLink {target.nvlink / 1e9:.0f} GB/s a GPU and direction, network "
            f"{target.network / 1e9:.0f} GB/s a GPU, both at {target.link_share:.0%}; a group has the links of all its "
            "members in a node",
            f"  rings; {target.hop_in_node * 1e6:.0f} µs a hop in a node, "
            f"{target.hop_between_nodes * 1e6:.0f} µs between",
            "  what fsdp sends hides under the compute of other layers, as far as that reaches; all else is waited for",
            "  data is read in time, no device is slower than another, nothing fails, checkpoints cost nothing",
        ]
    )
