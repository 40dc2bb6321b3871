"""The notebooks run from the first cell to the last, use public names only, and hold no outputs."""

import ast
import pathlib

import pytest

import mosaics_jax.explore

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PUBLIC = {"configs.tiny", "mosaics_jax", "mosaics_jax.explore"}
OTHERS = {"flax", "jax", "matplotlib", "numpy", "optax"}
STANDARD = {"json", "pathlib", "subprocess", "sys", "tempfile"}
COLAB = """\
# In Colab, this installs the package; anywhere else it does nothing.
import sys

if "google.colab" in sys.modules:
    !git clone https://github.com/OWNER/mosaics_jax && pip install -q ./mosaics_jax"""

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _read(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_there_is_nothing_but_text_and_code(path):
    notebook = _read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.keys() <= {"kernelspec", "language_info"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.cells[0].cell_type == "markdown"
    assert code[0].source == COLAB


def test_every_picture_is_described(path):
    cells = _read(path).cells
    for place, cell in enumerate(cells):
        if cell.cell_type == "code" and ("plt.show()" in cell.source or "explore.plot_" in cell.source):
            assert cells[place + 1].cell_type == "markdown"
            assert cells[place + 1].source.startswith("**What to look at.**")


def test_imports_are_public(path):
    code = [cell.source for cell in _read(path).cells if cell.cell_type == "code"][1:]
    for node in ast.walk(ast.parse("\n".join(code))):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module}
            if node.module == "mosaics_jax":
                assert {alias.name for alias in node.names} <= set(mosaics_jax.__all__)
        else:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "explore":
                assert node.attr in mosaics_jax.explore.__all__
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_") or node.attr == "__file__"
            continue
        for name in names:
            assert name in PUBLIC or name.split(".")[0] in OTHERS | STANDARD, name


@pytest.mark.slow
def test_it_runs(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    # The kernel finds the package as it is here, installed or not, and compiles for speed, unlike the tests.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this interpreter's kernel, whatever the user has
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    NotebookClient(
        _read(path), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
