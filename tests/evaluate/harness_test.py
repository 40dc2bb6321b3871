"""lm_eval with scripted models and with a run's: likelihoods are the forward pass's, local tasks work, groups exist."""

import json
import math
import types
import warnings

import numpy as np
import pytest
from oracles import TOKENIZER, Scripted

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other libraries, as they are imported
    lm_eval = pytest.importorskip("lm_eval")
    from mosaics_jax.evaluate import harness

pytestmark = pytest.mark.filterwarnings("ignore")

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
SAID = """
task: own_said
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/said.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choice.yaml").write_text(CHOICE.format(folder=folder))
    (folder / "said.yaml").write_text(SAID.format(folder=folder))
    choices = [
        {"question": f"{a} and {b} make", "choices": [str(a + b + 1), str(a + b), "x"], "answer": 1}
        for a in range(3) for b in range(3)
    ]  # fmt: skip
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, choices)) + "\n")
    said = [{"question": f"Say {word}:", "answer": word} for word in ("yes", "no", "well")]
    (folder / "said.jsonl").write_text("\n".join(map(json.dumps, said)) + "\n")
    return folder


def _sure_of(right: bool):
    """A loss of 0 for rows that end with the right sum (or with a wrong one), of 1 a token for others."""

    def loss(row: np.ndarray) -> np.ndarray:
        asked, _, answer = TOKENIZER.decode(row).rpartition(" make ")
        a, b = map(int, asked.split(" and "))
        return np.full(len(row) - 1, 0.0 if (answer == str(a + b)) == right else 1.0)

    return loss


def _table(report):
    return {(row[0], row[1]): row[3] for row in report.tables[0].rows}


def test_oracles(tasks, tmp_path):
    def of(right: bool) -> Scripted:
        say = (lambda prompt: f"{prompt[4:-1]}\nmore") if right else (lambda prompt: "~")
        return Scripted(say, _sure_of(right))

    names = ["own_choice", "own_said"]
    found = _table(harness.run(of(True), names, tmp_path / "right", folder=tasks))
    assert found == {("own_choice", "acc"): 1.0, ("own_said", "exact_match"): 1.0}
    found = _table(harness.run(of(False), names, tmp_path / "wrong", folder=tasks))
    assert found == {("own_choice", "acc"): 0.0, ("own_said", "exact_match"): 0.0}


def test_a_second_run_asks_nothing_again(tasks, tmp_path):
    first = Scripted(lambda prompt: "yes", _sure_of(True))
    one = harness.run(first, ["own_said"], tmp_path / "kept", folder=tasks)
    again = Scripted(lambda prompt: pytest.fail("asked again"), _sure_of(True))
    assert harness.run(again, ["own_said"], tmp_path / "kept", folder=tasks) == one


def test_a_killed_harness_goes_on_and_keeps_no_pickles(tasks, tmp_path):
    """By the answers that are there, whoever asked for them; a text's stop strings are not part of its answer."""
    whole = Scripted(lambda prompt: prompt[4:-1], _sure_of(True))
    names = ["own_choice", "own_said"]
    expected = harness.run(whole, names, tmp_path / "whole", folder=tasks)
    lines = (tmp_path / "whole" / "harness.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 9 * 3 + 3
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"harness.jsonl"}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "harness.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:30])
    model = Scripted(lambda prompt: prompt[4:-1], lambda row: pytest.fail("asked again"))
    assert harness.run(model, names, tmp_path / "killed", folder=tasks) == expected
    assert model.calls == [2]
    assert (tmp_path / "killed" / "harness.jsonl").read_bytes() == b"".join(lines)
    other = Scripted(lambda prompt: "~", _sure_of(False))
    other.identity = "other"
    assert _table(harness.run(other, names, tmp_path / "killed", folder=tasks)) != _table(expected)


def test_questions_that_are_asked_twice_are_answered_once():
    model = Scripted(lambda prompt: "one")
    lm = harness.MosaicLM(model=model)
    assert lm.generate_until([_request("a", {"max_gen_toks": 20})] * 5) == ["one"] * 5
    assert model.calls == [1]


def _request(*args):
    return types.SimpleNamespace(args=args, arguments=args)


