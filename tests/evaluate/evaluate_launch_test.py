"""launch.evaluate as a user types it: every suite on a tiny run, a second run that asks nothing, and mistakes."""

import json
import pathlib
import resource
import subprocess
import sys

import helpers
import pytest
import suite_files as made

from mosaics_jax.evaluate.settings import Settings
from mosaics_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent.parent
SUITES = "perplexity,retrieval,needle,classification,harness"


def _evaluate(workdir: pathlib.Path, *flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.evaluate", f"--workdir={workdir}", *flags],
        cwd=ROOT, check=False, capture_output=True, text=True, env=env,
    )  # fmt: skip


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "tiny"
    train(helpers.tiny_config(corpus, **{"run.steps": 4, "checkpoint.steps": (2,)}), directory)
    return directory


@pytest.fixture
def data(tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "t.jsonl").write_text('{"q": "a", "c": ["b", "c"], "a": 0}\n{"q": "b", "c": ["b", "c"], "a": 1}\n')
    (tasks / "t.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks}/t.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: '{{a}}'\n"
    )
    return [
        f"--squad={made.squad(tmp_path / 'squad.json')}", f"--hotpot={made.hotpot(tmp_path / 'hotpot.json')}",
        f"--banking77={made.banking(tmp_path / 'banking')}", f"--goemotions={made.emotions(tmp_path / 'emotions')}",
        f"--tacred={made.tacred(tmp_path / 'tacred')}", f"--task_folder={tasks}", "--tasks=own",
    ]  # fmt: skip


@pytest.mark.slow
def test_every_suite_and_again(workdir, data, tmp_path):
    small = ["--count=2", "--shots=1", "--depths=2", "--variants=single_1,multivalue", "--max_length=2000"]
    flags = [f"--suite={SUITES}", "--lengths=32,64", *small, *data]
    # Perplexity needs documents as long as its lengths, the others prompts that fit: two commands.
    one = _evaluate(workdir, "--suite=perplexity", "--lengths=32,64", *small)
    assert one.returncode == 0, one.stderr
    rest = [flag if "lengths" not in flag else "--lengths=1100,1400" for flag in flags]
    rest[0] = "--suite=retrieval,needle,classification,harness"
    two = _evaluate(workdir, *rest)
    assert two.returncode == 0, two.stderr
    folder = workdir / "evaluations" / "4"
    for suite in SUITES.split(","):
        body = json.loads((folder / f"{suite}.json").read_text())
        assert body["about"]["command"].startswith("`python -m launch.evaluate --workdir=")
        assert (folder / f"{suite}.md").read_text() in one.stdout + two.stdout
        for figure in body["figures"]:
            assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
            assert json.loads((folder / f"{figure}.json").read_text())["kind"] in ("lines", "heatmap")
    written = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    assert len(written) == 5
    three = _evaluate(workdir, *rest)
    assert three.returncode == 0, three.stderr
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == written, "nothing was asked again"
    assert three.stdout == two.stdout
    # Without the long-term memory, of another step, beside the first.
    four = _evaluate(
        workdir, "--suite=perplexity", "--lengths=32,64", *small, "--without_long_term", "--step=2",
        f"--compare={workdir}",
    )  # fmt: skip
    assert four.returncode == 0, four.stderr
    other = workdir / "evaluations" / "2" / "without_long_term"
    assert (other / "perplexity_context_compared.png").is_file()
    assert len(json.loads((other / "perplexity_context_compared.json").read_text())) == 2
    assert (other / "perplexity.jsonl").read_bytes() != (folder / "perplexity.jsonl").read_bytes()


@pytest.mark.long
def test_64k_on_a_cpu_stays_below_4_gib(tmp_path):
    """A row of sixteen times the training context is read and continued; T x T scores alone would be 16 GiB."""
    from mosaics_jax.data.prepare import prepare

    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} the memory reads a key. " * 2600)
    prepare([str(tmp_path / "text")], str(tmp_path / "corpus"), valid_fraction=0.4)
    changes = {"run.steps": 3, "data.context": 4096, "data.batch": 1, "model.window": 64, "model.delay_max": 64}
    train(helpers.tiny_config(tmp_path / "corpus", **changes), tmp_path / "run")
    found = _evaluate(
        tmp_path / "run", "--suite=perplexity,needle", "--lengths=65536", "--count=1", "--variants=single_2",
        env=helpers.OPTIMISED,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "65,536" in found.stdout
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 4 * 2**30, f"{peak / 2**30:.2f} GiB"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--suite is not set; legal: one or several of perplexity, retrieval"),
        ({"suite": ("recall",)}, "--suite has 'recall'; legal: perplexity"),
        ({"suite": ("needle",), "lengths": (512, 1)}, "--lengths has 1; legal: integers of 2 or more"),
        ({"suite": ("needle",), "count": 0}, "--count is 0; legal: 1 or more"),
        ({"suite": ("retrieval",)}, r"'retrieval' has no data; give one or more of --squad: SQuAD 2.0 .* CC BY-SA 4.0.*"
         r"https://.*; --hotpot: HotpotQA"),
        ({"suite": ("retrieval",), "squad": "no.json"}, "--squad is 'no.json', which is not there; it is SQuAD 2.0"),
        ({"suite": ("classification",)}, "--tacred: TACRED .* licence of the Linguistic Data Consortium"),
        ({"suite": ("classification",), "tacred": "no"}, "--tacred is 'no', which is not there; it is TACRED"),
        ({"suite": ("classification",), "texts": ("own=a.csv",)}, "--texts has 'own=a.csv'; legal: NAME=TRAIN:TEST"),
        ({"suite": ("needle",), "haystack": "no.txt"}, "--haystack is 'no.txt', which is not there"),
        ({"suite": ("classification",), "shots": (0,)}, "--shots has 0"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_before_a_model_is_loaded(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--suite=needle", "--lengths=4k"), "error: --lengths has '4k'; legal: integers, separated by commas"),
        (("--suite=perplexity", "--step=1"), "has no checkpoint 1; legal: 2, 3, 4"),
        (("--suite=perplexity", "--compare=nowhere"), "/nowhere', which has no evaluation with the suite 'perplexity'"),
    ],
)
def test_one_line_and_exit_2(workdir, flags, message):
    found = _evaluate(workdir, *flags)
    assert found.returncode == 2
    errors = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in found.stderr
