"""Hopper kernels on a CPU, in the interpreter that watches for races."""

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

WATCHED = plgpu.InterpretGPUParams(detect_races=True)


def assert_no_races() -> None:
    """About the interpreted kernels that ran last."""
    races = interpret_pallas_call.get_races()
    assert races is not None
    assert not races.races_found
