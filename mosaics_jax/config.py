"""Every setting of a run: frozen dataclasses, made once from a `ConfigDict` at the edge and validated there.

A recipe in `configs/` starts from `default_config()` and sets what it means to set; the command line overrides
fields (`--config.model.layers=8`); `Config.from_config_dict` makes the frozen form. Nothing below sees a `ConfigDict`.
"""

import dataclasses
import difflib
import importlib.util
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from mosaics_jax import paths


def _field(default: Any, doc: str, no_path: tuple[str, ...] | None = None) -> Any:
    """`no_path`, of a field that holds a path: its values that are none."""
    metadata = {"doc": doc, "no_path": no_path}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _check(section: Any, field: str, legal: bool, what_is_legal: str) -> None:
    if not legal:
        raise ValueError(f"{section.SECTION}.{field} is {_shown(getattr(section, field))}; legal: {what_is_legal}")


def _check_weights(where: str, weights: Any) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"{where} is {_shown(weights)}; legal: {{name: weight}}")
    for name, weight in weights.items():
        if not isinstance(name, str) or not _FOLDER.fullmatch(name) or name in (".", "..") or not name.isprintable():
            raise ValueError(f"{where} has the name {_shown(name)}; legal: the name of a folder in data.path")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight <= _GREATEST_WEIGHT:
            raise ValueError(
                f"{where}.{name} is {_shown(weight)}; legal: a positive number of at most {_GREATEST_WEIGHT:g} "
                "(leave out what has no part)"
            )
    for name, weight in weights.items():
        if weight < 1e-5 * sum(weights.values()):
            raise ValueError(f"{where}.{name} is {weight!r}, less than 1e-5 of their sum; leave it out")


