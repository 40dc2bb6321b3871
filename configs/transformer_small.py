"""The llama transformer at the widths, data and steps of `small.py`.

Command:  python -m launch.train --config=configs/transformer_small.py --workdir=runs/transformer_small
          The long/short baseline: --config.model.memories="('short','long')"
Cost:     see `small.py`; a step is a little cheaper than the mosaic's.
Expected: the baseline that `small.py` is held against.
"""

import ml_collections

from configs import small


def get_config(gpus: str = "256") -> ml_collections.ConfigDict:
    config = small.get_config(gpus)
    config.model.update(architecture="transformer", memories=("full",))
    return config
