"""The peers' formulas against the reference."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaics_jax import visibility
from pallas_kernels.retrieval import peers, retrieve

B, T, H, K = 2, 24, 2, 8
DELAY, WINDOW = 5, 7
_UNPACKED = np.zeros((B, T), np.int32)
_PACKED = np.repeat(np.arange(5, dtype=np.int32), [9, 1, 8, 2, 4])[None].repeat(B, axis=0)


def _arrays() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    query_BTHK, key_BTHK, value_BTHV = (jax.random.normal(key, (B, T, H, K)) for key in keys[:3])
    return query_BTHK, key_BTHK, value_BTHV, jnp.exp(jax.random.normal(keys[3], (B, T, H)))


def _intervals(document_BT: np.ndarray) -> dict[str, visibility.Interval]:
    start_BT = visibility.document_start(jnp.asarray(document_BT))
    return {
        "long": visibility.long_term(start_BT, delay=DELAY),
        "short": visibility.short_term(start_BT, window=WINDOW),
    }


def _value_and_gradients(operation, arrays):
    weight_BTHV = jax.random.normal(jax.random.key(1), (B, T, H, K))

    def loss(*arrays):
        output_BTHV = operation(*arrays)
        return (weight_BTHV * output_BTHV).sum(), output_BTHV

    (_, output_BTHV), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)
    return output_BTHV, *gradients


def _assert_is_retrieve(operation, interval):
    arrays = _arrays()
    reference = functools.partial(
        retrieve, start_BT=interval.start_BT, stop_BT=interval.stop_BT, implementation="reference"
    )
    expected = _value_and_gradients(reference, arrays)
    measured = _value_and_gradients(operation, arrays)
    for name, a, b in zip(("output", "d_query", "d_key", "d_value", "d_bandwidth"), measured, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)
    empty_BT = np.asarray(interval.start_BT >= interval.stop_BT)
    assert empty_BT[:, 0].all()
    assert not np.asarray(measured[0])[empty_BT].any()


_SHIFTED = {"long": (DELAY, None), "short": (1, WINDOW - 1)}  # how far queries are moved ahead, pairs that each sees


@pytest.mark.parametrize("memory", _SHIFTED)
def test_shifted_attention_is_a_read_of_an_unpacked_row(memory):
    """With zeros where nothing is seen; values and gradients."""
    shift, window = _SHIFTED[memory]
    read = functools.partial(peers.unpacked_read, peers.attention("xla", window), shift=shift)
    _assert_is_retrieve(lambda *arrays: read(*arrays), _intervals(_UNPACKED)[memory])


@pytest.mark.parametrize("by", peers.PEERS)
def test_a_stand_in_knows_documents_and_windows(by):
    """Against the definition, query by query: the last pairs of its document, the present one among them."""
    query_BTHK, key_BTHK, value_BTHV, _ = _arrays()
    document_BT = np.sort(_PACKED, axis=1)
    measured = peers.attention(by, 4, stand_in=True)(query_BTHK, key_BTHK, value_BTHV, jnp.asarray(document_BT))
    for b, t in np.ndindex(document_BT.shape):
        seen = [s for s in range(max(0, t - 3), t + 1) if document_BT[b, s] == document_BT[b, t]]
        score_SH = np.einsum("HK,SHK->SH", query_BTHK[b, t], key_BTHK[b, seen])
        weight_SH = np.exp(score_SH) / np.exp(score_SH).sum(0)
        expected_HV = np.einsum("SH,SHV->HV", weight_SH, value_BTHV[b, seen])
        np.testing.assert_allclose(measured[b, t], expected_HV, rtol=0, atol=2e-5)


def test_an_unknown_peer_is_refused():
    with pytest.raises(ValueError, match="'flash'; legal: cudnn, jla, jax, xla"):
        peers.attention("flash")


@pytest.mark.filterwarnings("default")  # the peer's own
@pytest.mark.parametrize("document_BT", [_UNPACKED, _PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("memory", ["long", "short"])
def test_tokamax(memory, document_BT):
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    interval = _intervals(document_BT)[memory]
    operation = functools.partial(
        peers.tokamax, start_BT=interval.start_BT, stop_BT=interval.stop_BT, implementation="xla"
    )
    _assert_is_retrieve(operation, interval)


@pytest.mark.filterwarnings("default")  # the peer's own
@pytest.mark.parametrize("document_BT", [_UNPACKED, _PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("memory", ["long", "short"])
def test_flex_attention(memory, document_BT):
    """Values only: on CPU it has no derivative."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    interval = _intervals(document_BT)[memory]
    arrays = _arrays()
    expected_BTHV = retrieve(*arrays, *interval, implementation="reference")
    query, key, value = (torch.from_numpy(np.array(array)).transpose(1, 2) for array in arrays[:3])
    bandwidth = torch.from_numpy(np.array(arrays[3])).transpose(1, 2)
    ends = (torch.from_numpy(np.array(end)) for end in interval)
    read = peers.flex_attention(bandwidth, *ends, T, compiled=False)
    np.testing.assert_allclose(read(query, key, value).transpose(1, 2).numpy(), expected_BTHV, rtol=0, atol=2e-5)


@pytest.mark.parametrize("memory", ["long", "short"])
@pytest.mark.skipif(importlib.util.find_spec("tokamax") is not None, reason="tokamax is installed")
def test_a_peer_that_is_not_installed_says_so(memory):
    with pytest.raises(ImportError, match="tokamax"):
        peers.tokamax(*_arrays(), *_intervals(_UNPACKED)[memory])
