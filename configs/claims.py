"""The models of `launch.claims`: one budget, one study, one variant, all of the same widths, tokens and order of data.

Command:  python -m launch.claims --workdir=runs/claims        (trains and asks them all)
          one of them: python -m launch.train --config=configs/claims.py:cpu,recall,mosaic --workdir=runs/recall \\
              --config.data.path=runs/claims/data --config.run.seed=1 --config.data.seed=1 \\
              --config.optimizer.peak_learning_rate=2e-3
Cost:     cpu: all 152 trainings and their answers 95 minutes on two CPU cores, as two commands side by side. gpu: not
          measured.
Expected: docs/results/claims.md.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from mosaics_jax.config import default_config


class Recipe(NamedTuple):
    """What a study trains: corpora by share of rows, for so many steps, and changes of the model."""

    corpora: Mapping[str, float]
    steps: int
    model: Mapping[str, Any] = {}


STUDIES: Mapping[str, Recipe] = {
    "language": Recipe({"facts": 0.5, "text": 0.5}, 500),
    "classification": Recipe({"classification": 1.0}, 400),
    "recall": Recipe({"recall": 1.0}, 300),
    "recall_one_layer": Recipe({"recall": 1.0}, 300, {"layers": 1}),
    "extension": Recipe({"long_facts": 0.5, "text": 0.5}, 16),  # goes on from the models of language, with longer rows
}
SLOWER = 10  # an extension's learning rate is this much below the one that its model was trained at
# What differs from Memory Mosaics v2, as a value or made of the mosaic's; the widths are the same in all but the last.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "mosaic": {},
    "transformer": {"architecture": "transformer", "memories": ("full",)},
    "long_short_transformer": {"architecture": "transformer"},
    "fixed_bandwidth": {"bandwidth": "fixed"},
    "fixed_delay": {"delay_max": lambda model: model.delay_min},
    "leaky_keys": {"key_extractor": "leaky"},
    "without_long_term": {"memories": ("short",)},
    # As a transformer: a mosaic's block has 6 d^2 + 4 d H weights beside the feed-forward ones instead of 4 d^2.
    "as_many_weights": {"ffn_width": lambda model: model.ffn_width - (2 * model.width + 4 * model.heads) // 3},
}
RATES = {"cpu": (2e-3, 6e-3), "gpu": (5e-4, 1.5e-3)}  # of each budget; a variant is judged at its best one


def get_config(which: str = "cpu,recall,mosaic") -> ml_collections.ConfigDict:
    """BUDGET,STUDY,VARIANT."""
    budget, study, variant, *rest = [*which.split(","), "", "", ""]
    if budget not in RATES or study not in STUDIES or variant not in VARIANTS or any(rest):
        raise ValueError(
            f"configs/claims.py has no recipe {which!r}; legal: one each of {', '.join(RATES)}; "
            f"{', '.join(STUDIES)}; {', '.join(VARIANTS)}"
        )
    config = default_config()
    if budget == "cpu":
        config.model.update(
            vocabulary=258, layers=2, width=64, heads=2, ffn_width=172, window=16, delay_min=4, delay_max=16,
            compute_dtype="float32", remat="none",
        )  # fmt: skip
        config.data.update(context=512, batch=4)
    else:
        config.model.update(
            vocabulary=258, layers=12, width=512, heads=8, ffn_width=1536, window=64, delay_min=16, delay_max=64,
        )  # fmt: skip
        config.data.update(context=1024, batch=64)
    recipe = STUDIES[study]
    steps = recipe.steps
    config.optimizer.update(peak_learning_rate=RATES[budget][0], warmup_steps=50)
    config.run.update(steps=steps, log_every=50, eval_every=steps, eval_batches=32)
    config.checkpoint.update(every=1000, keep=1)
    if study == "extension":
        config.data.update(context=4 * config.data.context)
        config.optimizer.update(peak_learning_rate=RATES[budget][0] / SLOWER, warmup_steps=0)
        config.run.update(log_every=1)
        config.checkpoint.steps = tuple(2**power for power in range(8) if 2**power < steps)
    config.data.path, config.data.mixture = "runs/claims/data", ml_collections.ConfigDict(dict(recipe.corpora))
    config.model.update(recipe.model)
    for field, value in VARIANTS[variant].items():
        config.model[field] = value(config.model) if callable(value) else value
    return config
