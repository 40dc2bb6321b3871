"""Stands in for `launch.gpu.parts`: parts that pass, find faults, hang, die, and say what they were told is broken.

It starts quickly: no jax. FAKE_KERNELS holds the kernels of the canary's groups.
"""

import argparse
import json
import os
import pathlib
import signal

from launch.gpu.records import COMPILING, Recorder

KERNEL = "retrieve forward, K = 128, unit norm"


def canary(record: Recorder, group: str) -> None:
    for kernel in json.loads(os.environ["FAKE_KERNELS"])[group]:
        with record.running(f"canary {kernel}", (kernel,)):
            if group == "leaky_average, K = 64":
                signal.pause()  # hangs in its first kernel
        wrong = kernel == "retrieve forward, K = 64, unit norm"
        record("canary", kernel=kernel, ok=not wrong, same_bits=True, errors={}, message="wrong values" * wrong)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    for word in ("records", "setting", "broken", "bundle", "argument"):
        parser.add_argument(f"--{word}")
    given = parser.parse_args()
    record = Recorder(given.records)
    record("told", broken=json.loads(pathlib.Path(given.broken).read_text()), setting=given.setting)
    if given.name == "canary":
        canary(record, given.argument)
    elif given.name == "hangs":
        record("figure", by="hopper", memory="long-term", rows="unpacked", time=16384, what="forward", tflops=1.0)
        with record.running("a program", (KERNEL,)):
            signal.pause()
    elif given.name == "dies":
        with record.running("another program", ("another kernel",)):
            print("famous last words", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
    elif given.name == "raises":
        try:
            with record.running("a third program", ("a third kernel",)):
                raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        except RuntimeError as error:
            record("error", message=str(error))
    elif given.name == "compiles":
        record(COMPILING, name="a program")
        signal.pause()
    elif given.name == "half_a_record":
        record("note", message="whole")
        with open(given.records, "a", encoding="utf-8") as file:
            file.write('{"kind": "not')


if __name__ == "__main__":
    main()
