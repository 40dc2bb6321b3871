"""New knowledge: questions about one of many unrelated documents (RULER's multi-document QA; PAPER section 7).

Hsieh et al., *RULER*, 2024 (arXiv 2404.06654), tasks qa_1 (SQuAD) and qa_2 (HotpotQA). As many documents as the length
holds are put into the prompt in an order drawn by seed, the one with the answer among them. An answer counts if it
contains any of the references, case aside (RULER's rule).
"""

import pathlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mosaics_jax.data.tokenizer import Tokenizer
from mosaics_jax.evaluate import given, report, suite
from mosaics_jax.evaluate.fit import most_that_fit
from mosaics_jax.evaluate.model import Model

NEW_TOKENS = 32
_ONLY = " Only give me the answer and do not output any other words."
_ASKED = "Answer the question based on the given documents."
PROMPTS = {  # RULER's for models without instruction tuning, and the shorter one of the paper
    "ruler": (
        _ASKED + _ONLY + "\n\nThe following are given documents.\n\n{documents}\n\n"
        + _ASKED + _ONLY + "\n\nQuestion: {question} Answer:"
    ),
    "paper": _ASKED + "\n\nThe following are given documents.\n\n{documents}\n\nQuestion: {question} Answer:",
}  # fmt: skip


class Question(NamedTuple):
    """A question, its accepted answers, and the documents (numbers in the pool) in the order in which they are taken.

    `gold` are those that hold the answer; `related` those of the same article or puzzle.
    """

    name: str
    text: str
    references: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]


class Pool(NamedTuple):
    questions: Sequence[Question]
    documents: Sequence[str]


def read_squad(path: pathlib.Path) -> Pool:
    """SQuAD 1.1 or 2.0; questions without an answer are left out."""

    def pool(body: Any) -> Pool:
        numbers: dict[str, int] = {}
        questions = []
        for article in body["data"]:
            texts = [given.string(paragraph["context"]) for paragraph in article["paragraphs"]]
            own = [numbers.setdefault(text, len(numbers)) for text in texts]
            for paragraph, gold in zip(article["paragraphs"], own, strict=True):
                for asked in paragraph["qas"]:
                    references = _references(answer["text"] for answer in asked["answers"])
                    if references and not asked.get("is_impossible", False):
                        related = tuple(dict.fromkeys(number for number in own if number != gold))
                        questions.append(_question(asked, "id", references, (gold,), related))
        return Pool(questions, list(numbers))

    return _read(path, pool, "SQuAD")


def read_hotpot(path: pathlib.Path) -> Pool:
    """HotpotQA in the distractor setting; gold are the paragraphs of the supporting facts."""

    def pool(body: Any) -> Pool:
        numbers: dict[str, int] = {}
        questions = []
        for asked in body:
            texts = {title: f"{given.string(title)}\n{''.join(sentences)}" for title, sentences in asked["context"]}
            own = {title: numbers.setdefault(text, len(numbers)) for title, text in texts.items()}
            titles = dict.fromkeys(title for title, _ in asked["supporting_facts"])
            gold = tuple(dict.fromkeys(own[title] for title in titles if title in own))
            if not gold:
                raise ValueError(f"question {asked['_id']!r} has no supporting fact among its paragraphs")
            related = tuple(number for number in dict.fromkeys(own.values()) if number not in gold)
            if references := _references([asked["answer"]]):
                questions.append(_question(asked, "_id", references, gold, related))
        return Pool(questions, list(numbers))

    return _read(path, pool, "HotpotQA (distractor)")


def _references(texts: Iterable[Any]) -> tuple[str, ...]:
    """Those that say something: every text holds an empty one."""
    return tuple(dict.fromkeys(text for text in map(given.string, texts) if text))


def _question(
    asked: Mapping[str, Any], name: str, references: tuple[str, ...], gold: tuple[int, ...], related: tuple[int, ...]
) -> Question:
    return Question(given.string(asked[name]), given.string(asked["question"]), references, gold, related)


def _read(path: pathlib.Path, pool: Callable[[Any], Pool], form: str) -> Pool:
    body = given.value(given.text(path), f"{str(path)!r}")
    try:
        made = pool(body)
    except given.WRONG_FORM as error:
        raise ValueError(f"{str(path)!r} is not in the format of {form}: {type(error).__name__} {error}") from error
    if not made.questions:
        raise ValueError(f"{str(path)!r} holds no question with an answer")
    return made


def any_reference(text: str, references: Sequence[str]) -> float:
    """RULER's string_match_part: 1 where the text contains any of the references, case aside."""
    return float(any(reference.lower() in text.lower() for reference in references))


