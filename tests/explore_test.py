"""Looking inside: the weights are those of the model's own reads, of what it may see and nothing else."""

import dataclasses
import sys

import jax
import matplotlib as mpl
import numpy as np
import pytest

from mosaics_jax import explore
from mosaics_jax.config import ModelConfig
from mosaics_jax.data.tokenizer import ByteTokenizer
from mosaics_jax.nn.memory import Context
from mosaics_jax.nn.model import create, from_values, to_values
from mosaics_jax.visibility import document_start
from pallas_kernels.retrieval import retrieve

mpl.use("Agg")

MOSAIC = ModelConfig(
    vocabulary=258, layers=2, width=16, heads=2, ffn_width=24, window=6, delay_min=3, delay_max=6,
    compute_dtype="float32", remat="none", implementation="reference",
)  # fmt: skip
TRANSFORMER = dataclasses.replace(MOSAIC, architecture="transformer", memories=("full",))
CONFIGS = {"mosaic": MOSAIC, "transformer": TRANSFORMER}
DOCUMENT_BT = np.array([[0] * 20, [0] * 7 + [1] * 13])
TOKENS_BT = np.random.default_rng(0).integers(258, size=DOCUMENT_BT.shape)


@pytest.fixture(scope="module", params=CONFIGS)
def looked(request):
    config = CONFIGS[request.param]
    values = jax.tree.map(
        lambda array: array * 3, to_values(create(config, 1))
    )  # reads that are far from even: β about 1,000
    model = from_values(config, values)
    return model, explore.look(model, TOKENS_BT, DOCUMENT_BT)


@pytest.fixture(scope="module")
def mosaic():
    model = create(MOSAIC, 2)
    return model, explore.look(model, TOKENS_BT[0])


def _interval(memory, t, start):
    """What the read at t of a document that starts at `start` may see, from the paper's words."""
    oldest = max(start, t - MOSAIC.window + 1)
    stop = {"short": t, "long": max(start, t - MOSAIC.delay_min + 1), "full": t + 1}[memory]
    return (oldest if memory == "short" else start), stop


def test_weights_sum_to_one_over_what_is_visible(looked):
    model, look = looked
    for layer in range(2):
        for memory in model.config.memories:
            weight_BHTS = look.weights(layer, memory)
            visible_BTS = look.visible(layer, memory)
            for row, start_T in enumerate(np.asarray(document_start(DOCUMENT_BT))):
                for t, document in enumerate(start_T):
                    start, stop = _interval(memory, t, document)
                    assert np.flatnonzero(visible_BTS[row, t]).tolist() == list(range(start, stop))
                    assert weight_BHTS[row, :, t, start:stop].sum(-1) == pytest.approx(float(stop > start), abs=1e-6)
            assert (weight_BHTS >= 0).all()
            assert (np.where(visible_BTS[:, None], 0, weight_BHTS) == 0).all()
            assert weight_BHTS.max() < 1.0001


def test_weights_and_values_make_the_model_s_own_reads(looked):
    model, look = looked
    context = Context(document_start(DOCUMENT_BT), model.config.delay_min)

    @jax.jit
    def reads(values):
        def read(memory, x_BTD, _):
            output_BTHK, _ = memory(x_BTD, context)
            return output_BTHK, output_BTHK

        return from_values(model.config, values).scan_blocks(TOKENS_BT, read)[1]

    for memory, output_LBTHK in reads(to_values(model)).items():
        for layer in range(2):
            trace = look.trace(layer, memory)
            made_BTHK = np.einsum("BHTS,BSHK->BTHK", look.weights(layer, memory), trace.value_BTHK)
            np.testing.assert_allclose(made_BTHK, output_LBTHK[layer], atol=5e-4)  # β · float32's
            again_BTHK = retrieve(*map(jax.numpy.asarray, (*trace[:4], *trace.interval)), implementation="reference")
            np.testing.assert_allclose(made_BTHK, again_BTHK, atol=5e-4)


