"""The language model: embedding, a stack of blocks scanned over depth, norm, classifier (PAPER section 4).

A memory mosaic and a transformer differ in the contextual memories of their blocks and in nothing else.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from mosaics_jax import collectives, dims, visibility
from mosaics_jax.config import ModelConfig
from mosaics_jax.nn import layers
from mosaics_jax.nn.memory import AssociativeMemory, Context
from mosaics_jax.nn.persistent import PersistentMemory
from mosaics_jax.nn.transformer import Attention

# How one contextual memory is read: (memory, x_BTD, its cache or None) -> (o_BTHK, what the reader keeps).
Reader = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]

_READ = (dims.MEMORY, dims.HEADS, dims.HEAD_WIDTH, dims.WIDTH)
_EMBEDDING = (dims.VOCABULARY, dims.WIDTH)
_CONTEXTUAL = {"mosaic": AssociativeMemory, "transformer": Attention}


def _remat(policy: str) -> Callable[[Callable], Callable]:
    """What backward keeps of a block: everything, the matmul results and the reads, or only the block's input."""
    if policy == "none":
        return lambda body: body
    if policy == "block":
        return jax.checkpoint
    keep = jax.checkpoint_policies
    return lambda body: jax.checkpoint(
        body,
        policy=keep.save_from_both_policies(
            keep.dots_with_no_batch_dims_saveable, keep.save_only_these_names("retrieved", "summed")
        ),
    )


class Block(nnx.Module):
    """x += W_o [contextual heads](norm(x)), then x += persistent(norm(x)).

    W_o_MHKD holds one (H, K, d) slice for each contextual memory, in the order of `config.memories`.
    """

    def __init__(self, config: ModelConfig, layer: jax.Array, seed: layers.Seed):
        self.config = config
        one = layers.constant(1.0)
        normal = layers.truncated_normal(1 / jnp.sqrt(2.0 * config.width * (layer + 1)))
        self.memory_norm = layers.parameter(seed, "memory_norm", (config.width,), (dims.NORM,), one)
        for kind in config.memories:
            memory = _CONTEXTUAL[config.architecture](config, kind, layer, seed.fold(kind))
            setattr(self, kind, memory)
        shape = (len(config.memories), config.heads, config.head_width, config.width)
        self.W_o = layers.parameter(seed, "W_o", shape, _READ, normal)
        self.persistent_norm = layers.parameter(seed, "persistent_norm", (config.width,), (dims.NORM,), one)
        self.persistent = PersistentMemory(config, layer, seed.fold("persistent"))

    def __call__(self, x_BTD: jax.Array, read: Reader, cache: Any = None) -> tuple[jax.Array, dict[str, Any]]:
        """The block's output, and for each contextual memory what `read` kept."""
        epsilon = self.config.norm_epsilon
        seen_BTD = collectives.enter(layers.rms_norm(x_BTD, self.memory_norm[...], epsilon))
        W_o_MHKD = layers.weight(self.W_o[...], _READ, x_BTD.dtype)
        kept, reads = {}, []
        for slot, kind in enumerate(self.config.memories):
            output_BTHK, kept[kind] = read(getattr(self, kind), seen_BTD, None if cache is None else cache[kind])
            reads.append(jnp.einsum("BTHK,HKD->BTD", output_BTHK, W_o_MHKD[slot]))
        x_BTD += collectives.leave(functools.reduce(operator.add, reads))
        seen_BTD = collectives.enter(layers.rms_norm(x_BTD, self.persistent_norm[...], epsilon))
        x_BTD += collectives.leave(self.persistent(seen_BTD))
        return x_BTD, kept


