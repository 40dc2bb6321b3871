"""What can be scored on the made-up tasks of docs/results/claims.md without reading what is asked for.

python docs/results/floors.py        # half a minute

Of recall, facts and classification: the answers given so far are crossed off what the document holds, and the most
frequent one that is left is said.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

from mosaics_jax.claims.episodes import TASKS, Episode

EPISODES = 600


def recall(episode: Episode) -> Iterator[tuple[str, list[str], str]]:
    """(what an answer is one of, all that can be answered, the answer) of each answer in turn."""
    pairs = episode.text.split("\n")[0]
    for answer in episode.answers:
        yield "value", list(pairs[1::2]), episode.text[answer.start : answer.stop]


def facts(episode: Episode) -> Iterator[tuple[str, list[str], str]]:
    held = defaultdict(list)
    for line in episode.text.splitlines():
        if line.startswith("The "):
            held[line.split()[1]].append(line.split()[-1].rstrip("."))
    for answer in episode.answers:
        attribute = episode.text[: answer.start].rsplit("the ", 1)[1].split()[0]
        yield attribute, held[attribute], episode.text[answer.start : answer.stop]


def score(task: str, x: int, draw: random.Random) -> float:
    """The share of answers that are right, in percent."""
    right = asked = 0
    for _ in range(EPISODES):
        left: dict[str, Counter[str]] = {}
        for kind, held, answer in {"recall": recall, "facts": facts}[task](TASKS[task].question(draw, x)):
            pool = left.setdefault(kind, Counter(held))
            most = max(pool.values())
            right += draw.choice([value for value, count in pool.items() if count == most]) == answer
            asked += 1
            pool[answer] -= 1
            if not pool[answer]:
                del pool[answer]
    return 100 * right / asked


def main() -> None:
    draw = random.Random(0)
    for task in ("recall", "facts"):
        found = [f"{x}: {score(task, x, draw):.0f}" for x in TASKS[task].asked]
        print(f"{task}, by {TASKS[task].axis}: {', '.join(found)}")
    shots = [100 / left for left in (4, 3, 2, 1)]  # every shot shows each of the four labels once
    print(f"classification, at any number of shots: {sum(shots) / 4:.0f}")


if __name__ == "__main__":
    main()