def test_a_look_is_the_numbers_of_the_model(looked):
    model, look = looked
    assert look.tokens_BT.tolist() == TOKENS_BT.tolist()
    for memory in model.config.memories:
        assert look.bandwidth(1, memory).shape == (2, 20, 2)
        if model.config.architecture == "transformer":
            assert look.bandwidth(0, memory) == pytest.approx(8**-0.5)
            with pytest.raises(ValueError, match=r"model\.architecture is transformer, whose keys have no gate"):
                look.gate(0, memory)
        else:
            assert (look.gate(0, memory) > 0).all()
            assert ((look.decay(0, memory) > 0) & (look.decay(0, memory) <= 1)).all()
            blocks = to_values(model)["blocks"][memory]["bandwidth"]
            one, three = np.exp(np.minimum(blocks["theta_beta1"][1], 10)), np.minimum(abs(blocks["theta_alpha"][1]), 1)
            count_BT = look.visible(1, memory).sum(-1)
            expected_BTH = one * np.maximum(count_BT, 1)[..., None] ** three + np.exp(blocks["theta_beta0"][1])
            np.testing.assert_allclose(look.bandwidth(1, memory), expected_BTH, rtol=1e-5)


def test_what_comes_later_changes_no_weight(mosaic):
    model, look = mosaic
    changed_T = TOKENS_BT[0].copy()
    changed_T[12:] = (changed_T[12:] + 7) % 258
    other = explore.look(model, changed_T)
    for memory in MOSAIC.memories:
        before, after = (one.weights(1, memory)[0, :, :12] for one in (look, other))
        np.testing.assert_allclose(before, after, atol=1e-6)


def _by_hand(start_T, stop_T, key_TK, bandwidth):
    """A look at one layer and one head of given keys."""
    time = len(start_T)
    key_LBTHK = np.asarray(key_TK, np.float32)[None, None, :, None]
    config = dataclasses.replace(MOSAIC, layers=1, heads=1, memories=("short",))
    made = explore.look(create(config, 0), np.arange(time))
    trace = made._traces["short"]
    interval = trace.interval._replace(start_BT=np.array([[start_T]]), stop_BT=np.array([[stop_T]]))
    trace = trace._replace(
        query_BTHK=key_LBTHK, key_BTHK=key_LBTHK, interval=interval,
        bandwidth_BTH=np.full((1, 1, time, 1), bandwidth, np.float32),
    )  # fmt: skip
    return dataclasses.replace(made, _traces={"short": trace})


def test_weight_by_distance_and_answers_of_a_hand_made_case():
    # Keys x, y, x, y; β = log 3: a pair of the same key weighs three times one of the other.
    look = _by_hand([0, 0, 0, 1], [0, 1, 2, 3], [[1, 0], [0, 1], [1, 0], [0, 1]], np.log(3))
    expected_TS = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [3 / 4, 1 / 4, 0, 0], [0, 3 / 4, 1 / 4, 0]])
    np.testing.assert_allclose(look.weights(0, "short")[0, 0], expected_TS, atol=1e-6)
    share_N = explore.weight_by_distance(look, "short")[0, 0]
    np.testing.assert_allclose(share_N, [np.nan, (1 + 1 / 4 + 1 / 4) / 3, 3 / 4, np.nan], atol=1e-6)
    np.testing.assert_array_equal(explore.weight_by_distance(look, "short", 1)[0, 0], share_N[:2])
    assert explore.answered(look, 0, "short", 0, 0) == []
    first, second = explore.answered(look, 0, "short", 0, 3)
    assert (first[:3], second[:3]) == ((1, 1, 2), (2, 2, 3))
    assert (first.weight, second.weight) == (pytest.approx(3 / 4), pytest.approx(1 / 4))
    assert explore.answered(look, 0, "short", 0, 3, top=1) == [first]


def test_a_transformer_may_answer_with_the_last_token():
    look = explore.look(create(TRANSFORMER, 0), [5, 6])
    answers = explore.answered(look, 0, "full", 1, 1)
    assert {(a.stored, a.token, a.next_token) for a in answers} == {(0, 5, 6), (1, 6, None)}