class Retrieval:
    """Every (pool, prompt, length) with the same questions, drawn by seed."""

    name = "retrieval"

    def __init__(
        self, pools: Mapping[str, Pool], tokenizer: Tokenizer, lengths: Sequence[int], *, count: int = 100,
        seed: int = 0, context: int = 0,
    ):  # fmt: skip
        """`count` questions of each pool; `context` is the length the model was trained on, marked in the figure.

        A question whose own documents do not fit the least length is left out everywhere. ValueError if none fits.
        """
        self._pools, self._tokenizer = pools, tokenizer
        self._lengths, self._seed, self._context = sorted(lengths), seed, context
        self._questions = {}
        self._left_out = {}
        for name, pool in pools.items():
            drawn = random.Random(f"{seed} {name}").sample(range(len(pool.questions)), len(pool.questions))
            fitting: list[Question] = []
            tried = 0
            for number in drawn:
                if len(fitting) == count:
                    break
                tried += 1
                question = pool.questions[number]
                ids = suite.row(tokenizer, self._prompt(pool, question, "ruler", list(question.gold)))
                if len(ids) + NEW_TOKENS <= self._lengths[0]:
                    fitting.append(question)
            if not fitting:
                raise ValueError(
                    f"no question of {name} fits --lengths={self._lengths[0]} with the documents that answer it; "
                    "take longer ones"
                )
            self._questions[name] = fitting
            self._left_out[name] = tried - len(fitting)

    def __len__(self) -> int:
        return sum(map(len, self._questions.values())) * len(PROMPTS) * len(self._lengths)

    def examples(self) -> Iterator[suite.Example]:
        for length in self._lengths:
            for name, pool in self._pools.items():
                for style in PROMPTS:
                    for question in self._questions[name]:
                        yield self._example(name, pool, style, length, question)

    def _example(self, name: str, pool: Pool, style: str, length: int, question: Question) -> suite.Example:
        draw = random.Random(f"{self._seed} {name} {length} {question.name}")
        own = {*question.gold, *question.related}
        others = [number for number in range(len(pool.documents)) if number not in own]
        draw.shuffle(others)
        taken = [*question.gold, *draw.sample(question.related, len(question.related)), *others]
        place = draw.random()

        def numbers(count: int) -> list[int]:
            """The first `count`, in an order drawn for each count."""
            return random.Random(f"{place} {count}").sample(taken[:count], count)

        texts: dict[int, str] = {}

        def prompt(count: int) -> Any:
            texts[count] = self._prompt(pool, question, style, numbers(count))
            return suite.row(self._tokenizer, texts[count])

        count, ids = most_that_fit(len(question.gold), len(taken), length - NEW_TOKENS, prompt)
        about = {
            "task": name, "prompt": style, "length": length, "question": question.name, "documents": count,
            "tokens": len(ids), "references": question.references,
            "depth": numbers(count).index(question.gold[0]) / max(1, count - 1),
        }  # fmt: skip
        key = f"{name} {style} {length} {question.name} {suite.digest(texts[count], about)}"
        return suite.Example(key, len(ids) + NEW_TOKENS, (ids, about))

    def _prompt(self, pool: Pool, question: Question, style: str, numbers: Sequence[int]) -> str:
        documents = "\n\n".join(
            f"Document {place}:\n{pool.documents[number]}" for place, number in enumerate(numbers, start=1)
        )
        return PROMPTS[style].format(documents=documents, question=question.text)

    def answer(self, model: Model, batch: Sequence[suite.Example]) -> list[dict[str, Any]]:
        texts = model.generate([example.payload[0] for example in batch], NEW_TOKENS)
        return [
            {**about, "answer": text, "score": any_reference(text, about["references"])}
            for text, (_, about) in zip(texts, (example.payload for example in batch), strict=True)
        ]

    def report(self, records: Sequence[dict[str, Any]]) -> report.Report:
        def scores(**where: Any) -> list[float]:
            return [r["score"] for r in records if all(r[field] == value for field, value in where.items())]

        conditions = [(task, style) for task in self._questions for style in PROMPTS]
        rows: list[list[Any]] = [
            [task, style, *(report.percent(scores(task=task, prompt=style, length=length)) for length in self._lengths)]
            for task, style in conditions
        ]
        for style in PROMPTS:
            means = [
                report.mean([report.mean(scores(task=task, prompt=style, length=length)) for task in self._questions])
                for length in self._lengths
            ]
            rows.append(["mean of tasks", style, *(f"{100 * value:.1f}" for value in means)])
        filled = [
            [task, length, len(of), report.mean([r["documents"] for r in of]), report.mean([r["tokens"] for r in of])]
            for task in self._questions
            for length in self._lengths
            if (of := [r for r in records if r["task"] == task and r["length"] == length and r["prompt"] == "ruler"])
        ]
        series = [
            report.curve(
                f"{task}, {style} prompt", self._lengths,
                [scores(task=task, prompt=style, length=length) for length in self._lengths],
            )
            for task, style in conditions
        ]  # fmt: skip
        marks = {str(self._context): "trained length"} if self._context else {}
        tables = [
            report.Table("Accuracy in percent", ["task", "prompt", *map(str, self._lengths)], rows),
            report.Table("Prompts (ruler)", ["task", "length", "questions", "documents", "tokens"], filled),
        ]
        notes = [
            f"{task}: {left} questions drawn were left out, whose own documents do not fit {self._lengths[0]} tokens."
            for task, left in self._left_out.items()
            if left
        ]
        data = report.lines(
            "Multi-document question answering", "task length, tokens", "accuracy", series, log_x=True, marks=marks
        )
        return report.Report(tables, [report.Figure("retrieval_accuracy", data)], notes)
