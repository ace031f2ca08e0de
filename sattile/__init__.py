"""sattile: tile satellite scenes, train segmentation models and stitch mosaics, as Spark jobs.

The functions here are what the commands call, and what reads their results. Those that need Spark take the caller's own
session first; paths may be text or `pathlib`'s. Nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from itertools import zip_longest
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
    return _door(getattr(importlib.import_module(_DOORS[name]), name))


def _door(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes what people give it: paths of `pathlib`, one scene where there may be several."""
    names = list(inspect.signature(function).parameters)

    def taken(name: str | None, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, list | tuple):
            value = type(value)(os.fspath(one) if isinstance(one, os.PathLike) else one for one in value)
        return [value] if name in ("scenes", "folders") and isinstance(value, str) else value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [taken(name, value) for name, value in zip_longest(names[: len(args)], args)]
        return function(*given, **{name: taken(name, value) for name, value in kwargs.items()})

    return call


def __dir__() -> list[str]:
    return sorted(__all__)