def test_contexts_and_continuations():
    seen = []

    def loss(row: np.ndarray) -> np.ndarray:
        seen.append(row.tolist())
        return np.arange(len(row) - 1) + 1.0

    lm = harness.MosaicLM(model=Scripted(loss=loss))
    begin, a, b, c = TOKENIZER.begin, *b"abc"
    found = lm.loglikelihood([_request("", "abc"), _request("ab", "c"), _request("a ", "b")], disable_tqdm=True)
    assert sorted(seen) == sorted([[begin, a, b, c], [begin, a, b, c], [begin, a, 32, b]])
    assert [value for value, _ in found] == [-(1 + 2 + 3), -3, -(2 + 3)]


def test_rolling_windows_predict_every_token_once():
    text = "".join(chr(97 + n % 26) for n in range(150))
    seen = []

    def loss(row: np.ndarray) -> np.ndarray:
        seen.append(row)
        return np.ones(len(row) - 1)

    lm = harness.MosaicLM(model=Scripted(loss=loss, context=64))
    assert lm.loglikelihood_rolling([_request(text), _request("abc"), _request("")]) == [-150.0, -3.0, 0.0]
    assert max(map(len, seen)) <= 64 + 2


def test_generation_stops_and_is_greedy():
    lm = harness.MosaicLM(model=Scripted(lambda prompt: "one. two"))
    how = {"until": [".", ""], "max_gen_toks": 20}
    assert lm.generate_until([_request("a", how), _request("b", {"max_gen_toks": 20})]) == ["one", "one. two"]
    with pytest.raises(ValueError, match="legal: greedy"):
        lm.generate_until([_request("a", {"do_sample": True, "temperature": 1.0})])


def test_no_prompt_is_cut():
    lm = harness.MosaicLM(model=Scripted(loss=lambda row: np.ones(len(row) - 1), max_length=10))
    with pytest.raises(ValueError, match="a prompt has 31 tokens, and --max_length is 10"):
        lm.loglikelihood([_request("a" * 29, "b")], disable_tqdm=True)


def test_likelihoods_are_the_forward_passes(corpus, tmp_path):
    import helpers
    import jax

    from mosaics_jax.config import MeshConfig
    from mosaics_jax.evaluate.model import RunModel
    from mosaics_jax.train import train

    train(helpers.tiny_config(corpus, **{"run.steps": 3}), tmp_path)
    model = RunModel(tmp_path, MeshConfig(), batch_tokens=256)
    lm = harness.MosaicLM(model=model)
    pairs = [("the key", " and"), ("", "a value"), ("it keeps what it has seen, and the past", " is"), ("a", " b" * 20)]
    found = lm.loglikelihood([_request(*pair) for pair in pairs], disable_tqdm=True)
    whole = model.model
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = np.array([TOKENIZER.begin, *TOKENIZER.encode(context + continuation)])
        log_p_TV = np.asarray(jax.nn.log_softmax(whole(ids[None]), axis=-1))[0].astype(np.float64)
        count = len(TOKENIZER.encode(continuation))
        scored = log_p_TV[len(ids) - 1 - count : -1]
        assert value == pytest.approx(math.fsum(scored[np.arange(count), ids[-count:]]), rel=1e-5)
        assert greedy == bool((scored.argmax(-1) == ids[-count:]).all())


def test_the_papers_lists_are_tasks_that_exist():
    manager = harness.TaskManager(include_path=[str(harness.TASKS)])
    assert [len(names) for names in harness.GROUPS.values()] == [13, 6]
    for names in harness.GROUPS.values():
        assert not [name for name in names if name not in manager.all_tasks]


def test_unknown_tasks_and_data_that_cannot_be_had(tasks, tmp_path):
    model = Scripted()
    with pytest.raises(ValueError, match="lm_eval knows no task 'nothing'; legal: its own"):
        harness.run(model, ["nothing"], tmp_path)
    (tasks / "choice.jsonl").unlink()
    with pytest.raises(ValueError, match=r"a task cannot be made, or its data cannot be had .*choice.jsonl"):
        harness.run(model, ["own_choice"], tmp_path, folder=tasks)
