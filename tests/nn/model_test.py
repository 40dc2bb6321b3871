"""The model against a plain NumPy form of the paper, what can reach what, sizes, initial weights, and errors."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mosaics_jax.config import ModelConfig
from mosaics_jax.nn import layers
from mosaics_jax.nn.features import ValueExtractor
from mosaics_jax.nn.memory import Bandwidth
from mosaics_jax.nn.model import LanguageModel, abstract, from_values, matmul_weights, to_values

T = 40
MOSAIC = ModelConfig(
    vocabulary=240, layers=2, width=32, heads=2, ffn_width=48, window=8, delay_min=3, delay_max=6,
    compute_dtype="float32", remat="none",
)  # fmt: skip
SHORT = dataclasses.replace(MOSAIC, memories=("short",))
V1_KEYS = dataclasses.replace(MOSAIC, key_extractor="leaky", bandwidth="fixed")
TRANSFORMER = dataclasses.replace(MOSAIC, architecture="transformer", memories=("full",))
CONFIGS = {
    "mosaic": MOSAIC,
    "mosaic of leaky keys and fixed bandwidth": V1_KEYS,
    "transformer": TRANSFORMER,
    "long/short transformer": dataclasses.replace(TRANSFORMER, memories=("short", "long")),
}
LENGTHS = (13, 1, 1, 24, 1)  # documents packed in row 0


# What the tests run: compiled once for each config, at one shape, and for little compilation rather than speed.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(_jit, static_argnums=0)
def _jitted_logits(config, values, tokens_BT, document_BT, delay):
    return from_values(config, values)(tokens_BT, document_BT, delay)


@functools.partial(_jit, static_argnums=0)
def _jitted_gradients(config, values, tokens_BT, document_BT, delay, weight_BTV):
    def loss(values):
        return jnp.sum(weight_BTV * from_values(config, values)(tokens_BT, document_BT, delay))

    return jax.value_and_grad(loss)(values)


def _logits(config, values, tokens_BT, document_BT, delay=MOSAIC.delay_min):
    return np.asarray(_jitted_logits(config, values, tokens_BT, document_BT, delay))


def _gradients(config, values, weight_BTV, rows=None):
    return jax.device_get(_jitted_gradients(config, values, *(rows or _rows()), config.delay_min, weight_BTV))


@functools.cache
def _rows():
    """Row 0 packs the documents, its tokens all different; row 1 + j starts with document j, followed by another."""
    rng = np.random.default_rng(0)
    packed_T = rng.permutation(MOSAIC.vocabulary)[:T]
    tokens_BT = rng.integers(MOSAIC.vocabulary, size=(1 + len(LENGTHS), T))
    document_BT = np.zeros_like(tokens_BT)
    tokens_BT[0], document_BT[0] = packed_T, np.repeat(range(len(LENGTHS)), LENGTHS)
    for j, (first, last) in enumerate(_spans()):
        tokens_BT[1 + j, : last - first] = packed_T[first:last]
        document_BT[1 + j, last - first :] = 1
    return tokens_BT.astype(np.int32), document_BT.astype(np.int32)


def _spans():
    stops = np.cumsum(LENGTHS).tolist()
    return list(itertools.pairwise([0, *stops]))


@functools.cache
def _values(config):
    """Weights that no initialisation would give: every parameter has its say."""
    rng = np.random.default_rng(1)
    spread = {
        "memory_norm": lambda n: 1 + 0.3 * n,
        "persistent_norm": lambda n: 1 + 0.3 * n,
        "final_norm": lambda n: 1 + 0.3 * n,
        "theta_beta0": lambda n: 0.5 + 0.5 * n,
        "theta_beta1": lambda n: 0.5 + 0.5 * n,
        "theta_alpha": lambda n: np.sign(n) * (0.3 + 0.4 * np.abs(n)),
        "theta_psi": lambda n: np.sign(n) * (0.1 + 0.5 * np.abs(n)),
        "gamma": lambda n: 0.5 + 0.4 * n,
        "embedding": lambda n: n,
    }
    drawn = {}
    for path, shape in flatten_dict(_shapes(config)).items():
        change = spread.get(path[-1], lambda n: 0.25 * n)
        drawn[path] = change(rng.normal(size=shape)).astype(np.float32)
    return unflatten_dict(drawn)


@functools.cache
def _shapes(config):
    return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(lambda: to_values(LanguageModel(config, 0))))


def _changed(values, change):
    """A copy of `values` in which `change(path, array)` has replaced every array."""
    return unflatten_dict({path: change(path, array) for path, array in flatten_dict(values).items()})


def _weight(seed=2, only_row=None):
    weight_BTV = np.random.default_rng(seed).normal(size=(1 + len(LENGTHS), T, MOSAIC.vocabulary))
    if only_row is not None:
        weight_BTV[np.arange(len(weight_BTV)) != only_row] = 0
    return weight_BTV.astype(np.float32)


# The paper, read by hand: one document, positions from 1 (index 0 of every list is unused), float64, loops.


def _paper_logits(config, values, tokens_T, document_T, m):
    """Logits of a packed row: each of its documents by itself."""
    borders = [0, *(np.flatnonzero(np.diff(document_T)) + 1), len(tokens_T)]
    documents = [tokens_T[a:b] for a, b in itertools.pairwise(borders)]
    values = jax.tree.map(lambda array: np.asarray(array, np.float64), values)
    return np.concatenate([_document_logits(config, values, document, m) for document in documents])


def _document_logits(config, values, tokens, m):
    length = len(tokens)
    x = [None] + [values["embedding"][token] for token in tokens]
    for l in range(config.layers):
        block = jax.tree.map(lambda array, l=l: array[l], values["blocks"])
        seen = [None] + [_rms_norm(x[t], block["memory_norm"], config) for t in range(1, length + 1)]
        contextual = _memory if config.architecture == "mosaic" else _attention
        read = {kind: contextual(config, kind, block[kind], seen, m) for kind in config.memories}
        for t in range(1, length + 1):
            joined = np.concatenate([head for kind in config.memories for head in read[kind][t]])
            x[t] = x[t] + joined @ block["W_o"].reshape(-1, config.width)
            inner = _rms_norm(x[t], block["persistent_norm"], config)
            W_1, W_2, W_3 = (block["persistent"][name] for name in ("W_1", "W_2", "W_3"))
            gate = inner @ W_1
            x[t] = x[t] + (gate / (1 + np.exp(-gate)) * (inner @ W_3)) @ W_2
    normed = [_rms_norm(x[t], values["final_norm"], config) for t in range(1, length + 1)]
    return np.array(normed) @ values["classifier"]


def _rms_norm(u, scale, config):
    return u / np.sqrt(np.mean(u**2) + config.norm_epsilon) * scale


def _norm(u):
    return u / np.linalg.norm(u) if u.any() else u


def _memory(config, kind, weights, x, m):
    """o[t] = one vector a head, of the memory of this kind (sections 2 to 5)."""
    length = len(x) - 1
    key, value, bandwidth = weights["key"], weights["value"], weights["bandwidth"]
    output = [[np.zeros(config.head_width) for _ in range(config.heads)] for _ in x]
    for head in range(config.heads):
        beta0 = math.exp(min(bandwidth["theta_beta0"][head], 10))
        if config.bandwidth == "adaptive":
            beta1 = math.exp(min(bandwidth["theta_beta1"][head], 10))
            alpha = min(abs(bandwidth["theta_alpha"][head]), 1)
        alpha_psi = math.exp(min(abs(value["theta_psi"][head]), 15))
        gamma = value["gamma"][head]
        k, v = [None] * (length + 1), [None] * (length + 1)
        k_bar = np.zeros(config.head_width)
        for t in range(1, length + 1):
            if config.key_extractor == "leaky":
                g, decay = 7.0, math.exp(-abs(key["theta_lambda"][head]))  # any constant g gives the same keys
            else:
                g = math.exp(x[t] @ key["W_g"][:, head])
                decay = math.exp(-abs(x[t] @ key["W_lambda"][:, head]))
            k_bar = g * (x[t] @ key["W_phi"][:, head]) + decay * k_bar
            k[t] = _norm(k_bar)
            now = x[t] @ value["W_psi"][:, head]
            after = x[t + 1] @ value["W_psi"][:, head] if t < length else np.zeros(config.head_width)
            v[t] = alpha_psi * _norm(gamma * now + (1 - gamma) * after)
        for t in range(1, length + 1):
            if kind == "short":
                pairs = [i for i in range(1, length + 1) if t - config.window + 1 <= i <= t - 1]
            else:
                pairs = [i for i in range(1, length + 1) if i <= t - m]
            if not pairs:
                continue
            beta = beta0 if config.bandwidth == "fixed" else beta1 * len(pairs) ** alpha + beta0
            # exp(-β ||k - k_i||²) with the factor 2 of the square absorbed in β.
            w = [math.exp(-beta / 2 * np.sum((k[t] - k[i]) ** 2)) for i in pairs]
            output[t][head] = sum(w_i * v[i] for w_i, i in zip(w, pairs, strict=True)) / sum(w)
    return output


def _attention(config, kind, weights, x, m):
    """o[t] of llama's attention over all pairs up to t, the last `window` of them, or those up to t - m."""
    length, half = len(x) - 1, config.head_width // 2
    frequency = np.array([config.rope_theta ** (-2 * i / config.head_width) for i in range(half)])
    output = [[np.zeros(config.head_width) for _ in range(config.heads)] for _ in x]
    for head in range(config.heads):
        q, k, v = [None], [None], [None]
        for t in range(1, length + 1):
            turn = np.exp(1j * t * frequency)  # entries i and i + K/2 are one complex number
            for turned, name in ((q, "W_q"), (k, "W_k")):
                plain = x[t] @ weights[name][:, head]
                turned.append((plain[:half] + 1j * plain[half:]) * turn)
            v.append(x[t] @ weights["W_v"][:, head])
        for t in range(1, length + 1):
            legal = {"full": lambda i: True, "short": lambda i, t=t: i > t - config.window}
            legal["long"] = lambda i, t=t: i <= t - m
            pairs = [i for i in range(1, t + 1) if legal[kind](i)]
            if not pairs:
                continue
            score = [np.vdot(k[i], q[t]).real / math.sqrt(config.head_width) for i in pairs]
            w = np.exp(np.array(score) - max(score))
            output[t][head] = sum(w_i * v[i] for w_i, i in zip(w, pairs, strict=True)) / w.sum()
    return output


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_papers(name):
    config, values = CONFIGS[name], _values(CONFIGS[name])
    tokens_BT, document_BT = _rows()
    for m in (config.delay_min, config.delay_max):
        logits_BTV = _logits(config, values, tokens_BT, document_BT, m)
        expected_TV = _paper_logits(config, values, tokens_BT[0], document_BT[0], m)
        assert expected_TV.std() > 0.5
        np.testing.assert_allclose(logits_BTV[0], expected_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [MOSAIC, V1_KEYS], ids=["paper", "leaky_fixed"])
