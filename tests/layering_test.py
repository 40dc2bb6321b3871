"""Imports go one way, heavy libraries stay where they belong, and the code is in one style (docs/design.md)."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("mosaics_jax", "pallas_kernels", "configs", "launch")

# The floors of the house, lowest first. A module imports from its own floor's folder or from floors below.
FLOORS = [
    {
        "mosaics_jax",
        "mosaics_jax.addresses",
        "mosaics_jax.dims",
        "mosaics_jax.environment",
        "mosaics_jax.lock",
        "mosaics_jax.paths",
        "mosaics_jax.place",
        "mosaics_jax.schedulers",
        "mosaics_jax.whole",
    },
    {"mosaics_jax.config"},
    {
        "configs",
        "mosaics_jax.visibility",
        "mosaics_jax.data",
        "mosaics_jax.sharding",
        "mosaics_jax.collectives",
        "pallas_kernels",
    },
    {"mosaics_jax.nn"},
    {
        "mosaics_jax.loss",
        "mosaics_jax.optimizer",
        "mosaics_jax.record",
        "mosaics_jax.fingerprint",
        "mosaics_jax.goodput",
        "mosaics_jax.history",
        "mosaics_jax.meeting",
        "mosaics_jax.processes",
    },
    {
        "mosaics_jax.integrity",
        "mosaics_jax.program",
        "mosaics_jax.step",
        "mosaics_jax.metrics",
        "mosaics_jax.decode",
        "mosaics_jax.export",
    },
    {"mosaics_jax.checkpoint", "mosaics_jax.local_checkpoint", "mosaics_jax.roofline"},
    {"mosaics_jax.restore", "mosaics_jax.loop", "mosaics_jax.watchdog", "mosaics_jax.compilation"},
    {"mosaics_jax.train", "mosaics_jax.api", "mosaics_jax.evaluate", "mosaics_jax.explore"},
    {"mosaics_jax.plan", "mosaics_jax.claims"},
    {"mosaics_jax.plan_report"},
    {"launch"},
]


def _modules() -> Iterator[tuple[str, pathlib.Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(path: pathlib.Path) -> set[str]:
    """Absolute names of all modules imported anywhere in the file; `from a import b` counts as a and as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def _floor(module: str) -> int | None:
    """The floor of the longest listed prefix of a module's name."""
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        for number, floor in enumerate(FLOORS):
            if ".".join(parts[:size]) in floor:
                return number
    return None


MODULES = dict(_modules())


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    own = _floor(module)
    assert own is not None, f"{module} stands on no floor"
    for name in _imports(MODULES[module]):
        if name.split(".")[0] not in PACKAGES or name in PACKAGES:
            continue
        assert (floor := _floor(name)) is not None
        assert floor <= own, f"{module} (floor {own}) imports {name} (floor {floor})"


@pytest.mark.parametrize(
    ("where", "forbidden"),
    [
        ("pallas_kernels", ("flax", "optax", "orbax", "grain", "ml_collections", "mosaics_jax")),
        ("mosaics_jax.nn", ("jax.sharding", "ml_collections", "mosaics_jax.sharding")),
        ("mosaics_jax.data", ("jax", "flax")),
        ("configs", ("jax", "flax", "numpy", "mosaics_jax.nn", "mosaics_jax.train")),
        ("mosaics_jax.config", ("jax", "flax", "numpy")),
    ],
)
def test_libraries_stay_out(where: str, forbidden: tuple[str, ...]) -> None:
    for module, path in MODULES.items():
        if module == where or module.startswith(where + "."):
            for name in _imports(path):
                hit = [f for f in forbidden if name == f or name.startswith(f + ".")]
                assert not hit, f"{module} imports {name}"


def test_ml_collections_stays_at_the_edge() -> None:
    users = {m for m, path in MODULES.items() if any(n.split(".")[0] == "ml_collections" for n in _imports(path))}
    outside = {m for m in users if m.split(".")[0] not in ("configs", "launch")}
    assert outside <= {"mosaics_jax.config", "mosaics_jax.api"}


def test_every_floor_is_inhabited() -> None:
    for floor in FLOORS:
        for name in floor:
            assert any(m == name or m.startswith(name + ".") for m in MODULES), f"nothing is called {name}"


def test_reading_a_config_imports_no_jax() -> None:
    code = "import sys, configs.tiny; configs.tiny.get_config(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("command", [("check", "."), ("format", "--check", ".")])
def test_style(command: tuple[str, ...]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
