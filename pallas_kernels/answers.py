"""Float64 answers in numpy, from the equations and their derivatives written out: no jax, nothing to compile.

For the GPU suite (`launch/gpu`), which carries them. `tests/pallas_kernels/answers_test.py` holds them against jax's
own derivatives of the references.
"""

import numpy as np

Answers = dict[str, np.ndarray]
_CHUNK = 512  # queries at a time: a chunk's scores are all that is held


def read(
    query_TK: np.ndarray,
    key_SK: np.ndarray,
    value_SV: np.ndarray,
    bandwidth_T: np.ndarray,
    start_T: np.ndarray,
    stop_T: np.ndarray,
    cotangent_TV: np.ndarray,
) -> Answers:
    """`retrieve` of one row and head, and the gradients of sum(cotangent * output).

        p = softmax(β q·k) over the visible pairs,   o = Σ p v,   δ = do·o,   ds = p (do·v - δ)
        dq = β Σ ds k,   dk = Σ ds β q,   dv = Σ p do,   dβ = q·Σ ds k

    An empty interval gives 0 in all of them.
    """
    query_TK, key_SK, value_SV, cotangent_TV = (
        a.astype(np.float64) for a in (query_TK, key_SK, value_SV, cotangent_TV)
    )
    bandwidth_T = bandwidth_T.astype(np.float64)
    output_TV, query_grad_TK = np.zeros_like(cotangent_TV), np.zeros_like(query_TK)
    key_grad_SK, value_grad_SV = np.zeros_like(key_SK), np.zeros_like(value_SV)
    bandwidth_grad_T = np.zeros_like(bandwidth_T)
    for first in range(0, len(query_TK), _CHUNK):
        rows = slice(first, first + _CHUNK)
        start, stop = start_T[rows], stop_T[rows]
        seen = start < stop
        if not seen.any():
            continue
        pairs = slice(start[seen].min(), stop[seen].max())
        place = np.arange(pairs.start, pairs.stop)
        visible = (start[:, None] <= place) & (place < stop[:, None])
        query, key, value, grad = query_TK[rows], key_SK[pairs], value_SV[pairs], cotangent_TV[rows]
        scale = bandwidth_T[rows, None]
        score = np.where(visible, scale * (query @ key.T), -np.inf)
        top = np.where(seen, score.max(axis=1), 0.0)
        weight = np.exp(score - top[:, None])
        weight /= np.where(seen, weight.sum(axis=1), 1.0)[:, None]
        output = weight @ value
        score_grad = weight * (grad @ value.T - (grad * output).sum(axis=1)[:, None])
        mixed = score_grad @ key
        output_TV[rows], query_grad_TK[rows] = output, scale * mixed
        bandwidth_grad_T[rows] = (query * mixed).sum(axis=1)
        key_grad_SK[pairs] += score_grad.T @ (scale * query)
        value_grad_SV[pairs] += weight.T @ grad
    return {
        "output": output_TV, "d_query": query_grad_TK, "d_key": key_grad_SK, "d_value": value_grad_SV,
        "d_bandwidth": bandwidth_grad_T,
    }  # fmt: skip


def reads(
    query_BTHK: np.ndarray,
    key_BSHK: np.ndarray,
    value_BSHV: np.ndarray,
    bandwidth_BTH: np.ndarray,
    start_BT: np.ndarray,
    stop_BT: np.ndarray,
    cotangent_BTHV: np.ndarray,
) -> Answers:
    """`read` of every row and head."""
    arrays = (query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH)
    found: dict[str, np.ndarray] = {}
    for b, h in np.ndindex(query_BTHK.shape[0], query_BTHK.shape[2]):
        query, key, value, bandwidth = (array[b, :, h] for array in arrays)
        one = read(query, key, value, bandwidth, start_BT[b], stop_BT[b], cotangent_BTHV[b, :, h])
        for name, array in one.items():
            whole = found.setdefault(
                name, np.zeros((query_BTHK.shape[0], len(array), query_BTHK.shape[2], *array.shape[1:]))
            )
            whole[b, :, h] = array
    return found


def averages(
    input_BTHK: np.ndarray,
    log_gate_BTH: np.ndarray,
    log_decay_BTH: np.ndarray,
    restart_BT: np.ndarray,
    average_BHK: np.ndarray,
    log_scale_BH: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray],
    unit_BH: np.ndarray,
) -> Answers:
    """`leaky_average`, and the gradients of sum(w_0 * output) + sum(w_1 * state), state = k̄_T exp(-unit).

        k̄_t = g k̃_t + λ k̄_{t-1},   y = k̄ / |k̄|,   e_t = (w_t - (w_t·y_t) y_t) / |k̄_t| + λ_{t+1} e_{t+1}
        dk̃ = g e,   d log g = g e·k̃,   d log λ = λ e·k̄_{t-1}

    The state before position 0 is exp(log_scale) average. At a restart λ is 0. Where k̄ = 0, y and its gradient are 0.
    """
    time = input_BTHK.shape[1]
    gate_BTH = np.exp(log_gate_BTH)
    decay_BTH = np.where(restart_BT[..., None], 0.0, np.exp(log_decay_BTH))
    scale_BH1 = np.exp(log_scale_BH)[..., None]
    means = [scale_BH1 * average_BHK]
    for t in range(time):
        means.append(gate_BTH[:, t, :, None] * input_BTHK[:, t] + decay_BTH[:, t, :, None] * means[-1])
    mean_BTHK = np.stack(means[1:], axis=1)
    norm_BTH1 = np.linalg.norm(mean_BTHK, axis=-1, keepdims=True)
    inverse_BTH1 = np.divide(1.0, norm_BTH1, out=np.zeros_like(norm_BTH1), where=norm_BTH1 > 0)
    output_BTHK = mean_BTHK * inverse_BTH1
    direct_BTHK = (weights[0] - (weights[0] * output_BTHK).sum(-1, keepdims=True) * output_BTHK) * inverse_BTH1
    unit_BH1 = np.exp(-unit_BH)[..., None]
    later_BHK = weights[1] * unit_BH1
    input_grad, gate_grad, decay_grad = np.zeros_like(input_BTHK), np.zeros_like(gate_BTH), np.zeros_like(gate_BTH)
    for t in reversed(range(time)):
        adjoint_BHK = direct_BTHK[:, t] + later_BHK
        input_grad[:, t] = gate_BTH[:, t, :, None] * adjoint_BHK
        gate_grad[:, t] = gate_BTH[:, t] * (adjoint_BHK * input_BTHK[:, t]).sum(-1)
        decay_grad[:, t] = decay_BTH[:, t] * (adjoint_BHK * means[t]).sum(-1)
        later_BHK = decay_BTH[:, t, :, None] * adjoint_BHK
    return {
        "output": output_BTHK, "state": means[-1] * unit_BH1, "d_input": input_grad, "d_log_gate": gate_grad,
        "d_log_decay": decay_grad, "d_average": scale_BH1 * later_BHK,
        "d_log_scale": (scale_BH1 * later_BHK * average_BHK).sum(-1),
    }  # fmt: skip