def test_gradients_are_the_papers(config):
    """Every parameter's, along one random direction, against differences of the float64 form."""
    tokens_BT, document_BT = _rows()
    weight_BTV = _weight(only_row=0)
    _, gradients = _gradients(config, _values(config), weight_BTV)
    wide = jax.tree.map(lambda array: np.asarray(array, np.float64), _values(config))
    rng = np.random.default_rng(3)
    for path, gradient in flatten_dict(gradients).items():
        if config is V1_KEYS and path[-1] not in ("theta_lambda", "theta_beta0"):
            continue  # the rest is the paper's
        # Along the gradient too, or a small slope would be compared with the rounding of large ones.
        direction = rng.normal(size=gradient.shape) + 3 * np.sqrt(gradient.size) * _norm(gradient.ravel()).reshape(
            gradient.shape
        )
        direction *= 1e-5 / np.linalg.norm(direction)
        ends = []
        for sign in (1, -1):
            moved = _changed(wide, lambda p, a, path=path, step=sign * direction: a + step if p == path else a)
            ends.append(np.sum(weight_BTV[0] * _paper_logits(config, moved, tokens_BT[0], document_BT[0], 3)))
        slope = np.sum(gradient * direction)
        assert slope != 0, path
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2, rtol=2e-3, err_msg=str(path))


