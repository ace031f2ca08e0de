"""Which value of label files is which class.

A class has an id (0 to 254, what labels and maps hold), a name, and, where it differs from the id, the value that
stands in the label files. The same rules hold for rasters and vectors:

* whole numbers from 0 to 254 are ids; other numbers and texts get free ids, in numeric, then alphabetical order;
* a text that is a number is that number: `01` of an attribute is 1;
* a value is looked up among values first, then, if it is a text, among names: a name never shadows a value, and the id
  of a class with a value of its own is no value.
"""

from __future__ import annotations

import csv
import io
import math
import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sattile.errors import Refused, UsageError
from sattile.schema import IGNORE, SegmentClass, colored

Value = int | float | str
"""As it stands in label files: a whole number is an int, whatever its type there."""

# An exponent has its sign, as Python writes it: 1e3 may be somebody's code, 1e-05 and -3.4e+38 are numbers.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]\d+)?", re.ASCII)
_COLOR = re.compile("#[0-9A-Fa-f]{6}")

MOST_SHOWN = 8
"""Values that a message names."""


def value_of(stored: Any) -> Value | None:
    """Give a stored number or text its one form; None for what is missing or empty.

    Texts are in Unicode's composed form (NFC) and without spaces around them.
    """
    if stored is None:
        return None
    if isinstance(stored, bool) or not hasattr(stored, "__float__"):
        text = unicodedata.normalize("NFC", str(stored)).strip()
        if not _NUMBER.fullmatch(text):
            return text or None
        stored = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    # 0.1 of float32 is 0.1; whole numbers keep all their digits.
    number = int(stored) if isinstance(stored, int | np.integer) else float(str(stored))
    if isinstance(number, float) and not math.isfinite(number):
        return None
    return int(number) if number == int(number) and abs(number) < 1 << 63 else number


def order(value: Value) -> tuple[bool, float, str]:
    """Sort key: numbers by size, then texts by letters."""
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")


def is_color(text: str) -> bool:
    return _COLOR.fullmatch(text) is not None


def is_id(value: Value) -> bool:
    """Whether a value is its own class id."""
    return isinstance(value, int) and 0 <= value < IGNORE


def assign_ids(values: Iterable[Value], taken: Iterable[int] = ()) -> dict[Value, int]:
    """Give each value its class id: its own where it is one, else the lowest that is free.

    Args:
        values: as of `value_of`.
        taken: ids that are used already.

    Raises:
        UsageError: if there are more than fit.
    """
    ordered = sorted(set(values), key=order)
    used = {*taken, *(value for value in ordered if is_id(value))}
    free = iter([one for one in range(IGNORE) if one not in used])
    try:
        return {value: int(value) if is_id(value) else next(free) for value in ordered}
    except StopIteration:
        raise UsageError(
            f"labels hold {len(ordered)} different values ({shown(ordered)}); a map holds at most {IGNORE} classes: "
            f"leave some out (--ignore V,W), or give fewer of them names (--classes) in a file with fewer"
        ) from None


def classes_of(values: Iterable[Value]) -> tuple[SegmentClass, ...]:
    """Name the classes of values that nobody named: numbers `class_7`, texts by themselves."""
    ids = assign_ids(values)
    mixed = any(not isinstance(value, str) for value in ids)
    names: set[str] = set()
    found = []
    for value, class_id in sorted(ids.items(), key=lambda item: (isinstance(item[0], str), item[1])):
        name = value if isinstance(value, str) else f"class_{written(value)}"
        while name in names:
            name += "_"  # a text that reads as a number's name does
        names.add(name)
        # Among numbers, the id of a text would be taken for the number that it is.
        found.append((class_id, name, None, None if is_id(value) or not mixed else value))
    return colored(found)


