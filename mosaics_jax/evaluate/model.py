"""What a suite sees of a language model, and the model of a training run behind it, over a mesh of devices."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mosaics_jax import decode, dims, paths, sharding, visibility, whole
from mosaics_jax.checkpoint import Checkpoints
from mosaics_jax.config import Config, MeshConfig, ModelConfig
from mosaics_jax.data.tokenizer import Tokenizer
from mosaics_jax.loss import token_losses
from mosaics_jax.nn.memory import Context
from mosaics_jax.nn.model import LanguageModel, from_values, parameter_axes, to_values
from mosaics_jax.record import tokenizer_of

# Raised where a model would answer an example of the same key otherwise, or where a record has other fields.
ANSWERS = 1
_GREEDY = decode.Sampling(temperature=0, top_k=0, top_p=1)
_ROWS = PartitionSpec(sharding.BATCH[0])


class TokenLosses(NamedTuple):
    """Of a row's tokens after the first: -log p(token | those before it) in nats, and whether none was likelier."""

    loss_T: np.ndarray
    likeliest_T: np.ndarray


class Model(Protocol):
    """The contract. Rows are token ids that start with the tokenizer's begin; a call takes one batch of them.

    Attributes:
      max_length: tokens that a row may have, those that are generated included.
      context: the row length that the model was trained on.
      identity: another one for every model that may answer otherwise.
    """

    tokenizer: Tokenizer
    identity: str
    max_length: int
    context: int

    def rows_at_once(self, length: int) -> int:
        """How many rows of `length` tokens make a batch."""

    def generate(self, rows: Sequence[np.ndarray], max_new_tokens: int) -> list[str]:
        """The likeliest continuation of each row, token by token, up to its end of text."""

    def rank(self, rows: Sequence[np.ndarray], options: Sequence[np.ndarray]) -> np.ndarray:
        """log p(option | row) [rows, options], in nats."""

    def losses(self, rows: Sequence[np.ndarray]) -> list[TokenLosses]:
        """The loss of every token of the rows but the first."""


class _Chosen(NamedTuple):
    """A checkpoint, and how it is read: `model` is its config, with another delay where that is asked for."""

    step: int
    config: Config
    model: ModelConfig
    tokenizer: Tokenizer
    identity: str


def _choose(
    checkpoints: Checkpoints, workdir: pathlib.Path, step: int | None, delay: int | None, long_term: bool
) -> _Chosen:
    step = checkpoints.chosen(step)
    record = checkpoints.record(step)  # the run's own may have become another's since
    config = Config.from_dict(record.config)
    model = config.model if delay is None else _with_delay(config.model, delay)
    tokenizer = tokenizer_of(workdir, record)
    of = {
        "answers": ANSWERS, "weights": checkpoints.weights_fingerprint(step), "model": dataclasses.asdict(model),
        "long_term": long_term, "tokenizer": tokenizer.fingerprint,
    }  # fmt: skip
    return _Chosen(step, config, model, tokenizer, whole.digest(of)[:16])


def identity(
    workdir: str | pathlib.Path, *, step: int | None = None, delay: int | None = None, long_term: bool = True
) -> str:
    """That of the RunModel with these arguments, without its weights being loaded. Raises as it does."""
    workdir = paths.absolute(workdir)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        return _choose(checkpoints, workdir, step, delay, long_term).identity