# What can reach what.


def _reach(config, values):
    """[t, s]: whether the logits of position t have a gradient at the embedding of position s, packed as row 0."""
    document_BT = np.broadcast_to(_rows()[1][0], _rows()[1].shape)
    # No token occurs twice, so that the rows of one run show several t at once.
    tokens_BT = np.random.default_rng(4).permutation(config.vocabulary).reshape(document_BT.shape).astype(np.int32)
    reach_TS = np.zeros((T, T), bool)
    for group in itertools.batched(range(T), len(tokens_BT)):
        weight_BTV = np.zeros((*tokens_BT.shape, config.vocabulary), np.float32)
        for b, t in enumerate(group):
            weight_BTV[b, t] = _weight()[b, t]
        _, gradients = _gradients(config, values, weight_BTV, (tokens_BT, document_BT))
        for b, t in enumerate(group):
            reach_TS[t] = np.abs(gradients["embedding"][tokens_BT[b]]).max(-1) > 0
    return reach_TS


def _same_document():
    document_T = _rows()[1][0]
    return document_T[:, None] == document_T[None, :]


@pytest.mark.parametrize("name", ["mosaic", "transformer"])
def test_a_token_reaches_all_later_ones_of_its_document_and_no_others(name):
    expected_TS = np.tril(_same_document())
    np.testing.assert_array_equal(_reach(CONFIGS[name], _values(CONFIGS[name])), expected_TS)


