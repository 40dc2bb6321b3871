"""Continues prompts with the newest checkpoint of a run.

python -m launch.generate --workdir=runs/tiny --prompt="def main" --max_new_tokens=200
"""

from absl import flags

from launch import command

_WORKDIR = command.define_path("workdir", None, "directory of the run")
_PROMPTS = flags.DEFINE_multi_string("prompt", [""], "text to continue; give it again for a batch")
_COUNT = flags.DEFINE_integer("max_new_tokens", 200, "tokens at most")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among the k likeliest tokens; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "draw among the fewest tokens that hold this share of the probability")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the draws")


def main() -> None:
    if not _WORKDIR.value:
        raise ValueError("--workdir is not set; legal: the directory of a run of launch.train")
    import mosaics_jax

    model, tokenizer = mosaics_jax.load(_WORKDIR.value)
    texts = mosaics_jax.generate(
        model, tokenizer, _PROMPTS.value, max_new_tokens=_COUNT.value, temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value, top_p=_TOP_P.value, seed=_SEED.value,
    )  # fmt: skip
    for number, (prompt, text) in enumerate(zip(_PROMPTS.value, texts, strict=True)):
        if len(texts) > 1:
            print(f"--- {number + 1} ---")
        print(prompt + text)


if __name__ == "__main__":
    command.run(main)
