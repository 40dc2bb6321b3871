"""Generation from the caches: prefill the prompts in parallel, then one token at a time.

Prompts of a batch are aligned at their ends: a row's padding lies before it, as a document of its own, so nothing of it
is ever read. Afterwards every cache counts from its own prompt's first token.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mosaics_jax import collectives
from mosaics_jax.config import ModelConfig
from mosaics_jax.data.tokenizer import Tokenizer, continuation
from mosaics_jax.nn.memory import Context
from mosaics_jax.nn.model import LanguageModel, from_values, to_values


class Sampling(NamedTuple):
    """How a token is drawn from the logits: temperature 0 takes the likeliest; top_k 0 and top_p 1 keep all."""

    temperature: float
    top_k: int
    top_p: float


def prefill(
    model: LanguageModel, tokens_BT: jax.Array, length_B: jax.Array, max_length: int
) -> tuple[jax.Array, dict[str, Any]]:
    """Logits_BV after the prompts, and the caches, with room for `max_length` positions of each row.

    Row b's prompt is its last `length_B[b]` >= 1 tokens; what stands before it is not read.
    """
    time = tokens_BT.shape[1]
    padding_B1 = (time - length_B)[:, None]
    start_BT = jnp.where(jnp.arange(time) < padding_B1, 0, padding_B1)
    context = Context(start_BT, model.config.delay_min)
    x_BTD, caches = model.scan_blocks(
        tokens_BT, lambda memory, x_BTD, _: memory.prefill(x_BTD, context, length_B, max_length)
    )
    return model.logits(x_BTD[:, -1:])[:, 0], caches


def decode(
    model: LanguageModel, token_B: jax.Array, caches: dict[str, Any], count_B: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """Logits_BV after one more token, of which each row has `count_B` >= 1 before it, and the caches with it."""
    x_B1D, caches = model.scan_blocks(
        token_B[:, None], lambda memory, x_B1D, cache: memory.decode(x_B1D, cache, count_B), caches
    )
    return model.logits(x_B1D)[:, 0], caches


def sample(key: jax.Array, logits_BV: jax.Array, how: Sampling) -> jax.Array:
    """token_B drawn from the logits: the top_k likeliest, of those the fewest that hold top_p of the probability."""
    if how.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / how.temperature
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    if how.top_k:
        sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < how.top_k, sorted_BV, -jnp.inf)
    # A token stays while those before it hold less than top_p: the likeliest always does.
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    sorted_BV = jnp.where((before_BV < how.top_p) | (how.top_p >= 1), sorted_BV, -jnp.inf)
    choice_B1 = jax.random.categorical(key, sorted_BV)[:, None]
    return jnp.take_along_axis(order_BV, choice_B1, axis=-1)[:, 0]


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """Continuations of the prompts, together as one batch; each ends at its end of text or after `max_new_tokens`.

    Every prompt is the beginning of a document of its own and may be of any length, the empty one included.
    """
    for name, value, kind, legal, what in (
        # Positions are int32, and a prompt takes some of them.
        (
            "max_new_tokens",
            max_new_tokens,
            Integral,
            lambda n: 1 <= n <= 2**30,
            "1 or more, an integer to 2**30",
        ),
        ("temperature", temperature, Real, lambda t: t >= 0, "0 (the likeliest token) or more"),
        ("top_k", top_k, Integral, lambda k: 0 <= k < 2**31, "0 (all) or more, an integer below 2**31"),
        ("top_p", top_p, Real, lambda p: 0 < p <= 1, "a number in (0, 1]"),
        ("seed", seed, Integral, lambda n: -(2**63) <= n < 2**63, "an integer of 64 bits"),
    ):
        if not (isinstance(value, kind) and legal(value)):
            raise ValueError(f"{name} is {value!r}; legal: {what}")
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is a {type(prompts).__name__}; legal: a list of str")
    prompts = list(prompts)
    if not prompts:
        return []
    if tokenizer.vocabulary > model.config.vocabulary:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocabulary} ids, the model knows {model.config.vocabulary}: "
            "they are not of the same run"
        )
    rows = [np.array([tokenizer.begin, *tokenizer.encode(prompt)], np.int32) for prompt in prompts]
    # Lengths are rounded up, so that prompts of about one length share a compiled program.
    tokens_BT, length_B = align_ends(rows, -(-max(map(len, rows)) // 32) * 32)
    new_BN = _continue(
        model.config, Sampling(temperature, top_k, top_p), max_new_tokens, tokenizer.end,
        to_values(model), tokens_BT, length_B, jax.random.key(seed),
    )  # fmt: skip
    return [text_until_end(tokenizer, row, before) for row, before in zip(np.asarray(new_BN), rows, strict=True)]


def align_ends(rows: Sequence[np.ndarray], time: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens_BT and length_B of prompts as `prefill` reads them: each at the end of its row of `time` positions."""
    tokens_BT = np.zeros((len(rows), time), np.int32)
    for row_T, prompt in zip(tokens_BT, rows, strict=True):
        row_T[time - len(prompt) :] = prompt
    return tokens_BT, np.array([len(prompt) for prompt in rows], np.int32)


