"""One evaluation of a run's newest checkpoint: how suites are made of the settings, run, written and compared."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from mosaics_jax import lock, place, processes, whole
from mosaics_jax.config import Config, MeshConfig
from mosaics_jax.data.corpus import Manifest, document_ends
from mosaics_jax.data.source import Tokens
from mosaics_jax.evaluate import figures, given, labelled, report, retrieval, suite
from mosaics_jax.evaluate.classification import LABELS, Classification
from mosaics_jax.evaluate.model import RunModel
from mosaics_jax.evaluate.needle import VARIANTS, Needle
from mosaics_jax.evaluate.perplexity import Perplexity
from mosaics_jax.evaluate.settings import Settings, text_files

READERS: Mapping[str, Callable[[pathlib.Path], retrieval.Pool]] = {
    "squad": retrieval.read_squad,
    "hotpot": retrieval.read_hotpot,
}
_TASKS = {"banking77": labelled.banking77, "goemotions": labelled.goemotions, "tacred": labelled.tacred}
_HAYSTACK_TOKENS = 200_000


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other evaluations from writing below `workdir`/evaluations meanwhile. All processes call this.

    Raises ValueError where another one does, or where one of the two is the place of something else, and OSError.
    """
    folder = workdir / "evaluations"
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            place.check(workdir, (place.RUN,), "--workdir")
            place.check(folder, (place.EMPTY, place.EVALUATIONS), "the folder of evaluations")
            folder.mkdir(exist_ok=True)
            stack.enter_context(lock.hold(folder / "lock", str(folder)))
            for left in folder.rglob("*.partial"):  # of a life that was killed as it wrote
                left.unlink()

        processes.first(hold, "lock of the evaluations")
        yield


def evaluate(
    model: RunModel, workdir: pathlib.Path, settings: Settings, variant: str, command: str, compare: str = ""
) -> Iterator[str]:
    """Runs the suites in turn; yields the markdown of each, once its files are in `workdir`/evaluations/<step>/.

    Args:
      variant: the folder below that, of a model that was changed (no long-term memory, another delay); "" for none.
      command: what was typed, which stands in every file.
      compare: another workdir, whose newest evaluation is drawn into the same figures.
    """
    directory = workdir / "evaluations" / str(model.step) / variant
    others = {name: _figures_of(pathlib.Path(compare), name) for name in settings.suite} if compare else {}
    names = (f"{workdir.name} {variant}".strip(), pathlib.Path(compare).name)
    for name in settings.suite:
        found = _run(name, model, settings, directory)
        trained = f"{model.config.run.steps} steps of {model.config.data.batch} x {model.config.data.context} tokens"
        about = {
            "model": f"{model.model_config.architecture}, memories {', '.join(model.model_config.memories)}",
            "checkpoint": f"step {model.step} of {trained}",
            "delay": model.model_config.delay_min,
            "command": f"`{command}`",
        }
        processes.first(functools.partial(_save, found, directory, name, about, others.get(name, {}), names), name)
        if jax.process_index() == 0:
            yield report.markdown(found, name, about)


def _save(
    found: report.Report, directory: pathlib.Path, name: str, about: Mapping[str, Any], others: Mapping[str, Any],
    names: tuple[str, str],
) -> None:  # fmt: skip
    """Writes the report, and those of its figures that another run has too with both of them, by these names."""
    report.save(found, directory, name, about)
    for figure in found.figures:
        if figure.name in others:
            both = [{**figure.data, "model": names[0]}, {**others[figure.name], "model": names[1]}]
            whole.write(directory / f"{figure.name}_compared.json", (json.dumps(both, indent=1) + "\n").encode())
            figures.draw(both[0], directory / f"{figure.name}_compared.png", both[1])


def _run(name: str, model: RunModel, settings: Settings, directory: pathlib.Path) -> report.Report:
    if name == "harness":
        from mosaics_jax.evaluate import harness

        return harness.run(
            model, settings.tasks, directory, limit=settings.limit or None,
            folder=pathlib.Path(settings.task_folder) if settings.task_folder else None,
            fewshot=None if settings.fewshot < 0 else settings.fewshot,
            run_code=settings.run_code, run_task_code=settings.run_task_code,
        )  # fmt: skip
    return suite.run(_make(name, model, settings), model, directory)


