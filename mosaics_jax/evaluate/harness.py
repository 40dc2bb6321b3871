"""Persistent knowledge: lm-evaluation-harness with a run's model, and the paper's task lists by name.

`MosaicLM` is registered as `mosaics_jax`: once this module is imported, `lm_eval.simple_evaluate(model="mosaics_jax",
model_args="workdir=W", tasks=[...])` works too. It imports lm_eval, so nothing but the harness suite imports it.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

try:
    import lm_eval
    import lm_eval.utils
    from jinja2 import TemplateError
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ValueError(f"the harness suite needs lm_eval ({error}); pip install 'mosaics_jax[eval]'") from error

from mosaics_jax import whole
from mosaics_jax.config import MeshConfig
from mosaics_jax.evaluate import report, task_folder
from mosaics_jax.evaluate.answers import Answers
from mosaics_jax.evaluate.model import Model, RunModel

TASKS = pathlib.Path(__file__).parent / "tasks"
# PAPER section 7: removing the long-term memory leaves the first as they were, and hurts the second. `mmlu alt` is
# taken for MMLU answered in words, `squad` for the completion form: the paper names no versions.
GROUPS = {
    "persistent_13": (
        "openbookqa", "arc_easy", "winogrande", "arc_challenge", "piqa", "boolq", "hellaswag", "nq_open", "social_iqa",
        "triviaqa", "gsm8k", "mmlu_continuation", "humaneval_plus",
    ),
    "contextual_6": ("squad_completion", "bbh", "hendrycks_math", "mbpp", "race_middle", "race"),
}  # fmt: skip

# The templates of tasks are lm_eval's to render, which lets them call whatever they can reach.
_SAFE = SandboxedEnvironment(undefined=lm_eval.utils.env.undefined, keep_trailing_newline=True)
_SAFE.filters.update(lm_eval.utils.env.filters)
lm_eval.utils.env = _SAFE


@register_model("mosaics_jax")
class MosaicLM(TemplateLM):
    """The harness's view of a model: contexts begin with the begin token, and are never cut.

    A text longer than the training context is scored in windows only where the harness asks for rolling ones.
    """

    def __init__(
        self, workdir: str | None = None, model: Model | None = None, batch_tokens: int = 65536,
        answers: pathlib.Path | None = None, **_: Any,
    ):  # fmt: skip
        """A run's newest checkpoint, or a `model` that is there already.

        What is in the file `answers` is not asked again, and what is not is added to it; without one nothing is kept.
        """
        super().__init__()
        if model is None:
            if workdir is None:
                raise ValueError("workdir is None; legal: the directory of a run (--model_args workdir=DIR)")
            model = RunModel(workdir, MeshConfig(), batch_tokens=int(batch_tokens))
        self._model = model
        self._answers = Answers(answers, model.identity)

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        return self._model.tokenizer.begin

    @property
    def max_length(self) -> int:
        return self._model.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._model.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether it is what greedy decoding gives."""
        begin = self.prefix_token_id
        rows = []
        for _names, context, continuation in requests:
            before = context if context[:1] == [begin] else [begin, *context]
            rows.append((np.array([*before, *continuation], np.int32), len(continuation)))

        def score(batch: Sequence[tuple[np.ndarray, int]]) -> list[dict[str, Any]]:
            found = self._model.losses([row for row, _ in batch])
            return [
                {"value": -float(losses.loss_T[len(losses.loss_T) - count :].sum(dtype=np.float64)),
                 "greedy": bool(losses.likeliest_T[len(losses.loss_T) - count :].all())}
                for losses, (_, count) in zip(found, batch, strict=True)
            ]  # fmt: skip

        jobs = [(f"likelihood {count} {_digest(row)}", len(row), (row, count)) for row, count in rows]
        return [(record["value"], record["greedy"]) for record in self._ask(jobs, score, "likelihoods")]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text), in windows of the training context, each with as much before it as fits."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self._model.context, context_len=1
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation, up to the first of the stop strings, which is left out."""
        jobs: dict[int, list[tuple[int, np.ndarray, list[str]]]] = {}  # by the number of tokens asked for
        for place, request in enumerate(requests):
            context, how = request.args
            if how.get("do_sample", False) and how.get("temperature", 0):
                raise ValueError(f"generation is asked for with {how}; legal: greedy (do_sample false)")
            stops = how.get("until") or []
            stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
            row = np.array([self.prefix_token_id, *self.tok_encode(context)], np.int32)
            jobs.setdefault(int(how.get("max_gen_toks", 256)), []).append((place, row, stops))
        texts: dict[int, str] = {}
        for count, group in jobs.items():
            found = self._generate([row for _, row, _ in group], count)
            texts |= {place: _until(text, stops) for text, (place, _, stops) in zip(found, group, strict=True)}
        return [texts[place] for place in range(len(requests))]

    def _generate(self, rows: Sequence[np.ndarray], count: int) -> list[str]:
        def write(batch: Sequence[np.ndarray]) -> list[dict[str, Any]]:
            return [{"text": text} for text in self._model.generate(batch, count)]

        jobs = [(f"generation {count} {_digest(row)}", len(row) + count, row) for row in rows]
        return [record["text"] for record in self._ask(jobs, write, "generations")]

    def _ask[Job](
        self, jobs: Sequence[tuple[str, int, Job]], work: Callable[[Sequence[Job]], Sequence[dict[str, Any]]], what: str
    ) -> list[dict[str, Any]]:
        """The records of jobs, each with a key and a length; worked on longest first, in batches of about one length.

        What decides an answer but the model is in its key.
        """
        order = sorted(jobs, key=lambda job: -job[1])
        if order and order[0][1] > self.max_length:
            raise ValueError(
                f"harness: a prompt has {order[0][1]} tokens, and --max_length is {self.max_length}; "
                "no prompt is cut: raise it, or ask for fewer examples"
            )
        with tqdm(total=len(jobs), desc=what, dynamic_ncols=True, disable=None) as bar:
            while order:
                size = self._model.rows_at_once(order[0][1])
                batch, order = order[:size], order[size:]
                self._answers.complete({key: job for key, _, job in batch}, work)
                bar.update(len(batch))
        return [self._answers.known[key] for key, _, _ in jobs]


def _digest(row: np.ndarray) -> str:
    """Of token ids; as long as it must be for no two of many millions to have the same."""
    return whole.digest(row.tolist())[:32]


def _until(text: str, stops: Sequence[str]) -> str:
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


class _Tasks(TaskManager):
    """lm_eval's tasks and others; one whose data cannot be had is a ValueError, whatever a library raised."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except Exception as error:
            raise ValueError(
                f"a task cannot be made, or its data cannot be had ({' '.join(str(error).split())}); lm_eval loads it "
                "from the Hugging Face hub: run once where that can be reached, with HF_HOME on a shared disk, or give "
                "a task with local files by --task_folder"
            ) from error


