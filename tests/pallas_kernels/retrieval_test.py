"""Every implementation of `retrieve` against float64, its properties, its memory and work, and its error messages."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import array_sizes

from mosaics_jax import visibility
from pallas_kernels import checks
from pallas_kernels.retrieval import blockwise, retrieve
from pallas_kernels.retrieval import cases as shared


@pytest.fixture(scope="module", autouse=True)
def small_spans():
    """The shapes here are tiny, and must still visit blocks both together and one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "SPAN", 2)
        jax.clear_caches()
        yield
    jax.clear_caches()


IMPLEMENTATIONS = ("reference", "xla")
CASES = {case.name: case for case in shared.cases()}
_expected = functools.cache(lambda name: shared.expected(CASES[name]))
_OPERATIONS = {name: functools.partial(retrieve, implementation=name) for name in IMPLEMENTATIONS}
T = 300  # of the properties, and of most cases


def _run(arrays, start_BT, stop_BT, weight_BTHV, implementation):
    """Output, and the gradients of Σ weight · output; compiled once for all that has the shapes of the cases."""
    operation = _OPERATIONS[implementation]
    results = shared.value_and_gradients(arrays, start_BT, stop_BT, weight_BTHV, operation, False)
    return [np.asarray(result) for result in results]


def _problem(name="random"):
    """The arrays of a case, its interval and the weights of its loss."""
    case = CASES[name]
    arrays = tuple(np.float32(array) for array in case.arrays)
    return arrays, case.start_BT, case.stop_BT, np.float32(case.weight_BTHV)


