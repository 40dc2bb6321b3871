"""Language models that are scripted: what each must score is known."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mosaics_jax.data.tokenizer import ByteTokenizer
from mosaics_jax.evaluate.model import TokenLosses

TOKENIZER = ByteTokenizer()


class Scripted:
    """Answers `say(prompt)`; the options that begin as it says are likeliest; tokens have the losses of `loss(row)`."""

    tokenizer = TOKENIZER
    identity = "scripted"

    def __init__(
        self, say: Callable[[str], str] = lambda prompt: "", loss: Callable[[np.ndarray], np.ndarray] | None = None,
        max_length: int = 100_000, context: int = 64,
    ):  # fmt: skip
        self._say, self._loss = say, loss
        self.max_length, self.context = max_length, context
        self.calls: list[int] = []  # rows of each call of generate

    def rows_at_once(self, length: int) -> int:
        return 3

    def generate(self, rows: Sequence[np.ndarray], max_new_tokens: int) -> list[str]:
        self.calls.append(len(rows))
        said = [self._say(TOKENIZER.decode(row)) for row in rows]
        assert all(len(TOKENIZER.encode(text)) <= max_new_tokens for text in said), (said, max_new_tokens)
        return said

    def rank(self, rows: Sequence[np.ndarray], options: Sequence[np.ndarray]) -> np.ndarray:
        said = [self._say(TOKENIZER.decode(row)) for row in rows]
        names = [TOKENIZER.decode(option) for option in options]
        return np.array([[0.0 if name.startswith(text) else -1.0 for name in names] for text in said])

    def losses(self, rows: Sequence[np.ndarray]) -> list[TokenLosses]:
        assert self._loss is not None
        found = [self._loss(row) for row in rows]
        return [TokenLosses(loss_T, loss_T < 0.5) for loss_T in found]


def uniform(row: np.ndarray) -> np.ndarray:
    """Every token as likely as any other."""
    return np.full(len(row) - 1, math.log(TOKENIZER.vocabulary))


# Of lm_eval, in a folder of one's own: data and templates, and no code.
TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/own.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
filter_list: [{{name: first, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
"""
