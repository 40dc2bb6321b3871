"""Where `prepare` works: a directory beside the one it makes, held by one run, found again by the next."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from mosaics_jax import lock, place, whole
from mosaics_jax.data import files
from mosaics_jax.data.corpus import MANIFEST, write_sealed
from mosaics_jax.data.splits import Rule
from mosaics_jax.data.stage import Reading, Stage

SETTINGS = "settings.json"
_BEFORE_SETTINGS = re.compile(r"lock.*|settings\.json\.[0-9]+\.partial")
_OWN = re.compile(
    rf"{_BEFORE_SETTINGS.pattern}|stages|tokenizer|((settings|manifest)\.json|(files|skipped)\.jsonl"
    r"|(train|valid)-[0-9]{5,}(\.(tokens|crc32|documents|json))?)(\.[0-9]+\.partial)?"
)


class UnusableError(ValueError):
    """What is done is of no use to any other run."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the result, besides the input."""

    tokenizer: str = "bytes"
    valid_fraction: float = 0.02
    shard_tokens: int = 2**27
    max_bytes: int | None = None
    text_field: str = "text"
    record_format: str = "text"
    shuffle_seed: int | None = 0

    @property
    def reading(self) -> Reading:
        return Reading(self.text_field, self.record_format, Rule.of_share(self.valid_fraction))


@dataclasses.dataclass(frozen=True)
class Progress:
    """What `prepare` says while it works: `done` of `total` (0: not known) in `unit` (B, tok, s), and tokens so far."""

    pass_: str
    unit: str
    done: int
    total: int
    tokens: int


@contextlib.contextmanager
def workplace(target: pathlib.Path, settings: Settings) -> Iterator[pathlib.Path]:
    """The directory beside `target` where it is made; held by this run alone, and kept only if some work is done."""
    partial = target.parent / f"{target.name}.partial"
    _check_free(target)
    _check_own(partial)
    with contextlib.ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.hold(partial / "lock", repr(str(target))))
        except lock.HeldError:
            raise
        except (OSError, ValueError) as error:  # a ValueError for what can be no path
            reason = files.meaning(error) if isinstance(error, OSError) else error
            raise ValueError(f"output {str(target)!r} cannot be made ({reason}); name another directory") from error
        _check_free(target)
        _check_settings(partial, target, settings)
        (partial / "stages").mkdir(exist_ok=True)
        try:
            yield partial
        except UnusableError:
            shutil.rmtree(partial)
            raise
        finally:
            stages = map(Stage.find, (partial / "stages").glob("*.stage"))
            if partial.exists() and not any(stage and any(stage.documents.values()) for stage in stages):
                shutil.rmtree(partial)


def _check_free(target: pathlib.Path) -> None:
    if os.path.exists(target / MANIFEST):  # False also for what can be no path
        raise ValueError(f"output {str(target)!r} already holds a prepared corpus; remove it or name another directory")
    if os.path.islink(target):
        raise ValueError(f"output {str(target)!r} is a link; name what it leads to, or another directory")
    with _looking_at(target):
        place.check(target, (place.EMPTY,), "output")
        if os.path.exists(target) and any(target.iterdir()):  # a rename takes an empty one's place alone
            raise ValueError(f"output {str(target)!r} exists and is not an empty directory; name another directory")


def _check_own(partial: pathlib.Path) -> None:
    """ValueError where something else than the work of `prepare` lies in its workplace: all in it may be removed."""
    if not os.path.lexists(partial):
        return
    if os.path.islink(partial) or not partial.is_dir():
        raise ValueError(f"{str(partial)!r}, where `prepare` works, is no folder; move it away, or name another output")
    with _looking_at(partial):
        names = sorted(path.name for path in partial.iterdir())
    foreign = [name for name in names if not _OWN.fullmatch(name)]
    # Without its settings nothing was begun yet, and only these can be there.
    if SETTINGS not in names:
        foreign += [name for name in names if not _BEFORE_SETTINGS.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"{str(partial)!r}, where `prepare` works, holds {foreign[0]!r}, which is not its own; nothing was "
            "written. Move it away, or name another output"
        )


@contextlib.contextmanager
def _looking_at(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"output: {str(folder)!r} cannot be looked at ({files.meaning(error)})") from error


def _check_settings(partial: pathlib.Path, target: pathlib.Path, settings: Settings) -> None:
    path = partial / SETTINGS
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    if os.path.lexists(path):
        try:
            before = whole.read_json(path)
        except (OSError, ValueError, RecursionError) as error:
            reason = files.meaning(error) if isinstance(error, OSError) else error
            raise ValueError(
                f"{str(path)!r}, of an unfinished run, cannot be read ({reason}); remove its folder to begin anew"
            ) from error
        changed = [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"{str(partial)!r} holds an unfinished run with other settings ({'; '.join(changed)}); take the old "
                f"settings to finish it, remove it to start anew, or name another output than {target.name!r}"
            )
    write_sealed(path, now)
