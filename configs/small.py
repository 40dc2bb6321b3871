"""Memory Mosaics v2 small, the paper's recipe: 200B tokens of 4,096-token rows, 3e-4 peak (PAPER section 6).

Command:  python -m launch.train --config=configs/small.py:256 --workdir=runs/small --config.data.path=data/mix
          (a corpus prepared with the Llama-3 tokenizer: --tokenizer=path/to/tokenizer.model)
Fit:      python -m launch.plan --config=configs/small.py:256 --devices=256   (docs/results/plan.md)
Cost:     not measured.
Expected: not measured here; the paper's results stand in its tables.
"""

import ml_collections

from mosaics_jax.config import default_config

MESHES = {  # GPUs: mesh axes, and the micro-batches of a step (at most four rows a GPU and time)
    8: ({"fsdp": 8}, 32),
    64: ({"fsdp": 64}, 4),
    256: ({"data": 4, "fsdp": 64}, 1),
    1024: ({"data": 16, "fsdp": 64}, 1),
}


def get_config(gpus: str = "256") -> ml_collections.ConfigDict:
    """The recipe for a number of GPUs: --config=configs/small.py:64."""
    if gpus not in map(str, MESHES):
        raise ValueError(f"configs/small.py has no mesh for {gpus!r} GPUs; legal: {', '.join(map(str, MESHES))}")
    axes, micro_batches = MESHES[int(gpus)]
    config = default_config()
    config.model.update(layers=24, width=2048, heads=16, ffn_width=6144)
    config.data.update(path="data/mix", context=4096, batch=1024, workers=4)
    config.optimizer.update(peak_learning_rate=3e-4)
    config.run.update(steps=47684, accumulation=micro_batches)
    config.mesh.update(**axes)
    return config
