"""What the memories of a model do on a text, as plain numpy arrays.

The model runs once, by its own code, and keeps what its reads are made of; only the weights, which no read ever holds,
are made here, from those.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mosaics_jax.config import ModelConfig
from mosaics_jax.data.tokenizer import Tokenizer, continuation
from mosaics_jax.nn.memory import Trace
from mosaics_jax.nn.model import LanguageModel, from_values, to_values
from pallas_kernels.retrieval import retrieve

LONGEST: Final = 4096  # positions of a text; the weights of one head are its square, 64 MiB there

_SIGNS: Final = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


class Answer(NamedTuple):
    """One stored pair that answered a read.

    Attributes:
      stored: its position s.
      token: the token at s, which made the key.
      next_token: the token at s+1, of which the value of a mosaic's memory tells; None after the text's end.
      weight: its share of the read.
    """

    stored: int
    token: int
    next_token: int | None
    weight: float


@dataclasses.dataclass(frozen=True)
class Look:
    """A model's reads of some texts. Made by `look`."""

    config: ModelConfig
    tokens_BT: np.ndarray
    _traces: Mapping[str, Trace]  # of each memory, as numpy arrays with a leading layer dimension

    def weights(self, layer: int, memory: str) -> np.ndarray:
        """weight_BHTS, float32: the share of stored s in the read of t. Over s they sum to 1, or to 0 of no pairs."""
        trace = self.trace(layer, memory)
        batch, time, heads, _ = trace.query_BTHK.shape
        weight_BHTS = np.empty((batch, heads, time, time), np.float32)
        for row in range(batch):
            for head in range(heads):
                weight_BHTS[row, head] = self.head_weights(layer, memory, row, head, slice(None))
        return weight_BHTS

    def head_weights(self, layer: int, memory: str, row: int, head: int, positions: slice) -> np.ndarray:
        """weight_TS, float64, of the reads of one head at `positions` of one row: the softmax over what each sees."""
        trace: Any = self.trace(layer, memory)
        _checked("head", head, self.config.heads)
        _checked("row", row, len(self.tokens_BT))
        visible_TS = self.visible(layer, memory)[row, positions]
        score_TS = trace.query_BTHK[row, positions, head] @ trace.key_BTHK[row, :, head].T.astype(np.float64)
        score_TS *= trace.bandwidth_BTH[row, positions, head, None]
        top_T1 = score_TS.max(-1, where=visible_TS, initial=-np.inf, keepdims=True)
        weight_TS = np.exp(score_TS - top_T1, where=visible_TS, out=np.zeros_like(score_TS))
        return weight_TS / np.maximum(weight_TS.sum(-1, keepdims=True), 1)  # the greatest weight was 1

    def visible(self, layer: int, memory: str) -> np.ndarray:
        """visible_BTS: whether the read of t may see the stored position s. It is the same in all layers and heads."""
        start_BT, stop_BT = map(np.asarray, self.trace(layer, memory).interval)
        stored_S = np.arange(self.tokens_BT.shape[1])
        return (start_BT[..., None] <= stored_S) & (stored_S < stop_BT[..., None])

    def bandwidth(self, layer: int, memory: str) -> np.ndarray:
        """bandwidth_BTH: β of every read."""
        return np.asarray(self.trace(layer, memory).bandwidth_BTH)

    def gate(self, layer: int, memory: str) -> np.ndarray:
        """gate_BTH, float64: g = exp(W_g x), the weight with which a position enters its key. Of mosaics only."""
        return np.exp(self._key_slopes(layer, memory).log_gate_BTH, dtype=np.float64)

    def decay(self, layer: int, memory: str) -> np.ndarray:
        """decay_BTH, float64: λ = exp(-|W_λ x|), what a key keeps of the one before. Of mosaics only."""
        return np.exp(self._key_slopes(layer, memory).log_decay_BTH, dtype=np.float64)

    def trace(self, layer: int, memory: str) -> Trace:
        """Queries, keys, values, bandwidths and intervals of one memory, as numpy arrays."""
        _checked("layer", layer, self.config.layers)
        if memory not in self._traces:
            raise ValueError(f"memory is {memory!r}; legal: {', '.join(self.config.memories)}")
        return jax.tree.map(lambda array: array[layer], self._traces[memory])

    def _key_slopes(self, layer: int, memory: str) -> Any:
        trace = self.trace(layer, memory)
        if trace.log_gate_BTH is None:
            raise ValueError(
                f"model.architecture is {self.config.architecture}, whose keys have no gate and no decay; legal: mosaic"
            )
        return trace


def look(model: LanguageModel, tokens: Any, document_BT: Any = None) -> Look:
    """Runs the model once over `tokens`, token ids [T] or [B, T], and keeps what its reads are made of.

    Documents are as in a call of the model. Raises ValueError for a text of more than 4,096 positions, or for what the
    model cannot read.
    """
    tokens_BT: Any = np.asarray(tokens)
    tokens_BT = tokens_BT[None] if tokens_BT.ndim == 1 else tokens_BT
    if tokens_BT.shape[-1] > LONGEST:
        raise ValueError(f"the text has {tokens_BT.shape[-1]} positions; legal: {LONGEST} or fewer")
    model.checked(tokens_BT, document_BT)  # here, where ids are concrete
    traces = jax.device_get(_traces(model.config, to_values(model), tokens_BT, document_BT))
    return Look(model.config, tokens_BT, jax.tree.map(_plain, traces))


