"""Scripted models get the scores they must; prompts are golden files; a killed evaluation goes on."""

import json
import math
import pathlib
import random
import re

import numpy as np
import oracles
import pytest
import suite_files as made
from oracles import TOKENIZER, Scripted

from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.prepare import prepare
from mosaics_jax.evaluate import labelled, report, retrieval, suite
from mosaics_jax.evaluate.answers import Answers
from mosaics_jax.evaluate.classification import PROMPTS, Classification
from mosaics_jax.evaluate.fit import most_that_fit
from mosaics_jax.evaluate.needle import VARIANTS, Needle
from mosaics_jax.evaluate.perplexity import Perplexity

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
WRONG = Scripted(lambda prompt: "~~~")
TEXT = "The sea was calm. Nobody spoke! Why should they? A gull went by."


def _golden(name: str, text: str) -> None:
    """`text` is what the golden file holds; delete the file to write it anew."""
    path = GOLDEN / f"{name}.txt"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path} was missing; it is written now, look at it")
    assert text == path.read_text(encoding="utf-8")


def _prompts(of: suite.Suite, keys: int) -> str:
    """Some of the prompts of a suite, from its beginning to its end."""
    examples = list(of.examples())
    assert len(examples) == len(of)
    assert len({example.key for example in examples}) == len(examples)
    chosen = examples[:: max(1, len(examples) // keys)]
    return "\n".join(f"=== {e.key} ({e.length})\n{TOKENIZER.decode(e.payload[0])}|" for e in chosen) + "\n"


def _cells(of: report.Report, table: int = 0) -> list:
    return [list(row) for row in of.tables[table].rows]


def _numbers(of: report.Report, table: int = 0) -> set[float]:
    """All percentages of a table, without their errors and bold face."""
    found = set()
    for row in of.tables[table].rows:
        found |= {float(cell.strip("*").split(" ± ")[0]) for cell in row if re.match(r"^\**\d", str(cell))}
    return found


@pytest.fixture
def pools(tmp_path):
    return {
        "squad": retrieval.read_squad(made.squad(tmp_path / "squad.json")),
        "hotpot": retrieval.read_hotpot(made.hotpot(tmp_path / "hotpot.json")),
    }


# --- retrieval ---


def _reader(prompt: str) -> str:
    """Answers from the documents in the prompt alone."""
    name = re.findall(r"Question: Which colour is the boat of (?:the friend of )?(\w+)\? Answer:$", prompt)[0]
    if friend := re.search(rf"{name} knows (\w+)\.", prompt):
        name = friend[1]
    found = re.search(rf"(?:boat of {name} is|{name} has a boat that is) (\w+)", prompt)
    return f" It is {found[1]}." if found else " I do not know."


def test_retrieval_oracles(pools, tmp_path):
    made_suite = retrieval.Retrieval(pools, TOKENIZER, [700, 1200], count=4)
    right = suite.run(made_suite, Scripted(_reader), tmp_path / "right")
    assert _numbers(right) == {100.0}
    assert _numbers(suite.run(made_suite, WRONG, tmp_path / "wrong")) == {0.0}
    for task, length, count, documents, tokens in _cells(right, 1):
        assert count == 4
        assert 0.6 * length < tokens + 32 <= length, (task, "the prompt fills its length and no more")
        assert documents >= 2


def test_retrieval_prompts(pools):
    _golden("prompts_retrieval", _prompts(retrieval.Retrieval(pools, TOKENIZER, [700], count=2), 4))


def test_gold_documents_lie_anywhere_and_longer_prompts_hold_more(pools):
    examples = list(retrieval.Retrieval(pools, TOKENIZER, [700, 1200], count=4).examples())
    depths = {round(e.payload[1]["depth"], 1) for e in examples}
    assert len(depths) > 3
    documents = {length: [] for length in (700, 1200)}
    for example in examples:
        documents[example.payload[1]["length"]].append(example.payload[1]["documents"])
    assert sum(documents[700]) < sum(documents[1200])
    again = retrieval.Retrieval(pools, TOKENIZER, [1200], count=4)
    assert {e.key for e in again.examples()} < {e.key for e in examples}, "a length more changes no other's prompts"
    other = retrieval.Retrieval(pools, TOKENIZER, [1200], count=4, seed=1)
    assert {e.key for e in other.examples()} != {e.key for e in again.examples()}


def test_any_reference_counts_case_aside():
    assert retrieval.any_reference("in PARIS, France", ["London", "paris"]) == 1
    assert retrieval.any_reference("Pari s", ["London", "paris"]) == 0
    assert retrieval.any_reference("", ["a"]) == 0


def test_a_question_that_does_not_fit_is_left_out_and_counted(pools, tmp_path):
    with pytest.raises(ValueError, match="no question of squad fits --lengths=100"):
        retrieval.Retrieval(pools, TOKENIZER, [100], count=2)
    least = min(len(e.payload[0]) for e in retrieval.Retrieval(pools, TOKENIZER, [700], count=6).examples())
    assert least > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"x.json' is not JSON"),
        ('{"data": [{"paragraphs": [{}]}]}', "KeyError 'context'"),
        ('{"data": []}', "holds no question"),
    ],
)
def test_a_file_that_is_not_squad(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        retrieval.read_squad(tmp_path / "x.json")


# --- needle ---


def _finder(prompt: str) -> str:
    asked = re.findall(r"What (?:is|are all) the special magic \w+ for (.*) mentioned in the provided text\?", prompt)[
        0
    ]
    keys = re.split(r", and |, ", asked)
    return " " + ", ".join(v for key in keys for v in re.findall(rf"for {re.escape(key)} is: ([\w-]+)\.", prompt))


def test_needle_oracles(tmp_path):
    made_suite = Needle(TOKENIZER, [1300, 2000], TEXT, count=4, depths=3)
    right = suite.run(made_suite, Scripted(lambda prompt: _finder(prompt)[:128]), tmp_path / "right")
    short = Needle(TOKENIZER, [1300], TEXT, count=4, depths=3, variants=["multivalue"])
    first = suite.run(short, Scripted(lambda prompt: _finder(prompt).split(",")[0]), tmp_path / "first")
    assert _numbers(right) == {100.0}
    assert _numbers(first) == {25.0}, "one of four values"
    wrong = suite.run(made_suite, WRONG, tmp_path / "wrong")
    assert _numbers(wrong) == {0.0}
    assert [figure.name for figure in right.figures] == ["needle_all", *(f"needle_{name}" for name in VARIANTS)]
    cells = right.figures[0].data["values"]
    assert {value for row in cells for value in row} <= {1.0, None}
    assert right.figures[0].data["rows"] == ["0%", "50%", "100%"]


def test_a_needle_lies_where_the_map_says():
    for example in Needle(TOKENIZER, [2600], TEXT, count=3, depths=3, variants=["single_2"]).examples():
        ids, about = example.payload
        prompt = TOKENIZER.decode(ids)
        body = prompt[prompt.index("\n") + 1 : prompt.rindex("\nWhat is")]
        place = body.index("One of the special magic")
        assert place / len(body) == pytest.approx(about["depths"][0], abs=0.06)


def test_needle_prompts():
    _golden("prompts_needle", _prompts(Needle(TOKENIZER, [1100], TEXT, count=1, depths=2), 8))


def test_distractors_never_answer_the_question():
    for example in Needle(TOKENIZER, [3000], TEXT, count=4, variants=["multikey_2", "multikey_3"]).examples():
        assert len(_finder(TOKENIZER.decode(example.payload[0])).split(", ")) == 1


def test_a_haystack_without_full_stops_is_cut():
    examples = list(Needle(TOKENIZER, [1600], "word " * 500, count=2, variants=["single_2", "multivalue"]).examples())
    assert all(example.length > 600 for example in examples)


def test_needle_refuses():
    with pytest.raises(ValueError, match="'single_9' is unknown; legal: single_1"):
        Needle(TOKENIZER, [900], TEXT, variants=["single_9"])
    with pytest.raises(ValueError, match="needle single_1 at --lengths=200: the shortest prompt has"):
        Needle(TOKENIZER, [200], TEXT)
    with pytest.raises(ValueError, match="empty text"):
        Needle(TOKENIZER, [900], " \n")


# --- classification ---


@pytest.fixture
def tasks(tmp_path):
    return [
        labelled.banking77(made.banking(tmp_path / "banking")),
        labelled.goemotions(made.emotions(tmp_path / "emo")),
    ]


def _lines(prompt: str) -> list[str]:
    """The examples' labels, in order."""
    return [found.strip() for found in re.findall(r"category: (\S+)", prompt)]


def test_classification_oracles(tasks, tmp_path):
    made_suite = Classification(tasks[:1], TOKENIZER, [1, 2], count=6)
    truth = dict(tasks[0].test)

    def knows(prompt: str) -> str:
        """Knows the class, and finds out from an example what it is called."""
        query = prompt.split("service query: ")[-1].removesuffix("intent category:").strip()
        return " " + re.findall(rf"about {truth[query]}, number \d\s+intent category: (\S+)", prompt)[0]

    right = suite.run(made_suite, Scripted(knows), tmp_path / "right")
    assert _numbers(right, 0) == _numbers(right, 1) == {100.0}
    wrong = suite.run(made_suite, WRONG, tmp_path / "wrong")
    assert _numbers(wrong, 0) == {0.0}
    # It copies the label that stands last: in order that is the last class, of three.
    recent = suite.run(made_suite, Scripted(lambda prompt: f" {_lines(prompt)[-1]}\nservice"), tmp_path / "recent")
    in_order = [row for row in _cells(recent) if "in order" in row[2]]
    assert {cell.split(" ± ")[0] for row in in_order for cell in row[3:]} == {"33.3"}
    for records in ([*Answers(tmp_path / "recent" / "classification.jsonl", "scripted").known.values()],):
        assert all(r["generated"] == r["ranked"] for r in records if r["delimiter"] == "newline")


def test_best_of_four_is_the_best(tasks, tmp_path):
    made_suite = Classification(tasks[:1], TOKENIZER, [1], count=6)
    found = suite.run(made_suite, Scripted(lambda prompt: f" {_lines(prompt)[-1]}"), tmp_path)
    rows = _cells(found)
    for at in (0, 5):  # semantic, anonymous
        four = [float(row[3].split(" ± ")[0]) for row in rows[at : at + 4]]
        assert float(rows[at + 4][3].strip("*").split(" ± ")[0]) == max(four)


def test_classification_prompts(tasks, tmp_path):
    tasks = [*tasks, labelled.tacred(made.tacred(tmp_path / "tacred"))]
    _golden("prompts_classification", _prompts(Classification(tasks, TOKENIZER, [1], count=1), 24))


def test_a_shot_is_one_example_of_every_class(tasks):
    of = Classification(tasks[:1], TOKENIZER, [3], count=4, labels=["semantic"])
    seen = {}
    for example in of.examples():
        ids, condition, _ = example.payload
        labels = _lines(TOKENIZER.decode(ids))
        assert len(labels) == 9
        assert all(sorted(labels[at : at + 3]) == ["topic", "topic_b", "urgent"] for at in (0, 3, 6))
        seen.setdefault(condition.order, set()).add(tuple(labels))
    assert seen["in order"] == {("topic", "topic_b", "urgent") * 3}
    assert len(seen["shuffled"]) > 1


def test_a_label_that_another_begins_with_has_no_advantage(tasks):
    of = Classification(tasks[:1], TOKENIZER, [1], count=1, labels=["semantic"])
    for example in of.examples():
        names = [TOKENIZER.decode(option) for option in of.options(example.payload[1])]
        assert not any(a != b and b.startswith(a) for a in names for b in names)


def test_what_is_generated_counts_up_to_where_the_next_example_would_begin(tasks):
    of = Classification(tasks[:1], TOKENIZER, [1], count=1)
    newline, space = (
        next(e.payload[1] for e in of.examples() if e.payload[1].delimiter == d) for d in ("newline", "space")
    )
    assert of.first_label(newline, " topic\nservice query: x") == "topic"
    assert of.first_label(space, " topic service query: x") == "topic"
    assert of.first_label(space, "") == ""


def test_classification_refuses(tasks, tmp_path):
    with pytest.raises(ValueError, match="the class 'topic' has 6 examples, fewer than 7 shots"):
        Classification(tasks[:1], TOKENIZER, [1, 7])
    with pytest.raises(ValueError, match="legal: semantic, anonymous"):
        Classification(tasks[:1], TOKENIZER, [1], labels=["other"])
    with pytest.raises(ValueError, match=r"train.csv' cannot be read"):
        labelled.banking77(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="legal: text and label among them"):
        labelled.any_task("own", tmp_path / "a.csv", tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="line 1: legal is an object with text and label"):
        labelled.any_task("own", tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "empty.tsv").write_text("text\tlabel\n")
    with pytest.raises(ValueError, match="holds no rows"):
        labelled.any_task("own", tmp_path / "empty.tsv", tmp_path / "empty.tsv")
    with pytest.raises(ValueError, match=r"legal: .csv, .tsv, .jsonl"):
        labelled.any_task("own", tmp_path / "a.txt", tmp_path / "a.txt")


def test_own_files_and_the_shipped_formats(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\nline", "label": 3}\n')
    (tmp_path / "b.tsv").write_text("text\tlabel\nx\t3\n")
    own = labelled.any_task("own", tmp_path / "a.jsonl", tmp_path / "b.tsv")
    assert (own.train, own.test) == ([("one\nline", "3")], [("x", "3")])
    assert own.lines("one\nline", "3") == ["text: one line", "label: 3"]
    emotions = labelled.goemotions(made.emotions(tmp_path / "e"))
    assert ("both at once", "joy") not in emotions.train
    assert emotions.labels == ["anger", "joy"]
    relations = labelled.tacred(made.tacred(tmp_path / "t"))
    assert relations.labels == ["per:city", "per:origin"]
    assert relations.lines(*relations.train[0]) == [
        "sentence: Ada Byron lives in London .",
        "the relation between Ada Byron and London is: per:city",
    ]


# --- perplexity ---


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    draw = random.Random(0)
    for number in range(12):
        text = "".join(draw.choice("abcdef ") for _ in range(60 * number + 20))
        (folder / f"{number}.txt").write_text(text)
    return prepare([str(folder)], str(folder / "corpus"), valid_fraction=0.5)


def test_perplexity_oracles(documents: Manifest, tmp_path):
    of = Perplexity(documents, [64, 400], count=3)
    flat = suite.run(of, Scripted(loss=oracles.uniform), tmp_path / "uniform")
    for row in [*_cells(flat, 0), *_cells(flat, 1)]:
        assert row[1] == pytest.approx(math.log(258))
        assert row[3] == pytest.approx(258)
        assert row[2] == pytest.approx(8.0 + math.log2(258 / 256), rel=0.02), "bits per byte: bytes are the tokens"
    sure = suite.run(of, Scripted(loss=lambda row: np.zeros(len(row) - 1)), tmp_path / "sure")
    assert {row[3] for row in _cells(sure)} == {1.0}
    # A loss that is the position: the bins are where they say they are.
    ramp = suite.run(of, Scripted(loss=lambda row: np.arange(len(row) - 1.0)), tmp_path / "ramp")
    for name, loss, *_ in _cells(ramp):
        first, last = (int(end.replace(",", "")) for end in name.split(" to "))
        assert loss == pytest.approx((first + last) / 2)


def test_every_context_ends_with_the_same_tokens(documents: Manifest):
    of = Perplexity(documents, [64, 400], count=3)
    short, long = ([e.payload for e in of.examples() if e.length == n] for n in (64, 400))
    for a, b in zip(short, long, strict=True):
        assert len(a) == 65
        assert len(b) == 401
        assert a[0] == b[0] == documents.begin
        np.testing.assert_array_equal(a[1:], b[-64:])


def test_perplexity_refuses(documents: Manifest):
    with pytest.raises(ValueError, match=r"no held-out document of .* has 5000 tokens and one more; the longest has"):
        Perplexity(documents, [64, 5000])
    with pytest.raises(ValueError, match="--lengths has 1"):
        Perplexity(documents, [1])


# --- the loop ---


def test_killed_anywhere_it_goes_on_and_ends_alike(tmp_path):
    def of() -> Needle:
        return Needle(TOKENIZER, [1000], TEXT, count=4, depths=3, variants=["single_1", "single_2"])

    whole = Scripted(_finder)
    expected = suite.run(of(), whole, tmp_path / "whole")
    path = tmp_path / "whole" / "needle.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    assert sum(whole.calls) == 8
    for kept in range(8):
        folder = tmp_path / str(kept)
        folder.mkdir()
        # The next line was cut short.
        (folder / "needle.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        model = Scripted(_finder)
        assert suite.run(of(), model, folder) == expected
        assert sum(model.calls) == 8 - kept
        assert sorted((folder / "needle.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_a_prompt_longer_than_the_model_can_hold_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"needle: single_1 1000 0 \w+ needs \d+ tokens, and --max_length is 500"):
        suite.run(Needle(TOKENIZER, [1000], TEXT, count=1), Scripted(_finder, max_length=500), tmp_path)


@pytest.mark.parametrize("size", [1, 3, 7, 100, 1000])
def test_bisection_finds_the_most_that_fits(size):
    made_lengths = []

    def prompt(count):
        made_lengths.append(count * size)
        return np.zeros(count * size)

    count, ids = most_that_fit(1, 500, 1234, prompt)
    assert count == min(500, 1234 // size)
    assert len(ids) == count * size
    assert len(made_lengths) <= 22
    assert max(made_lengths) <= 3 * 1234, "no prompt is made that is much longer than the limit"
    with pytest.raises(ValueError, match="the shortest prompt has 2000 tokens, and 1234 are free"):
        most_that_fit(2, 500, 1234, lambda count: np.zeros(count * 1000))


def test_data_that_changed_is_asked_anew_though_the_prompts_are_the_same(pools, tmp_path):
    """A reference, or the label of a text that is asked about, stands in no prompt."""

    def keys(of):
        return {example.key for example in of.examples()}

    squad = pools["squad"]
    mended = [question._replace(references=("other",)) for question in squad.questions]
    one, two = (retrieval.Retrieval({"squad": pool}, TOKENIZER, [700], count=3)
                for pool in (squad, squad._replace(questions=mended)))  # fmt: skip
    assert not keys(one) & keys(two)
    task = labelled.banking77(made.banking(tmp_path / "banking"))
    other = task._replace(test=[(text, "urgent") for text, _ in task.test])
    one, two = (Classification([of], TOKENIZER, [1], count=6, labels=["semantic"]) for of in (task, other))
    assert len(keys(one) & keys(two)) == sum(label == "urgent" for _, label in task.test) * len(PROMPTS)


# --- what is written ---


def test_figures_are_drawn_from_the_data_beside_them(tmp_path):
    curve = report.lines(
        "Title", "x", "y", [report.curve("a", [1, 2], [[0.0, 1.0], [1.0]])], log_x=True, marks={"1": "m"}
    )
    colours = report.heatmap("Map", "x", "y", [1, 2], ["0%"], [[0.5, None]])
    table = report.Table("T", ["a", "b"], [["x", 1234], ["y", 0.5], [None, "z"]])
    of = report.Report([table], [report.Figure("curve", curve), report.Figure("map", colours)], ["A note."])
    written = report.save(of, tmp_path, "suite", {"command": "c"})
    assert {path.name for path in written} == {
        "suite.json", "suite.md", "curve.json", "curve.png", "map.json", "map.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "curve.json").read_text()) == json.loads(json.dumps(curve))
    assert "| x | 1,234 |" in (tmp_path / "suite.md").read_text()
    assert "| – | z |" in (tmp_path / "suite.md").read_text()
    for name in ("curve", "map"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_mean_and_error():
    assert report.percent([0.0, 1.0, 1.0, 0.0]) == "50.0 ± 28.9"
    assert report.percent([1.0]) == "100.0"
    assert report.standard_error([2.0, 4.0]) == pytest.approx(1.0)


def test_prompts_are_four():
    assert len(PROMPTS) == 4
