"""The small files of a run that decide what it is: no bit of them may change without being found."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

import helpers
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mosaics_jax
from mosaics_jax import whole
from mosaics_jax.checkpoint import Checkpoints
from mosaics_jax.config import Config
from mosaics_jax.local_checkpoint import LocalCheckpoints
from mosaics_jax.record import RunRecord, read_run_record, write_run_record
from mosaics_jax.restore import check_initial
from mosaics_jax.train import train
from mosaics_jax.whole import DamagedError


@pytest.fixture(scope="module")
def finished(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of 8 steps, saved at 3, 6 and 8."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(helpers.tiny_config(corpus), workdir)
    return workdir


@pytest.fixture
def run(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of one's own."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _fingerprints(workdir: pathlib.Path, at: int = 8) -> object:
    return json.loads((workdir / "checkpoints" / str(at) / "verified.json").read_text())["fingerprints"]


def _flips(content: bytes, least: int = 1) -> Iterator[bytes]:
    """Every bit of a file, or one in `least`, the other way round."""
    for bit in range(0, 8 * len(content), least):
        spoilt = bytearray(content)
        spoilt[bit // 8] ^= 1 << bit % 8
        yield bytes(spoilt)


# JSON with a digest.


@pytest.mark.parametrize(
    "body",
    [{}, {"a": 1}, {"a": {"1": [1.5, None, True, "ü\ud800"]}, "b": -0.0, "c": 1e300}, {1: (2, 3)}, {"n": float("inf")}],
)
def test_what_was_sealed_opens(body: dict, tmp_path: pathlib.Path) -> None:
    whole.write_json(tmp_path / "x.json", body)
    assert whole.read_json(tmp_path / "x.json") == json.loads(json.dumps(body))
    assert whole.read_json(tmp_path / "x.json") == whole.opened(whole.sealed(body)) or 1 in body


def test_no_bit_of_sealed_json_may_change(tmp_path: pathlib.Path) -> None:
    body = {"heads": 12, "rate": 0.001, "memories": ["short", "long"], "note": "é"}
    whole.write_json(tmp_path / "x.json", body)
    content, found = (tmp_path / "x.json").read_bytes(), 0
    for spoilt in _flips(content):
        (tmp_path / "x.json").write_bytes(spoilt)
        try:
            read = whole.read_json(tmp_path / "x.json")
        except DamagedError:
            found += 1
        else:
            # Nothing but a space that became another, or the digest's name: readers refuse a field that is unknown.
            assert read == body or (read.keys() - body.keys() and all(read[name] == body[name] for name in body))
    assert found > 6 * len(content)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 100_000])
def test_what_is_no_sealed_json(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedError):
        whole.read_json(tmp_path / "x.json")


def test_a_file_is_whole_or_as_it_was(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole.write(tmp_path / "x", b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(whole.os, name, full)
            with pytest.raises(OSError, match="No space"):
                whole.write(tmp_path / "x", b"after")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"before")]


# The record of a run.


def test_no_bit_of_a_record_may_change(run: pathlib.Path) -> None:
    path, good = run / "config.json", read_run_record(run)
    content, found = path.read_bytes(), 0
    for spoilt in _flips(content):
        path.write_bytes(spoilt)
        try:
            assert read_run_record(run) == good
        except DamagedError:
            found += 1
    assert found > 5 * len(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("manifest"),
        lambda body: body.pop("config"),
        lambda body: body.update(colour="red"),
        lambda body: body.update(rows_read="many"),
        lambda body: body.update(manifest=None),
        lambda body: body.update(config=[]),
        lambda body: body.update(data_changes=[3]),
        lambda body: body.update(data_changes=7),
        lambda body: body["config"]["model"].update(colour="red"),
        lambda body: body["config"].update(model=3),
    ],
)
def test_unknown_and_missing_fields_are_damage_where_no_digest_speaks_for_them(
    run: pathlib.Path, change: Callable[[dict], object]
) -> None:
    body = json.loads((run / "config.json").read_bytes())
    del body["digest"]
    assert RunRecord.from_dict(body) == read_run_record(run)  # as an older version wrote it
    change(body)
    with pytest.raises(DamagedError):
        RunRecord.from_dict(body)
    with pytest.raises(ValueError, match="of another version") as error:
        RunRecord.from_dict(whole.sealed(body))
    assert not isinstance(error.value, DamagedError)  # nothing whole is moved away


@pytest.mark.parametrize(
    "spoil", ["flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("empty", "gone"))]
)
def test_a_run_whose_record_is_lost_takes_it_from_a_checkpoint(
    spoil: str, run: pathlib.Path, finished: pathlib.Path, corpus: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """And not from the command that it is started with: that one must still agree."""
    path = run / "config.json"
    content = path.read_bytes()
    {"flipped": lambda: path.write_bytes(content.replace(b'"heads": 2', b'"heads": 3')),
     "empty": lambda: path.write_bytes(b""),
     "gone": path.unlink}[spoil]()  # fmt: skip
    with pytest.raises(ValueError, match=r"was made with other settings \(run.seed: 0 -> 1\)"):
        train(helpers.tiny_config(corpus, **{"run.seed": 1}), run)
    shutil.rmtree(run / "checkpoints" / "8")
    train(helpers.tiny_config(corpus), run)
    assert "it is written anew from checkpoint 6" in capsys.readouterr().out
    assert _fingerprints(run) == _fingerprints(finished)
    assert read_run_record(run) == read_run_record(finished)
    assert len(list((run / "damaged").glob("config.json-*"))) == (spoil != "gone")


# Checkpoints.


def test_no_bit_of_what_verifies_a_checkpoint_may_change(run: pathlib.Path) -> None:
    path = run / "checkpoints" / "8" / "verified.json"
    content, found = path.read_bytes(), 0
    checkpoints = Checkpoints(run)
    good = json.loads(content)
    for spoilt in _flips(content, least=53):
        path.write_bytes(spoilt)
        if checkpoints.problem(8):
            found += 1
        else:
            assert json.loads(spoilt) == good
    assert found > 100
    checkpoints.close()


def _rename_a_key(path: pathlib.Path) -> None:
    path.write_text(path.read_text().replace('"fingerprints"', '"fingerprimts"'))


def _reseal_without(path: pathlib.Path) -> None:
    body = whole.read_json(path)
    del body["fingerprints"]
    whole.write_json(path, body)


def _folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def _empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [_rename_a_key, *(pytest.param(how, marks=pytest.mark.slow) for how in (_reseal_without, _folder, _empty))]
)
def test_where_what_verifies_a_checkpoint_is_damaged_an_older_one_is_tried(
    spoil: Callable[[pathlib.Path], None], run: pathlib.Path, finished: pathlib.Path, corpus: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    spoil(run / "checkpoints" / "8" / "verified.json")
    train(helpers.tiny_config(corpus), run)
    said = capsys.readouterr().out
    assert said.count("is damaged") == 1
    assert "resuming" in said
    assert "at step 6" in said
    assert _fingerprints(run) == _fingerprints(finished)


def test_no_bit_of_the_record_of_a_checkpoint_may_change(run: pathlib.Path) -> None:
    """Of one that nobody verified: no other checksum speaks for its record."""
    checkpoints = Checkpoints(run)
    path, good = run / "checkpoints" / "8" / "record" / "metadata", checkpoints.record(8)
    content, found = path.read_bytes(), 0
    for spoilt in _flips(content):
        path.write_bytes(spoilt)
        try:
            assert checkpoints.record(8) == good
        except DamagedError:
            found += 1
    assert found > 6 * len(content)
    checkpoints.close()


def test_an_unverified_checkpoint_with_a_damaged_record_is_passed_over(
    run: pathlib.Path, finished: pathlib.Path, corpus: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder = run / "checkpoints" / "8"
    (folder / "verified.json").unlink()
    record = folder / "record" / "metadata"
    record.write_text(record.read_text().replace('"seed": 0', '"seed": 1', 1))
    train(helpers.tiny_config(corpus), run)
    assert "durable checkpoint 8 is damaged" in capsys.readouterr().out
    assert _fingerprints(run) == _fingerprints(finished)


def test_names_that_are_no_steps_are_no_checkpoints(run: pathlib.Path, corpus: pathlib.Path) -> None:
    """Digits of other alphabets, signs and zeros in front; a file too."""
    for name in ("²", "٨", "-9", "+9", "009", "9.0", "9 ", "nine", "9_0"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "77").write_text("a file")
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [3, 6, 8]
    checkpoints.close()
    train(helpers.tiny_config(corpus), run)


def test_a_local_checkpoint_with_a_damaged_record_is_passed_over(
    corpus: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    config = helpers.tiny_config(
        corpus, **{"checkpoint.local_dir": str(tmp_path / "disk"), "checkpoint.local_every": 1, "checkpoint.keep": 9}
    )
    train(config, tmp_path / "run")
    (path,) = (tmp_path / "disk").glob("run-*/process-0-of-1/7.safetensors")
    local = LocalCheckpoints(config.checkpoint.local_dir, tmp_path / "run")
    good, content, found = local.record(7), path.read_bytes(), 0
    first, last = content.index(b"record"), content.rindex(b"rows_read")
    for bit in range(8 * first, 8 * last, 11):
        spoilt = bytearray(content)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            assert local.record(7) == good
        except DamagedError:
            found += 1
    assert found > 500
    local.close()

    path.write_bytes(content)
    with safe_open(path, "numpy") as file:
        about = file.metadata()
    save_file(load_file(path), path, about | {"record": about["record"].replace('"seed": 0', '"seed": 1', 1)})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    capsys.readouterr()
    train(config, tmp_path / "run")
    assert "local checkpoint 7 is damaged" in capsys.readouterr().out
    assert _fingerprints(tmp_path / "run") == _fingerprints(finished)


# What reads a run.


def test_weights_are_read_with_the_settings_that_they_were_trained_with(
    run: pathlib.Path, finished: pathlib.Path, corpus: pathlib.Path
) -> None:
    """Whatever the workdir's own record says: there another window, with a digest that is right."""
    other = helpers.tiny_config(corpus, **{"model.window": 12})
    write_run_record(run, RunRecord(other.to_dict(), "0" * 64, 0))
    model, _ = mosaics_jax.load(run)
    assert model.config == Config.from_dict(read_run_record(finished).config).model
    checked = helpers.tiny_config(corpus, **{"init_from": str(run)})
    check_initial(checked, read_run_record(finished).tokenizer)
    with pytest.raises(ValueError, match=r"whose model is another; legal: --config.model.window=8 \(not 12\)"):
        check_initial(dataclasses.replace(checked, model=other.model), read_run_record(finished).tokenizer)