def test_kernel_regression_of_numbers():
    key_S, value_S = np.array([-0.5, 0.2, 0.9]), np.array([1.0, 2.0, 5.0])
    weight_S = np.exp(7 * np.cos(0.1 - key_S))
    expected = [weight_S @ value_S / weight_S.sum(), weight_S[1:] @ value_S[1:] / weight_S[1:].sum(), 0.0]
    got_T = explore.kernel_regression([0.1, 0.1, 0.1], key_S, value_S, [7, 7, 7], [0, 1, 3], 3)
    np.testing.assert_allclose(got_T, expected, rtol=1e-5)
    assert explore.kernel_regression([0.1], key_S, value_S, 7) == pytest.approx(expected[:1])
    with pytest.raises(ValueError, match=r"key has shape \(1, 3\); legal: one dimension"):
        explore.kernel_regression([0.1], key_S[None], value_S, 7)


def test_token_labels():
    tokenizer = ByteTokenizer()
    ids = [tokenizer.begin, *tokenizer.encode("a \n$é"), tokenizer.end]
    assert explore.token_labels(tokenizer, ids) == ["⊢", "a", "␣", "⏎", "$", "�", "�", "⊣"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda look: look.weights(2, "short"), "layer is 2; legal: 0 to 1"),
        (lambda look: look.weights(0, "full"), "memory is 'full'; legal: short, long"),
        (lambda look: explore.answered(look, 0, "long", 2, 0), "head is 2; legal: 0 to 1"),
        (lambda look: explore.answered(look, 0, "long", 0, 20), "position is 20; legal: 0 to 19"),
        (lambda look: explore.answered(look, 0, "long", 0, 0, row=1), "row is 1; legal: 0 to 0"),
        (lambda look: explore.weight_by_distance(look, "long", 20), "longest is 20; legal: 0 to 19"),
        (lambda look: explore.plot_answer(look, 0, "long", 0, 9, ["a"]), "1 labels; legal: one for each of the 20"),
    ],
)
def test_errors_name_what_is_legal(mosaic, call, message):
    with pytest.raises(ValueError, match=message):
        call(mosaic[1])


def test_texts_that_cannot_be_looked_at(mosaic):
    model, _ = mosaic
    with pytest.raises(ValueError, match="the text has 4097 positions; legal: 4096 or fewer"):
        explore.look(model, np.zeros(4097, int))
    with pytest.raises(ValueError, match="tokens_BT holds ids from 258 to 258; legal: 0 to 257"):
        explore.look(model, [258])


def test_plots_draw_what_the_functions_return(mosaic):
    _, look = mosaic
    (axes,) = explore.plot_weight_by_distance(look).axes
    curves = [line.get_ydata() for line in axes.lines if line.get_linewidth() > 2]
    for curve_N, memory in zip(curves, MOSAIC.memories, strict=True):
        np.testing.assert_array_equal(curve_N, explore.weight_by_distance(look, memory).mean((0, 1)))
    figure = explore.plot_along_text(look, 1, "long", [str(t) for t in range(20)], first=5, stop=15)
    bandwidth, gate, decay = (axes.lines[1] for axes in figure.axes)
    np.testing.assert_array_equal(bandwidth.get_xdata(), np.arange(5, 15))
    np.testing.assert_array_equal(bandwidth.get_ydata(), look.bandwidth(1, "long")[0, 5:15, 1])
    np.testing.assert_array_equal(gate.get_ydata(), look.gate(1, "long")[0, 5:15, 1])
    np.testing.assert_array_equal(decay.get_ydata(), look.decay(1, "long")[0, 5:15, 1])
    figure = explore.plot_answer(look, 0, "short", 1, 12)
    heights = sorted(bar.get_height() for bar in figure.axes[0].patches)
    assert heights == pytest.approx(sorted(a.weight for a in explore.answered(look, 0, "short", 1, 12, 20)))


def test_without_matplotlib(mosaic, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ValueError, match=r"pip install 'mosaics_jax\[notebooks\]'"):
        explore.plot_weight_by_distance(mosaic[1])
