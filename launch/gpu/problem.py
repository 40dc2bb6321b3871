"""What is read in the GPU suite: sizes on the card and in a dry run, intervals, bandwidths, arrays, their answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import answers
from pallas_kernels.retrieval import cases

SAMPLE = 128  # positions of a row whose answers are carried
BACKWARD = 2.5  # FLOPs of backward over those of forward: five products of the size of forward's two
NAMES = ("output", "d_key", "d_value", "d_bandwidth")
SMALL_BANDWIDTH = 16.0  # a power of two: folded into bfloat16 queries, as peers need it, it rounds nothing


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes. `interpret`: kernels run on a CPU in Pallas's interpreter, peers by what stands in for them."""

    name: str
    heads: int
    time: int  # of the rows that matter most
    packed: int
    more: tuple[int, ...]  # other lengths, where time is left
    documents: int  # mean length in packed rows
    delay: int
    window: int
    seconds: float  # that one figure may take to time
    interpret: bool
    width: int = 128


CARD = Setting("card", 32, 16384, 32768, (4096, 32768), 1024, 64, 256, 0.6, False)
DRY = Setting("dry", 1, 128, 128, (), 48, 16, 48, 0.0, True)


@dataclasses.dataclass(frozen=True)
class Place:
    """What is read, of which rows."""

    memory: str  # "long-term" or "short-term"
    rows: str  # "unpacked" or "packed"
    time: int

    def __str__(self) -> str:
        return f"{self.memory}, {self.rows}, T = {self.time:,}"


def places(setting: Setting) -> dict[str, list[Place]]:
    """By the part that measures them."""
    memories = ("long-term", "short-term")
    return {
        "reads_long": [Place("long-term", "unpacked", setting.time)],
        "reads_short_and_packed": [
            Place("short-term", "unpacked", setting.time),
            *(Place(memory, "packed", setting.packed) for memory in memories),
        ],
        "reads_more": [Place(memory, "unpacked", time) for time in setting.more for memory in memories],
    }


def documents(setting: Setting, place: Place) -> np.ndarray:
    """Document ids [1, T]: one document, or many of exponential lengths, cut at the row's end."""
    if place.rows == "unpacked":
        return np.zeros((1, place.time), np.int32)
    lengths = np.random.default_rng(0).exponential(setting.documents, place.time)
    ends = np.cumsum(np.maximum(1, lengths.astype(np.int64)))
    return np.searchsorted(ends, np.arange(place.time), side="right").astype(np.int32)[None]


def interval(setting: Setting, place: Place) -> cases.Interval:
    """start_BT and stop_BT of one row."""
    start_BT = cases.document_start(documents(setting, place))
    if place.memory == "long-term":
        return cases.long_term(start_BT, setting.delay)
    return cases.short_term(start_BT, setting.window)


def causal_interval(setting: Setting, place: Place) -> cases.Interval:
    """What a peer reads that knows documents and windows but no delay: the present pair too, and those before it."""
    window = None if place.memory == "long-term" else setting.window - 1
    return cases.causal(cases.document_start(documents(setting, place)), window)


def model_bandwidth(setting: Setting, place: Place) -> np.ndarray:
    """The β_BTH that a mosaic has before its first step: e^1.5 (n^(1/3) + 1), of n >= 1 visible pairs."""
    start_BT, stop_BT = interval(setting, place)
    count_BT1 = np.maximum(stop_BT - start_BT, 1).astype(np.float32)[..., None]
    return np.repeat(np.float32(np.exp(1.5)) * (count_BT1 ** np.float32(1 / 3) + 1), setting.heads, axis=2)


def small_bandwidth(setting: Setting, place: Place) -> np.ndarray:
    return np.full((1, place.time, setting.heads), SMALL_BANDWIDTH, np.float32)


def pairs(ends: cases.Interval) -> int:
    start_BT, stop_BT = ends
    return int(np.maximum(stop_BT - start_BT, 0).sum(dtype=np.int64))


def flops(setting: Setting, count: int, what: str) -> float:
    """Those that `count` visible pairs need: 4 K a pair and head forward, and BACKWARD times that backward."""
    return 4.0 * setting.width * setting.heads * count * (1 if what == "forward" else 1 + BACKWARD)


def random_arrays(shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """(cotangent, key, value) in bfloat16, keys of norm 1; the same numbers on any device, up to a rounding."""
    key_BTHK, value_BTHV, cotangent_BTHV = (
        jax.random.normal(seed, shape) for seed in jax.random.split(jax.random.key(0), 3)
    )
    key_BTHK /= jnp.linalg.norm(key_BTHK, axis=-1, keepdims=True)
    return tuple(array.astype(jnp.bfloat16) for array in (cotangent_BTHV, key_BTHK, value_BTHV))


def sample(time: int) -> np.ndarray:
    """The positions whose answers are carried, always the first and the last among them."""
    rest = np.random.default_rng(time).choice(time - 2, min(SAMPLE, time) - 2, replace=False) + 1
    return np.sort(np.concatenate([[0, time - 1], rest]))


def sampled(arrays: dict[str, np.ndarray], time: int) -> answers.Answers:
    """Of whole arrays of row 0, the last head at the sampled positions."""
    return {name: np.asarray(array)[0, sample(time), -1].astype(np.float64) for name, array in arrays.items()}


@functools.cache
def _host_arrays(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The last head of `random_arrays`, made on the CPU: [T, K] each."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        made = jax.jit(random_arrays, static_argnums=0)(shape)
        return tuple(np.asarray(array[0, :, -1]).astype(np.float64) for array in made)


def answer(setting: Setting, place: Place, bandwidth_BTH: np.ndarray) -> answers.Answers:
    """The float64 answers of the last head at the sampled positions, with the gradients of queries and keys apart."""
    cotangent_TV, key_TK, value_TV = _host_arrays((1, place.time, setting.heads, setting.width))
    start_BT, stop_BT = interval(setting, place)
    found = answers.read(key_TK, key_TK, value_TV, bandwidth_BTH[0, :, -1], start_BT[0], stop_BT[0], cotangent_TV)
    return {name: array[sample(place.time)] for name, array in found.items()}


def of_one_array(expected: answers.Answers) -> answers.Answers:
    """The same where queries are keys: their gradients add."""
    rest = {name: array for name, array in expected.items() if name != "d_query"}
    return rest | {"d_key": expected["d_key"] + expected["d_query"]}


def least_bytes(setting: Setting, length: int, what: str) -> int:
    """The least that must be moved for one row of bfloat16.

    Forward reads the input, two float32 gates and a bool, and writes the output: 2 large arrays. Backward reads the
    input, the output, its cotangent, the gates, the bool and the norm that forward then has to write, and writes the
    gradients of input and gates: 4 large arrays more.
    """
    large, gate, restart = 2 * length * setting.heads * setting.width, 4 * length * setting.heads, length
    forward = 2 * large + 2 * gate + restart
    return forward if what == "forward" else forward + gate + 4 * large + 5 * gate + restart


def half_the_numbers(setting: Setting, length: int, what: str) -> int:
    """float32 numbers of an array that is as many bytes, read and written."""
    return least_bytes(setting, length, what) // 2 // 4