def parse_classes(text: str | Sequence[str] | None, *, by_id: bool = True) -> tuple[SegmentClass, ...] | None:
    """Read `land,water` (ids 0, 1), `land=0,water=255` (the values in the files; also `0:land`), `clouds=C` (a text).

    Names with commas stand in double quotes; `=`, `:` and `#` of a name itself behind a backslash. A colour may follow:
    `water=1=#332288`.

    Args:
        by_id: in the order of their ids; else in that in which they are named.

    Raises:
        UsageError: for names, values or ids that are given twice, and for what can't be read.
    """
    if not text:
        return None
    parts = _split(text) if isinstance(text, str) else list(text)
    names: list[str] = []
    values: list[Value | None] = []
    colors: list[str | None] = []
    for part in parts:
        pairs = re.sub(r"^\s*([+-]?[\d.]+)\s*:", r"\1=", part)
        fields = [one.strip() for one in re.split(r"(?<!\\)=", pairs)]
        color = fields.pop() if len(fields) > 1 and is_color(fields[-1]) else None
        said = [value_of(re.sub(r"\\([\\=:#])", r"\1", field)) for field in fields]
        if len(fields) not in (1, 2) or None in said or any(field.startswith("#") for field in fields):
            raise UsageError(
                f"classes: {part!r} is not NAME, NAME=VALUE or NAME=VALUE=#rrggbb (= : and # of a name itself: "
                f"\\= \\: \\#)"
            )
        if len(said) == 2 and not isinstance(said[0], str):
            said.reverse()  # 0:land
        name, value = (said[0], said[1]) if len(said) == 2 else (said[0], None)
        if not isinstance(name, str):  # a number alone
            if value is not None:
                raise UsageError(f"classes: {part!r}: a name that is a number would be taken for a value; use a word")
            name, value = f"class_{written(name or 0)}", name
        names.append(name)
        values.append(value)
        colors.append(color)
    placed = [place if value is None else value for place, value in enumerate(values)]
    if len({*names}) < len(names) or len({*placed}) < len(placed):
        raise UsageError(
            f"classes {text!r}: names must differ, and so must values (a name alone has its place as value, from 0): "
            f"{', '.join(f'{name}={written(value)}' for name, value in zip(names, placed, strict=True))}"
        )
    if len(placed) > IGNORE or any(value is None and not is_id(place) for place, value in enumerate(values)):
        raise UsageError(f"classes: {len(placed)} of them; a map holds at most {IGNORE}")
    ids = assign_ids(placed)
    found = colored(
        [
            (ids[place], name, color, None if is_id(place) else place)
            for place, name, color in zip(placed, names, colors, strict=True)
        ]
    )
    return found if by_id else tuple(sorted(found, key=lambda one: names.index(one.name)))


def all_colored(text: str | Sequence[str] | None) -> bool:
    """Whether each of these classes was given a colour."""
    parts = _split(text) if isinstance(text, str) and text else text or ()
    return all(is_color(part.rpartition("=")[2].strip()) for part in parts)


def lookup(classes: Iterable[SegmentClass]) -> dict[Value, int]:
    """Class ids by all that may stand in a label file for them: values, then names."""
    found: dict[Value, int] = {one.id if one.value is None else one.value: one.id for one in classes}
    for one in classes:
        found.setdefault(unicodedata.normalize("NFC", one.name), one.id)
    return found


def numbers(classes: Iterable[SegmentClass]) -> tuple[tuple[float, int], ...]:
    """(value, class id) of what may stand in a label raster."""
    return tuple((value, one) for value, one in lookup(classes).items() if not isinstance(value, str))


def written(value: Value) -> str:
    """A value as a message shows it; a number as it is read back."""
    return repr(value) if not isinstance(value, str) else f'"{value}"' if "," in value else value


def _split(text: str) -> list[str]:
    """The parts of an option between commas; in double quotes, a part may have commas and line breaks."""
    try:
        (row,) = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    except (csv.Error, ValueError):
        raise UsageError(f"{text!r}: what has a line break or a comma stands in double quotes") from None
    return row


def join(parts: Iterable[str]) -> str:
    """The parts as `_split` reads them."""
    line = io.StringIO()
    csv.writer(line).writerow(list(parts))
    return line.getvalue().removesuffix("\r\n")


def _escaped(text: str) -> str:
    """A name or value as a part of `parse_classes`."""
    return re.sub(r"^(\s*[+-]?[\d.]+\s*):", r"\1\:", re.sub(r"([\\=])|^(?=#)", r"\\\1", text))


def shown(values: Iterable[Value]) -> str:
    """Some values, in their order, for a message."""
    ordered = sorted(set(values), key=order)
    more = f" and {len(ordered) - MOST_SHOWN} more" if len(ordered) > MOST_SHOWN else ""
    return ", ".join(map(written, ordered[:MOST_SHOWN])) + more