def _shown(value: Any) -> str:
    """A value in a message: cut where it is long. Python itself refuses to write out huge integers and deep lists."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _check_positive(section: Any, *fields: str) -> None:
    for field in fields:
        _check(section, field, getattr(section, field) >= 1, "an integer of 1 or more")


ARCHITECTURES = ("mosaic", "transformer")
MEMORIES = {"mosaic": ("short", "long"), "transformer": ("full", "short", "long")}
KEY_EXTRACTORS = ("gated", "leaky")
BANDWIDTHS = ("adaptive", "fixed")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "dots", "block")
PACKINGS = ("concat", "best_fit")
IMPLEMENTATIONS = ("auto", "hopper", "reference", "xla")
_FOLDER = re.compile("[^/]{1,255}")
_INTEGERS = 2**31
_GREATEST_WEIGHT = 1e100  # the sum of any number of them is finite
_MOST_SHOWN = 300


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of the model. Defaults are the paper's small model."""

    SECTION = "model"

    architecture: str = _field("mosaic", "mosaic (Memory Mosaics v2) or transformer (the llama baseline)")
    memories: tuple[str, ...] = _field(
        ("short", "long"), "contextual memories of a block: mosaic short, long; transformer full, or short, long"
    )
    key_extractor: str = _field(
        "gated", "mosaic: gated (a gate and a decay for every position) or leaky (v1: one decay a head)"
    )
    bandwidth: str = _field("adaptive", "mosaic: adaptive (to the pairs that a read sees) or fixed (a number a head)")
    vocabulary: int = _field(128256, "token ids the embedding and the classifier know")
    layers: int = _field(24, "blocks")
    width: int = _field(2048, "model width d")
    heads: int = _field(16, "heads of each contextual memory; the head width is width / heads")
    ffn_width: int = _field(6144, "feed-forward width d' of the persistent memory")
    window: int = _field(256, "h: the short-term memory reads the last h - 1 pairs")
    delay_min: int = _field(64, "m at inference, and the least m drawn in training")
    delay_max: int = _field(256, "the greatest delay m drawn in training")
    rope_theta: float = _field(500000.0, "base of the rotary position encoding (transformer only)")
    norm_epsilon: float = _field(1e-5, "epsilon of RMSNorm")
    compute_dtype: str = _field("bfloat16", "type of activations and matmul inputs: bfloat16 or float32")
    remat: str = _field("dots", "what backward recomputes: none, dots (all but matmul results and reads), block (all)")
    implementation: str = _field("auto", "path of the two operations: auto, hopper, xla or reference")

    def __post_init__(self) -> None:
        _check(self, "architecture", self.architecture in ARCHITECTURES, ", ".join(ARCHITECTURES))
        legal = MEMORIES[self.architecture]
        _check(
            self, "memories",
            isinstance(self.memories, tuple) and 0 < len(self.memories) == len(set(self.memories))
            and set(self.memories) <= set(legal),
            f"a tuple of one or more of {', '.join(legal)}, each once",
        )  # fmt: skip
        _check(self, "key_extractor", self.key_extractor in KEY_EXTRACTORS, ", ".join(KEY_EXTRACTORS))
        _check(self, "bandwidth", self.bandwidth in BANDWIDTHS, ", ".join(BANDWIDTHS))
        if self.architecture == "transformer":
            for field, only in (("key_extractor", KEY_EXTRACTORS[0]), ("bandwidth", BANDWIDTHS[0])):
                _check(self, field, getattr(self, field) == only, f"{only}, where model.architecture is transformer")
        _check_positive(self, "vocabulary", "layers", "width", "heads", "ffn_width", "delay_min")
        if self.width % self.heads:
            raise ValueError(f"model.heads is {self.heads}, which does not divide model.width = {self.width}")
        _check(self, "window", self.window >= 2, "an integer of 2 or more")
        _check(
            self,
            "delay_max",
            self.delay_max >= self.delay_min,
            f"model.delay_min = {self.delay_min} or more",
        )
        if self.delay_max > self.window and set(self.memories) >= {"short", "long"}:
            raise ValueError(
                f"model.delay_max is {self.delay_max} with model.window = {self.window}: pairs between the two are "
                f"seen by neither memory; legal: model.delay_min <= delay_max <= {self.window}"
            )
        _check(self, "rope_theta", self.rope_theta > 0, "a positive number")
        _check(self, "norm_epsilon", self.norm_epsilon > 0, "a positive number")
        _check(self, "compute_dtype", self.compute_dtype in DTYPES, ", ".join(DTYPES))
        _check(self, "remat", self.remat in REMAT_POLICIES, ", ".join(REMAT_POLICIES))
        _check(self, "implementation", self.implementation in IMPLEMENTATIONS, ", ".join(IMPLEMENTATIONS))
        if self.architecture == "transformer":
            _check(self, "heads", self.head_width % 2 == 0, "heads of an even width (rotary encoding turns pairs)")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def operation_path(self) -> str | None:
        """The `implementation` argument of the two operations."""
        return None if self.implementation == "auto" else self.implementation


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model reads, and in which order."""

    SECTION = "data"

    path: str = _field(
        "data/python", "directory made by launch.prepare; with data.mixture, the one that holds those", no_path=()
    )
    mixture: Mapping[str, float] = _field({}, "{name: weight} of corpora path/name, in shares of rows; {}: only path")
    mixture_changes: Mapping[str, Any] = _field({}, "{step: {name: weight}}: other weights from that step on")
    packing: str = _field("concat", "concat (documents cut at row ends) or best_fit (whole documents, padded)")
    context: int = _field(4096, "positions of a row, T")
    batch: int = _field(1024, "rows of one optimiser step, over all devices")
    seed: int = _field(0, "seed of the order of rows")
    workers: int = _field(0, "reading processes beside each training process; 0 reads in a thread")
    prefetch: int = _field(2, "batches made ahead by each worker")

    def __post_init__(self) -> None:
        _check_positive(self, "context", "batch", "prefetch")
        _check(self, "workers", self.workers >= 0, "0 or more")
        _check(self, "packing", self.packing in PACKINGS, ", ".join(PACKINGS))
        if self.mixture:
            _check_weights("data.mixture", self.mixture)
        if self.mixture_changes:
            _check(self, "mixture_changes", bool(self.mixture), "{} where data.mixture is {}")
        for step, weights in self.mixture_changes.items():
            legal = isinstance(step, str) and re.fullmatch("[1-9][0-9]{0,9}", step) is not None
            _check(self, "mixture_changes", legal, "{step: {name: weight}}, steps being integers of 1 or more")
            _check_weights(f"data.mixture_changes.{step}", weights)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under linear warm-up and cosine decay (PAPER section 6)."""

    SECTION = "optimizer"

    peak_learning_rate: float = _field(3e-4, "learning rate at the end of warm-up")
    warmup_steps: int = _field(2000, "steps of linear warm-up")
    final_fraction: float = _field(0.01, "last learning rate as a share of the peak")
    beta1: float = _field(0.9, "decay of the first moment")
    beta2: float = _field(0.95, "decay of the second moment")
    epsilon: float = _field(1e-8, "added to the root of the second moment")
    weight_decay: float = _field(0.1, "decoupled decay, of matrices only")
    clip_norm: float = _field(1.0, "the global gradient norm is cut to this")

    def __post_init__(self) -> None:
        _check(self, "peak_learning_rate", self.peak_learning_rate > 0, "a positive number")
        _check(self, "warmup_steps", self.warmup_steps >= 0, "0 or more")
        _check(self, "final_fraction", 0 <= self.final_fraction <= 1, "a number in [0, 1]")
        _check(self, "beta1", 0 <= self.beta1 < 1, "a number in [0, 1)")
        _check(self, "beta2", 0 <= self.beta2 < 1, "a number in [0, 1)")
        _check(self, "epsilon", self.epsilon > 0, "a positive number")
        _check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        _check(self, "clip_norm", self.clip_norm > 0, "a positive number")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices."""

    SECTION = "mesh"

    data: int = _field(-1, "replicas of the weights; -1 takes all devices the other axes leave")
    fsdp: int = _field(1, "shards of the weights' model width, and of the batch")
    sequence: int = _field(1, "shards of time")
    tensor: int = _field(1, "shards of heads and feed-forward width")
    processes: int = _field(0, "processes that must have come; 0 takes any number")
    devices_per_process: int = _field(0, "devices that each must have; 0 takes any number")

    def __post_init__(self) -> None:
        _check(self, "data", self.data == -1 or self.data >= 1, "-1 or an integer of 1 or more")
        _check_positive(self, "fsdp", "sequence", "tensor")
        for field in ("processes", "devices_per_process"):
            _check(self, field, getattr(self, field) >= 0, "0 or more")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and how many saves are kept."""

    SECTION = "checkpoint"

    every: int = _field(500, "steps between checkpoints; the last step is always saved")
    keep: int = _field(3, "newest verified checkpoints kept; nothing newer than them is removed")
    keep_every: int = _field(0, "steps whose multiples are kept for ever; 0: none")
    keep_hours: float = _field(0.0, "hours of which one checkpoint each is kept for ever; 0: none")
    steps: tuple[int, ...] = _field((), "further steps that are saved, and kept for ever")
    local_dir: str = _field(
        "", "folder on each node's own disk for frequent checkpoints beside these; '': none", no_path=("",)
    )
    local_every: int = _field(50, "steps between checkpoints in local_dir, of which the newest two are kept")

    def __post_init__(self) -> None:
        _check_positive(self, "every", "keep", "local_every")
        for field in ("keep_every", "keep_hours"):
            _check(self, field, getattr(self, field) >= 0, "0 or more")
        _check(self, "steps", all(step >= 1 for step in self.steps), "integers of 1 or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of the run and what it reports."""

    SECTION = "run"

    steps: int = _field(50000, "optimiser steps")
    seed: int = _field(0, "seed of the initial weights and of the drawn delays")
    accumulation: int = _field(1, "micro-batches that one optimiser step is computed in")
    loss_chunk: int = _field(2048, "tokens whose logits are held at once by the loss")
    log_every: int = _field(10, "steps between lines of metrics")
    eval_every: int = _field(500, "steps between evaluations on the held-out split; the last step is always evaluated")
    eval_steps: tuple[int, ...] = _field((), "further steps after which is evaluated; 0: before the first")
    eval_batches: int = _field(16, "batches of one evaluation, at most the held-out split once")
    spike_sigma: float = _field(
        0.0, "a step whose loss or gradient norm is this many sigma above the last 128 is skipped; 0: only non-finite"
    )
    max_skipped: int = _field(20, "skipped steps in a row that stop the run")
    watchdog_factor: float = _field(20.0, "the run ends, with every stack, after this many median steps without one")
    watchdog_seconds: float = _field(60.0, "the least that the watchdog waits for a step; 0: there is none")
    watchdog_phase_seconds: float = _field(1800.0, "what it waits for a compilation, restore, save or evaluation")
    deterministic: bool = _field(False, "the same weights twice on GPUs too: slower operations, and no autotuning")
    compilation_cache: str = _field(
        "auto", "folder of compiled steps; auto: beside the workdir; '': none", no_path=("", "auto")
    )

    def __post_init__(self) -> None:
        _check_positive(
            self, "steps", "accumulation", "loss_chunk", "log_every", "eval_every", "eval_batches", "max_skipped"
        )
        for field in ("spike_sigma", "watchdog_seconds"):
            _check(self, field, getattr(self, field) >= 0, "0 or more")
        _check(self, "watchdog_factor", self.watchdog_factor >= 2, "2 or more")
        _check(self, "watchdog_phase_seconds", self.watchdog_phase_seconds > 0, "a positive number")
        _check(self, "eval_steps", all(step >= 0 for step in self.eval_steps), "integers of 0 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one run.

    Attributes:
      init_from: the workdir of a run whose newest weights this one starts from, with an optimiser of its own; "" makes
        new weights.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()
    init_from: str = dataclasses.field(default="", metadata={"no_path": ("",)})

    def __post_init__(self) -> None:
        if "short" in self.model.memories and self.data.context < self.model.window:
            raise ValueError(
                f"data.context is {self.data.context}, shorter than the window: legal: model.window = "
                f"{self.model.window} or more (or lower --config.model.window)"
            )
        if self.data.batch % self.run.accumulation:
            raise ValueError(
                f"run.accumulation is {self.run.accumulation}, which does not divide data.batch = {self.data.batch}"
            )
        if self.optimizer.warmup_steps >= self.run.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; legal: below run.steps = {self.run.steps}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Makes the frozen form; every field must be there, and no other. Raises ValueError naming what differs."""
        sections = _exact_fields(cls, values, "the config")
        made = {}
        for name, kind in sections.items():
            if not dataclasses.is_dataclass(kind):
                made[name] = _as_type(kind, values[name], name)
                continue
            made[name] = _section(kind, values[name])
        return cls(**made)

    @classmethod
    def from_config_dict(cls, config: ml_collections.ConfigDict) -> "Config":
        """As `from_dict`; paths become absolute, and a ~ at their beginning a home."""
        try:
            values = config.to_dict()
        except TypeError as error:  # it sorts the names of a dictionary
            raise ValueError(
                f"a dictionary of the config has names that are no strings ({error}); legal: strings"
            ) from error
        return _with_absolute_paths(cls.from_dict(values))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def model_from_dict(values: Any) -> ModelConfig:
    """The config of a model by itself. A field that it lacks is newer than it: the default is what was done then."""
    if not isinstance(values, Mapping) or "memories" not in values:
        raise ValueError(f"{_shown(values)} is no config of a model; legal: a mapping with memories and other fields")
    return _section(ModelConfig, {**dataclasses.asdict(ModelConfig()), **values})


def _with_absolute_paths(section: Any) -> Any:
    changed = {}
    for field in dataclasses.fields(section):
        value, no_path = getattr(section, field.name), field.metadata.get("no_path")
        if dataclasses.is_dataclass(value):
            changed[field.name] = _with_absolute_paths(value)
        elif no_path is not None and value not in no_path:
            changed[field.name] = str(paths.absolute(value))
    return dataclasses.replace(section, **changed)


def _section(kind: Any, values: Any) -> Any:
    fields = _exact_fields(kind, values, f"config.{kind.SECTION}")
    return kind(**{f: _as_type(t, values[f], f"{kind.SECTION}.{f}") for f, t in fields.items()})


def _exact_fields(kind: type, values: Any, where: str) -> dict[str, type]:
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {_shown(values)}; legal: a mapping with {', '.join(fields)}")
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"legal: {', '.join(fields)}"
            raise ValueError(f"{where} has no field {_shown(name)}; {hint}")
    for name in fields:
        if name not in values:
            raise ValueError(f"{where} lacks the field {name!r}")
    return fields  # type: ignore[return-value]


def _as_type(kind: Any, value: Any, where: str) -> Any:
    """JSON and the command line blur list and tuple, int and float; nothing else is converted."""
    if kind in (tuple[str, ...], tuple[int, ...]):
        (of, _) = typing.get_args(kind)
        if isinstance(value, list | tuple) and all(type(part) is of for part in value):
            return tuple(_as_type(of, part, where) for part in value)
        raise ValueError(f"{where} is {_shown(value)}; legal: a tuple of {of.__name__}")
    if typing.get_origin(kind) is Mapping and isinstance(value, Mapping):
        return dict(value)
    if kind is float and type(value) is int and abs(value) < _INTEGERS:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {_shown(value)}; legal: a value of type {getattr(kind, '__name__', kind)}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; legal: a finite number")
    # Counts and sizes go into int32; seeds are only hashed.
    if kind is int and not where.endswith(".seed") and abs(value) >= _INTEGERS:
        raise ValueError(f"{where} is {_shown(value)}; legal: an integer below {_INTEGERS}")
    return value


def default_config() -> ml_collections.ConfigDict:
    """All fields at their defaults, locked: a recipe can set fields, not invent them."""
    config = ml_collections.ConfigDict(Config().to_dict())
    config.lock()
    return config


def load_config(path: str) -> ml_collections.ConfigDict:
    """The `ConfigDict` that the recipe file at `path` makes (its `get_config()`)."""
    file = paths.absolute(path)
    if not file.is_file():
        raise ValueError(f"no config file {path!r}; the shipped ones are in configs/")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path!r} is not a Python file; a config file defines get_config()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path!r} does not define get_config()")
    return module.get_config()


def describe_fields() -> list[str]:
    """One line for every field: its name, default and meaning (what `--help` prints)."""
    lines = []
    for section in _sections():
        for field in dataclasses.fields(section.default):  # type: ignore[arg-type]
            default = getattr(section.default, field.name)
            lines.append(f"--config.{section.name}.{field.name} (default {default!r}): {field.metadata['doc']}")
    return [*lines, "--config.init_from (default ''): workdir of a run whose newest weights this one starts from"]


def _sections() -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)]


def with_new_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved `to_dict()` form, with what is newer than it at its default, which does what was done then."""
    made = Config().to_dict()
    return {
        name: {**default, **saved.get(name, {})} if isinstance(default, dict) else saved.get(name, default)
        for name, default in made.items()
    } | {name: value for name, value in saved.items() if name not in made}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """`to_dict()` as one level: "section.field", and "init_from"."""
    whole = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    return whole | {
        f"{name}.{field}": value
        for name, section in config.items()
        if isinstance(section, Mapping)
        for field, value in section.items()
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`section.field: old -> new` for every field that differs between two `to_dict()` forms."""
    before, after = flat(old), flat(new)
    lines = []
    for name in sorted({*before, *after}):
        a, b = before.get(name, "absent"), after.get(name, "absent")
        if (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            lines.append(f"{name}: {a!r} -> {b!r}")
    return lines
