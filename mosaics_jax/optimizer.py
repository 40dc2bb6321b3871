"""AdamW under linear warm-up and cosine decay, from the config (PAPER section 6)."""

from typing import Any

import jax
import optax

from mosaics_jax import dims
from mosaics_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """0 to the peak in `warmup_steps`, then a cosine to final_fraction of the peak at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.peak_learning_rate,
        peak_value=config.peak_learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, 1),
        end_value=config.peak_learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int, axes: dict[str, Any]) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW; weight decay acts on matrices only (norms and per-head scalars are free).

    `axes` are the parameters' logical axes (`nn.model.parameter_axes`).
    """
    is_matrix = jax.tree.map(dims.is_matrix, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        ),
    )
