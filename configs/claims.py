"""The models of `launch.claims`: one budget, one study, one variant, all of the same widths, tokens and order of data.

Command:  python -m launch.claims --workdir=runs/claims        (trains and asks them all)
          one of them: python -m launch.train --config=configs/claims.py:cpu,recall,mosaic --workdir=runs/recall \\
              --config.data.path=runs/claims/data --config.run.seed=1 --config.optimizer.peak_learning_rate=3e-3
Cost:     not measured.
Expected: docs/results/claims.md, once it is written.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from mosaics_jax.config import default_config

# What is trained: corpora by share of rows, and changes of the model.
STUDIES: Mapping[str, tuple[dict[str, float], dict[str, Any]]] = {
    "language": ({"text": 1.0}, {}),
    "facts": ({"facts": 0.75, "text": 0.25}, {}),
    "classification": ({"classification": 1.0}, {}),
    "recall": ({"recall": 1.0}, {}),
    "recall_one_layer": ({"recall": 1.0}, {"layers": 1}),
}
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
BUDGETS = ("cpu", "gpu")


def get_config(which: str = "cpu,recall,mosaic") -> ml_collections.ConfigDict:
    """BUDGET,STUDY,VARIANT."""
    budget, study, variant, *rest = [*which.split(","), "", "", ""]
    if budget not in BUDGETS or study not in STUDIES or variant not in VARIANTS or any(rest):
        raise ValueError(
            f"configs/claims.py has no recipe {which!r}; legal: one each of {', '.join(BUDGETS)}; "
            f"{', '.join(STUDIES)}; {', '.join(VARIANTS)}"
        )
    config = default_config()
    if budget == "cpu":
        config.model.update(
            vocabulary=258, layers=2, width=64, heads=2, ffn_width=172, window=16, delay_min=4, delay_max=16,
            compute_dtype="float32", remat="none",
        )  # fmt: skip
        config.data.update(context=512, batch=8)
        config.optimizer.update(peak_learning_rate=3e-3, warmup_steps=50)
        config.run.update(steps=600, log_every=50, eval_every=600, eval_batches=16)
    else:
        config.model.update(
            vocabulary=258, layers=12, width=512, heads=8, ffn_width=1536, window=64, delay_min=16, delay_max=64,
        )  # fmt: skip
        config.data.update(context=1024, batch=64)
        config.optimizer.update(peak_learning_rate=1e-3, warmup_steps=100)
        config.run.update(steps=2000, log_every=50, eval_every=2000, eval_batches=16)
    config.checkpoint.update(every=1000, keep=1)
    config.data.path, config.data.mixture = "runs/claims/data", ml_collections.ConfigDict(STUDIES[study][0])
    config.model.update(STUDIES[study][1])
    for field, value in VARIANTS[variant].items():
        config.model[field] = value(config.model) if callable(value) else value
    return config
