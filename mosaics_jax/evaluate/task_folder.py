"""That the tasks of a folder are data: YAML which names files and templates, and no code.

lm_eval imports what a task tells it to, by `!function`, by a metric that it has to look for, and by more. So a task
may say what stands here, and nothing else; what else tasks can say needs --run_task_code.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import lm_eval.api.metrics  # noqa: F401, it fills the registries
import yaml
from lm_eval.api.registry import aggregation_registry, metric_registry
from lm_eval.filters import filter_registry

_TEXTS = {"doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "target_delimiter", "fewshot_delimiter"}
_LEGAL = _TEXTS | {
    "task", "task_alias", "tag", "include", "dataset_path", "dataset_name", "dataset_kwargs", "training_split",
    "validation_split", "test_split", "fewshot_split", "description", "fewshot_config", "num_fewshot", "metric_list",
    "output_type", "generation_kwargs", "repeats", "filter_list", "should_decontaminate",
    "doc_to_decontamination_query", "metadata",
}  # fmt: skip
_LEGAL_GROUP = {"group", "group_alias", "task", "tag", "aggregate_metric_list", "include", "metadata"}
_LEGAL_FEWSHOT = _TEXTS | {"sampler", "split", "fewshot_indices", "samples"}
_REMEDY = "a folder whose code you trust needs --run_task_code"


def check(folder: pathlib.Path) -> None:
    """Raises ValueError, naming the file, where reading a task of the folder could run code."""
    root = folder.resolve()
    for path in sorted(root.rglob("*.yaml")):
        _check_file(path, root, ())


def _check_file(path: pathlib.Path, root: pathlib.Path, within: tuple[pathlib.Path, ...]) -> None:
    """One file, and those that it includes; `within` are those that include it."""
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{str(path)!r} lies outside of --task_folder; {_REMEDY}")
    if path in within:
        raise ValueError(f"{str(path)!r} includes itself")
    try:
        body = yaml.load(path.read_bytes(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no plain YAML: {' '.join(str(error).split())}; {_REMEDY}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{str(path)!r} holds a {type(body).__name__}; legal: fields of a task")
    try:
        _check_fields(body)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}; {_REMEDY}") from error
    included = body.get("include", [])
    for name in included if isinstance(included, list) else [included]:
        _check_file((path.parent / str(name)).resolve(), root, (*within, path))


def _check_fields(body: Mapping[str, Any]) -> None:
    group = "group" in body
    _check_names(body, _LEGAL_GROUP if group else _LEGAL, "a task")
    members = body.get("task", [])
    if group and not all(isinstance(one, str) for one in (members if isinstance(members, list) else [members])):
        raise ValueError("a group changes its tasks; legal: names of tasks")
    if str(body.get("dataset_path", "")).endswith(".py"):
        raise ValueError(f"dataset_path is {body['dataset_path']!r}; legal: data, such as json with data_files")
    _check_names(_mapping(body, "fewshot_config"), _LEGAL_FEWSHOT, "fewshot_config")
    for metric in _mappings(body, "metric_list"):
        if "hf_evaluate" in metric:
            raise ValueError("a metric has hf_evaluate, which runs what it finds; legal: lm_eval's own metrics")
        _check_registered(metric.get("metric"), metric_registry, "metric")
        _check_registered(metric.get("aggregation", "mean"), aggregation_registry, "aggregation")
    for pipeline in _mappings(body, "filter_list"):
        for one in _mappings(pipeline, "filter"):
            if one.get("function") == "custom":
                raise ValueError("the filter 'custom' takes a function")
            _check_registered(one.get("function"), filter_registry, "filter")


def _check_names(body: Mapping[str, Any], legal: set[str], what: str) -> None:
    if unknown := sorted(str(name) for name in body if name not in legal):
        raise ValueError(f"{what} has the field {unknown[0]!r}; legal without that: {', '.join(sorted(legal))}")


def _check_registered(name: Any, registry: Any, what: str) -> None:
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"the {what} {name!r} is not lm_eval's own")


def _mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = body.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{name} is a {type(found).__name__}; legal: fields")
    return found


def _mappings(body: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = body.get(name) or []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{name} is {found!r}; legal: a list of fields")
    return found
