"""A task for lm_eval with local files: which of four passages goes on from a held-out text.

python docs/results/evaluation/cloze.py stories/valid.jsonl.xz TASKS
python -m launch.evaluate --workdir=W --suite=harness --task_folder=TASKS --tasks=cloze
"""

import json
import lzma
import pathlib
import random
import sys

BEFORE, AFTER, COUNT = 1500, 120, 40


def main(source: str, folder: str) -> None:
    with lzma.open(source, "rt", encoding="utf-8") as file:
        texts = [text for line in file if len(text := json.loads(line)["text"]) > BEFORE + AFTER]
    draw = random.Random(0)
    rows = []
    for text in draw.sample(texts, COUNT):
        others = (draw.choice(texts) for _ in range(3))
        wrong = [other[(at := draw.randrange(len(other) - AFTER)) : at + AFTER] for other in others]
        choices = draw.sample([text[BEFORE : BEFORE + AFTER], *wrong], 4)
        rows.append(
            {"before": text[:BEFORE], "choices": choices, "right": choices.index(text[BEFORE : BEFORE + AFTER])}
        )
    target = pathlib.Path(folder).absolute()
    target.mkdir(parents=True, exist_ok=True)
    (target / "cloze.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (target / "cloze.yaml").write_text(
        "task: cloze\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {target / 'cloze.jsonl'}}}}}\n"
        "doc_to_text: '{{before}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{right}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