def test_each_memory_reaches_its_interval_and_no_further():
    """One block whose keys forget at once (λ = 0): then only stored values carry the past."""
    t, s = np.indices((T, T))
    h, m = MOSAIC.window, MOSAIC.delay_min
    expected = {
        # The value of pair i holds tokens i and i+1; pairs are t-h+1 .. t-1.
        "short": _same_document() & (t - h + 1 <= s) & (s <= t),
        # Pairs .. t-m; the residual stream adds t itself.
        "long": _same_document() & ((s <= t - m + 1) | (s == t)),
    }
    # Where pair t-m is not of this document, its second token, t-m+1, is not read either.
    first_T = np.repeat([first for first, _ in _spans()], LENGTHS)
    expected["long"] &= (s == t) | (t - m >= first_T[t])
    for kind, slot in (("short", 0), ("long", 1)):

        def only_this(path, array, slot=slot):
            array = array.copy()
            if path[-1] == "W_lambda":
                return 1e7 * array  # not 1e4: a few of |W_λ x| are below 0.01
            if path[-1] == "W_o":
                array[0, 1 - slot] = 0
            if path[-1] in ("W_o", "W_2"):
                array[1] = 0  # the second block adds nothing
            return array

        reach_TS = _reach(MOSAIC, _changed(_values(MOSAIC), only_this))
        np.testing.assert_array_equal(reach_TS, expected[kind], err_msg=kind)
    assert expected["long"][T - 2, T - 25]  # more than h and m back, in the same document


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_document_is_read_as_if_alone(name):
    config = CONFIGS[name]
    logits_BTV = _logits(config, _values(config), *_rows())
    for j, (first, last) in enumerate(_spans()):
        alone_TV = logits_BTV[1 + j, : last - first]
        np.testing.assert_allclose(logits_BTV[0, first:last], alone_TV, rtol=1e-4, atol=1e-5)


