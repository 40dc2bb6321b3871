"""Made-up episodes: what stands before an answer decides it, and a reader that knows how gets all of it right."""

import random
import re

import pytest

from configs import claims
from mosaics_jax.claims.episodes import TASKS, Episode
from mosaics_jax.config import Config
from mosaics_jax.nn.model import parameter_count


def _recall(before: str) -> str:
    pairs = before.split("\n")[0]
    return dict(zip(pairs[::2], pairs[1::2], strict=True))[before[-1]]


def _facts(before: str) -> str:
    attribute, name = re.findall(r"Question: the (\w+) of (\w+) is $", before)[0]
    return re.findall(rf"^The {attribute} of {name} is (\w+)\.$", before, re.M)[0]


def _classification(before: str) -> str:
    """The class whose examples so far agree with this one in the most letters, on average."""
    *lines, now = before.split("\n")
    agreeing: dict[str, list[int]] = {}
    for line in lines:
        agreeing.setdefault(line[-1], []).append(sum(a == b for a, b in zip(line[:-1], now, strict=True)))
    return max(agreeing, key=lambda label: sum(agreeing[label]) / len(agreeing[label]))


READERS = {"recall": _recall, "facts": _facts, "long_facts": _facts, "classification": _classification}


def _right(name: str, episode: Episode) -> dict[int, list[bool]]:
    found: dict[int, list[bool]] = {}
    for start, stop, x in episode.answers:
        found.setdefault(x, []).append(READERS[name](episode.text[:start]) == episode.text[start:stop])
    return found


@pytest.mark.parametrize("name", TASKS)
def test_what_stands_before_an_answer_decides_it(name: str) -> None:
    task, draw = TASKS[name], random.Random(0)
    for x in task.asked:
        for _ in range(20):
            episode = task.question(draw, x)
            assert episode.text.isascii()
            assert max(answer.x for answer in episode.answers) == x
            if name != "classification":
                assert all(right for of in _right(name, episode).values() for right in of), episode.text


def test_more_shots_tell_more_and_never_all_at_once() -> None:
    task, draw = TASKS["classification"], random.Random(1)
    right: dict[int, list[bool]] = {}
    for _ in range(100):
        for x, of in _right("classification", task.question(draw, 16)).items():
            right.setdefault(x, []).extend(of)
    share = {x: sum(of) / len(of) for x, of in right.items()}
    assert list(share) == [shots for shots in task.scored if shots <= 16]
    assert task.chance + 0.3 < share[1] < 0.9
    assert share[16] > share[1] + 0.05
    assert share[16] > 0.9


@pytest.mark.parametrize("name", TASKS)
def test_bindings_are_drawn_anew_and_by_the_seed(name: str) -> None:
    task = TASKS[name]
    first, again, other = (task.training(random.Random(seed)).text for seed in (0, 0, 1))
    assert first == again != other
    drawn = {max(answer.x for answer in task.training(random.Random(seed)).answers) for seed in range(200)}
    assert max(drawn) == task.trained <= max(task.asked)


def _config(variant: str, study: str = "recall") -> Config:
    return Config.from_config_dict(claims.get_config(f"cpu,{study},{variant}"))


def test_variants_differ_from_the_mosaic_as_they_say_and_in_nothing_else() -> None:
    mosaic = _config("mosaic").to_dict()
    for name, changes in claims.VARIANTS.items():
        found = _config(name).to_dict()
        assert {field for field in found["model"] if found["model"][field] != mosaic["model"][field]} == set(changes)
        assert {section: found[section] for section in found if section != "model"} == {
            section: mosaic[section] for section in mosaic if section != "model"
        }


@pytest.mark.parametrize("budget", claims.RATES)
def test_an_extension_reads_longer_rows(budget: str) -> None:
    """Its checkpoints are after 1, 2, 4, ... mini-batches, and its model is the one that it goes on from."""
    short, long = (
        Config.from_config_dict(claims.get_config(f"{budget},{study},mosaic")) for study in ("language", "extension")
    )
    assert long.data.context == 4 * short.data.context
    assert long.checkpoint.steps == (1, 2, 4, 8)
    assert long.run.steps == 16
    assert long.model == short.model


@pytest.mark.parametrize("budget", claims.RATES)
def test_as_many_weights_are_as_many(budget: str) -> None:
    count = {
        name: parameter_count(Config.from_config_dict(claims.get_config(f"{budget},recall,{name}")).model)
        for name in ("mosaic", "transformer", "as_many_weights")
    }
    assert abs(count["as_many_weights"] / count["transformer"] - 1) < 0.005 < count["mosaic"] / count["transformer"] - 1


@pytest.mark.parametrize(
    "which", ["cpu,recall", "cpu,recall,mosaics", "tpu,recall,mosaic", "cpu,recall,mosaic,more", ""]
)
def test_a_recipe_that_is_not_there_is_named(which: str) -> None:
    with pytest.raises(
        ValueError, match=rf"no recipe '{which}'; legal: one each of cpu, gpu; language, classification"
    ):
        claims.get_config(which)
