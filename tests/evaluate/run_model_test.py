"""A run's model gives the suites what a plain forward pass gives: one device, a mesh, lm_eval."""

import json
import pathlib
import shutil
import subprocess
import sys

import evaluate_runs
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaics_jax.config import MeshConfig
from mosaics_jax.data.tokenizer import make_tokenizer
from mosaics_jax.evaluate.model import RunModel, identity
from mosaics_jax.evaluate.suite import row
from mosaics_jax.train import train

HERE = pathlib.Path(__file__).parent
TEXTS = ["the key", "", "a memory reads a key and the value from the past, which it keeps. " * 3]


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "tiny"
    train(helpers.tiny_config(corpus, **{"run.steps": 4, "checkpoint.every": 2}), directory)
    return directory


@pytest.fixture(scope="module")
def model(workdir):
    return RunModel(workdir, MeshConfig(), batch_tokens=1024)


@pytest.fixture(scope="module")
def rows(model):
    return [row(model.tokenizer, text) for text in TEXTS]


@pytest.fixture(scope="module")
def log_p(model):
    """Row of ids -> log-probabilities [T, V] by a plain forward pass."""
    of = model.model
    forward = jax.jit(lambda tokens_BT: jax.nn.log_softmax(of(tokens_BT), axis=-1))
    return lambda ids: np.asarray(forward(jnp.asarray(ids)[None]))[0].astype(np.float64)


def test_losses_are_the_forward_passes(model, rows, log_p):
    for ids, losses in zip(rows, model.losses(rows), strict=True):
        assert losses.loss_T.shape == losses.likeliest_T.shape == (len(ids) - 1,)
        if len(ids) > 1:
            log_p_TV = log_p(ids)[:-1]
            expected = -log_p_TV[np.arange(len(ids) - 1), ids[1:]]
            np.testing.assert_allclose(losses.loss_T, expected, rtol=2e-5, atol=2e-5)
            np.testing.assert_array_equal(losses.likeliest_T, log_p_TV.argmax(-1) == ids[1:])


def test_ranks_are_sums_of_the_forward_passes(model, rows, log_p):
    options = [np.array(ids, np.int32) for ids in ([97], [98, 99, 100], [101, 32])]
    found = model.rank(rows, options)
    assert found.shape == (3, 3)
    for scores, ids in zip(found, rows, strict=True):
        for score, option in zip(scores, options, strict=True):
            whole = np.concatenate([ids, option])
            log_p_TV = log_p(whole)
            expected = sum(log_p_TV[len(ids) - 1 + place, token] for place, token in enumerate(option))
            assert score == pytest.approx(expected, rel=2e-5)


def test_generation_is_greedy_by_the_forward_pass(model, rows, log_p):
    for ids, text in zip(rows, model.generate(rows, 5), strict=True):
        whole = list(ids)
        for _ in range(5):
            token = int(log_p(np.array(whole, np.int32))[-1].argmax())
            if token == model.tokenizer.end:
                break
            whole.append(token)
        assert text == model.tokenizer.decode(whole[len(ids) :])


def test_batches_hold_what_they_may(model):
    assert model.rows_at_once(32) == 32
    assert model.rows_at_once(1000) == 1
    assert model.rows_at_once(5000) == 1


def test_without_long_term_and_with_another_delay(workdir, rows):
    whole, delayed, short = (
        RunModel(workdir, MeshConfig(), **change).losses(rows[2:])[0].loss_T
        for change in ({}, {"delay": 8}, {"long_term": False})
    )
    reads_long = slice(10, None)
    assert not np.allclose(whole[reads_long], delayed[reads_long])
    assert not np.allclose(whole[reads_long], short[reads_long])
    np.testing.assert_array_equal(RunModel(workdir, MeshConfig(), delay=2).losses(rows[2:])[0].loss_T, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delay": 9}, r"--delay is 9; legal: 1 to 8 \(model.window"),
        ({"delay": 0}, "--delay is 0; legal: 1 to 8"),
        ({"mesh": MeshConfig(fsdp=2)}, "but there are 1 devices"),
        ({"mesh": MeshConfig(sequence=2)}, "mesh.sequence is 2; legal for evaluation: 1"),
    ],
)
def test_refused(workdir, change, message):
    with pytest.raises(ValueError, match=message):
        RunModel(workdir, **({"mesh": MeshConfig()} | change))


def test_the_identity_is_of_the_weights_and_of_how_they_are_read(workdir, model, tmp_path):
    found = [identity(workdir, **change) for change in ({}, {"step": 2}, {"delay": 8}, {"long_term": False})]
    assert len(set(found)) == 4
    assert found[0] == model.identity == identity(workdir, step=4) == identity(workdir, delay=2)
    assert found[3] == RunModel(workdir, MeshConfig(), long_term=False).identity
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    assert identity(moved) == found[0]
    shutil.rmtree(moved / "checkpoints" / "4")
    shutil.copytree(moved / "checkpoints" / "2", moved / "checkpoints" / "4")
    assert identity(moved) == found[1], "the step is not what tells weights apart"
    for left in moved.rglob("verified.json"):  # nobody came to verify it
        left.unlink()
    assert identity(moved) == found[1]


def test_a_model_is_what_its_checkpoint_says(workdir, model, rows, tmp_path):
    """The workdir's own record may be another's by now, and so may its tokenizer."""
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    record = json.loads((other / "config.json").read_text())
    record["config"]["model"] |= {"window": 4, "delay_min": 4, "heads": 1}
    (other / "config.json").write_text(json.dumps(record))
    again = RunModel(other, MeshConfig(), batch_tokens=1024)
    assert again.model_config == model.model_config
    assert again.config == model.config
    assert again.identity == model.identity
    np.testing.assert_array_equal(again.losses(rows[2:])[0].loss_T, model.losses(rows[2:])[0].loss_T)
    shutil.rmtree(other / "tokenizer")
    make_tokenizer("bpe:258", ["a text of few words " * 9]).save(other / "tokenizer")
    with pytest.raises(ValueError, match="is not the one that the run was trained with"):
        RunModel(other, MeshConfig())
    (other / "checkpoints" / "4" / "record" / "metadata").write_text("{")
    with pytest.raises(ValueError, match=r"the record of .* is damaged"):
        RunModel(other, MeshConfig())


def test_a_model_without_long_term_memory_has_no_delay_and_nothing_to_remove(corpus, tmp_path):
    changes = {"run.steps": 3, "model.memories": ("short",)}
    train(helpers.tiny_config(corpus, **changes), tmp_path)
    with pytest.raises(ValueError, match=r"--delay is 3, but this run's memories are \('short',\)"):
        RunModel(tmp_path, MeshConfig(), delay=3)
    with pytest.raises(ValueError, match="legal: 'long' beside another memory"):
        RunModel(tmp_path, MeshConfig(), long_term=False)


@pytest.mark.long
def test_a_mesh_gives_the_same(workdir, model, rows, tmp_path):
    """Two axes of a mesh of eight devices and all three, in a process of their own."""
    subprocess.run(
        [sys.executable, str(HERE / "evaluate_runs.py"), str(workdir), str(tmp_path / "found.json")], check=True
    )
    found = json.loads((tmp_path / "found.json").read_text())
    expected = evaluate_runs.answers(model)
    assert len(found) == len(evaluate_runs.MESHES)
    for mesh, answers in found.items():
        assert answers["texts"] == expected["texts"], mesh
        np.testing.assert_allclose(answers["ranks"], expected["ranks"], rtol=1e-4)
        for one, other in zip(answers["losses"], expected["losses"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