def _make(name: str, model: RunModel, settings: Settings) -> suite.Suite:
    context = model.config.data.context
    lengths = settings.lengths or tuple(context * times for times in (1, 2, 4, 8))
    if name == "perplexity":
        manifest = _manifest(model, settings)
        return Perplexity(manifest, lengths, count=settings.count, seed=settings.seed, context=context)
    if name == "retrieval":
        pools = {
            field: read(pathlib.Path(getattr(settings, field)))
            for field, read in READERS.items()
            if getattr(settings, field)
        }
        return retrieval.Retrieval(
            pools, model.tokenizer, lengths, count=settings.count, seed=settings.seed, context=context
        )
    if name == "needle":
        return Needle(
            model.tokenizer, lengths, _haystack(model, settings), count=settings.count, depths=settings.depths,
            seed=settings.seed, variants=settings.variants or tuple(VARIANTS),
        )  # fmt: skip
    tasks = [make(pathlib.Path(getattr(settings, field))) for field, make in _TASKS.items() if getattr(settings, field)]
    for text in settings.texts:
        tasks.append(labelled.any_task(*text_files(text)))
    return Classification(
        tasks,
        model.tokenizer,
        settings.shots,
        count=settings.count,
        seed=settings.seed,
        labels=settings.labels or LABELS,
    )


def _manifest(model: RunModel, settings: Settings) -> Manifest:
    """The corpus that was asked for, or the run's own; its ids must mean what the model was trained on."""
    config: Config = model.config
    if not settings.corpus and config.data.mixture:
        names = ", ".join(f"{config.data.path}/{name}" for name in config.data.mixture)
        raise ValueError(f"--corpus is not set, and the run read several; legal: one of them ({names}), or another")
    try:
        manifest = Manifest.load(settings.corpus or config.data.path)
    except ValueError as error:
        raise ValueError(f"{error}; --corpus names the corpus whose held-out documents are read") from error
    if manifest.tokenizer_fingerprint != model.tokenizer.fingerprint:
        raise ValueError(
            f"the corpus {str(manifest.directory)!r} was made with another tokenizer than the run's; prepare it with "
            "--tokenizer=WORKDIR/tokenizer"
        )
    return manifest


def _haystack(model: RunModel, settings: Settings) -> str:
    if settings.haystack:
        return given.text(pathlib.Path(settings.haystack))
    manifest = _manifest(model, settings)
    tokens = Tokens(manifest, "valid")
    ends = document_ends(manifest, "valid")
    count = int(min(_HAYSTACK_TOKENS, ends[-1])) if len(ends) else 0
    return model.tokenizer.decode(tokens.read(0, count))


def variant_name(delay: int | None, long_term: bool) -> str:
    parts = [] if long_term else ["without_long_term"]
    return "_".join(parts if delay is None else [*parts, f"delay_{delay}"])


def _figures_of(workdir: pathlib.Path, name: str) -> Mapping[str, Any]:
    """The figures of another run's newest evaluation with this suite, by name. ValueError where one is damaged."""
    steps = [path for path in (workdir / "evaluations").glob(f"*/{name}.json") if path.parent.name.isdecimal()]
    if not steps:
        raise ValueError(
            f"--compare is {str(workdir)!r}, which has no evaluation with the suite {name!r}; make it with "
            f"python -m launch.evaluate --workdir={workdir} --suite={name}"
        )
    newest = max(steps, key=lambda path: int(path.parent.name))
    found: dict[str, Any] = {}
    path = newest
    try:
        for one in given.value(given.text(newest), "it")["figures"]:
            path = newest.with_name(f"{given.string(one)}.json")
            if path.parent != newest.parent:
                raise ValueError("it lies in another folder")
            found[one] = given.value(given.text(path), "it")
            figures.check(found[one])
    except given.WRONG_FORM as error:
        raise ValueError(f"--compare: {str(path)!r} is damaged, evaluate that run again ({error})") from error
    return found


def mesh(fsdp: int, tensor: int) -> MeshConfig:
    """All devices, those that the other axes leave being replicas."""
    return MeshConfig(fsdp=fsdp, tensor=tensor)
