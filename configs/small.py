"""Memory Mosaics v2 small, the paper's recipe: 200B tokens of 4,096-token rows, 3e-4 peak (PAPER section 6).

Command:  python -m launch.train --config=configs/small.py --workdir=runs/small --config.data.path=data/mix
          (a corpus prepared with the Llama-3 tokenizer: --tokenizer=path/to/tokenizer.model)
Cost:     not measured.
Expected: not measured here; the paper's results stand in its tables.
"""

import ml_collections

from mosaics_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(layers=24, width=2048, heads=16, ffn_width=6144)
    config.data.update(path="data/mix", context=4096, batch=1024, workers=4)
    config.optimizer.update(peak_learning_rate=3e-4)
    config.run.update(steps=47684)
    config.mesh.update(fsdp=8)
    return config
