"""From 4,096 to 32,768 tokens of context: a trained mosaic goes on with longer rows (PAPER section 6).

Command:  python -m launch.train --config=configs/extend_32k.py:large,256 --config.init_from=runs/large \\
              --workdir=runs/large_32k --config.data.path=data/mix
          tiny: --config=configs/extend_32k.py:tiny, on a corpus with documents of 32,768 tokens.
          A run whose model had overrides needs them again; the message names them.
Fit:      python -m launch.plan --config=configs/extend_32k.py:large,256 --devices=256   (docs/results/plan.md)
Cost:     tiny: less than a minute a step on two CPU cores. small and large: not measured.
Expected: in the paper one step gains 22 points of 32k question answering, and two reach the optimum: steps 1, 2, 4, ...
          are evaluated and kept, for `python -m launch.evaluate --step=1`. Not measured here for small and large.

Optimiser and schedule are new: the paper does not give theirs; here a tenth of the recipe's peak, without warm-up, and
a cosine. A step has as many tokens as the recipe's.
"""

import ml_collections

from configs import large, small, tiny

CONTEXT = 32768
MESHES = {  # GPUs: mesh axes, and the micro-batches of a step, of 128 rows (one row, or part of one, a GPU and time)
    "small": {
        8: ({"fsdp": 8}, 16),
        64: ({"fsdp": 16, "sequence": 4}, 8),
        256: ({"fsdp": 64, "sequence": 4}, 2),
        1024: ({"data": 2, "fsdp": 64, "sequence": 8}, 1),
    },
    "large": {
        64: ({"fsdp": 16, "sequence": 4}, 8),
        256: ({"fsdp": 64, "sequence": 4}, 2),
        1024: ({"data": 2, "fsdp": 64, "sequence": 8}, 1),
    },
}


def get_config(which: str = "tiny") -> ml_collections.ConfigDict:
    """tiny, or small or large and a number of GPUs: --config=configs/extend_32k.py:large,256."""
    name, _, gpus = which.partition(",")
    legal = ["tiny", *(f"{name},{number}" for name, meshes in MESHES.items() for number in meshes)]
    if which not in legal:
        raise ValueError(f"configs/extend_32k.py has no recipe {which!r}; legal: {'; '.join(legal)}")
    if name == "tiny":
        config = tiny.get_config()
        config.data.update(path="data/long", context=CONTEXT, batch=1)
        config.run.update(steps=16)
    else:
        config = {"small": small, "large": large}[name].get_config("256")
        axes, micro_batches = MESHES[name][int(gpus)]
        config.data.update(context=CONTEXT, batch=config.data.batch * config.data.context // CONTEXT)
        config.mesh.update({"data": -1, "fsdp": 1, "sequence": 1, **axes})
        config.run.update(steps=800, accumulation=micro_batches)
    config.optimizer.update(peak_learning_rate=config.optimizer.peak_learning_rate / 10, warmup_steps=0)
    early = tuple(2**power for power in range(8) if 2**power < config.run.steps)
    config.run.update(eval_steps=(0, *early), eval_every=100, eval_batches=2, log_every=1)
    config.checkpoint.update(steps=early, every=100)
    return config