def _with(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def _cases_of(implementation):
    # In bfloat16 the dense definition rounds every score and weight: it is a definition in float32 and float64 only.
    return [name for name, case in CASES.items() if implementation != "reference" or case.dtype == "float32"]


@pytest.mark.parametrize(
    ("implementation", "name"),
    [(implementation, name) for implementation in IMPLEMENTATIONS for name in _cases_of(implementation)],
)
def test_values_and_gradients(implementation, name):
    case, expected = CASES[name], _expected(name)
    measured = shared.measured(case, _OPERATIONS[implementation])
    # bfloat16 keeps 8 bits, a relative error of 2^-9 for each rounding: weights and output in the value, and in the
    # gradients also the output inside δ, its cotangent, ds and βq. These few, all of random sign, stay below 2e-2.
    tolerance = 2e-2 if case.dtype == "bfloat16" else 2e-5
    for result in shared.NAMES:
        largest = np.abs(expected[result]).max(initial=0)
        limit = tolerance * (largest if case.is_exact else max(1.0, largest))
        np.testing.assert_allclose(measured[result], expected[result], rtol=0, atol=limit, err_msg=result)


@pytest.mark.parametrize(
    "name", ["random", "empty_here_and_there", "short_term", "one_key_dominates", "identical_keys_dominate"]
)
def test_the_reference_is_the_equation(name):
    np.testing.assert_allclose(_expected(name)["output"], shared.plain(CASES[name]), rtol=0, atol=1e-12)


def test_the_gradients_of_the_reference_are_slopes():
    name = "more_queries_than_pairs_in_whole_tiles"
    case, expected = CASES[name], _expected(name)
    rng = np.random.default_rng(0)
    directions = [rng.normal(size=array.shape) for array in case.arrays]

    def loss(step):
        arrays = tuple(array + step * direction for array, direction in zip(case.arrays, directions, strict=True))
        return np.sum(case.weight_BTHV * shared.plain(dataclasses.replace(case, arrays=arrays)))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    gradients = (expected[name] for name in shared.NAMES[1:])
    parts = [np.sum(gradient * direction) for gradient, direction in zip(gradients, directions, strict=True)]
    assert math.isclose(sum(parts), slope, abs_tol=1e-6 * max(np.abs(parts)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_extreme_bandwidth_overflows_nowhere(sign, implementation):
    """Of any keys, rounding decides which of two near ones wins; the answer is still a mean of values."""
    (*arrays, bandwidth_BTH), *rest = _problem()
    extreme_BTH = np.full_like(bandwidth_BTH, sign * shared.EXTREME_BANDWIDTH)
    output_BTHV, *gradients = _run((*arrays, extreme_BTH), *rest, implementation)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert np.abs(output_BTHV).max() <= 1.0001 * np.abs(arrays[2]).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_order_of_the_batch_is_free(implementation):
    """Bit for bit."""
    problem = _problem()
    turned = jax.tree.map(lambda array: array[::-1], problem)
    for result, turned_result in zip(_run(*problem, implementation), _run(*turned, implementation), strict=True):
        np.testing.assert_array_equal(result[::-1], turned_result)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_moves_no_other_query(implementation):
    """Bit for bit, also where its interval makes the tile visit more blocks."""
    t = 140
    (query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH), start_BT, stop_BT, weight_BTHV = problem = _problem(
        "short_term_across_tiles"
    )
    changed = (_with(query_BTHK, np.s_[:, t], 2.0), key_BSHK, value_BSHV, _with(bandwidth_BTH, np.s_[:, t], 3.0))
    interval = _with(start_BT, np.s_[:, t], 0), _with(stop_BT, np.s_[:, t], T)
    before_BTHV, *before = _run(*problem, implementation)
    after_BTHV, *after = _run(changed, *interval, weight_BTHV, implementation)
    others = np.arange(T) != t
    np.testing.assert_array_equal(before_BTHV[:, others], after_BTHV[:, others])
    assert np.abs(before_BTHV[:, t] - after_BTHV[:, t]).max() > 0.1
    for place in (shared.NAMES.index("d_query") - 1, shared.NAMES.index("d_bandwidth") - 1):
        np.testing.assert_array_equal(before[place][:, others], after[place][:, others])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gradient_reaches_its_query_and_its_interval_only(implementation):
    t, start, stop = 140, 100, 250
    arrays, start_BT, stop_BT, weight_BTHV = _problem()
    interval = _with(start_BT, np.s_[:, t], start), _with(stop_BT, np.s_[:, t], stop)
    only_t_BTHV = _with(np.zeros_like(weight_BTHV), np.s_[:, t], weight_BTHV[:, t])
    _, d_query, d_key, d_value, d_bandwidth = _run(arrays, *interval, only_t_BTHV, implementation)
    for gradient, first, last in (
        (d_query, t, t + 1),
        (d_bandwidth, t, t + 1),
        (d_key, start, stop),
        (d_value, start, stop),
    ):
        largest_T = np.abs(gradient).reshape(shared.B, T, -1).max(axis=(0, 2))
        assert np.flatnonzero(largest_T).tolist() == list(range(first, last))


@pytest.mark.parametrize(
    ("implementation", "garbage", "first", "last"),
    [
        ("reference", 1e30, 100, 200),
        ("xla", 1e30, 100, 200),
        # A block that nothing visits may hold anything; in a block that is read, 0 · NaN is NaN.
        ("xla", np.nan, 128, 256),
        ("xla", np.inf, 128, 256),
    ],
)
def test_what_no_query_sees_changes_nothing(implementation, garbage, first, last):
    """Bit for bit, in values and gradients. With NaN it proves that hidden blocks are not visited."""
    (query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH), start_BT, stop_BT, weight_BTHV = _problem(
        "short_term_across_tiles"
    )
    reads_before_BT = start_BT < first
    stop_BT = np.where(reads_before_BT, np.minimum(stop_BT, first), stop_BT)
    start_BT = np.where(reads_before_BT, start_BT, np.maximum(start_BT, last))
    hidden = np.s_[:, first:last]
    garbled = (query_BTHK, _with(key_BSHK, hidden, garbage), _with(value_BSHV, hidden, garbage), bandwidth_BTH)
    rest = (start_BT, stop_BT, weight_BTHV, implementation)
    results, garbled_results = _run((query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH), *rest), _run(garbled, *rest)
    assert np.abs(results[0][:, [0, -1]]).max() > 0
    for name, result, garbled_result in zip(shared.NAMES, results, garbled_results, strict=True):
        np.testing.assert_array_equal(result, garbled_result, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "read",
    [functools.partial(visibility.short_term, window=30), functools.partial(visibility.long_term, delay=20)],
    ids=["short_term", "long_term"],
)
def test_a_document_is_the_same_packed_or_alone(read, implementation):
    """Alone is at the front of a row of zeros; a document here crosses a tile."""
    lengths = (100, 1, 150, 49)
    document_BT = np.broadcast_to(np.repeat(np.arange(4, dtype=np.int32), lengths), (shared.B, T))
    arrays, *_, weight_BTHV = _problem()
    interval = read(visibility.document_start(jnp.asarray(document_BT)))
    alone_interval = read(jnp.zeros((shared.B, T), jnp.int32))
    packed = _run(arrays, *interval, weight_BTHV, implementation)
    for start, stop in itertools.pairwise((0, *np.cumsum(lengths))):
        here, front = np.s_[:, start:stop], np.s_[:, : stop - start]
        *alone_arrays, alone_BTHV = [_with(np.zeros_like(a), front, a[here]) for a in (*arrays, weight_BTHV)]
        alone = _run(tuple(alone_arrays), *alone_interval, alone_BTHV, implementation)
        for name, packed_result, alone_result in zip(shared.NAMES, packed, alone, strict=True):
            np.testing.assert_allclose(packed_result[here], alone_result[front], rtol=0, atol=5e-5, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes(implementation):
    """The output comes in the type of the values, every gradient in that of its argument."""
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.float32)
    arrays, *rest = _problem()
    arrays = tuple(jax.ShapeDtypeStruct(array.shape, dtype) for array, dtype in zip(arrays, dtypes, strict=True))
    run = functools.partial(shared.value_and_gradients, operation=_OPERATIONS[implementation], is_one_array=False)
    output_BTHV, *gradients = jax.eval_shape(run, arrays, *rest)
    assert output_BTHV.dtype == jnp.bfloat16
    assert [gradient.dtype for gradient in gradients] == list(dtypes)


# Memory and work.


def test_no_array_of_all_queries_by_all_pairs():
    """Forwards and backwards; nothing runs."""
    time = 4096
    shapes = ((1, time, 2, 16),) * 3 + ((1, time, 2),)
    arrays = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    end_BT = jax.ShapeDtypeStruct((1, time), jnp.int32)

    def largest(implementation):
        run = functools.partial(shared.value_and_gradients, operation=_OPERATIONS[implementation], is_one_array=False)
        return max(array_sizes(jax.make_jaxpr(run)(arrays, end_BT, end_BT, arrays[2])))

    assert largest("reference") >= time * time  # the measure sees one where there is one
    assert largest("xla") <= math.prod(shapes[0])


def _visited(document_BT, read):
    """How many blocks each tile of a row visits."""

    @jax.jit
    def bounds(document_BT):
        time = document_BT.shape[1]
        interval = read(visibility.document_start(document_BT))
        tiles = blockwise._tiles(jnp.zeros((1, time, 1, 1)), jnp.zeros((1, time, 1)), *interval)
        return tiles.first_block_N, tiles.end_block_N

    first_1N, end_1N = bounds(document_BT)
    assert end_1N.max() <= document_BT.shape[1] / blockwise.BLOCK
    return np.maximum(np.asarray(end_1N)[0] - np.asarray(first_1N)[0], 0).tolist()


_short = functools.partial(visibility.short_term, window=256)
_long = functools.partial(visibility.long_term, delay=129)


@pytest.mark.parametrize("time", [512, 16384])
def test_a_short_term_read_visits_its_window_however_long_the_row(time):
    assert _visited(np.zeros((1, time), np.int32), _short) == [1, 2] + [3] * (time // blockwise.TILE - 2)


@pytest.mark.parametrize("read", [_short, visibility.causal])
@pytest.mark.parametrize("time", [1024, 4096])
def test_no_tile_looks_beyond_its_document(time, read):
    """So in packed documents the work is linear in T, whatever the kind of read."""
    assert _visited(np.arange(time)[None] // 256, read) == [1, 2] * (time // 256)


def test_a_long_read_visits_the_past_and_what_nobody_sees_costs_nothing():
    document_BT = np.zeros((1, 512), np.int32)
    assert _visited(document_BT, visibility.causal) == [1, 2, 3, 4]
    assert _visited(document_BT, _long) == [0, 1, 2, 3]
    assert _visited(np.arange(512)[None], _long) == [0, 0, 0, 0]


# The edge: what is refused.


_zeros = functools.partial(jnp.zeros, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "fast"}, "implementation is 'fast'; legal: None, 'hopper', 'xla', 'reference'"),
        ({"query_BTHK": _zeros((2, 3, 4))}, "query_BTHK has shape (2, 3, 4); legal: four dimensions [B, T, H, K]"),
        ({"key_BSHK": _zeros((2, 5, 4))}, "key_BSHK has shape (2, 5, 4); legal: [2, S, 2, 4]"),
        ({"key_BSHK": _zeros((1, 5, 2, 4))}, "key_BSHK has shape (1, 5, 2, 4); legal: [2, S, 2, 4]"),
        ({"key_BSHK": _zeros((2, 5, 1, 4))}, "key_BSHK has shape (2, 5, 1, 4); legal: [2, S, 2, 4]"),
        ({"key_BSHK": _zeros((2, 5, 2, 3))}, "key_BSHK has shape (2, 5, 2, 3); legal: [2, S, 2, 4]"),
        ({"value_BSHV": _zeros((2, 5, 6))}, "value_BSHV has shape (2, 5, 6); legal: [2, 5, 2, V]"),
        ({"value_BSHV": _zeros((2, 4, 2, 6))}, "value_BSHV has shape (2, 4, 2, 6); legal: [2, 5, 2, V]"),
        ({"bandwidth_BTH": _zeros((2, 3))}, "bandwidth_BTH has shape (2, 3); legal: [2, 3, 2]"),
        ({"bandwidth_BTH": _zeros((2, 5, 2))}, "bandwidth_BTH has shape (2, 5, 2); legal: [2, 3, 2]"),
        ({"start_BT": jnp.zeros((2, 5), jnp.int32)}, "start_BT has shape (2, 5); legal: [2, 3]"),
        ({"stop_BT": jnp.zeros(3, jnp.int32)}, "stop_BT has shape (3,); legal: [2, 3]"),
        (
            {"query_BTHK": jnp.zeros((2, 3, 2, 4), jnp.int32)},
            "query_BTHK has type int32; legal: a floating type",
        ),
        (
            {"bandwidth_BTH": jnp.zeros((2, 3, 2), jnp.int32)},
            "bandwidth_BTH has type int32; legal: a floating type",
        ),
        (
            {"key_BSHK": jnp.zeros((2, 5, 2, 4), jnp.bfloat16)},
            "key_BSHK has type bfloat16; legal: the queries' type, float32",
        ),
        (
            {"value_BSHV": jnp.zeros((2, 5, 2, 6), jnp.bfloat16)},
            "value_BSHV has type bfloat16; legal: the queries' type, float32",
        ),
        ({"start_BT": _zeros((2, 3))}, "start_BT has type float32; legal: an integer type"),
        ({"stop_BT": jnp.zeros((2, 3), bool)}, "stop_BT has type bool; legal: an integer type"),
        (
            {"start_BT": jnp.array([[0, -1, 2], [0, 0, 0]])},
            "start_BT holds values from -1 to 2; legal: 0 to S = 5",
        ),
        (
            {"stop_BT": jnp.array([[1, 2, 3], [4, 5, 6]])},
            "stop_BT holds values from 1 to 6; legal: 0 to S = 5",
        ),
        (
            {"start_BT": jnp.array([[0, 0, 1], [0, 2, 1]])},
            "start_BT goes back from 2 to 1 at row 1, position 2; legal: values that never decrease along T",
        ),
        (
            {"start_BT": jnp.array([[0, 1, 1], [0, 0, 3]]), "stop_BT": jnp.array([[0, 1, 2], [1, 2, 2]])},
            "stop_BT is 2 at row 1, position 2, where start_BT is 3; "
            "legal: start_BT or more (equal: an empty interval)",
        ),
    ],
)
def test_errors_name_the_argument_its_value_and_what_is_legal(changes, message):
    arguments = {
        "query_BTHK": _zeros((2, 3, 2, 4)),
        "key_BSHK": _zeros((2, 5, 2, 4)),
        "value_BSHV": _zeros((2, 5, 2, 6)),
        "bandwidth_BTH": _zeros((2, 3, 2)),
        "start_BT": jnp.zeros((2, 3), jnp.int32),
        "stop_BT": jnp.full((2, 3), 5, jnp.int32),
        "implementation": "xla",
    }
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        retrieve(**(arguments | changes))


def test_inside_jit_values_are_checked_under_the_debug_flag_alone(monkeypatch):
    arrays = _zeros((1, 3, 1, 4)), _zeros((1, 5, 1, 4)), _zeros((1, 5, 1, 4)), _zeros((1, 3, 1))
    start_BT, stop_BT = jnp.array([[2, 0, 1]]), jnp.array([[5, 5, 5]])

    def run():
        read = jax.jit(lambda *arguments: retrieve(*arguments, implementation="xla"))  # a fresh one: traced anew
        jax.block_until_ready(read(*arrays, start_BT, stop_BT))
        jax.effects_barrier()

    run()
    monkeypatch.setenv(checks.VARIABLE, "1")
    with pytest.raises(jax.errors.JaxRuntimeError, match="start_BT goes back from 2 to 0 at row 0, position 1"):
        run()


def test_an_array_that_is_query_and_key_is_saved_once():
    arrays, start_BT, stop_BT, _ = _problem("short_term")
    _, key_BSHK, value_BSHV, bandwidth_BTH = map(jnp.asarray, arrays)

    def saved(*moving):
        _, pull = jax.vjp(lambda *moving: retrieve(*moving, bandwidth_BTH, start_BT, stop_BT), *moving)
        return [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == key_BSHK.shape]

    def read_of_one(key_BSHK, value_BSHV):
        _, pull = jax.vjp(
            lambda key, value: retrieve(key, key, value, bandwidth_BTH, start_BT, stop_BT), key_BSHK, value_BSHV
        )
        return [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == key_BSHK.shape]

    program = jax.make_jaxpr(read_of_one)(key_BSHK, value_BSHV)
    of_two = jax.make_jaxpr(saved)(key_BSHK, key_BSHK, value_BSHV)
    assert len(set(of_two.jaxpr.outvars)) == 2
    assert len(set(program.jaxpr.outvars)) == 1
