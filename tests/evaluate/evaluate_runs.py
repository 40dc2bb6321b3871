"""Run by `run_model_test.py` in a process of its own, which has eight CPU devices: one checkpoint on several meshes."""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from mosaics_jax.config import MeshConfig
from mosaics_jax.evaluate.model import RunModel
from mosaics_jax.evaluate.suite import row

MESHES = {"data": {}, "fsdp": {"fsdp": 8}, "tensor": {"tensor": 2}, "all": {"fsdp": 2, "tensor": 2}}


def answers(model: RunModel) -> dict[str, Any]:
    """Of rows that stop at different times: one ends its text at once where the model says so."""
    texts = ["the key", "", "a memory reads a key and the value from the past", *(f"it keeps {n}" for n in range(7))]
    rows = [row(model.tokenizer, text) for text in texts]
    options = [np.array(ids, np.int32) for ids in ([97], [98, 99, 100])]
    return {
        "texts": model.generate(rows, 6),
        "ranks": model.rank(rows, options).tolist(),
        "losses": [losses.loss_T.tolist() for losses in model.losses(rows)],
    }


if __name__ == "__main__":
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    found = {
        name: answers(RunModel(sys.argv[1], MeshConfig(**axes), batch_tokens=1024)) for name, axes in MESHES.items()
    }
    pathlib.Path(sys.argv[2]).write_text(json.dumps(found))
