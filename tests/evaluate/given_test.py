"""Whatever lies where a file of data is read, it is one line: of the file, or of the disk."""

import json
import pathlib
import re

import pytest
import suite_files as made

from mosaics_jax.evaluate import figures, given, labelled, report, retrieval
from mosaics_jax.evaluate.run import _figures_of
from mosaics_jax.evaluate.settings import Settings

CONTENT = {
    "empty": b"",
    "binary": bytes(range(256)) * 8,
    "latin-1": '{"text": "\xe9", "label": "b"}\n'.encode("latin-1"),
    "deep list": b"[" * 100_000,
    "deep object": b'{"data":' * 100_000,
    "number": b"3",
    "null": b"null",
    "list of numbers": b"[1, 2]",
    "half": b'{"data": [',
    "NUL": b"text,category\n\0,\0",
    "wide field": b'text,label,category,token\n"' + b"a" * 200_000 + b'",b,b,b',
    "short row": b"text,label,category\na\n",
    "lone surrogate": b'{"text": "\\ud800"}',
    "long number": b'{"text": ' + b"9" * 5000 + b"}",
}
LEGAL = {("train.csv", "NUL"), *(("labels.txt", lines) for lines in ("NUL", "wide field", "short row"))}
READERS = {
    "squad": retrieval.read_squad,
    "hotpot": retrieval.read_hotpot,
    "any.csv": lambda path: labelled.any_task("own", path, path),
    "any.tsv": lambda path: labelled.any_task("own", path, path),
    "any.jsonl": lambda path: labelled.any_task("own", path, path),
    "train.csv": lambda path: labelled.banking77(path.parent),
    "train.json": lambda path: labelled.tacred(path.parent),
    "train.tsv": lambda path: labelled.goemotions(path.parent),
    "labels.txt": lambda path: labelled.goemotions(path.parent),
}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """All data sets, whole, in one folder."""
    for make in (made.banking, made.emotions, made.tacred):
        make(tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("name", READERS)
def test_a_file_is_read_or_refused_in_one_line(name: str, content: str, folder: pathlib.Path) -> None:
    (folder / name).write_bytes(CONTENT[content])
    if (name, content) in LEGAL:
        READERS[name](folder / name)
        return
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        READERS[name](folder / name)


@pytest.mark.parametrize("name", READERS)
def test_a_folder_in_place_of_a_file_is_one_line(name: str, folder: pathlib.Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(ValueError, match="Is a directory"):
        READERS[name](folder / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(id=3), lambda q: q.update(question=None), lambda q: q.update(answers=3),
        lambda q: q.update(answers=[{"text": 7}]), lambda q: q.update(answers=[["text"]]), lambda q: q.pop("answers"),
    ],
)  # fmt: skip
def test_squad_of_other_types(change, tmp_path: pathlib.Path) -> None:
    body = json.loads(made.squad(tmp_path / "x.json").read_text())
    change(body["data"][0]["paragraphs"][0]["qas"][0])
    (tmp_path / "x.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"x.json' is not in the format of SQuAD: "):
        retrieval.read_squad(tmp_path / "x.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(supporting_facts=[]), lambda q: q.update(supporting_facts=[["nowhere", 0]]),
        lambda q: q.update(answer=["a"]), lambda q: q.update(context=[["title", [1]]]), lambda q: q.update(_id=None),
        lambda q: q.update(context=[[["title"], ["a"]]]), lambda q: q.update(context=3),
    ],
)  # fmt: skip
def test_hotpot_of_other_types(change, tmp_path: pathlib.Path) -> None:
    body = json.loads(made.hotpot(tmp_path / "x.json").read_text())
    change(body[0])
    (tmp_path / "x.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"x.json' is not in the format of HotpotQA"):
        retrieval.read_hotpot(tmp_path / "x.json")


def test_an_empty_reference_is_none(tmp_path: pathlib.Path) -> None:
    """Every text holds it, so every answer would be right."""
    body = json.loads(made.hotpot(tmp_path / "x.json").read_text())
    body[0]["answer"] = ""
    (tmp_path / "x.json").write_text(json.dumps(body))
    assert len(retrieval.read_hotpot(tmp_path / "x.json").questions) == len(body) - 1


@pytest.mark.parametrize("field", ["squad", "hotpot", "haystack"])
def test_a_flag_for_a_file_takes_no_folder(field: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=f"--{field} is '.*', which is no file"):
        Settings(suite=("needle",), **{field: str(tmp_path)})


@pytest.mark.parametrize("field", ["banking77", "goemotions", "tacred", "task_folder"])
def test_a_flag_for_a_folder_takes_no_file(field: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"--{field} is '.*', which is no folder"):
        Settings(suite=("needle",), **{field: str(tmp_path / "file")})


def test_text_names_its_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"x.txt' cannot be read: it is not text in UTF-8"):
        given.text(tmp_path / "x.txt")


# --- another run's figures ---

CURVE = report.lines("T", "x", "y", [report.curve("a", [1, 2], [[0.0, 1.0], [1.0]])], marks={"1": "m"})
MAP = report.heatmap("M", "x", "y", [1, 2], ["0%"], [[0.5, None]])


def _evaluated(workdir: pathlib.Path, step: str, title: str = "T") -> pathlib.Path:
    folder = workdir / "evaluations" / step
    folder.mkdir(parents=True)
    for name, data in (("curve", CURVE), ("map", MAP)):
        (folder / f"{name}.json").write_text(json.dumps({**data, "title": title}))
    (folder / "needle.json").write_text(json.dumps({"figures": ["curve", "map"]}))
    return folder


def test_the_newest_evaluation_is_compared_whatever_else_lies_there(tmp_path: pathlib.Path) -> None:
    for step in ("9", "10", "notes", "²", "1e3", "-1"):
        _evaluated(tmp_path, step, title=step)
    assert {data["title"] for data in _figures_of(tmp_path, "needle").values()} == {"10"}


@pytest.mark.parametrize("content", ["", "3", "null", "[" * 100_000, "{", '{"figures": 3}', '{"figures": ["gone"]}',
                                     '{"figures": [["curve"]]}', '{"figures": ["../../curve"]}'])  # fmt: skip
def test_a_damaged_evaluation_is_one_line(content: str, tmp_path: pathlib.Path) -> None:
    (_evaluated(tmp_path, "4") / "needle.json").write_text(content)
    (tmp_path / "curve.json").write_text(json.dumps(CURVE))
    with pytest.raises(ValueError, match=r"--compare: '.*\.json' is damaged, evaluate that run again"):
        _figures_of(tmp_path, "needle")


@pytest.mark.parametrize("name", ["needle", "curve"])
def test_a_folder_in_place_of_an_evaluation_is_one_line(name: str, tmp_path: pathlib.Path) -> None:
    folder = _evaluated(tmp_path, "4")
    (folder / f"{name}.json").unlink()
    (folder / f"{name}.json").mkdir()
    with pytest.raises(ValueError, match=r"--compare: .* is damaged"):
        _figures_of(tmp_path, "needle")


@pytest.mark.filterwarnings("ignore")  # matplotlib's, of an empty legend
@pytest.mark.parametrize("data", [CURVE, MAP], ids=["lines", "map"])
def test_every_part_of_a_figure_is_checked_before_it_is_drawn(data: dict, tmp_path: pathlib.Path) -> None:
    figures.check(json.loads(json.dumps(data)))

    def spoilt(found):
        """`found` with each of its parts, in turn, replaced or gone."""
        parts = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        for key, part in parts:
            for other in (None, [], {}, "text", 3, [[[]]]):
                yield {**found, key: other} if isinstance(found, dict) else [*found[:key], other, *found[key + 1 :]]
            for inner in spoilt(part):
                yield {**found, key: inner} if isinstance(found, dict) else [*found[:key], inner, *found[key + 1 :]]

    refused = 0
    for one in spoilt(json.loads(json.dumps(data))):
        try:
            figures.check(one)
        except ValueError:
            refused += 1
        else:
            figures.draw(one, tmp_path / "x.png")
    assert refused > 20
