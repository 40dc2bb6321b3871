"""The collectives of a step are those of docs/design.md: counted in programs compiled for eight CPU devices."""

import json
import os
import pathlib
import subprocess
import sys

import mesh_runs
import pytest

from mosaics_jax.program import Collective, collectives

ROOT = pathlib.Path(__file__).parent.parent

# For (data 2, fsdp 2). Written by hand in the compiler's notation.
TEXT = """\
HloModule step, num_partitions=4

%body (p.0: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = f32[4]{0} get-tuple-element(%p.0), index=1
  %all-gather.1 = f32[8]{0} all-gather(%w), replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/all_gather"}
  ROOT %t = (s32[], f32[8]) tuple(%i, %all-gather.1)
}

%inner (p.1: s32[]) -> s32[] {
  %rs = ((bf16[8,2]{1,0}), bf16[4,2]{1,0}) reduce-scatter-start(%g), replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}
  %d = bf16[4,2]{1,0} reduce-scatter-done(%rs)
}

%outer (p.2: s32[]) -> s32[] {
  %loop = s32[] while(%x), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %ar = (f32[3]{0}, f32[5]{0}) all-reduce(%a, %b), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%sum
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %while.2 = s32[] while(%a), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"2"}}
  %cp = (u8[6]{0}, u8[6]{0}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,2},{1,3}}
}
"""


def test_kinds_axes_bytes_and_executions_are_read():
    found = {c.kind: c for c in collectives(TEXT, {"data": 2, "fsdp": 2})}
    assert found["all-gather"] == Collective(
        "all-gather", "f32", ((8,),), 32, ("fsdp",), 2, 5, "jit(f)/all_gather", False
    )
    assert found["reduce-scatter"] == Collective("reduce-scatter", "bf16", ((4, 2),), 32, ("fsdp",), 2, 6, "", True)
    assert found["all-reduce"] == Collective("all-reduce", "f32", ((3,), (5,)), 32, ("data",), 2, 2, "", False)
    assert found["collective-permute"] == Collective("collective-permute", "u8", ((6,),), 6, ("data",), 2, 1, "", True)
    assert [found[kind].sent for kind in ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")] == [
        5 * 16.0, 6 * 16.0, 2 * 32.0, 6.0,
    ]  # fmt: skip


def test_a_loop_of_unknown_length_around_a_collective_is_refused():
    with pytest.raises(ValueError, match="outer is in a loop whose number of trips"):
        collectives(TEXT.replace('{"known_trip_count":{"n":"2"}}', "{}"), {"data": 2, "fsdp": 2})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The collectives of one step of a tiny mosaic on three meshes; float32 everywhere."""
    directory = tmp_path_factory.mktemp("programs")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / "mesh_runs.py"), "programs", str(directory)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=500)
    made = {}
    for path in directory.glob("*.json"):
        mesh = json.loads(path.read_text())
        made[path.stem] = collectives(path.with_suffix(".hlo").read_text(), mesh)
    return made


CONFIG = mesh_runs.config("mosaic")
LAYERS, MICRO = CONFIG.model.layers, CONFIG.run.accumulation
D, H, K, F = CONFIG.model.width, CONFIG.model.heads, CONFIG.model.head_width, CONFIG.model.ffn_width
V, T = CONFIG.model.vocabulary, CONFIG.data.context


def _times(found, kind, shape, axes):
    """How often arrays of a shape travel by a kind of collective along some axes; combined ones count each."""
    return sum(
        c.count * [sorted(s) for s in c.shapes].count(sorted(shape))
        for c in found
        if c.kind == kind and set(c.axes) == set(axes)
    )


@pytest.mark.slow
def test_weights_are_gathered_once_a_layer_and_pass_and_activations_never(found):
    program = found["fsdp_tensor"]
    passes = 2 * LAYERS * MICRO
    weights = {  # as used: whole along fsdp, cut along tensor of 2
        (D, H // 2, K): 4, (D, 2, H // 2): 2, (D, F // 2): 3, (2, H // 2, K, D): 1
    }  # fmt: skip
    for shape, count in weights.items():
        assert _times(program, "all-gather", shape, ["fsdp"]) == count * passes, shape
    assert _times(program, "all-gather", (V // 2, D), ["fsdp"]) == 2  # embedding and classifier, for all micro-batches
    gathers = sum(c.count * len(c.shapes) for c in program if c.kind == "all-gather")
    assert gathers == sum(weights.values()) * passes + 2  # and nothing else is gathered


@pytest.mark.slow
def test_tensor_sums_activations_twice_a_layer_and_pass(found):
    rows = CONFIG.data.batch // 4 // MICRO
    # Forward, after the memories and after the persistent memory, and the embedding; backward, before each of the two,
    # and the loss's gradient. What forward summed is kept, and not summed again.
    assert _times(found["fsdp_tensor"], "all-reduce", (rows, T, D), ["tensor"]) == (4 * LAYERS + 2) * MICRO


@pytest.mark.slow
def test_a_short_term_read_moves_its_window_and_a_long_term_read_gathers_once_each_way(found):
    program = found["fsdp_sequence_long_stretches"]
    rows, before = CONFIG.data.batch // 4 // MICRO, CONFIG.model.window - 1
    moved = _times(program, "collective-permute", (rows, before, H, K), ["sequence"])
    assert moved == LAYERS * MICRO * 2 * 3  # keys and values: forward, again in backward, and their gradients
    whole = (rows, T, H, K)
    assert _times(program, "all-gather", whole, ["sequence"]) == LAYERS * MICRO * 2 * 2
    scattered = [c for c in program if c.kind == "reduce-scatter" and set(c.axes) == {"sequence"}]
    stretch = (rows, T // 2, H, K)
    assert sum(c.count * c.shapes.count(stretch) for c in scattered) == LAYERS * MICRO * 2
    # Of activations nothing else travels: single positions for the values, and sums of the recurrence.
    largest = max(c.bytes for c in program if c.kind == "collective-permute")
    assert largest == 4 * rows * before * H * K


@pytest.mark.slow
def test_data_sums_each_gradient_once_a_step(found):
    program = found["data"]
    weights = sum(c.bytes * c.count for c in program if set(c.axes) == {"data"})
    assert all(c.kind == "all-reduce" and c.count == 1 for c in program if c.bytes > 4096)
    parameters = 4 * mesh_runs.parameters("mosaic")
    assert parameters <= weights <= 1.01 * parameters
