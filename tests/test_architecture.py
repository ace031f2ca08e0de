"""The structure that docs/architecture.md draws is the one the imports have."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sattile"

LAYERS = [
    {"cli", "submit"},
    {"config"},
    {"pipeline"},
    {"evaluation"},
    {"tiles", "training", "prediction", "doctor"},
    {"sheets", "processors"},
    {"mapreduce"},
    {"inference", "strata", "reporting", "shape_windows"},
    {"warp", "scenes", "labels", "model", "mosaic", "vectors", "pictures", "comparison", "demo"},
    {"versions", "card", "shapes", "sidecars", "foreign"},
    {
        "raster",
        "cog",
        "decoder",
        "dataset",
        "receptive",
        "fusion",
        "record",
        "engine",
        "legend",
        "metrics",
        "figures",
        "scorers",
        "stac",
    },
    {"schema", "stitch"},
    {"drift", "geography", "keras2", "grid", "memory", "spectrum", "split", "statistics", "storage"},
    {"errors"},
]
"""From top to bottom. A module imports from layers below its own."""

OWNERS = {
    "rasterio": {"raster", "shapes", "cog", "demo"},
    "tensorflow": {"scorers", "receptive", "training", "model"},
    "openvino": {"scorers"},
    "keras": {"model", "foreign", "receptive", "fusion", "training"},
    "petastorm": {"dataset"},
    "geopandas": {"labels", "scenes", "tiles", "prediction"},
    "pystac": {"scenes", "card"},
    "matplotlib": {"figures"},
    "jinja2": {"reporting"},
}


def imports(path: Path) -> set[str]:
    """All modules a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def modules() -> dict[str, set[str]]:
    """{module: what it imports}; training's files are one module."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name != "__init__":
            found.setdefault(name, set()).update(imports(path))
    return found


def test_every_module_has_a_layer():
    assert set(modules()) == set.union(*LAYERS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_from_layers_below_only(name):
    level = next(index for index, layer in enumerate(LAYERS) if name in layer)
    below = set().union(*LAYERS[level + 1 :])
    used = {one.split(".")[1] for one in modules()[name] if one.startswith("sattile.")}
    assert used - {name, "__version__"} <= below


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_heavy_library_has_its_owners(library):
    users = {name for name, used in modules().items() if any(one.split(".")[0] == library for one in used)}
    assert users <= OWNERS[library]


def test_architecture_page_names_every_module():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    assert not [name for name in modules() if f"`{name}" not in page]


def test_importing_sattile_loads_nothing_heavy():
    code = (
        "import sys, sattile, sattile.grid, sattile.stitch, sattile.config, sattile.cli; "
        "heavy = ('tensorflow', 'keras', 'pyspark', 'rasterio', 'petastorm', 'geopandas'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