def text_until_end(tokenizer: Tokenizer, ids: np.ndarray, before: np.ndarray | None = None) -> str:
    """The text of generated ids up to the first end of text, as it follows the ids `before` (see `continuation`)."""
    own = ids[: int((ids == tokenizer.end).argmax())] if tokenizer.end in ids else ids
    return continuation(tokenizer, own, before)


def continue_rows(
    config: ModelConfig, how: Sampling, count: int, end: int, values: Any, tokens_BT: jax.Array, length_B: jax.Array,
    key: jax.Array,
) -> jax.Array:  # fmt: skip
    """new_BN: the N = `count` tokens after each prompt; `end` fills what follows a row's end.

    Rows are as of `prefill`. On a mesh every device continues its own rows, for as many tokens as the longest needs.
    """
    model = from_values(config, values)
    batch, time = tokens_BT.shape

    def draw(index: jax.Array, logits_BV: jax.Array, done_B: jax.Array) -> jax.Array:
        return jnp.where(done_B, end, sample(jax.random.fold_in(key, index), logits_BV, how)).astype(jnp.int32)

    def more(carry: tuple[Any, ...]) -> jax.Array:
        index, _, done_B, _, _ = carry
        return (index < count) & (collectives.total((~done_B).sum(), *collectives.BATCH_AXES) > 0)

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, new_BN, done_B, logits_BV, caches = carry
        token_B = draw(index, logits_BV, done_B)
        new_BN = new_BN.at[:, index].set(token_B)
        logits_BV, caches = decode(model, token_B, caches, length_B + index)
        return index + 1, new_BN, done_B | (token_B == end), logits_BV, caches

    logits_BV, caches = prefill(model, tokens_BT, length_B, time + count)
    start = (jnp.int32(0), jnp.full((batch, count), end, jnp.int32), jnp.zeros(batch, bool), logits_BV, caches)
    return lax.while_loop(more, one, start)[1]


_continue = jax.jit(continue_rows, static_argnums=(0, 1, 2, 3))


def rank_rows(
    config: ModelConfig, values: Any, tokens_BT: jax.Array, length_B: jax.Array, options_NC: jax.Array,
    option_length_N: jax.Array,
) -> jax.Array:  # fmt: skip
    """score_BN = log p(option n | prompt b), the sum over the option's tokens, in nats.

    Prompts are read once, and what follows them, each option at once, from their caches. Rows are as of `prefill`;
    option n is the first `option_length_N[n]` >= 1 of its C tokens.
    """
    model = from_values(config, values)
    batch, time = tokens_BT.shape
    after_prompt_BV, after_prompt = prefill(model, tokens_BT, length_B, time)

    def score(option: tuple[jax.Array, jax.Array]) -> jax.Array:
        option_C, length = option
        tokens_BC = jnp.broadcast_to(option_C, (batch, option_C.size))
        x_BCD, _ = model.scan_blocks(
            tokens_BC, lambda memory, x_BCD, cache: (memory.follow(x_BCD, cache, length_B), None), after_prompt
        )
        before_BCV = jnp.concatenate([after_prompt_BV[:, None], model.logits(x_BCD[:, :-1])], axis=1)
        log_p_BC = jnp.take_along_axis(jax.nn.log_softmax(before_BCV), tokens_BC[..., None], axis=-1)[..., 0]
        return jnp.where(jnp.arange(option_C.size) < length, log_p_BC, 0).sum(1)

    return lax.map(score, (options_NC, option_length_N)).T