def test_only_changes_of_the_document_id_matter():
    tokens_BT, document_BT = _rows()
    expected_BTV = _logits(MOSAIC, _values(MOSAIC), tokens_BT, document_BT)
    for ids in ([0, 1, 0, 1, 0], [7, -3, 2**31 - 1, 0, 7]):
        renamed_BT = np.array(ids, np.int32)[document_BT]
        np.testing.assert_array_equal(_logits(MOSAIC, _values(MOSAIC), tokens_BT, renamed_BT), expected_BTV)


# Other ways to the same numbers.


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_remat_and_implementation_change_no_number(remat):
    values, weight_BTV = _values(SHORT), _weight()
    plain = dataclasses.replace(SHORT, remat="none", implementation="reference")
    loss, gradients = _gradients(plain, values, weight_BTV)
    other_loss, other_gradients = _gradients(
        dataclasses.replace(SHORT, remat=remat, implementation="xla"), values, weight_BTV
    )
    np.testing.assert_allclose(other_loss, loss, rtol=1e-4, atol=1e-2)
    for path, gradient in flatten_dict(gradients).items():
        other = flatten_dict(other_gradients)[path]
        assert np.linalg.norm(other - gradient) <= 1e-4 * np.linalg.norm(gradient), path


def test_logits_are_float32_whatever_is_computed_in():
    config = dataclasses.replace(MOSAIC, compute_dtype="bfloat16")
    logits_BTV = jax.eval_shape(lambda model, tokens: model(tokens), abstract(config), _rows()[0])
    assert (logits_BTV.shape, logits_BTV.dtype) == ((6, T, 240), jnp.float32)


def test_removing_the_long_term_memory_is_zeroing_its_slice():
    values = jax.tree.map(jnp.asarray, _values(MOSAIC))
    model = from_values(MOSAIC, values)
    removed = model.remove_long_term()
    assert removed.config == dataclasses.replace(MOSAIC, memories=("short",))
    assert jax.tree.map(jnp.shape, to_values(removed)) == _shapes(removed.config)

    zeroed = _changed(values, lambda path, array: array.at[:, 1].set(0) if path[-1] == "W_o" else array)
    expected_BTV = _logits(MOSAIC, zeroed, *_rows())
    np.testing.assert_allclose(
        _logits(removed.config, to_values(removed), *_rows()), expected_BTV, rtol=1e-6, atol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, to_values(model), values)  # the model itself is as it was


@pytest.mark.parametrize("memories", [("short",), ("long",)])
def test_removing_needs_a_long_term_memory_beside_another(memories):
    model = abstract(dataclasses.replace(MOSAIC, memories=memories))
    with pytest.raises(ValueError, match=rf"model.memories is \('{memories[0]}',\); legal: 'long' beside another"):
        model.remove_long_term()


# Parameters: how many, where they start, and their forms.

LARGE = ModelConfig(vocabulary=128256, layers=32, width=4096, heads=32, ffn_width=14336)


def _counted(model):
    """Weights of the table in PAPER section 7: all but gates' and decays' projections, scalars of heads, and norms."""
    aside = {"W_g", "W_lambda", "gamma", "memory_norm", "persistent_norm", "final_norm"}
    return sum(
        math.prod(leaf.shape)
        for path, leaf in flatten_dict(to_values(model)).items()
        if path[-1] not in aside and not path[-1].startswith("theta_")
    )


def test_parameter_counts_of_the_large_models():
    transformer = dataclasses.replace(LARGE, architecture="transformer", memories=("full",))
    shared = 32 * 3 * 4096 * 14336 + 2 * 128256 * 4096
    assert _counted(abstract(transformer)) == 32 * 4 * 4096**2 + shared == 8_835_301_376
    assert _counted(abstract(LARGE)) == 32 * 6 * 4096**2 + shared == 9_909_043_200
    removed = nnx.eval_shape(lambda: LanguageModel(LARGE, 0).remove_long_term())
    assert _counted(removed) == 32 * 3 * 4096**2 + shared == 8_298_430_464
    # What multiplies a token: W_g and W_lambda do, the embedding's rows do not.
    gates = 32 * 2 * 2 * 4096 * 32
    assert matmul_weights(LARGE) == 9_909_043_200 + gates - 128256 * 4096
    assert matmul_weights(transformer) == 8_835_301_376 - 128256 * 4096


