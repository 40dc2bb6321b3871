"""The llama transformer at the widths, data and steps of `large.py`.

Command:  python -m launch.train --config=configs/transformer_large.py --workdir=runs/transformer_large
          The long/short baseline: --config.model.memories="('short','long')"
Cost:     see `large.py`; a step is a little cheaper than the mosaic's.
Expected: the baseline that `large.py` is held against.
"""

import ml_collections

from configs import large


def get_config(gpus: str = "256") -> ml_collections.ConfigDict:
    config = large.get_config(gpus)
    config.model.update(architecture="transformer", memories=("full",))
    return config
