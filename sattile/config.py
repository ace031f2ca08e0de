"""Settings of the commands: where they are declared, how a file and the command line set them.

A command is a thin face of one library function: its options, their types and defaults are the function's own
parameters, their help the function's docstring. So there is one place to look them up, and notebooks, YAML and the
command line agree.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from sattile import storage
from sattile.errors import UsageError, nearest


@dataclass(frozen=True)
class Option:
    """One parameter of a library function.

    Attributes:
        name: as in Python and YAML; `--name` with dashes on the command line.
        kind: `bool`, `int`, `float`, `str`, `list` (of words), or `dict`, which only Python can give.
        default: None if it must be given or has no value.
        required: has no default.
        help: its line in the docstring.
    """

    name: str
    kind: str
    default: Any
    required: bool
    help: str


@dataclass(frozen=True)
class Command:
    """A command: its name, the function behind it, and an example that runs.

    `bare` is the option, a list, whose values need no name on the command line.
    """

    name: str
    target: str
    summary: str
    example: str
    needs_spark: bool = True
    bare: str = ""

    def function(self) -> Callable[..., Any]:
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def options(self) -> list[Option]:
        """What can be set by hand."""
        found = [one for one in options_of(self.function()) if one.kind != "dict"]
        return [replace(one, kind="list") if one.name == self.bare else one for one in found]

    @property
    def chains(self) -> bool:
        """Whether it runs other commands, and takes their settings."""
        return any(one.name == "settings" for one in options_of(self.function()))


COMMANDS = {
    one.name: one
    for one in (
        Command(
            "index",
            "sattile.scenes:index",
            "list scenes, read their metadata, refuse what can't be read",
            "sattile index 'scenes/*.tif' --out catalog",
            bare="scenes",
        ),
        Command(
            "tile",
            "sattile.tiles:tile",
            "cut labelled scenes into a tiles dataset",
            "sattile tile --scenes scenes --labels labels --out tiles --size 128 --classes land,water",
        ),
        Command(
            "train",
            "sattile.training:train",
            "train a segmentation model on a tiles dataset",
            "sattile train --dataset tiles --out model --epochs 10",
        ),
        Command(
            "search",
            "sattile.training.search:search",
            "train over a small grid of settings, as Spark tasks, and say which is best",
            "sattile search --dataset tiles --grid 'arch=unet-small,light-small' --set train.epochs=10 --out search",
        ),
        Command(
            "bundle",
            "sattile.model:bundle",
            "make a bundle of a Keras model trained elsewhere",
            "sattile bundle --keras net.h5 --bands B04,B03,B02 --classes land,water --activation sigmoid --out model",
            needs_spark=False,
        ),
        Command(
            "evaluate",
            "sattile.evaluation:evaluate",
            "measure a model on a dataset's split, or on scenes with labels",
            "sattile evaluate --model model --dataset tiles --split test --out evaluation",
        ),
        Command(
            "predict",
            "sattile.prediction:predict",
            "stitch segmentation maps of scenes",
            "sattile predict --model model --scenes 'scenes/*.tif' --out mosaics",
        ),
        Command(
            "report",
            "sattile.reporting:report",
            "one page that says what ran, how well, and shows it",
            "sattile report catalog tiles model evaluation mosaics --out report",
            needs_spark=False,
            bare="folders",
        ),
        Command(
            "run",
            "sattile.pipeline:run",
            "index, tile, train, evaluate, predict and report, one after the other",
            "sattile run --scenes scenes --labels labels --out work --set train.epochs=10 --set tile.size=128",
        ),
        Command(
            "reprocess",
            "sattile.pipeline:reprocess",
            "bring the maps of an archive up to date, every night: index, predict, report",
            "sattile reprocess --model model --scenes 'scenes/*.tif' --out nightly",
        ),
        Command(
            "doctor",
            "sattile.doctor:doctor",
            "check the session, its executors and a shared folder, and say what to set",
            "sattile doctor --folder work --workers 2",
        ),
        Command(
            "demo",
            "sattile.pipeline:demo",
            "make a small archive and run everything on it",
            "sattile demo --out demo",
        ),
    )
}

JOB_KEYS = {
    "master": (str, "where Spark runs: local[2], yarn, ... (default: local[*], or what spark-submit said)"),
    "max_failed_fraction": (float, "refused scenes / given ones above which a command exits with 3 (default: 0.1)"),
    "spark": (dict, "Spark settings, name: value"),
    "verbose": (bool, "say more"),
}
"""Keys beside the commands' sections: not settings of a result."""


def options_of(function: Callable[..., Any]) -> list[Option]:
    """The options of a library function: its parameters but the session."""
    hints = typing.get_type_hints(function, localns={"SparkSession": Any})
    texts = _argument_texts(inspect.getdoc(function) or "")
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "spark" or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        found.append(Option(name, _kind(hints.get(name, str)), default, required, texts.get(name, "")))
    return found


