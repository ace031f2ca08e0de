"""The quickstart notebook runs from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # the kernel's machinery is not ours
def test_quickstart_runs(tmp_path: Path, all_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("SATTILE_QUICK", "1")
    monkeypatch.setenv("SATTILE_FOLDER", str(tmp_path / "quick start"))  # a space, as in many home folders
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    folder = tmp_path / "quick start"
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert metrics["miou"] > 0
    html = (folder / "report" / "index.html").read_text()
    assert "What was refused, and why" in html
    maps = [path.parent.name for path in (folder / "mosaics").glob("*/labels.tif")]
    assert len(maps) == 4
    pictures = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]  # fmt: skip
    assert len(pictures) == 4


def test_quickstart_names_no_machine() -> None:
    """Stored outputs hold no absolute path and no error."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    folders = {"home", "root", "tmp", *(one.name for one in Path("/").iterdir() if one.is_dir())}
    for word in ("Traceback", *(f"/{name}/" for name in folders)):
        assert word not in text, word
