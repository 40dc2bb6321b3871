"""The llama transformer at the widths, data and steps of `tiny.py`.

Command:  python -m launch.train --config=configs/transformer_tiny.py --workdir=runs/transformer_tiny
          The long/short baseline: --config.model.memories="('short','long')"
Cost:     see `tiny.py`; a step is a little cheaper than the mosaic's.
Expected: the baseline that `tiny.py` is held against.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.model.update(architecture="transformer", memories=("full",))
    return config
