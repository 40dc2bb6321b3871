"""Memory Mosaics v2 large, the paper's recipe: 1T tokens of 4,096-token rows, 1e-3 peak (PAPER section 6).

Command:  python -m launch.train --config=configs/large.py:256 --workdir=runs/large --config.data.path=data/mix
          (a corpus prepared with the Llama-3 tokenizer: --tokenizer=path/to/tokenizer.model)
Fit:      python -m launch.plan --config=configs/large.py:256 --devices=256   (docs/results/plan.md)
Cost:     not measured.
Expected: not measured here; the paper's results stand in its tables.
"""

import ml_collections

from mosaics_jax.config import default_config

MESHES = {  # GPUs: mesh axes, and the micro-batches of a step (at most two rows a GPU and time)
    8: ({"fsdp": 8}, 64),
    64: ({"fsdp": 64}, 8),
    256: ({"data": 4, "fsdp": 64}, 2),
    1024: ({"data": 8, "fsdp": 128}, 1),
}


def get_config(gpus: str = "256") -> ml_collections.ConfigDict:
    """The recipe for a number of GPUs: --config=configs/large.py:64."""
    if gpus not in map(str, MESHES):
        raise ValueError(f"configs/large.py has no mesh for {gpus!r} GPUs; legal: {', '.join(map(str, MESHES))}")
    axes, micro_batches = MESHES[int(gpus)]
    config = default_config()
    config.model.update(layers=32, width=4096, heads=32, ffn_width=14336)
    config.data.update(path="data/mix", context=4096, batch=1024, workers=4)
    config.optimizer.update(peak_learning_rate=1e-3)
    config.run.update(steps=238419, accumulation=micro_batches)
    config.mesh.update(**axes)
    return config