class RunModel:
    """A checkpoint of a run, its weights over the devices as in training (`data`, `fsdp`, `tensor`).

    Attributes:
      step: the checkpoint's.
      config: what the checkpoint was saved with.
      identity: changes with the weights, the tokenizer and the config, and with the delay and the removal.
    """

    def __init__(
        self, workdir: str | pathlib.Path, mesh: MeshConfig, *, step: int | None = None, delay: int | None = None,
        long_term: bool = True, max_length: int = 131072, batch_tokens: int = 65536,
    ):  # fmt: skip
        """A checkpoint and the run's tokenizer.

        Args:
          step: the checkpoint's; None is the newest.
          delay: m of the long-term memory; None is inference's, `model.delay_min`.
          long_term: False removes the long-term memory.
          batch_tokens: positions that the rows of a batch may have together.

        Raises:
          ValueError: no run or checkpoint there; a mesh that does not fit; no long-term memory to delay or remove.
        """
        if mesh.sequence != 1:
            raise ValueError(
                f"mesh.sequence is {mesh.sequence}; legal for evaluation: 1 (a cache is not cut along time)"
            )
        workdir = paths.absolute(workdir)
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            chosen = _choose(checkpoints, workdir, step, delay, long_term)
            self.mesh = sharding.make_mesh(mesh)
            values = _load(checkpoints, chosen, self.mesh)
        self.step, self.config, self.tokenizer, self.identity = (
            chosen.step, chosen.config, chosen.tokenizer, chosen.identity,
        )  # fmt: skip
        self.max_length, self.context = max_length, self.config.data.context
        self._batch_tokens, self._chunk = batch_tokens, self.config.run.loss_chunk
        model = chosen.model
        if not long_term:
            with jax.set_mesh(self.mesh):
                removed = from_values(model, values).remove_long_term()
            model, values = removed.config, to_values(removed)
        self.model_config, self._values = model, values
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def model(self) -> LanguageModel:
        return from_values(self.model_config, self._values)

    def rows_at_once(self, length: int) -> int:
        shards = self._shards
        return max(1, self._batch_tokens // _rounded(length) // shards) * shards

    def generate(self, rows: Sequence[np.ndarray], max_new_tokens: int) -> list[str]:
        tokens_BT, length_B = decode.align_ends(*self._filled(rows))
        end = self.tokenizer.end
        program = self._program(
            ("generate", max_new_tokens),
            lambda values, tokens_BT, length_B: decode.continue_rows(
                self.model_config, _GREEDY, max_new_tokens, end, values, tokens_BT, length_B, jax.random.key(0)
            ),
            (_ROWS, _ROWS), _ROWS,
        )  # fmt: skip
        new_BN = program(self._values, tokens_BT, length_B)[: len(rows)]
        return [decode.text_until_end(self.tokenizer, *pair) for pair in zip(new_BN, rows, strict=True)]

    def rank(self, rows: Sequence[np.ndarray], options: Sequence[np.ndarray]) -> np.ndarray:
        tokens_BT, length_B = decode.align_ends(*self._filled(rows))
        option_length_N = np.array([len(option) for option in options], np.int32)
        options_NC = np.zeros((len(options), int(option_length_N.max())), np.int32)
        for row_C, option in zip(options_NC, options, strict=True):
            row_C[: len(option)] = option
        program = self._program(
            "rank", functools.partial(decode.rank_rows, self.model_config),
            (_ROWS, _ROWS, PartitionSpec(), PartitionSpec()), _ROWS,
        )  # fmt: skip
        return program(self._values, tokens_BT, length_B, options_NC, option_length_N)[: len(rows)]

    def losses(self, rows: Sequence[np.ndarray]) -> list[TokenLosses]:
        filled, time = self._filled(rows)
        tokens_BT = np.zeros((len(filled), time + 1), np.int32)  # what follows a row is read by nothing of it
        for row_T, row in zip(tokens_BT, filled, strict=True):
            row_T[: len(row)] = row
        program = self._program("losses", self._losses, (sharding.BATCH, sharding.BATCH), (_ROWS, _ROWS))
        found = program(self._values, tokens_BT[:, :-1], tokens_BT[:, 1:])
        return [
            TokenLosses(*(array_T[: len(row) - 1] for array_T in arrays))
            for row, *arrays in zip(rows, *found, strict=False)
        ]

    def _losses(self, values: Any, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = from_values(self.model_config, values)
        context = Context(visibility.document_start(lax.full_like(tokens_BT, 0)), self.model_config.delay_min)
        x_BTD, _ = model.hidden(tokens_BT, context)
        return token_losses(x_BTD, model.classifier[...], targets_BT, self._chunk)

    @property
    def _shards(self) -> int:
        return self.mesh.shape[dims.DATA] * self.mesh.shape[dims.FSDP]

    def _filled(self, rows: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
        """The rows, up to a power of two of them (or a whole batch) by rows of one token; their length, rounded up.

        So few sizes are compiled, whatever the last batch of a condition has.
        """
        longest, shards = max(map(len, rows)), self._shards
        count = -(-(2 ** math.ceil(math.log2(len(rows)))) // shards) * shards
        count = max(len(rows) + -len(rows) % shards, min(count, self.rows_at_once(longest)))
        return [*rows, *[np.array([self.tokenizer.begin], np.int32)] * (count - len(rows))], _rounded(longest)

    def _program(
        self, key: Any, function: Callable[..., Any], in_specs: tuple[PartitionSpec, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """`function(values, *arrays)` compiled for the mesh; takes numpy arrays and gives those, whole, everywhere."""
        if key not in self._programs:
            specs = sharding.parameter_specs(parameter_axes(self.model_config))

            def over_mesh(values: Any, *arrays: jax.Array) -> Any:
                return sharding.over_mesh(function, (specs, *in_specs), out_specs)(values, *arrays)

            compiled = jax.jit(over_mesh, out_shardings=sharding.replicated(self.mesh))

            def call(values: Any, *arrays: np.ndarray) -> Any:
                with jax.set_mesh(self.mesh):
                    placed = [self._put(array, spec) for array, spec in zip(arrays, in_specs, strict=True)]
                    return jax.tree.map(np.asarray, compiled(values, *placed))

            self._programs[key] = call
        return self._programs[key]

    def _put(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), lambda index: array[index])


def _rounded(length: int) -> int:
    """Rounded up by at most an eighth (or to 32), so that rows of about one length share a compiled program."""
    step = max(32, 2 ** math.floor(math.log2(length)) // 8)
    return -(-length // step) * step


def _with_delay(config: ModelConfig, delay: int) -> ModelConfig:
    if "long" not in config.memories:
        raise ValueError(f"--delay is {delay}, but this run's memories are {config.memories}: none has a delay")
    most = config.window if "short" in config.memories else None
    if delay < 1 or (most is not None and delay > most):
        raise ValueError(
            f"--delay is {delay}; legal: 1 to {most or 'any'} (model.window: none may be seen by no memory)"
        )
    return dataclasses.replace(config, delay_min=delay, delay_max=max(delay, config.delay_max))


def _load(checkpoints: Checkpoints, chosen: _Chosen, mesh: Mesh) -> dict[str, Any]:
    """The weights of the checkpoint, in their shards."""
    shapes = jax.eval_shape(lambda: to_values(LanguageModel(chosen.model, 0)))
    shardings = sharding.parameter_shardings(mesh, parameter_axes(chosen.model), shapes)
    abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    return checkpoints.params(chosen.step, abstract)
