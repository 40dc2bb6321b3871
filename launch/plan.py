"""Says, before a GPU is rented, whether a model fits on a mesh and how fast it should train.

python -m launch.plan --config=configs/large.py:256 --devices=256 --target=h100 [--sweep]

Compiles the real train step for the mesh (on this machine, for devices that it has not), reads memory and collectives
out of it, and estimates the time of a step from speeds and shares that it prints. Nothing here is measured on a GPU.
"""

from absl import flags
from ml_collections import config_flags

from launch import command
from mosaics_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config file, such as configs/large.py:256 (the recipe for 256 GPUs)", lock_config=True
)
_DEVICES = flags.DEFINE_integer("devices", None, "GPUs to plan for")
_TARGET = flags.DEFINE_string("target", "h100", "kind of GPU")
_DOCUMENT = flags.DEFINE_integer("document", None, "mean tokens of a document; the context, where it is not given")
_SWEEP = flags.DEFINE_bool("sweep", False, "estimate all meshes of so many devices, without compiling")


def main() -> None:
    if _CONFIG.value is None:
        raise ValueError("--config is not set; legal: a config file, such as configs/large.py:256")
    if _DEVICES.value is None or _DEVICES.value < 1:
        raise ValueError(f"--devices is {_DEVICES.value}; legal: the number of GPUs to plan for")
    config = config_lib.Config.from_config_dict(_CONFIG.value)
    import jax

    from mosaics_jax import plan_report, roofline

    if _TARGET.value not in roofline.TARGETS:
        raise ValueError(f"--target is {_TARGET.value!r}; legal: {', '.join(roofline.TARGETS)}")
    document = config.data.context if _DOCUMENT.value is None else _DOCUMENT.value
    if document < 1:
        raise ValueError(f"--document is {document}; legal: 1 or more tokens")
    jax.config.update("jax_num_cpu_devices", _DEVICES.value)  # where the target's compiler is not installed
    report = plan_report.sweep if _SWEEP.value else plan_report.plan
    print(report(config, _TARGET.value, _DEVICES.value, document))


if __name__ == "__main__":
    command.run(main)