def _kind(hint: Any) -> str:
    """`bool`, `int`, `float`, `str` or `list` for an annotation; the widest of a union that can be typed in."""
    if hint in (bool, int, float, str):
        return hint.__name__
    arguments = [one for one in typing.get_args(hint) if one is not type(None)]
    kinds = [_kind(one) for one in arguments] if _is_union(hint) else []
    if kinds:
        return "str" if "str" in kinds else kinds[0]
    if typing.get_origin(hint) is Mapping:
        return "dict"
    return "list" if typing.get_origin(hint) in (list, tuple, Sequence) or "Sequence" in str(hint) else "str"


def _is_union(hint: Any) -> bool:
    import types

    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _argument_texts(doc: str) -> dict[str, str]:
    """The `Args:` of a Google-style docstring, {name: text}."""
    match = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in (match.group(1) if match else "").splitlines():
        start = re.match(r"    (\w+(?:, \w+)*)(?: \([^)]*\))?: (.*)", line)
        if start:  # `size, stride: ...` speaks of both
            names = start.group(1).split(", ")
            texts |= dict.fromkeys(names, start.group(2))
        elif names and line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


UNREADABLE = (yaml.YAMLError, ValueError, AttributeError, RecursionError)
"""What yaml raises for what it can't read: the thirteenth month, a number that is none, brackets without end."""


def load(path: str | None, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """Settings from a YAML file and `a.b=c` assignments, checked; the latter win.

    Returns:
        {command: {option: value}, and the job's own keys}.

    Raises:
        UsageError: for an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    found: dict[str, Any] = {}
    if path is not None:
        entry = storage.stat(path)
        if entry is None or entry.is_folder:
            raise UsageError(f"--conf {path} {'is a folder; name a YAML file' if entry else 'does not exist'}")
        try:
            found = yaml.safe_load(storage.read_text(path)) or {}
        except UNREADABLE as error:
            raise UsageError(f"--conf {path} is not YAML: {error}") from error
        if not isinstance(found, dict):
            raise UsageError(f"--conf {path}: give sections such as `predict:` with their settings below")
    settings = _checked(found, path or "--conf")
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r}: write it as section.name=value, such as train.epochs=10")
        section, _, name = key.strip().partition(".")
        value = _assigned(section, name, text)
        checked = _checked({section: {name: value} if name else value}, f"--set {assignment}")
        for section_name, part in checked.items():
            settings[section_name] = {**settings.get(section_name, {}), **part} if isinstance(part, dict) else part
    return settings


def _assigned(section: str, name: str, text: str) -> Any:
    """The value of an assignment: as YAML has it, but words stay words ('{scene}, {band}.tiff', 'no', '007')."""
    try:
        value = yaml.safe_load(text)
    except UNREADABLE:
        return text
    known = {option.name: option for option in COMMANDS[section].options()} if section in COMMANDS else {}
    words = name in known and known[name].kind in ("str", "list")
    return text if words and value is not None and not isinstance(value, list) else value


def _checked(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for section, value in found.items():
        if section in COMMANDS:
            known = {option.name: option for option in COMMANDS[section].options()}
            if not isinstance(value, Mapping | None):
                raise UsageError(f"{where}: {section} is a section; give its settings below it")
            value = value or {}
            for name in value:
                if name not in known:
                    raise UsageError(f"{where}: {section}.{name} is no setting{nearest(str(name), known, section)}")
            # Nothing behind the colon is "not set", which some options have a word for.
            said = {name: one for name, one in value.items() if one is not None or known[name].default is None}
            checked[section] = {name: convert(known[name], one, where) for name, one in said.items()}
        elif section in JOB_KEYS:
            kind = JOB_KEYS[section][0]
            if value is None:
                continue
            try:
                if isinstance(value, bool) != (kind is bool):
                    raise ValueError
                checked[section] = dict(value) if kind is dict else kind(value)
            except (TypeError, ValueError):
                raise UsageError(f"{where}: {section} {value!r} is no {kind.__name__}") from None
        else:
            inside = [name for name, one in COMMANDS.items() if section in {option.name for option in one.options()}]
            hint = f"; did you mean {inside[0]}.{section}?" if inside else nearest(str(section), [*COMMANDS, *JOB_KEYS])
            raise UsageError(f"{where}: {section} is no setting{hint}")
    return checked


def convert(option: Option, value: Any, where: str) -> Any:
    """A value from YAML or the command line as the function takes it.

    Raises:
        UsageError: if it is of another type.
    """
    if value is None:
        return None
    try:
        if option.kind == "bool":
            if not isinstance(value, bool):
                raise ValueError
            return value
        if option.kind == "int":
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
            return int(value)
        if option.kind == "float":
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        words = value if isinstance(value, list | tuple) else [value]
        if option.kind in ("str", "list") and any(isinstance(one, bool | dict | None) for one in words):
            raise ValueError  # yes and no are no words in YAML unless they are quoted
        if option.kind == "list":
            return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
    except (TypeError, ValueError, OverflowError):
        quoted = "; put words such as yes, no, on and off in quotes" if option.kind in ("str", "list") else ""
        raise UsageError(f"{where}: {option.name} {value!r} is no {option.kind}{quoted}") from None
    return ",".join(map(_part, value)) if isinstance(value, list | tuple) else str(value)


def _part(value: Any) -> str:
    """An item of a list as a part of an option's text: one with a comma stands in quotes, where options know them."""
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if "," in text and not text.startswith('"') else text
