"""Small data in the formats of the suites."""

import json
import pathlib

COLOURS = {"Ada": "red", "Bo": "green", "Cy": "blue", "Di": "white", "Ed": "black", "Flo": "yellow"}


def squad(path: pathlib.Path) -> pathlib.Path:
    """Two articles of three paragraphs; every paragraph says who has a boat of which colour."""
    people = list(COLOURS)
    articles = []
    for title, owners in (("North", people[:3]), ("South", people[3:])):
        paragraphs = [
            {
                "context": f"In the {title} there is {name}. {name} has a boat that is {COLOURS[name]} and quite old.",
                "qas": [
                    {"id": f"q{name}", "question": f"Which colour is the boat of {name}?", "is_impossible": False,
                     "answers": [{"text": COLOURS[name], "answer_start": 0}] * 2},
                    {"id": f"n{name}", "question": "Who is the king?", "is_impossible": True, "answers": []},
                ],
            }
            for name in owners
        ]  # fmt: skip
        articles.append({"title": title, "paragraphs": paragraphs})
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return path


def hotpot(path: pathlib.Path) -> pathlib.Path:
    """Four questions, each with two gold paragraphs and two that mislead."""
    names = list(COLOURS)
    items = []
    for number in range(4):
        name, other = names[number], names[number + 1]
        context = [
            [f"{name}'s friend", [f"{name} knows {other}.", " They met long ago."]],
            [f"Harbour {number}", [f"The harbour number {number} is calm."]],
            [f"{other}'s boat", [f"The boat of {other} is {COLOURS[other]}."]],
            [f"Hill {number}", [f"The hill number {number} is steep."]],
        ]
        items.append(
            {"_id": f"h{number}", "question": f"Which colour is the boat of the friend of {name}?",
             "answer": COLOURS[other].upper(), "context": context, "type": "bridge", "level": "easy",
             "supporting_facts": [[f"{name}'s friend", 0], [f"{other}'s boat", 0]]}
        )  # fmt: skip
    path.write_text(json.dumps(items))
    return path


def banking(folder: pathlib.Path, classes: int = 3, rows: int = 6) -> pathlib.Path:
    """Texts whose class can be read off: `topic 1` belongs to `topic_1`; one label begins another."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["topic", "topic_b", "urgent"][:classes]
    for split, count in (("train", rows), ("test", 2)):
        lines = [f'"It is about {name}, number {n}",{name}' for n in range(count) for name in names]
        (folder / f"{split}.csv").write_text("\n".join(["text,category", *lines]) + "\n")
    return folder


def emotions(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("joy\nanger")
    for split in ("train", "test"):
        lines = ["so glad\t0\ta", "so cross\t1\tb", "both at once\t0,1\tc", "how nice\t0\td", "how bad\t1\te"]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def tacred(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["Ada", "Byron", "lives", "in", "London", "."]
    item = {"id": "1", "token": words, "subj_start": 0, "subj_end": 1, "obj_start": 4, "obj_end": 4}
    items = [{**item, "relation": relation} for relation in ("per:city", "no_relation", "per:origin")]
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps(items))
    return folder
