"""Memory Mosaics v2 large, the paper's recipe: 1T tokens of 4,096-token rows, 1e-3 peak (PAPER section 6).

Command:  python -m launch.train --config=configs/large.py --workdir=runs/large --config.data.path=data/mix
          (a corpus prepared with the Llama-3 tokenizer: --tokenizer=path/to/tokenizer.model)
Cost:     not measured.
Expected: not measured here; the paper's results stand in its tables.
"""

import ml_collections

from mosaics_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(layers=32, width=4096, heads=32, ffn_width=14336)
    config.data.update(path="data/mix", context=4096, batch=1024, workers=4)
    config.optimizer.update(peak_learning_rate=1e-3)
    config.run.update(steps=238419)
    config.mesh.update(fsdp=64)
    return config
