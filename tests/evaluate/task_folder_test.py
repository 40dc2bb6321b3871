"""A folder of tasks is data unless its owner is trusted: nothing in it runs, and what would is refused in one line."""

import json
import os
import pathlib
import warnings

import pytest
from oracles import TASK, Scripted

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other libraries, as they are imported
    pytest.importorskip("lm_eval")
    from mosaics_jax.evaluate import harness, task_folder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(folder=tmp_path / "tasks"))
    (tmp_path / "tasks" / "own.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    (tmp_path / "tasks" / "utils.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef ask(doc):\n    return doc['question']\n"
    )
    return tmp_path / "tasks"


def _run(folder: pathlib.Path, **how) -> None:
    harness.run(Scripted(lambda prompt: "b"), ["own"], folder.parent / "answers", folder=folder, **how)


def test_plain_tasks_need_no_flag(folder: pathlib.Path) -> None:
    (folder / "group.yaml").write_text("group: all\ntask: [own]\naggregate_metric_list: [{metric: exact_match}]\n")
    (folder / "second.yaml").write_text("include: own.yaml\ntask: second\n")
    task_folder.check(folder)
    _run(folder)
    assert not (folder.parent / "ran").exists()


REFUSED = {
    "a function": "doc_to_text: !function utils.ask",
    "a function deep inside": "metadata: {{a: [{{b: !function utils.ask}}]}}",
    "a python tag": "metadata: !!python/object/apply:os.system [touch ran]",
    "another tag": "metadata: !thing 3",
    "a class": "class: utils.Task",
    "a data set that is made": "custom_dataset: utils.ask",
    "a script for data": "dataset_path: {folder}/utils.py",
    "documents that are made": "process_docs: utils.ask",
    "results that are made": "process_results: utils.ask",
    "prompts of another library": "use_prompt: promptsource:all",
    "prompts of another file": "use_prompt: prompts.yaml:all",
    "a metric that is looked for": "metric_list: [{{metric: utils}}]",
    "a metric of another library": "metric_list: [{{metric: acc, hf_evaluate: true}}]",
    "a filter with a function": "filter_list: [{{name: a, filter: [{{function: custom, filter_fn: utils.ask}}]}}]",
    "a filter that is looked for": "filter_list: [{{name: a, filter: [{{function: utils.ask}}]}}]",
    "examples that are made": "fewshot_config: {{process_docs: utils.ask}}",
    "lm_eval's own files": "include: {folder}/../outside.yaml",
    "a file above": "include: ../outside.yaml",
    "itself": "include: own.yaml",
    "no YAML": "a: [",
    "binary": "\x01\x02",
    "deep": "metadata: " + "[" * 3000,
    "a group that changes tasks": "group: all\ntask: [{{task: own, metadata: {{}}}}]",
    "a group that changes all": "group: all\ntask: [own]\ndataset_path: json",
    "a list": "- own",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_run_code_is_refused_before_lm_eval_sees_it(what: str, folder: pathlib.Path) -> None:
    (folder.parent / "outside.yaml").write_text("doc_to_text: !function utils.ask\n")
    text = REFUSED[what].format(folder=folder) if "{" in REFUSED[what] else REFUSED[what]
    name = "own.yaml" if what == "itself" else "other.yaml"
    (folder / "deeper").mkdir()
    place = folder if what in ("itself", "a file above") else folder / "deeper"
    (place / name).write_text(text if text.startswith(("group", "-", "include")) else f"task: other\n{text}\n")
    with pytest.raises(ValueError, match=r"\.yaml'"):
        _run(folder)
    assert not (folder.parent / "ran").exists()


def test_with_the_flag_it_runs(folder: pathlib.Path) -> None:
    """So what is refused above is no impossible task."""
    (folder / "own.yaml").write_text(
        (folder / "own.yaml").read_text().replace('doc_to_text: "{{question}}"', "doc_to_text: !function utils.ask")
    )
    with pytest.raises(ValueError, match=r"own.yaml' is no plain YAML.*needs --run_task_code"):
        _run(folder)
    assert not (folder.parent / "ran").exists()
    _run(folder, run_task_code=True)
    assert (folder.parent / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{{{ cycler.__init__.__globals__.os.system('touch {ran}') }}}}",
        "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
        "{{{{ self.__init__.__globals__.__builtins__.open('{ran}', 'w') }}}}",
        "{{{{ question|attr('__class__') }}}}",
        "{{{{ '%s'|format(lipsum.__globals__) }}}}",
        "{{{{ '{{0.__class__.__init__.__globals__}}'.format(lipsum) }}}}",
        "{{{{ question['__class__']['__mro__'] }}}}",
    ],
)
def test_a_template_reaches_no_code(template: str, folder: pathlib.Path) -> None:
    ran = folder.parent / "ran"
    text = (folder / "own.yaml").read_text().replace("'", "''")
    shown = template.format(ran=ran)
    (folder / "own.yaml").write_text(text.replace('"{{question}}"', json.dumps(shown)))
    with pytest.raises(ValueError, match=r"(a task cannot be made|a template of own cannot be rendered)"):
        _run(folder)
    assert not ran.exists()


def test_lm_evals_own_renderer_would_run_it(tmp_path: pathlib.Path) -> None:
    import jinja2

    plain = jinja2.Environment(undefined=jinja2.StrictUndefined)
    assert plain.from_string("{{ cycler.__init__.__globals__.os.getpid() }}").render() == str(os.getpid())
