"""The README's Colab cell runs as it stands, and its tour names what there is."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_colab_cell(tmp_path: pathlib.Path, monkeypatch) -> None:
    cell = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    code = "\n".join(line for line in cell.splitlines() if not line.startswith("!"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mosaics_jax").symlink_to(ROOT)  # what `git clone` leaves there
    names: dict = {}
    exec(code, names)
    assert names["logits_BTV"].shape == (1, 3, names["model"].config.vocabulary)
    assert (names["again"](((1, 2, 3),)) == names["logits_BTV"]).all()


def test_the_tour_names_what_there_is() -> None:
    tour = README.split("## Tour")[1]
    for line in re.findall(r"```\n(.*?)```", tour, re.S)[0].splitlines():
        path = line.split("  ")[0].strip()
        if "{" in path:
            head, names, tail = re.fullmatch(r"(.*)\{(.*)\}(.*)", path).groups()
            paths = [f"{head}{name}{tail}" for name in names.split(",")]
        else:
            paths = [path]
        for name in paths:
            assert (ROOT / name).exists(), name