@functools.partial(jax.jit, static_argnums=0)
def _traces(config: ModelConfig, values: Any, tokens_BT: jax.Array, document_BT: jax.Array | None) -> dict[str, Trace]:
    model = from_values(config, values)
    tokens_BT, context = model.checked(tokens_BT, document_BT)
    _, traces = model.scan_blocks(tokens_BT, lambda memory, x_BTD, _: memory.trace(x_BTD, context))
    return traces


def _plain(array: np.ndarray) -> np.ndarray:
    """numpy knows no bfloat16."""
    return array if array.dtype.kind in "iu" else array.astype(np.float32)


def weight_by_distance(look: Look, memory: str, longest: int | None = None) -> np.ndarray:
    """weight_LHN: the mean weight of the pair n positions back, of each layer and head, for n = 0 .. `longest`.

    The mean is over the reads that can see that pair, in all rows; NaN where none can. `.mean((0, 1))` is the curve of
    the whole memory. None is the greatest distance in the text.
    """
    time = look.tokens_BT.shape[1]
    longest = time - 1 if longest is None else longest
    _checked("longest", longest, time)
    visible_BTS = look.visible(0, memory)
    count_N = np.array([visible_BTS.diagonal(-n, 1, 2).sum() for n in range(longest + 1)])
    share_LHN = np.empty((look.config.layers, look.config.heads, longest + 1))
    for layer in range(look.config.layers):
        weight_BHTS = look.weights(layer, memory)
        for n in range(longest + 1):
            share_LHN[layer, :, n] = weight_BHTS.diagonal(-n, 2, 3).sum((0, 2), dtype=np.float64)
    return np.where(count_N > 0, share_LHN / np.maximum(count_N, 1), np.nan)


def answered(look: Look, layer: int, memory: str, head: int, position: int, top: int = 5, row: int = 0) -> list[Answer]:
    """The `top` stored pairs with most weight in the read at `position`, heaviest first; none if it sees nothing."""
    tokens_T = look.tokens_BT[_checked("row", row, len(look.tokens_BT))]
    _checked("position", position, len(tokens_T))
    weight_S = look.head_weights(layer, memory, row, head, slice(position, position + 1))[0]
    seen_S = np.flatnonzero(look.visible(layer, memory)[row, position])
    heaviest = seen_S[np.argsort(-weight_S[seen_S], kind="stable")][:top]
    following = [*tokens_T.tolist()[1:], None]
    return [Answer(int(s), int(tokens_T[s]), following[s], float(weight_S[s])) for s in heaviest]


def kernel_regression(
    query_T: Any, key_S: Any, value_S: Any, bandwidth: Any, start: Any = 0, stop: Any = None
) -> np.ndarray:
    """The read of a memory of numbers: o_t = Σ_s w_ts v_s over s in [start_t, stop_t), w_ts ∝ exp(β_t cos(q_t - k_s)).

    Queries and keys are angles, points of the unit circle: near each other that is the Gaussian exp(-β/2 (q - k)²).
    `bandwidth`, `start` and `stop` are numbers, or one for each query; stop None is the number of stored pairs.
    Raises ValueError as `pallas_kernels.retrieval.retrieve` does, which it calls.
    """
    arrays = {name: np.asarray(a, np.float32) for name, a in (("query", query_T), ("key", key_S), ("value", value_S))}
    for name, array in arrays.items():
        if array.ndim != 1:
            raise ValueError(f"{name} has shape {array.shape}; legal: one dimension")
    query_T, key_S, value_S = arrays.values()
    query_BTHK, key_BSHK = (np.stack([np.cos(a), np.sin(a)], -1)[None, :, None] for a in (query_T, key_S))
    stop = key_S.size if stop is None else stop
    per_query = (np.broadcast_to(np.asarray(number), query_T.shape) for number in (bandwidth, start, stop))
    bandwidth_T, start_T, stop_T = map(jnp.asarray, per_query)
    output_BTHV = retrieve(
        jnp.asarray(query_BTHK), jnp.asarray(key_BSHK), jnp.asarray(value_S[None, :, None, None]),
        bandwidth_T.astype(jnp.float32)[None, :, None], start_T[None], stop_T[None], unit_norm=True,
    )  # fmt: skip
    return np.asarray(output_BTHV)[0, :, 0, 0]


def token_labels(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """What each token says, for the ticks of a plot: white space as visible signs, a part of a character as �."""
    marks = {tokenizer.begin: "⊢", tokenizer.end: "⊣"}
    texts = [marks.get(int(token)) or continuation(tokenizer, [int(token)]) for token in ids]
    return ["".join(_SIGNS.get(letter, letter) for letter in text) for text in texts]


def _checked(name: str, value: int, count: int) -> int:
    """`value`, if it is one of `count` places, from 0. Raises ValueError."""
    if not 0 <= value < count:
        raise ValueError(f"{name} is {value}; legal: 0 to {count - 1}")
    return value
