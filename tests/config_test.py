"""Configs: validation with the offending value, the golden dumps, and the way to frozen dataclasses."""

import dataclasses
import pathlib

import ml_collections
import pytest

from mosaics_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def _dump(config: config_lib.Config) -> str:
    """One sorted `section.field: value` a line."""
    lines = [f"{name}: {value!r}" for name, value in config_lib.flat(config.to_dict()).items()]
    return "\n".join(sorted(lines)) + "\n"


@pytest.mark.parametrize("recipe", RECIPES)
def test_golden_dump(recipe: str) -> None:
    """A default that moves shows up here. Where the change is meant, write the new text into the golden file."""
    made = config_lib.load_config(str(ROOT / "configs" / f"{recipe}.py"))
    text = _dump(config_lib.Config.from_dict(made.to_dict()))
    assert text == (ROOT / "tests" / "golden" / f"{recipe}.txt").read_text()


def test_every_recipe_is_there() -> None:
    names = ["tiny", "small", "large"]
    assert sorted(["claims", "extend_32k"] + names + [f"transformer_{name}" for name in names]) == RECIPES


def test_round_trip_and_immutability() -> None:
    config = config_lib.Config()
    assert config_lib.Config.from_dict(config.to_dict()) == config
    assert config_lib.Config.from_dict(config_lib.default_config().to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.layers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.architecture": "mosaics"}, r"model.architecture is 'mosaics'; legal: mosaic, transformer"),
        ({"model.memories": ("full",)}, r"model.memories is \('full',\); legal: .*short, long"),
        ({"model.memories": ()}, r"model.memories is \(\)"),
        ({"model.memories": ("short", "short")}, r"each once"),
        ({"model.heads": 3}, r"model.heads is 3, which does not divide model.width = 2048"),
        ({"model.layers": 0}, r"model.layers is 0; legal: an integer of 1 or more"),
        ({"model.window": 1}, r"model.window is 1"),
        ({"model.delay_max": 8}, r"model.delay_max is 8; legal: .*model.delay_min = 64"),
        ({"model.delay_max": 300}, r"model.delay_max is 300 with model.window = 256"),
        ({"model.compute_dtype": "float16"}, r"model.compute_dtype is 'float16'; legal: float32, bfloat16"),
        ({"model.remat": "all"}, r"model.remat is 'all'; legal: none, dots, block"),
        ({"model.implementation": "cuda"}, r"model.implementation is 'cuda'; legal: auto, hopper, reference, xla"),
        ({"model.key_extractor": "v1"}, r"model.key_extractor is 'v1'; legal: gated, leaky"),
        ({"model.bandwidth": "none"}, r"model.bandwidth is 'none'; legal: adaptive, fixed"),
        (
            {"model.architecture": "transformer", "model.memories": ("full",), "model.bandwidth": "fixed"},
            r"model.bandwidth is 'fixed'; legal: adaptive, where model.architecture is transformer",
        ),
        ({"model.layers": "8"}, r"model.layers is '8'; legal: a value of type int"),
        ({"data.context": 100}, r"data.context is 100, shorter than the window: legal: model.window = 256 or more"),
        ({"data.workers": -1}, r"data.workers is -1"),
        ({"run.accumulation": 3}, r"run.accumulation is 3, which does not divide data.batch = 1024"),
        ({"optimizer.warmup_steps": 10**6}, r"optimizer.warmup_steps is 1000000; legal: below run.steps = 50000"),
        ({"optimizer.peak_learning_rate": 0.0}, r"optimizer.peak_learning_rate is 0.0; legal: a positive number"),
        ({"optimizer.beta2": 1.0}, r"optimizer.beta2 is 1.0"),
        ({"mesh.data": 0}, r"mesh.data is 0"),
        ({"checkpoint.keep": 0}, r"checkpoint.keep is 0"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], message: str) -> None:
    values = config_lib.Config().to_dict()
    for name, value in change.items():
        section, field = name.split(".")
        values[section][field] = value
    with pytest.raises(ValueError, match=message):
        config_lib.Config.from_dict(values)


def test_unknown_and_missing_fields() -> None:
    values = config_lib.Config().to_dict()
    values["model"]["layer"] = values["model"].pop("layers")
    with pytest.raises(ValueError, match=r"config.model has no field 'layer'; did you mean 'layers'\?"):
        config_lib.Config.from_dict(values)
    del values["model"]["layer"]
    with pytest.raises(ValueError, match=r"config.model lacks the field 'layers'"):
        config_lib.Config.from_dict(values)
    with pytest.raises(ValueError, match=r"config.run is 3; legal: a mapping with"):
        config_lib.Config.from_dict(config_lib.Config().to_dict() | {"run": 3})


def test_recipes_are_locked() -> None:
    config = config_lib.default_config()
    with pytest.raises((AttributeError, KeyError)):
        config.model.layer = 3


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no config file"), ("x = 1", r"does not define get_config\(\)")],
)
def test_bad_config_files(tmp_path: pathlib.Path, text: str | None, message: str) -> None:
    path = tmp_path / "recipe.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config_lib.load_config(str(path))


def test_differences_are_named() -> None:
    old, new = config_lib.Config().to_dict(), config_lib.Config().to_dict()
    new["model"]["layers"] = 3
    assert config_lib.differences(old, new) == ["model.layers: 24 -> 3"]
    new["model"] = new["model"] | {"memories": ["short", "long"], "layers": 24}  # JSON has lists only
    assert config_lib.differences(old, new) == []


def test_every_field_is_described() -> None:
    text = "\n".join(config_lib.describe_fields())
    config = ml_collections.ConfigDict(config_lib.Config().to_dict())
    for section in config:
        for field in config[section]:
            assert f"--config.{section}.{field} " in text
