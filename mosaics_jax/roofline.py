"""How long a step should take: FLOPs, bytes and link speeds, from the config alone, with every assumption named.

One device's step is a sum of terms. Compute: matrix products, reads, and what is bound by memory, one after the other.
Communication: by mesh axis, over NVLink where a group lies in one node, over the nodes' network where it does not. What
fsdp sends belongs to one layer and can travel while the layer before computes; all else waits, and is waited for.
"""

import dataclasses
import math
from collections.abc import Iterator

from mosaics_jax import dims
from mosaics_jax.config import Config, MeshConfig
from mosaics_jax.metrics import PEAK_FLOPS
from mosaics_jax.nn.model import matmul_weights, parameter_count


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of cluster. Speeds are the makers' figures; shares are what is assumed to be reached of them."""

    device: str = "NVIDIA H100 80GB HBM3"
    memory: float = 80e9  # bytes
    reserve: float = 6e9  # bytes of it left to CUDA, NCCL's buffers and fragments
    memory_speed: float = 3.35e12  # bytes/s
    node: int = 8  # devices
    nvlink: float = 450e9  # bytes/s and direction, each device
    network: float = 50e9  # bytes/s and direction, each device (InfiniBand, 400 Gb/s)
    matmul_share: float = 0.70  # of peak FLOP/s, in matrix products of the model
    read_share: float = 0.45  # of peak, in reads: on the FLOPs that visible pairs need. Not measured
    memory_share: float = 0.80
    link_share: float = 0.80
    hop_in_node: float = 1e-6  # seconds added by each hop of a ring
    hop_between_nodes: float = 5e-6

    @property
    def peak(self) -> float:
        return PEAK_FLOPS[self.device]

    def bandwidth(self, mesh: MeshConfig, axis: str) -> float:
        """Bytes/s at which a device sends along an axis. Of a group that spans nodes, each member has a link of its own
        out of the node, and rings run over all of them: as many links as the group has members in a node."""
        inner, size = _stride(mesh, axis), getattr(mesh, axis)
        if inner * size <= self.node:
            return self.nvlink * self.link_share
        return min(self.nvlink, self.network * max(1, self.node // inner)) * self.link_share

    def latency(self, mesh: MeshConfig, axis: str) -> float:
        """Seconds for one way round a ring along an axis."""
        inner, size = _stride(mesh, axis), getattr(mesh, axis)
        nodes = max(1, inner * size // self.node) if inner < self.node else size
        return (size - nodes) * self.hop_in_node + (nodes - 1) * self.hop_between_nodes


TARGETS = {"h100": Target()}


def _stride(mesh: MeshConfig, axis: str) -> int:
    """How far apart neighbours along an axis are; tensor is innermost."""
    inner = dims.MESH_AXES[dims.MESH_AXES.index(axis) + 1 :]
    return math.prod(getattr(mesh, name) for name in inner)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one step on one device."""

    matmul: float
    reads: float
    memory_bound: float
    communication: dict[str, float]  # seconds by mesh axis
    sent: dict[str, float]  # bytes by mesh axis
    hidden: float  # seconds of communication under compute
    model_flops: float  # of the step on all devices, recomputation not counted
    hardware_flops: float  # with it
    tokens: int  # of the step on all devices
    devices: int
    held: dict[str, float]  # bytes by kind

    @property
    def compute(self) -> float:
        return self.matmul + self.reads + self.memory_bound

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.communication.values()) - self.hidden

    @property
    def tokens_per_device(self) -> float:
        """Tokens a second and device."""
        return self.tokens / self.seconds / self.devices

    def mfu(self, target: Target) -> float:
        return self.model_flops / (self.seconds * self.devices * target.peak)

    def fits(self, target: Target) -> bool:
        return sum(self.held.values()) <= target.memory - target.reserve


def visible_pairs(config: Config, document: int) -> float:
    """Pairs that the memories of all layers see in a step, rows being documents of `document` tokens, and cut."""
    model, T = config.model, config.data.context
    length = min(document, T)
    delay = (model.delay_min + model.delay_max) / 2  # the mean of the drawn m

    def of_a_document(kind: str) -> float:
        full = length * (length + 1) / 2
        if kind == "full":
            return full
        if kind == "short":
            window = min(model.window - (model.architecture == "mosaic"), length)
            own = 0 if model.architecture == "mosaic" else 1  # whether the present pair is seen
            return sum(min(t + own, window) for t in range(length))
        reach = max(0.0, length - delay)
        return reach * (reach + 1) / 2

    rows = config.data.batch * T / length
    return rows * model.layers * sum(of_a_document(kind) for kind in model.memories)


def saved_bytes(config: Config, tensor: int) -> float:
    """Bytes that the forward pass of all layers keeps for backward, for each token (docs/design.md, the mesh).

    The block's input always; under "dots" every matrix product's result, what the reads return and what was summed over
    tensor; under "none" about twice that.
    """
    model = config.model
    wide, item = model.width, 2 if model.compute_dtype == "bfloat16" else 4
    if model.remat == "block":
        return model.layers * item * wide
    memories = len(model.memories)
    projections = (2 if model.architecture == "mosaic" else 3) * memories  # a mosaic's query is its key
    of_heads = item * wide * (projections + memories) + memories * model.heads * 4 * 4  # gates, decays, two row terms
    of_features = item * 2 * model.ffn_width
    summed = 2 * item * wide
    dots = model.layers * (item * wide + summed + (of_heads + of_features) / tensor)
    return dots if model.remat == "dots" else 2 * dots


def estimate(config: Config, mesh: MeshConfig, target: Target, document: int) -> Estimate:
    """The step of `config` on a mesh (every axis a number, none -1)."""
    model, devices = config.model, mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor
    tokens = config.data.batch * config.data.context
    here = tokens / (mesh.data * mesh.fsdp * mesh.sequence)  # tokens of a device
    weights, parameters = matmul_weights(model), parameter_count(model)
    blocks = parameters - 2 * model.vocabulary * model.width  # all but embedding and classifier

    pairs = visible_pairs(config, document)
    matmul_flops, read_flops = 6.0 * weights * tokens, 12.0 * model.heads * model.head_width * pairs
    again = model.remat == "block"
    hardware = matmul_flops + read_flops + (2.0 * blocks * tokens + read_flops / 3 if again else 0)
    # The last stretch of a row sees nearly twice the mean of the long-term pairs, and the others wait for it.
    uneven = 2 - 1 / mesh.sequence
    matmul = (hardware - read_flops * (4 / 3 if again else 1)) / devices / (target.peak * target.matmul_share)
    reads = read_flops * (4 / 3 if again else 1) * uneven / devices / (target.peak * target.read_share)

    communication, sent, hidden = _communication(config, mesh, target, here, blocks, matmul + reads)
    stored = parameters / (mesh.fsdp * mesh.tensor)
    return Estimate(
        matmul=matmul,
        reads=reads,
        memory_bound=_passes(config, mesh, here, stored) / (target.memory_speed * target.memory_share),
        communication=communication,
        sent=sent,
        hidden=hidden,
        model_flops=matmul_flops + read_flops,
        hardware_flops=hardware,
        tokens=tokens,
        devices=devices,
        held=_held(config, mesh, here, stored),
    )


def _passes(config: Config, mesh: MeshConfig, here: float, stored: float) -> float:
    """Bytes between memory and what is no matrix product: about 40 arrays of the model width and 6 of the feed-forward
    width for each token, layer and step (norms, sums, recurrences, values, SiLU, both ways), and the optimiser."""
    model = config.model
    item = 2 if model.compute_dtype == "bfloat16" else 4
    of_token = item * model.layers * (10 * model.width + (30 * model.width + 6 * model.ffn_width) / mesh.tensor)
    of_weight = 4 * (7 + 3 * config.run.accumulation)  # AdamW reads four and writes three; gradients are added up
    return here * of_token + stored * of_weight


def _held(config: Config, mesh: MeshConfig, here: float, stored: float) -> dict[str, float]:
    """Bytes by kind. Weights, optimiser and gradients are exact; the rest follows the formulas above and below."""
    model = config.model
    item = 2 if model.compute_dtype == "bfloat16" else 4
    vocabulary = model.vocabulary * model.width / mesh.tensor
    layer = (parameter_count(model) - 2 * model.vocabulary * model.width) / model.layers / mesh.tensor
    micro = here / config.run.accumulation
    logits = 3 * 4 * min(config.run.loss_chunk, micro) * model.vocabulary / mesh.tensor
    return {
        "weights": 4 * stored,
        "optimizer": 8 * stored,
        "gradients": 8 * stored,  # of all micro-batches so far, and of one
        "activations": saved_bytes(config, mesh.tensor) * micro,
        # Embedding and classifier whole, and the gradient of one; two layers' weights whole, and the gradient of one.
        "temporary": vocabulary * (2 * item + 4) + layer * (2 * item + 4) + logits + 12 * micro * item * model.width,
    }


def _communication(
    config: Config, mesh: MeshConfig, target: Target, here: float, blocks: int, compute: float
) -> tuple[dict[str, float], dict[str, float], float]:
    """Seconds and bytes by axis, and the seconds that compute hides."""
    model, rounds = config.model, config.run.accumulation
    item = 2 if model.compute_dtype == "bfloat16" else 4
    wide = item * model.width
    ends = 2 * model.vocabulary * model.width / mesh.tensor
    calls = dict.fromkeys(dims.MESH_AXES, 0.0)
    whole = dict.fromkeys(dims.MESH_AXES, 0.0)
    share = {name: (getattr(mesh, name) - 1) / getattr(mesh, name) for name in dims.MESH_AXES}
    # Weights whole, forward and backward, and gradients in float32; 8 gathers of a layer, of which backward has two.
    whole["fsdp"] = rounds * blocks / mesh.tensor * (2 * item + 4) + ends * (item + 4 * rounds)
    calls["fsdp"] = rounds * model.layers * (8 * 2 + 1)
    # Two sums a layer forward, two backward, of what is whole along tensor; a sum is twice the ring.
    whole["tensor"] = 2 * here * wide * (4 * model.layers + 2)
    calls["tensor"] = 2 * rounds * (4 * model.layers + 2)
    long = sum(kind != "short" for kind in model.memories)
    # Keys and values of the whole row: forward, again in backward, and the sum of their gradients.
    whole["sequence"] = here * mesh.sequence * wide / mesh.tensor * long * 6 * model.layers
    calls["sequence"] = rounds * model.layers * (6 * long + 3 * 6)
    sent = {name: whole[name] * share[name] for name in dims.MESH_AXES}
    # Once a step, gradients are summed over all that hold the same shard.
    summing, holders = ("data" if mesh.data > 1 else "sequence"), mesh.data * mesh.sequence
    sent[summing] += 2 * 4 * (blocks / mesh.tensor + ends) / mesh.fsdp * (holders - 1) / holders
    calls[summing] += 2
    if mesh.sequence > 1:  # the window before each stretch, to neighbours
        rows = here * mesh.sequence / config.data.context
        sent["sequence"] += 6 * model.layers * rows * (model.window - 1) * wide / mesh.tensor
    seconds = {
        name: sent[name] / target.bandwidth(mesh, name) + calls[name] * target.latency(mesh, name)
        for name in dims.MESH_AXES
        if getattr(mesh, name) > 1
    }
    # All layers but the first of a pass can be fetched under the one before; a layer hides what its own compute covers.
    hidden = min(seconds.get("fsdp", 0.0) * (1 - 1 / model.layers), compute)
    return seconds, {name: sent[name] for name in seconds}, hidden


def meshes(config: Config, devices: int, target: Target) -> Iterator[tuple[MeshConfig, int]]:
    """All meshes of powers of two that the model divides among, with every number of micro-batches.

    tensor stays within a node: its sums are waited for.
    """
    model, data = config.model, config.data

    def powers(most: int) -> list[int]:
        return [2**i for i in range(most.bit_length()) if 2**i <= most]

    for tensor in powers(min(target.node, devices)):
        if model.heads % tensor or model.ffn_width % tensor or model.vocabulary % tensor or devices % tensor:
            continue
        for sequence in powers(devices // tensor):
            if data.context % sequence or data.context // sequence < model.window or devices % (tensor * sequence):
                continue
            rows = devices // (tensor * sequence)
            for fsdp in powers(rows):
                if rows % fsdp or model.width % fsdp or data.batch % rows:
                    continue
                mesh = dataclasses.replace(config.mesh, data=rows // fsdp, fsdp=fsdp, sequence=sequence, tensor=tensor)
                for micro in powers(data.batch // rows):
                    if (data.batch // rows) % micro == 0:
                        yield mesh, micro