def named_line(classes: Iterable[SegmentClass], seen: Iterable[Value]) -> str:
    """Write the `--classes` option that keeps the classes that there are and gives the other values seen one each.

    Names without values that are as many as the numbers seen are meant for these, one after the other.
    """
    classes, ordered = tuple(classes), sorted(set(seen), key=order)
    known = lookup(classes)
    new = [value for value in ordered if value not in known]
    bare = all(one.value is None for one in classes) and [one.id for one in classes] == list(range(len(classes)))
    fields: list[tuple[str, Value | None]]
    if bare and len(classes) == len(ordered) and not any(isinstance(value, str) for value in ordered):
        fields = [(one.name, value) for value, one in zip(ordered, classes, strict=True)]
    elif bare and all(isinstance(value, str) for value in new):
        fields = [(name, None) for name in (*(one.name for one in classes), *map(str, new))]
    else:
        ids = assign_ids(new, [one.id for one in classes])
        fields = [(one.name, one.id if one.value is None else one.value) for one in classes]
        fields += [(value, ids[value]) if isinstance(value, str) else (f"class_{value}", value) for value in new]
    parts = [
        _escaped(name) + ("" if value is None else f"={_escaped(value) if isinstance(value, str) else repr(value)}")
        for name, value in fields
    ]
    return f"--classes {shlex.quote(join(parts))}"


def ignore_line(values: Iterable[Value]) -> str:
    """Write the `--ignore` option that leaves values unlabelled; the first ones, where there are many."""
    chosen = sorted(set(values), key=order)[:MOST_SHOWN]
    return f"--ignore {shlex.quote(join(one if isinstance(one, str) else repr(one) for one in chosen))}"


def parse_values(text: str | float | Sequence[Any] | None, option: str = "ignore") -> list[Value]:
    """Read values of labels: 0, [0, 99], '0,99' or 'clouds,-9999', sorted.

    Raises:
        UsageError: for an empty one.
    """
    if isinstance(text, str):
        parts: Sequence[Any] = _split(text) if text else ()
    else:
        parts = [text] if isinstance(text, int | float) else text or ()
    found = [value_of(part) for part in parts]
    if None in found or any(isinstance(part, bool) for part in parts):
        raise UsageError(f"{option} {text!r}: give values of the labels, such as 0,99 or clouds")
    return sorted({value for value in found if value is not None}, key=order)


def called(classes: Iterable[SegmentClass]) -> str:
    """Classes with the values that stand for them, for a message."""
    return ", ".join(f"{one.name}={written(one.id if one.value is None else one.value)}" for one in classes)


ENCODINGS = ("index", "rgb", "one-hot")
"""How a label raster says its classes: by one number a pixel, by the classes' colours, or by a band for each class."""