@pytest.fixture(scope="module")
def initial():
    """The initial weights by seed, of a model wide enough to measure them."""
    config = dataclasses.replace(MOSAIC, layers=3, width=96, heads=4, ffn_width=160)
    return config, functools.cache(lambda seed: _initial(config, seed))


def _initial(config, seed):
    return flatten_dict(jax.device_get(_jit(lambda: to_values(LanguageModel(config, seed)))()))


def test_initial_spread_of_matrices(initial):
    config, make = initial
    d, ffn_width = config.width, config.ffn_width
    # The spread of a normal cut at ±3, in units of the uncut one's.
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    cut = math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))
    checked = set()
    for path, array in make(0).items():
        name = path[-1]
        if not name.startswith("W_") and name not in ("embedding", "classifier"):
            continue
        checked.add(name)
        for l, layer in enumerate(array if path[0] == "blocks" else array[None]):
            sigma = 1 / math.sqrt(2 * (ffn_width if name == "W_2" else d) * (l + 1))
            assert abs(layer.std() / (cut * sigma) - 1) < 4 / math.sqrt(2 * layer.size), (path, l)
            assert abs(layer.mean()) < 4 * sigma / math.sqrt(layer.size), (path, l)
            assert np.abs(layer).max() <= 3.0001 * sigma, (path, l)
            if layer.size > 4000:
                assert np.abs(layer).max() > 2.7 * sigma, (path, l)
    assert checked == {"W_phi", "W_psi", "W_g", "W_lambda", "W_o", "W_1", "W_2", "W_3", "embedding", "classifier"}


def test_initial_scalars_and_norms(initial):
    _, make = initial
    constants = {"theta_beta0": 1.5, "theta_beta1": 1.5, "theta_alpha": np.float32(1 / 3), "theta_psi": 0.0}
    constants |= {"memory_norm": 1.0, "persistent_norm": 1.0, "final_norm": 1.0}
    gammas = []
    for path, array in make(0).items():
        if path[-1] in constants:
            np.testing.assert_array_equal(array, constants[path[-1]])
        if path[-1] == "gamma":
            gammas.append(array.ravel())
    gamma = np.concatenate(gammas)
    assert gamma.shape == (24,)
    assert len(set(gamma.tolist())) == 24
    assert 0 <= gamma.min() < 0.2
    assert 0.8 < gamma.max() < 1


def test_initial_weights_follow_the_seed_and_the_parameters_name(initial):
    config, make = initial
    first, other = make(0), make(1)
    alone = _initial(dataclasses.replace(config, memories=("short",)), 0)
    drawn = {path for path in first if path[-1].startswith("W_") or path[-1] in ("gamma", "embedding", "classifier")}
    for path, array in first.items():
        assert np.array_equal(array, other[path]) == (path not in drawn), path
        if "long" not in path:
            kept = array[:, :1] if path[-1] == "W_o" else array
            np.testing.assert_array_equal(alone[path], kept, err_msg=str(path))
    assert {path for path in first if "long" not in path} == set(alone)
    # No two parameters, and no two layers, start alike.
    starts = [layer.ravel()[:3] / layer.std() for path in drawn - {("embedding",), ("classifier",)}
              for layer in first[path]]  # fmt: skip
    assert len({tuple(np.round(start, 3).tolist()) for start in starts}) == len(starts)


