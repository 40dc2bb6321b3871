"""Draws the loss curves of runs: python docs/results/curves.py OUT.png WORKDIR [WORKDIR ...]"""

import json
import pathlib
import sys

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main(out: str, *workdirs: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, workdir in enumerate(map(pathlib.Path, workdirs)):
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        train = [r for r in records if r["kind"] == "train"]
        held_out = [r for r in records if r["kind"] == "eval"]
        color = f"C{number}"
        axes.plot([r["step"] for r in train], [r["bits_per_byte"] for r in train], color=color, alpha=0.4, lw=1)
        axes.plot(
            [r["step"] for r in held_out], [r["bits_per_byte"] for r in held_out], "o-", color=color,
            label=f"{workdir.name}: held-out {held_out[-1]['bits_per_byte']:.3f}",
        )  # fmt: skip
        bigram = held_out[-1]["bigram_bits_per_byte"]
        axes.axhline(bigram, color=color, ls=":", lw=1, label=f"bigram entropy of that text: {bigram:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1.5, 6))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