@dataclass(frozen=True)
class Legend:
    """What the values of a label raster mean.

    Attributes:
        encoding: one of `ENCODINGS`.
        classes: those that there are; None takes ids as they stand there.
        ignore: values (of colour masks: colours) that mean "unlabelled", besides the file's nodata.
        of_model: the classes are a model's, which no option changes.
    """

    encoding: str = "index"
    classes: tuple[SegmentClass, ...] | None = None
    ignore: tuple[Value, ...] = ()
    of_model: bool = False

    def ids(self, values: np.ndarray, good: np.ndarray, url: str) -> tuple[np.ndarray, int]:
        """Stored values as class ids.

        Args:
            values: (..., bands) as stored.
            good: (...) bool: neither nodata nor masked.
            url: for messages.

        Returns:
            (...) uint8; and how many are 255 though nobody says what that means.

        Raises:
            Refused: for values that are no class.
        """
        if self.encoding == "rgb":
            return self._of_colors(values, good, url), 0
        if self.encoding == "one-hot":
            return self._of_bands(values, good, url), 0
        return self._of_numbers(values[..., 0], good, url)

    def _of_numbers(self, values: np.ndarray, good: np.ndarray, url: str) -> tuple[np.ndarray, int]:
        # Numbers and the ids that they are read as; without classes all that can be ids are.
        known = numbers(self.classes) if self.classes else tuple((one, one) for one in range(IGNORE))
        table = dict(known) | {value: IGNORE for value in self.ignore if not isinstance(value, str)}
        unsaid = IGNORE not in table
        table.setdefault(IGNORE, IGNORE)
        inside = values if good.all() else values[good]
        if values.dtype == np.uint8:
            bytes_known = [key for key in table if isinstance(key, int) and 0 <= key <= IGNORE]
            ids = np.full(256, IGNORE, np.uint8)
            ids[bytes_known] = [table[key] for key in bytes_known]
            counts = np.bincount(inside.ravel(), minlength=256)
            if (strange := np.setdiff1d(np.flatnonzero(counts), bytes_known)).size:
                raise Refused(self._no_class(strange, url))
            return np.where(good, ids[values], np.uint8(IGNORE)), int(counts[IGNORE]) if unsaid else 0
        inside = inside.ravel()
        undeclared = int((inside == IGNORE).sum()) if unsaid else 0
        if values.dtype.kind == "f":
            held = sorted(table)
            keys = np.array(held, np.float64).astype(values.dtype)
        else:  # compared as they are: float64 has not all whole numbers
            limits = np.iinfo(values.dtype)
            held = sorted(one for one in table if isinstance(one, int) and limits.min <= one <= limits.max)
            keys = np.array(held, values.dtype)
        at = np.minimum(np.searchsorted(keys, inside), len(keys) - 1)
        if (wrong := keys[at] != inside).any():
            raise Refused(self._no_class(np.unique(inside[wrong]), url))
        found = np.full(values.shape, IGNORE, np.uint8)
        found[good] = np.array([table[key] for key in held], np.uint8)[at]
        return found, undeclared

    def _no_class(self, stored: np.ndarray, url: str) -> str:
        if stored.size > IGNORE:
            return (
                f"labels {url} hold {stored.size} values that are no class in one window alone: is that a raster of "
                f"classes? Another band is {url}:N"
            )
        strange = [value for value in map(value_of, stored) if value is not None]
        ignore = ignore_line(strange)
        if self.classes is None:
            return (
                f"labels {url} hold {shown(strange)}; class ids are whole numbers from 0 to 254 (values that "
                f"mean no label: {ignore}, or declare them: gdal_edit.py -a_nodata V FILE)"
            )
        name = (
            "the model has no such class"
            if self.of_model
            else f"name it among the classes, such as "
            f"{named_line(self.classes, [*dict(numbers(self.classes)), *strange])}"
        )
        return (
            f"labels {url} hold value {shown(strange)}, which is no class ({called(self.classes)}); {name}, or ignore "
            f"it: {ignore}"
        )

    def _of_colors(self, values: np.ndarray, good: np.ndarray, url: str) -> np.ndarray:
        """Each pixel's class by its colour."""
        if values.shape[-1] != 3 or values.dtype != np.uint8:
            raise Refused(
                f"labels {url} have {values.shape[-1]} bands of {values.dtype}; a colour mask has three of uint8 "
                f"(red, green, blue; alpha aside)"
            )
        packed = values.astype(np.int64) @ np.array([65536, 256, 1])
        table = {int(one.color[1:], 16): one.id for one in self.classes or ()}
        table |= {int(one[1:], 16): IGNORE for one in map(str, self.ignore) if is_color(one)}
        keys = np.array(sorted(table))
        inside = packed[good]
        at = np.minimum(np.searchsorted(keys, inside), len(keys) - 1)
        if (strange := keys[at] != inside).any():
            seen = [f"#{one:06x}" for one in np.unique(inside[strange])[:MOST_SHOWN].tolist()]
            classes = self.classes or ()
            line = join([*(f"{_escaped(one.name)}={one.id}={one.color}" for one in classes), f"another={seen[0]}"])
            name = "the model has" if self.of_model else "give each class its colour, such as --classes"
            raise Refused(
                f"labels {url} hold colours that are no class: {', '.join(seen)}; {name} {shlex.quote(line)}, or "
                f"ignore some: {ignore_line(seen)}"
            )
        found = np.full(packed.shape, IGNORE, np.uint8)
        found[good] = np.array([table[key] for key in sorted(table)], np.uint8)[at]
        return found

    def _of_bands(self, values: np.ndarray, good: np.ndarray, url: str) -> np.ndarray:
        """Each pixel's class by the one band that is not 0 there; none is unlabelled."""
        ids = [one.id for one in self.classes] if self.classes else list(range(values.shape[-1]))
        if values.shape[-1] != len(ids):
            raise Refused(
                f"labels {url} have {values.shape[-1]} bands (alpha aside) for {len(ids)} classes "
                f"({called(self.classes or ())}); one-hot labels have one for each, in the order of their ids"
            )
        marked = (values != 0) & good[..., None]
        if twice := int((marked.sum(-1) > 1).sum()):
            raise Refused(
                f"labels {url} give {twice} pixels several classes; one-hot labels are 0 in all bands but one"
            )
        return np.where(marked.any(-1), np.array(ids, np.uint8)[marked.argmax(-1)], np.uint8(IGNORE))
