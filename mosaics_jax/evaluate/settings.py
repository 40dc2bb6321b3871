"""What is asked of an evaluation. Imports no jax: a mistake is answered before a model is loaded."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

from mosaics_jax import paths

SUITES = ("perplexity", "retrieval", "needle", "classification", "harness")
SOURCES = {
    "squad": "SQuAD 2.0 (dev-v2.0.json, CC BY-SA 4.0): https://rajpurkar.github.io/SQuAD-explorer",
    "hotpot": "HotpotQA (hotpot_dev_distractor_v1.json, CC BY-SA 4.0): https://hotpotqa.github.io",
    "banking77": (
        "Banking77 (a folder with train.csv and test.csv, CC BY 4.0): "
        "https://github.com/PolyAI-LDN/task-specific-datasets"
    ),
    "goemotions": (
        "GoEmotions (a folder with train.tsv, test.tsv and labels.txt, CC BY 4.0): "
        "https://github.com/google-research/google-research/tree/master/goemotions"
    ),
    "tacred": (
        "TACRED (a folder with train.json and test.json, under a licence of the Linguistic Data Consortium): "
        "https://catalog.ldc.upenn.edu/LDC2018T24"
    ),
}
_FILES, _FOLDERS = ("squad", "hotpot", "haystack"), ("banking77", "goemotions", "tacred", "task_folder")
_OF_SUITE = {"retrieval": ("squad", "hotpot"), "classification": ("banking77", "goemotions", "tacred")}


def _field(default: Any, doc: str, path: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "path": path})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of the suites: each field is a flag of launch.evaluate. An empty tuple means all or the default."""

    suite: tuple[str, ...] = _field((), f"suites: {', '.join(SUITES)}")
    lengths: tuple[int, ...] = _field((), "task lengths in tokens; default: 1, 2, 4, 8 times the context of training")
    count: int = _field(100, "documents, questions, needles or texts of each condition")
    seed: int = _field(0, "seed of all draws")
    corpus: str = _field("", "prepared corpus whose held-out documents are read; default: the run's", path=True)
    squad: str = _field("", "retrieval: a JSON file in SQuAD's format", path=True)
    hotpot: str = _field("", "retrieval: a JSON file in HotpotQA's distractor format", path=True)
    haystack: str = _field("", "needle: a text file to hide them in; default: the corpus's held-out text", path=True)
    depths: int = _field(10, "needle: depths of the grid, from the beginning of the text to its end")
    variants: tuple[str, ...] = _field((), "needle: variants, such as single_1,multikey_2; default: all eight")
    banking77: str = _field("", "classification: folder with train.csv and test.csv", path=True)
    goemotions: str = _field("", "classification: folder with train.tsv, test.tsv and labels.txt", path=True)
    tacred: str = _field("", "classification: folder with your train.json and test.json", path=True)
    texts: tuple[str, ...] = _field(
        (), "classification: NAME=TRAIN:TEST, two .csv, .tsv or .jsonl of text and label; give it again for more"
    )
    shots: tuple[int, ...] = _field((1, 2, 4, 8), "classification: examples of each class in the prompt")
    labels: tuple[str, ...] = _field((), "classification: semantic, anonymous; default: both")
    tasks: tuple[str, ...] = _field(
        ("persistent_13", "contextual_6"), "harness: tasks of lm_eval, or the paper's lists persistent_13, contextual_6"
    )
    task_folder: str = _field("", "harness: folder with further tasks (YAML)", path=True)
    limit: int = _field(0, "harness: examples of each task at most; 0: all")
    fewshot: int = _field(-1, "harness: examples in the prompt; -1: as each task says")
    run_task_code: bool = _field(False, "harness: let the YAML of --task_folder run Python code, on this machine")
    run_code: bool = _field(False, "harness: let tasks run, on this machine, code that the model wrote")

    def __post_init__(self) -> None:
        if not self.suite:
            raise ValueError(f"--suite is not set; legal: one or several of {', '.join(SUITES)}")
        for name in self.suite:
            if name not in SUITES:
                raise ValueError(f"--suite has {name!r}; legal: {', '.join(SUITES)}")
        for field, least in (("lengths", 2), ("shots", 1)):
            if bad := [value for value in getattr(self, field) if value < least]:
                raise ValueError(f"--{field} has {bad[0]}; legal: integers of {least} or more")
        for field, least in (("count", 1), ("depths", 2), ("limit", 0), ("fewshot", -1)):
            if getattr(self, field) < least:
                raise ValueError(f"--{field} is {getattr(self, field)}; legal: {least} or more")
        self._check_installed()
        for suite, fields in _OF_SUITE.items():
            if suite in self.suite and not (suite == "classification" and self.texts):
                self._check_data(suite, fields)
        for field in (*_FILES, *_FOLDERS):
            self._check_there(field)
        for text in self.texts:
            text_files(text)

    def _check_installed(self) -> None:
        modules = {"figures": "matplotlib"} | ({"the harness suite": "lm_eval"} if "harness" in self.suite else {})
        for what, module in modules.items():
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"{what} needs {module}, which is not installed: pip install 'mosaics_jax[eval]'")

    def _check_data(self, suite: str, fields: Sequence[str]) -> None:
        if not any(getattr(self, field) for field in fields):
            where = "; ".join(f"--{field}: {SOURCES[field]}" for field in fields)
            raise ValueError(f"the suite {suite!r} has no data; give one or more of {where}")

    def _check_there(self, field: str) -> None:
        """A file, or a folder, whichever is read."""
        path = pathlib.Path(getattr(self, field))
        if getattr(self, field) and not (path.is_file() if field in _FILES else path.is_dir()):
            state = "no file" if field in _FILES else "no folder"
            what = f"; it is {SOURCES[field]}" if field in SOURCES else ""
            raise ValueError(f"--{field} is {str(path)!r}, which is {state if path.exists() else 'not there'}{what}")


def text_files(text: str) -> tuple[str, pathlib.Path, pathlib.Path]:
    """Name and files of NAME=TRAIN:TEST. ValueError for another form, and where two files are not there.

    A path may hold colons: the one is meant that has a file on each side.
    """
    name, _, files = text.partition("=")
    halves = [(files[:at], files[at + 1 :]) for at in range(len(files)) if files[at] == ":"]
    pairs = [(paths.absolute(train), paths.absolute(test)) for train, test in halves]
    legal = "legal: NAME=TRAIN:TEST, two .csv, .tsv or .jsonl files"
    if not name or not pairs:
        raise ValueError(f"--texts has {text!r}; {legal}")
    for train, test in pairs:
        if train.is_file() and test.is_file():
            return name, train, test
    raise ValueError(f"--texts has {text!r}, of whose files one or both are not there; {legal}")
