"""sattile: tile satellite scenes, train segmentation models and stitch mosaics, as Spark jobs.

The functions here are the same that the commands call. Each takes the caller's own SparkSession first and returns
the URL of what it wrote. Nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_DOORS = {
    "session": "sattile.engine",
    "index": "sattile.scenes",
    "read_catalog": "sattile.scenes",
    "tile": "sattile.tiles",
    "train": "sattile.training",
    "search": "sattile.training.search",
    "bundle": "sattile.model",
    "load_bundle": "sattile.model",
    "load_scorer": "sattile.model",
    "evaluate": "sattile.evaluation",
    "predict": "sattile.prediction",
    "report": "sattile.reporting",
    "run": "sattile.pipeline",
    "reprocess": "sattile.pipeline",
    "make_archive": "sattile.demo",
}

__all__ = ["__version__", *_DOORS]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'sattile' has no attribute {name!r}")
    return getattr(importlib.import_module(_DOORS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