class LanguageModel(nnx.Module):
    """`model(tokens_BT, document_BT=None, delay=None) -> logits_BTV`."""

    def __init__(self, config: ModelConfig, seed: int):
        self.config = config
        root = layers.Seed(seed)
        normal = layers.truncated_normal((2 * config.width) ** -0.5)
        shape = (config.vocabulary, config.width)
        self.embedding = layers.parameter(root, "embedding", shape, _EMBEDDING, normal)
        self.blocks = layers.stack(lambda layer, seed: Block(config, layer, seed), root.fold("blocks"), config.layers)
        self.final_norm = layers.parameter(root, "final_norm", shape[1:], (dims.NORM,), layers.constant(1.0))
        self.classifier = layers.parameter(root, "classifier", shape[::-1], _EMBEDDING[::-1], normal)

    def __call__(
        self, tokens_BT: jax.Array, document_BT: jax.Array | None = None, delay: jax.Array | int | None = None
    ) -> jax.Array:
        """Next-token logits_BTV in float32.

        Args:
          tokens_BT: token ids below `config.vocabulary` (checked outside jit; an id past it raises ValueError).
          document_BT: any integers; a change starts a document, across which nothing is read. None: one document a row.
          delay: m of the long-term memory; None is inference's `config.delay_min`.
        """
        tokens_BT, context = self.checked(tokens_BT, document_BT, delay)
        x_BTD, _ = self.hidden(tokens_BT, context)
        return self.logits(x_BTD)

    def checked(
        self, tokens_BT: jax.Array, document_BT: jax.Array | None = None, delay: jax.Array | int | None = None
    ) -> tuple[jax.Array, Context]:
        """The arguments of a call as the blocks take them. Raises ValueError for what the model cannot read."""
        tokens_BT = jnp.asarray(tokens_BT)
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise ValueError(f"tokens_BT is {tokens_BT.dtype}{list(tokens_BT.shape)}; legal: integers [B, T]")
        vocabulary = self.config.vocabulary
        if not isinstance(tokens_BT, jax.core.Tracer) and tokens_BT.size:
            least, greatest = np.asarray(tokens_BT).min(), np.asarray(tokens_BT).max()
            if not 0 <= least <= greatest < vocabulary:
                raise ValueError(
                    f"tokens_BT holds ids from {least} to {greatest}; legal: 0 to {vocabulary - 1} "
                    f"(model.vocabulary = {vocabulary})"
                )
        document_BT = jnp.zeros_like(tokens_BT) if document_BT is None else jnp.asarray(document_BT)
        if document_BT.shape != tokens_BT.shape:
            raise ValueError(f"document_BT has shape {document_BT.shape}; legal: that of tokens_BT, {tokens_BT.shape}")
        delay = self.config.delay_min if delay is None else delay
        if isinstance(delay, int) and delay < 1:  # a pair is complete one position later
            raise ValueError(f"delay is {delay}; legal: 1 or more")
        return tokens_BT, Context(visibility.document_start(document_BT), delay)

    def hidden(self, tokens_BT: jax.Array, context: Context) -> tuple[jax.Array, dict[str, Any]]:
        """What the classifier reads, x_BTD, and the health of every memory with a leading layer dimension."""
        return self.scan_blocks(tokens_BT, lambda memory, x_BTD, _: memory(x_BTD, context))

    def scan_blocks(self, tokens_BT: jax.Array, read: Reader, cache: Any = None) -> tuple[jax.Array, Any]:
        """Embeds, runs the blocks with every contextual memory read by `read`, and norms.

        `cache` and the second result have a leading layer dimension.
        """
        graph, stacked = nnx.split(self.blocks)

        def body(x_BTD: jax.Array, layer: tuple[nnx.State, Any]) -> tuple[jax.Array, Any]:
            state, layer_cache = layer
            return nnx.merge(graph, state)(x_BTD, read, layer_cache)

        x_BTD = self._embed(tokens_BT)
        x_BTD, kept = jax.lax.scan(_remat(self.config.remat)(body), x_BTD, (stacked, cache))
        return layers.rms_norm(x_BTD, self.final_norm[...], self.config.norm_epsilon), kept

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Rows of the embedding; each device along tensor adds those of its part of the vocabulary."""
        table_VD = layers.weight(self.embedding[...], _EMBEDDING, self.config.compute_dtype)
        if collectives.size(dims.TENSOR) == 1:
            return table_VD[tokens_BT]
        own_BT = tokens_BT - collectives.index(dims.TENSOR) * table_VD.shape[0]
        here_BT1 = ((own_BT >= 0) & (own_BT < table_VD.shape[0]))[..., None]
        return collectives.leave(jnp.where(here_BT1, table_VD.at[own_BT].get(mode="clip"), 0))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """logits_BTV in float32."""
        classifier_DV = layers.weight(self.classifier[...], _EMBEDDING[::-1], x_BTD.dtype)
        logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, classifier_DV, preferred_element_type=jnp.float32)
        return collectives.whole_vocabulary(logits_BTV)

    def remove_long_term(self) -> "LanguageModel":
        """The same model without its long-term memories: their weights, and their slice of every W_o, are gone."""
        if "long" not in self.config.memories or len(self.config.memories) == 1:
            raise ValueError(
                f"model.memories is {self.config.memories}; legal: 'long' beside another memory, which stays"
            )
        slot = self.config.memories.index("long")
        kept = tuple(kind for kind in self.config.memories if kind != "long")
        config = dataclasses.replace(self.config, memories=kept)
        values = to_values(self)
        del values["blocks"]["long"]
        values["blocks"]["W_o"] = jnp.delete(values["blocks"]["W_o"], slot, axis=1, assume_unique_indices=True)
        return from_values(config, values)


def create(config: ModelConfig, seed: int) -> LanguageModel:
    """The model with its initial weights (compiled: the eager constructor is slow)."""
    return from_values(config, jax.jit(lambda: to_values(LanguageModel(config, seed)))())


def to_values(model: LanguageModel) -> dict[str, Any]:
    """The parameters as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(model))


def abstract(config: ModelConfig) -> LanguageModel:
    """The model with shapes in place of weights: nothing is computed or held."""
    return nnx.eval_shape(lambda: LanguageModel(config, 0))


def from_values(config: ModelConfig, values: dict[str, Any]) -> LanguageModel:
    """The model whose parameters are `values`, as `to_values` gives them."""
    graph, state = nnx.split(abstract(config))
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)


def parameter_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axes of every parameter: a tree like `to_values`, with tuples of names as leaves."""
    state = nnx.state(abstract(config))
    return unflatten_dict({path: variable.get_metadata("axes") for path, variable in nnx.to_flat_state(state)})


@functools.cache
def parameter_count(config: ModelConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(to_values(abstract(config))))


@functools.cache
def matmul_weights(config: ModelConfig) -> int:
    """Weights that multiply every token: all matrices but the embedding, of which a token reads one row."""
    leaves = jax.tree.leaves(nnx.state(abstract(config)), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    matrices = [v for v in leaves if dims.is_matrix(v.get_metadata("axes"))]
    return sum(v.size for v in matrices) - config.vocabulary * config.width