def test_a_tokenizer_of_another_run_is_refused(run: pathlib.Path) -> None:
    body = json.loads((run / "config.json").read_bytes())
    assert body["tokenizer"] == json.loads((run / "tokenizer" / "tokenizer_config.json").read_bytes())["fingerprint"]
    record = run / "checkpoints" / "8" / "record" / "metadata"
    fields = whole.opened(json.loads(record.read_bytes()))
    record.write_text(json.dumps(whole.sealed(fields | {"tokenizer": "0" * 64})))
    (run / "checkpoints" / "8" / "verified.json").unlink()
    with pytest.raises(ValueError, match="is not the one that the run was trained with"):
        mosaics_jax.load(run)


def test_the_tokenizer_is_written_only_where_it_differs(run: pathlib.Path, corpus: pathlib.Path) -> None:
    path = run / "tokenizer" / "tokenizer_config.json"
    before, content = path.stat().st_mtime_ns, path.read_bytes()
    train(helpers.tiny_config(corpus), run)
    assert path.stat().st_mtime_ns == before
    for spoilt in (b"", content[:-20], content.replace(b"258", b"259")):
        path.write_bytes(spoilt)
        train(helpers.tiny_config(corpus), run)
        assert path.read_bytes() == content
    assert sorted(one.name for one in run.iterdir() if "tokenizer" in one.name) == ["tokenizer"]


def test_the_weights_have_a_name(run: pathlib.Path) -> None:
    checkpoints = Checkpoints(run)
    verified = checkpoints.weights_fingerprint(8)
    (run / "checkpoints" / "8" / "verified.json").unlink()
    assert checkpoints.weights_fingerprint(8) == verified
    assert checkpoints.weights_fingerprint(6) != verified
    (run / "checkpoints" / "6" / "verified.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"checkpoint .*6 cannot be read"):
        checkpoints.weights_fingerprint(6)
    checkpoints.close()