def run(
    model: Model, tasks: Sequence[str], directory: pathlib.Path, *, folder: pathlib.Path | None = None,
    limit: int | None = None, fewshot: int | None = None, run_code: bool = False, run_task_code: bool = False,
) -> report.Report:  # fmt: skip
    """Evaluates the tasks; answers are kept in `directory`, so that it goes on when killed.

    Args:
      tasks: names that lm_eval knows, of the YAML files in `folder`, or of GROUPS.
      limit: examples of each task at most; None: all.
      fewshot: examples in the prompt; None: as each task says.
      run_code: lets tasks run what the model wrote (humaneval_plus, mbpp), on this machine.
      run_task_code: lets the YAML files of `folder` import and run Python code.

    Raises:
      ValueError: an unknown task, one whose data cannot be had, or one that runs code where that is not allowed.
    """
    names = list(dict.fromkeys(name for task in tasks for name in GROUPS.get(task, (task,))))
    if folder and not run_task_code:
        task_folder.check(folder)
    manager = _Tasks(include_path=[str(TASKS), *([str(folder)] if folder else [])])
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(
                f"lm_eval knows no task {name!r}; legal: its own (`lm-eval ls tasks`), those in --task_folder, "
                f"or {', '.join(GROUPS)}"
            )
    try:
        found = lm_eval.simple_evaluate(
            model=MosaicLM(model=model, answers=directory / "harness.jsonl"), tasks=names, task_manager=manager,
            limit=limit, num_fewshot=fewshot, bootstrap_iters=0, confirm_run_unsafe_code=run_code,
        )  # fmt: skip
    except TemplateError as error:
        raise ValueError(f"a template of {', '.join(names)} cannot be rendered: {error}") from error
    rows = [
        [name, metric.split(",")[0], metric.split(",")[1], float(value), found["n-samples"][name]["effective"]]
        for name, metrics in found["results"].items()
        if name in found["n-samples"]
        for metric, value in metrics.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, int | float)
    ]
    table = report.Table("Harness", ["task", "metric", "filter", "value", "examples"], rows)
    return report.Report([table], [], [f"lm_eval {lm_eval.__version__}; versions: {json.dumps(found['versions'])}"])
