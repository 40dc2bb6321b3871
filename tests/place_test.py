"""No command writes over the place of something else: what a folder is, and what each writer does there."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import helpers
import numpy as np
import pytest

import mosaics_jax
from mosaics_jax import place, whole
from mosaics_jax.config import Config
from mosaics_jax.data.prepare import prepare
from mosaics_jax.nn.model import create
from mosaics_jax.record import RunRecord, write_run_record
from mosaics_jax.train import train


def _files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _model(window: int = 8):
    return create(helpers.tiny_config(**{"model.window": window}).model, seed=window)


def _make(kind: str, folder: pathlib.Path, corpus: pathlib.Path) -> pathlib.Path:
    """A folder of the kind, as the commands leave it."""
    if kind == place.CORPUS:
        shutil.copytree(corpus, folder)
    elif kind == place.EXPORT:
        mosaics_jax.save_safetensors(_model(), folder)
    elif kind == "file":
        folder.write_text("mine")
    elif kind != "absent":
        folder.mkdir()
    match kind:
        case place.RUN:
            write_run_record(folder, RunRecord(helpers.tiny_config(corpus).to_dict(), "0" * 64, 0))
            (folder / "metrics.jsonl").touch()
        case place.STUDY:
            (folder / "claims.json").write_text("{}")
        case place.EVALUATIONS:
            (folder / "12").mkdir()
        case place.FOREIGN:
            (folder / "thesis.tex").write_text("mine")
        case "a model of somebody else":
            (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


KINDS = {
    "absent": place.EMPTY, "file": place.FOREIGN, "a model of somebody else": place.FOREIGN,
    **{kind: kind for kind in (place.EMPTY, place.RUN, place.CORPUS, place.EXPORT, place.STUDY, place.EVALUATIONS,
                               place.FOREIGN)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_known_by_what_lies_in_it(kind: str, corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert place.kind_of(_make(kind, tmp_path / "folder", corpus)) == KINDS[kind]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lock"], place.EMPTY),
        (["slurm-7.out", ".snapshot", "lost+found"], place.EMPTY),
        (["config.json.77.partial", "lock"], place.EMPTY),  # a run that was killed before it began
        (["logs", "restarts"], place.EMPTY),  # as the batch script leaves it for the first life
        (["checkpoints"], place.RUN),  # whose other files are lost
        (["metrics.jsonl", "manifest.json"], place.RUN),
        (["12", "7", "lock"], place.EVALUATIONS),
        (["12", "notes"], place.FOREIGN),
        (["config.json"], place.FOREIGN),
    ],
)
def test_a_folder_of_one_that_was_killed_or_has_lost_files(names: list[str], kind: str, tmp_path: pathlib.Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert place.kind_of(tmp_path) == kind


def test_a_link_to_nothing_is_no_empty_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert place.kind_of(tmp_path / "link") == place.FOREIGN


def _train(folder: pathlib.Path, corpus: pathlib.Path) -> None:
    train(helpers.tiny_config(corpus), folder)


def _prepare(folder: pathlib.Path, corpus: pathlib.Path) -> None:
    prepare(["python"], str(folder))


def _export(folder: pathlib.Path, corpus: pathlib.Path) -> None:
    mosaics_jax.save_safetensors(_model(), folder)


WRITERS = {
    _train: {place.EMPTY, "absent", place.RUN},
    _prepare: {place.EMPTY, "absent"},
    _export: {place.EMPTY, "absent", place.EXPORT},
}


@pytest.mark.parametrize(
    ("write", "kind"), [(write, kind) for write, legal in WRITERS.items() for kind in KINDS if kind not in legal]
)
def test_nothing_is_written_over_something_else(
    write: Callable[[pathlib.Path, pathlib.Path], None], kind: str, corpus: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = _make(kind, tmp_path / "folder", corpus)
    before = _files(tmp_path)
    with pytest.raises(ValueError, match=r"folder'.*(Legal|another directory)"):
        write(folder, corpus)
    assert _files(tmp_path) == before


# An export over an export.


def test_an_export_over_an_export_is_one_change(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """At no moment does the folder hold something of both."""
    target = tmp_path / "export"
    mosaics_jax.save_safetensors(_model(8), target)
    old, seen, real = _files(target), [], whole.replace_folder

    def watched(draft: pathlib.Path, at: pathlib.Path) -> pathlib.Path | None:
        seen.append(_files(at))
        found = real(draft, at)
        seen.append(_files(at))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "replace_folder", watched)
        mosaics_jax.save_safetensors(_model(12), target)
    new = _files(target)
    assert seen == [old, new]
    assert new.keys() == old.keys()
    assert all(new[name] != old[name] for name in new)
    assert mosaics_jax.load_safetensors(target).config.window == 12
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("can", [True, False])
def test_two_folders_change_places(can: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draft", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not can:
        monkeypatch.setattr(whole, "_EXCHANGE", 64)  # a flag that no file system has
    old = whole.replace_folder(tmp_path / "draft", tmp_path / "target")
    assert old
    assert os.listdir(tmp_path / "target") == ["draft"]
    assert os.listdir(old) == ["target"]


def test_an_export_that_fails_leaves_the_one_before(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mosaics_jax.save_safetensors(_model(), tmp_path / "export")
    before = _files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write", "replace_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(whole, name, full)
            with pytest.raises(ValueError, match=r"No space left on device.*make room"):
                mosaics_jax.save_safetensors(_model(12), tmp_path / "export")
        assert _files(tmp_path) == before
    mosaics_jax.save_safetensors(_model(12), tmp_path / "export")
    assert mosaics_jax.load_safetensors(tmp_path / "export").config.window == 12


def test_an_export_removes_nothing_that_was_added(tmp_path: pathlib.Path) -> None:
    mosaics_jax.save_safetensors(_model(), tmp_path / "export")
    (tmp_path / "export" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'README\.md' too"):
        mosaics_jax.save_safetensors(_model(), tmp_path / "export")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "job.log").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'job\.log' too"):
        mosaics_jax.save_safetensors(_model(), tmp_path / "other")


def test_an_export_through_a_link_replaces_what_it_leads_to(tmp_path: pathlib.Path) -> None:
    mosaics_jax.save_safetensors(_model(8), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mosaics_jax.save_safetensors(_model(12), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert mosaics_jax.load_safetensors(tmp_path / "real").config.window == 12


def test_no_bit_of_an_export_may_change(tmp_path: pathlib.Path) -> None:
    """Or it is refused, or it loads as before: of config.json every bit, of the weights some."""
    mosaics_jax.save_safetensors(_model(), tmp_path / "export")
    good = mosaics_jax.load_safetensors(tmp_path / "export")
    draw = np.random.default_rng(0)
    for name in ("config.json", "model.safetensors"):
        path = tmp_path / "export" / name
        content = path.read_bytes()
        bits = range(8 * len(content)) if name == "config.json" else draw.integers(0, 8 * len(content), 50)
        refused = 0
        for bit in map(int, bits):
            spoilt = bytearray(content)
            spoilt[bit // 8] ^= 1 << bit % 8
            if name == "config.json" and _same_json(content, bytes(spoilt)):
                continue  # a space that became another
            path.write_bytes(spoilt)
            with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
                mosaics_jax.load_safetensors(tmp_path / "export")
            refused += 1
        assert refused > 40
        path.write_bytes(content)
    assert mosaics_jax.load_safetensors(tmp_path / "export").config == good.config


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_an_export_of_an_older_version_still_loads(tmp_path: pathlib.Path) -> None:
    mosaics_jax.save_safetensors(_model(), tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    older = {
        name: value for name, value in json.loads(path.read_bytes()).items() if name not in ("digest", "weights_sha256")
    }
    path.write_text(json.dumps(older))
    assert (
        mosaics_jax.load_safetensors(tmp_path / "export").config
        == Config.from_dict(helpers.tiny_config().to_dict()).model
    )
