"""The whole road on a laptop: bytes of Python source, about a million weights, a few minutes on two CPU cores.

Command:  make train   (or: python -m launch.train --config=configs/tiny.py --workdir=runs/tiny)
Cost:     about three minutes on two CPU cores.
Expected: 1.88 bits per byte held out, beside a bigram entropy of 2.80 (docs/results/tiny.md).
"""

import ml_collections

from mosaics_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(
        vocabulary=258, layers=4, width=128, heads=4, ffn_width=384, window=64, delay_min=16, delay_max=64,
        compute_dtype="float32", remat="none",
    )  # fmt: skip
    config.data.update(path="data/python", context=512, batch=4)
    config.optimizer.update(peak_learning_rate=3e-3, warmup_steps=30)
    config.run.update(steps=240, log_every=10, eval_every=80, eval_batches=16)
    config.checkpoint.update(every=80)
    return config
