"""The README's commands, as written, on a small archive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[str]:
    """The lines of the block below "Your own scenes"."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## Your own scenes.*?```sh\n(.*?)```", text, re.DOTALL)
    assert block
    return [line for line in block.group(1).splitlines() if line.startswith("sattile ")]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Scenes of land and water; water is dark."""
    import numpy as np
    from scenes_for_tests import write_scene

    rng = np.random.default_rng(3)
    for index in range(10):
        water = np.hypot(*(np.indices((300, 420)) - np.array([150, 40 * index])[:, None, None])) < 110
        image = np.where(water, 300, 1500) + rng.normal(0, 60, (3, 300, 420))
        where = {"west": 600_000 + 10_000 * index}
        write_scene(
            tmp_path / "scenes" / f"s{index}.tif", image.astype(np.uint16), names=("B02", "B03", "B08"), **where
        )
        write_scene(tmp_path / "labels" / f"s{index}.tif", water[None].astype(np.uint8), nodata=255, **where)
    return tmp_path


@pytest.mark.real
def test_the_commands_run_one_after_the_other(archive, all_cores):
    ran = commands()
    assert [line.split()[1] for line in ran] == ["index", "tile", "train", "evaluate", "predict", "report"]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    for line in ran:
        line = line.replace("--epochs 30", "--epochs 3")
        done = subprocess.run(
            line, shell=True, cwd=archive, env={**os.environ, "PATH": path}, capture_output=True, text=True,
            check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    assert pq.read_table(archive / "catalog" / "scenes.parquet").num_rows == 10
    metrics = json.loads((archive / "evaluation" / "metrics.json").read_text())
    assert metrics["classes"]["water"]["iou"] > 0.8
    assert len(list((archive / "mosaics").glob("*/labels.tif"))) == 10
    page = (archive / "report" / "index.html").read_text()
    assert "water" in page
    assert not re.search(r"""(src|href)=["']https?://""", page)