def test_bandwidth_and_value_scale_are_cut_as_in_the_paper():
    config = dataclasses.replace(MOSAIC, heads=4)

    @_jit
    def bandwidths(count_BT):
        bandwidth = Bandwidth(config, layers.Seed(0))
        bandwidth.theta_beta0[...] = jnp.asarray([0.0, 10.0, 12.0, -1.0])
        bandwidth.theta_beta1[...] = jnp.asarray([1.0, 0.0, 0.0, 11.0])
        bandwidth.theta_alpha[...] = jnp.asarray([0.5, -0.5, 3.0, -2.0])
        return bandwidth(count_BT)

    e = math.e
    expected_TH = [
        [e * 2 + 1, 2 + e**10, 4 + e**10, e**10 * 4 + 1 / e],  # n = 4
        [e * 3 + 1, 3 + e**10, 9 + e**10, e**10 * 9 + 1 / e],  # n = 9
    ]
    np.testing.assert_allclose(bandwidths(np.array([[4, 9]]))[0], expected_TH, rtol=1e-5)

    @_jit
    def mixed(now_BTHK, next_BTHK):
        value = ValueExtractor(config, jnp.int32(0), layers.Seed(0))
        value.theta_psi[...] = jnp.asarray([0.0, -2.0, 15.0, 20.0])
        value.gamma[...] = jnp.asarray([1.0, 0.0, 0.5, 0.5])
        return value.mix(now_BTHK, next_BTHK)

    now_BTHK, next_BTHK = np.zeros((2, 1, 1, 4, 8), np.float32)
    now_BTHK[..., 0] = next_BTHK[..., 1] = 2
    half = math.sqrt(0.5) * e**15
    expected_HK = np.zeros((4, 8))
    expected_HK[:, :2] = [[1, 0], [0, e**2], [half, half], [half, half]]
    np.testing.assert_allclose(mixed(now_BTHK, next_BTHK)[0, 0], expected_HK, rtol=1e-5)


def test_the_value_scale_moves_from_zero():
    """|θ| has the derivative +1 at 0: the gradient there is the one just to the right."""

    def at(theta):
        moved = _changed(_values(MOSAIC), lambda p, a: np.full_like(a, theta) if p[-1] == "theta_psi" else a)
        _, gradients = _gradients(MOSAIC, moved, _weight())
        return np.stack([gradients["blocks"][kind]["value"]["theta_psi"] for kind in MOSAIC.memories])

    at_zero, right, left = at(0.0), at(1e-6), at(-1e-6)
    assert (at_zero != 0).all()
    scale = np.abs(at_zero).max()
    np.testing.assert_allclose(at_zero, right, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(at_zero, -left, rtol=1e-3, atol=1e-4 * scale)


def test_keys_are_of_the_name_and_the_seed():
    places = [layers.Seed(0).fold("W_phi"), layers.Seed(0).fold("W_psi"), layers.Seed(1).fold("W_phi")]
    data = {tuple(jax.random.key_data(place.key()).tolist()) for place in [*places, places[0]]}
    assert len(data) == 3
    with pytest.raises(TypeError):  # a traced seed has no number to hash: not every seed's weights alike, silently
        jax.eval_shape(lambda seed: layers.Seed(seed).key(), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3, np.int32),), r"tokens_BT is int32\[3\]; legal: integers \[B, T\]"),
        ((np.zeros((1, 3), np.float32),), r"tokens_BT is float32\[1, 3\]; legal: integers \[B, T\]"),
        (
            (np.array([[1, 240]]),),
            r"tokens_BT holds ids from 1 to 240; legal: 0 to 239 \(model.vocabulary = 240\)",
        ),
        ((np.array([[-1, 3]]),), r"tokens_BT holds ids from -1 to 3; legal: 0 to 239"),
        ((np.zeros((1, 3), np.int32), None, 0), r"delay is 0; legal: 1 or more"),
        (
            (np.zeros((2, 3), np.int32), np.zeros((2, 4), np.int32)),
            r"document_BT has shape \(2, 4\); legal: that of tokens_BT, \(2, 3\)",
        ),
    ],
)
def test_bad_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        abstract(MOSAIC)(*arguments)
