"""Decoding against the whole forward pass, hand-made tables of the sampler, and generation."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mosaics_jax.config import ModelConfig
from mosaics_jax.data.tokenizer import ByteTokenizer
from mosaics_jax.decode import Sampling, align_ends, decode, generate, prefill, rank_rows, sample
from mosaics_jax.nn.model import LanguageModel, abstract, from_values, to_values

T = 40
MOSAIC = ModelConfig(
    vocabulary=50, layers=2, width=32, heads=2, ffn_width=48, window=8, delay_min=3, delay_max=6,
    compute_dtype="float32", remat="none",
)  # fmt: skip
TRANSFORMER = dataclasses.replace(MOSAIC, architecture="transformer", memories=("full",))
CONFIGS = {
    "mosaic": MOSAIC,
    "mosaic without long-term memory": dataclasses.replace(MOSAIC, memories=("short",)),
    "mosaic of leaky keys and fixed bandwidth": dataclasses.replace(MOSAIC, key_extractor="leaky", bandwidth="fixed"),
    "transformer": TRANSFORMER,
    "long/short transformer": dataclasses.replace(TRANSFORMER, memories=("short", "long")),
}

# Compiled for little compilation rather than speed.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _values(config, seed=0):
    """Weights with every parameter away from its initial value."""
    shapes = flatten_dict(jax.eval_shape(lambda: to_values(LanguageModel(config, 0))))
    rng = np.random.default_rng(seed)
    drawn = {}
    for path, shape in shapes.items():
        middle, spread = (1, 0.3) if "norm" in path[-1] else (0.5, 0.4) if shape.ndim == 2 else (0, 0.25)
        if path[-1] in ("embedding", "classifier"):
            middle, spread = 0, 1
        drawn[path] = (middle + spread * rng.normal(size=shape.shape)).astype(np.float32)
    return unflatten_dict(drawn)


@functools.partial(_jit, static_argnums=0)
def _logits(config, values, tokens_BT):
    return from_values(config, values)(tokens_BT)


@functools.partial(_jit, static_argnums=(0, 4))
def _prefill(config, values, tokens_BT, length_B, max_length):
    return prefill(from_values(config, values), tokens_BT, length_B, max_length)


@functools.partial(_jit, static_argnums=0)
def _decode(config, values, token_B, caches, count_B):
    return decode(from_values(config, values), token_B, caches, count_B)


def _compare(name, lengths, max_length):
    """Prefills the first `lengths[b]` tokens of row b, decodes the others, and compares at every position."""
    values = _values(CONFIGS[name])
    # The full pass by the other implementation: the two sides then share the least.
    config, plain = CONFIGS[name], dataclasses.replace(CONFIGS[name], implementation="reference")
    length_B, time = np.array(lengths, np.int32), max(lengths)
    row = np.arange(len(lengths))
    tokens_BT = np.random.default_rng(1).integers(config.vocabulary, size=(len(lengths), T)).astype(np.int32)
    expected_BTV = np.asarray(_logits(plain, values, tokens_BT))
    assert expected_BTV.std() > 0.5

    # Ends aligned; before them any tokens, which must not be read.
    aligned_BT = np.full((len(lengths), time), 7, np.int32)
    for b, length in enumerate(lengths):
        aligned_BT[b, time - length :] = tokens_BT[b, :length]
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    logits_BV, caches = _prefill(config, values, aligned_BT, length_B, max_length)
    close(logits_BV, expected_BTV[row, length_B - 1], err_msg="prefill")
    for step in range(max_length - time):
        count_B = length_B + step
        logits_BV, caches = _decode(config, values, tokens_BT[row, count_B], caches, count_B)
        close(logits_BV, expected_BTV[row, count_B], err_msg=f"after {step + 1} decoded tokens")


@functools.partial(_jit, static_argnums=0)
def _rank(config, values, *arrays):
    return rank_rows(config, values, *arrays)


@pytest.mark.parametrize("name", CONFIGS)
def test_options_are_ranked_as_the_whole_forward_pass_ranks_them(name):
    """Prompts of one token, of less and of more than a window; options longer than the delay."""
    config, values = CONFIGS[name], _values(CONFIGS[name])
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 50, length).astype(np.int32) for length in (1, 5, 30)]
    options_NC = rng.integers(0, 50, (4, 7)).astype(np.int32)
    option_length_N = np.array([7, 1, 4, 6], np.int32)
    found_BN = _rank(config, values, *align_ends(prompts, 32), options_NC, option_length_N)
    for scores_N, prompt in zip(np.asarray(found_BN), prompts, strict=True):
        for score, option, length in zip(scores_N, options_NC, option_length_N, strict=True):
            row = np.concatenate([prompt, option[:length], np.zeros(T, np.int32)])[:T]
            log_p_TV = jax.nn.log_softmax(_logits(config, values, row[None]))[0]
            places = np.arange(len(prompt) - 1, len(prompt) - 1 + length)
            expected = np.asarray(log_p_TV)[places, option[:length]].astype(np.float64).sum()
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_are_the_full_pass(name):
    """Prompts shorter and longer than the window and the delay, in one batch; decoding crosses both borders."""
    _compare(name, (1, 3, 8, 20), max_length=T)


@pytest.mark.parametrize("name", ["mosaic", "long/short transformer"])
def test_room_for_less_than_a_window(name):
    _compare(name, (1, 2, 3, 2), max_length=6)


# The sampler.

PROBABILITY = (0.15, 0.5, 0.05, 0.3)


def _draw(how, count=20_000, logits=None):
    """The share of each token among many draws."""
    logits_V = np.log(np.array(PROBABILITY, np.float32)) if logits is None else np.array(logits, np.float32)
    logits_BV = jnp.asarray(np.broadcast_to(logits_V, (count, logits_V.size)))
    token_B = np.asarray(_jit(sample, static_argnums=2)(jax.random.key(0), logits_BV, how))
    return np.bincount(token_B, minlength=logits_V.size) / count


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Sampling(1.0, 0, 1.0), PROBABILITY),
        (Sampling(0.5, 0, 1.0), np.square(PROBABILITY) / np.square(PROBABILITY).sum()),
        (Sampling(0.0, 0, 1.0), (0, 1, 0, 0)),
        (Sampling(1.0, 1, 1.0), (0, 1, 0, 0)),
        (Sampling(1.0, 2, 1.0), (0, 0.625, 0, 0.375)),
        (Sampling(1.0, 3, 1.0), (0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95)),
        (Sampling(1.0, 9, 1.0), PROBABILITY),  # more than there are
        (Sampling(1.0, 0, 0.01), (0, 1, 0, 0)),  # the likeliest always stays
        (Sampling(1.0, 0, 0.4), (0, 1, 0, 0)),
        (Sampling(1.0, 0, 0.6), (0, 0.625, 0, 0.375)),
        (Sampling(1.0, 0, 0.9), (0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95)),
        (Sampling(1.0, 0, 0.97), PROBABILITY),
        (Sampling(1.0, 2, 0.6), (0, 1, 0, 0)),  # of the two likeliest, the first holds 0.625
        (Sampling(4.0, 0, 0.5), None),  # top_p is of the probability after the temperature
    ],
    ids=str,
)
def test_tables_of_the_sampler(how, expected):
    if expected is None:
        flat = np.array(PROBABILITY) ** 0.25
        kept = np.where(np.array(PROBABILITY) > 0.2, flat / flat.sum(), 0)  # 0.30 and 0.26: together past 0.5
        expected = kept / kept.sum()
    share = _draw(how)
    np.testing.assert_allclose(share, expected, atol=0.015)
    np.testing.assert_array_equal(share > 0, np.array(expected) > 0)


def test_rows_are_drawn_each_from_its_own_logits():
    logits_BV = jnp.asarray([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    for how in (Sampling(0.0, 0, 1.0), Sampling(1.0, 1, 1.0), Sampling(1.0, 0, 0.5)):
        assert sample(jax.random.key(1), logits_BV, how).tolist() == [1, 0, 2]


# Generation.

BYTES = dataclasses.replace(MOSAIC, memories=("long",), vocabulary=258, implementation="reference")
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    """Its likeliest tokens are ASCII, so that different continuations are different texts."""
    values = _values(BYTES)
    values["classifier"][:, 128:] = 0
    return from_values(BYTES, jax.tree.map(jnp.asarray, values))


@pytest.fixture(scope="module")
def spelling():
    """A model that looks at the last token alone, and follows chains.

    Begin -> "a" -> "b" -> end, "c" -> "c", and "d" -> " " -> "d".
    """
    values = _values(BYTES)
    values["blocks"]["W_o"][:] = 0
    values["blocks"]["persistent"]["W_2"][:] = 0
    values["embedding"][:] = values["classifier"][:] = 0
    values["final_norm"][:] = 1
    chain = {TOKENIZER.begin: ord("a"), ord("a"): ord("b"), ord("b"): TOKENIZER.end, ord("c"): ord("c")}
    chain |= {ord("d"): ord(" "), ord(" "): ord("d")}
    for direction, (last, following) in enumerate(chain.items()):
        values["embedding"][last, direction] = 1
        values["classifier"][direction, following] = 1
    return from_values(BYTES, jax.tree.map(jnp.asarray, values))


LONG = "a prompt that is longer than one rounding of lengths"
_greedy = functools.partial(generate, tokenizer=TOKENIZER, max_new_tokens=12, temperature=0, top_p=1.0)


def test_prompts_of_a_batch_are_continued_each_by_itself(model):
    prompts = ["", "x", "eight ch", LONG]
    texts = _greedy(model, prompts=prompts)
    assert len(set(texts)) == 4
    assert all(0 < len(text) <= 12 for text in texts)
    for prompt, text in zip(prompts[:3], texts[:3], strict=True):
        assert _greedy(model, prompts=[prompt]) == [text]
    assert _greedy(model, prompts=[LONG, "", "y", ""])[0] == texts[3]
    assert _greedy(model, prompts=[]) == []


def test_a_greedy_continuation_is_the_argmax_of_the_full_pass(model):
    prompt, steps = "x", 12
    text = _greedy(model, prompts=[prompt])[0]
    row = [TOKENIZER.begin, *TOKENIZER.encode(prompt).tolist(), *TOKENIZER.encode(text).tolist()]
    padded_T = np.array(row + [0] * (T - len(row)), np.int32)
    logits_TV = np.asarray(_logits(BYTES, to_values(model), padded_T[None]))[0]
    expected = logits_TV[len(row) - 1 - len(text) : len(row) - 1].argmax(-1)
    assert TOKENIZER.decode(expected) == text
    assert len(text) == steps


def test_the_end_of_text_stops_a_row_and_not_its_neighbours(spelling):
    assert _greedy(spelling, prompts=["", "a", LONG + "b", "c"]) == ["ab", "b", "", "c" * 12]


class _DropsFirstSpace(ByteTokenizer):
    """Decodes as the tokenizers of Llama 2 and Mistral do."""

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


def test_a_continuation_keeps_its_first_space(spelling):
    made = _greedy(spelling, tokenizer=_DropsFirstSpace(), prompts=["d", "d ", "c"], max_new_tokens=3)
    assert made == [" d ", "d d", "ccc"]


def test_the_seed_decides_what_is_drawn():
    config = dataclasses.replace(BYTES, architecture="transformer", memories=("full",), layers=1)
    model = from_values(config, jax.tree.map(jnp.asarray, _values(config)))
    draw = functools.partial(generate, model, TOKENIZER, ["", "x"], max_new_tokens=12, temperature=1.0, top_p=1.0)
    texts = draw(seed=0)
    assert draw(seed=0) == texts
    assert all(a != b for a, b in zip(draw(seed=1), texts, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; legal: 1 or more, an integer to 2**30"),
        ({"temperature": -0.1}, "temperature is -0.1; legal: 0 (the likeliest token) or more"),
        ({"temperature": float("nan")}, "temperature is nan; legal: 0 (the likeliest token) or more"),
        ({"top_k": -1}, "top_k is -1; legal: 0 (all) or more, an integer below 2**31"),
        ({"top_p": 0.0}, "top_p is 0.0; legal: a number in (0, 1]"),
        ({"top_p": 1.5}, "top_p is 1.5; legal: a number in (0, 1]"),
        ({"prompts": "text"}, "prompts is a str; legal: a list of str"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        generate(**({"model": abstract(BYTES), "tokenizer": TOKENIZER, "prompts": ["x"]} | arguments))


def test_a_tokenizer_of_another_run_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has 258 ids, the model knows 50: they are not of the same run"):
        generate(abstract(MOSAIC), TOKENIZER, ["x"])
