"""Law 6 on executors of their own: N barrier tasks train to the weights of one worker."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

SCRIPT = """
import sys
from sattile import engine
from sattile.training import train

if __name__ == "__main__":
    spark = engine.session("local-cluster[2,1,1024]", conf={"spark.executor.memory": "512m"})
    assert spark.sparkContext.master.startswith("local-cluster")
    train(spark, dataset=sys.argv[1], out=sys.argv[2], workers=2, arch="unet-tiny", epochs=2, batch_size=12)
    spark.stop()
"""


def weights(model: Path) -> list[np.ndarray]:
    """All weights of a `.keras` file, by name, without TensorFlow."""
    import h5py

    found: list[np.ndarray] = []
    with zipfile.ZipFile(model / "model.keras") as archive, archive.open("model.weights.h5") as file:
        content = h5py.File(file, "r")
        content.visititems(lambda _, node: found.append(node[()]) if isinstance(node, h5py.Dataset) else None)
    return found


def test_two_executors_train_to_the_weights_of_one_worker(spark, tmp_path):
    from scenes_for_tests import position_image, write_scene

    from sattile.tiles import tile
    from sattile.training import train

    write_scene(tmp_path / "a.tif", position_image(160, 224, 3))
    write_scene(tmp_path / "l.tif", (np.indices((160, 224)).sum(0) // 24 % 2).astype(np.uint8)[None])
    dataset = tile(spark, scenes=[str(tmp_path / "a.tif")], labels=str(tmp_path / "l.tif"), size=32,
                   fractions="1,0,0", out=str(tmp_path / "tiles"))  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), dataset, str(tmp_path / "two")], capture_output=True, text=True, check=False,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    train(spark, dataset=dataset, out=str(tmp_path / "one"), arch="unet-tiny", epochs=2, batch_size=12)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert len(one) == len(two) > 20
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)
