"""What a job did, and how it ends: `_run.json`, `_quarantine.parquet`, the exit status.

Every command works inside one `Run`. It holds the out folder's lease, refuses a folder made with other settings,
times the stages, and collects what was refused.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import sattile
from sattile import schema, storage
from sattile.errors import SattileError, TooManyRefused, UsageError, unforeseen
from sattile.memory import peak_mb
from sattile.schema import Refusal

log = logging.getLogger("sattile")

RUN = "_run.json"
QUARANTINE = "_quarantine.parquet"
STARTED = "_started.json"
"""Settings of a run while it goes on: what a killed one leaves, so that the next run with them may finish it."""

NOTES = ("unlike", "before")
"""What a run finds out that the one which goes on for it has to know, though it does not find it out again."""

OF_ANY = ("before",)
"""Those that hold for other settings, too."""


PACKAGES = (
    "pyspark", "tensorflow", "tensorflow-cpu", "openvino", "keras", "rasterio", "pyproj", "shapely", "numpy", "pyarrow",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of all that shapes a result."""
    found = {"python": platform.python_version(), "sattile": sattile.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settings_of(out: str) -> dict[str, Any] | None:
    """Settings of the run that made a folder, or goes on in it; None where there is none that says them."""
    for mark in (STARTED, RUN):
        url = storage.join(out, mark)
        if storage.exists(url):
            try:
                settings = storage.read_json(url)["settings"]
            except (SattileError, KeyError, TypeError):
                continue
            if isinstance(settings, dict):
                return settings
    return None


@dataclass
class Stage:
    """One timed stage of a run; `pixels` may be set while it runs."""

    name: str
    seconds: float = 0.0
    pixels: int = 0

    def to_dict(self) -> dict[str, Any]:
        rate = round(self.pixels / 1e6 / self.seconds, 3) if self.pixels and self.seconds else None
        return {"name": self.name, "seconds": round(self.seconds, 3), "pixels": self.pixels, "mpix_per_s": rate}


@dataclass
class Run:
    """The record of one command over one out folder. Use as a context manager.

    Args:
        command: its name.
        out: the out folder.
        settings: all that shapes the result (JSON values); two runs into one folder must agree on it.
        overwrite: replace what was made with other settings.
        max_failed_fraction: refused / given above which `finish` raises.
        what: the word for what is given and refused.

    Raises:
        UsageError: on entering, if the folder is being written, holds other settings or is none of ours.
    """

    command: str
    out: str
    settings: dict[str, Any]
    overwrite: bool = False
    max_failed_fraction: float = 0.1
    stages: list[Stage] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    given: int = 0
    what: str = "scenes"
    done: int = 0
    skipped: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    peak_memory: float = 0.0

    def __enter__(self) -> Run:
        if not 0 <= self.max_failed_fraction <= 1:
            raise UsageError(f"max_failed_fraction {self.max_failed_fraction:g}: give a share from 0 to 1")
        self.settings = plain(self.settings)
        self.previous = self._read_previous()
        self.changed = False
        if self.previous and self.previous["settings"] is not None:
            self.changed = self._differs(self.previous["settings"], self.settings)
        self.replacing = self.changed or bool((self.previous or {}).get("replacing"))
        self._lease = storage.Lease(self.out)
        try:
            self._lease.__enter__()
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UsageError(f"--out {self.out} can't be written: {error.strerror or error}") from error
        earlier, url = self.previous or {}, storage.join(self.out, STARTED)
        self.notes = {one: earlier[one] for one in (OF_ANY if self.changed else NOTES) if one in earlier}
        self._started = storage.read_bytes(url) if storage.exists(url) else None
        self.note()
        return self

    def _differs(self, before: dict[str, Any], now: dict[str, Any]) -> bool:
        changed = _differences(before, now)
        if changed and not self.overwrite and self._made():
            raise UsageError(
                f"{self.out} was made with other settings ({'; '.join(changed)}); "
                f"use another --out, or --overwrite to replace it"
            )
        return bool(changed)

    def compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Compare what is no setting of all folders: where it differs, what lies here is replaced as by others.

        Raises:
            UsageError: if it differs, without `overwrite`.
        """
        if not self.replacing and self._differs(before, now):
            self.replacing = True
            self.note()

    def note(self, **noted: Any) -> None:
        """Keep something for the run that goes on, should this one be killed: of the names in `NOTES`."""
        self.notes |= noted
        started = {"command": self.command, "settings": self.settings, **self.notes}
        if self.replacing:
            started["replacing"] = True
        storage.write_json(storage.join(self.out, STARTED), started)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and self.is_held:
            if not self._visible():
                storage.remove(storage.join(self.out, STARTED))  # nothing was made: nothing to finish or to agree with
            elif issubclass(kind, UsageError):
                self._forget()
        self._lease.__exit__(kind, *rest)

    def _forget(self) -> None:
        """What was asked for cannot be: let the next run agree with what lies here, and not with these settings."""
        url = storage.join(self.out, STARTED)
        if self._started is not None:
            storage.write_bytes(url, self._started)
        elif self.previous:
            storage.remove(url)
        else:
            storage.write_json(url, {"command": self.command, "settings": None, **self.notes})

    def _made(self) -> bool:
        """Whether anything lies there but what each run writes: nothing is lost with that."""
        names = {storage.name(entry.url) for entry in storage.list_folder(self.out)}
        return bool(names - {RUN, STARTED, QUARANTINE, storage.Lease.NAME})

    def _visible(self) -> list[str]:
        """Names of what lies in the out folder, but for our own marks."""
        names = (storage.name(entry.url) for entry in storage.list_folder(self.out))
        return [one for one in names if not one.startswith((".", "_"))]

    def _read_previous(self) -> dict[str, Any] | None:
        if not self.out:  # of an unset variable; it would be the root
            raise UsageError("--out is empty; name a folder")
        entry = storage.stat(self.out)
        if entry is None:
            return None
        if not entry.is_folder:
            raise UsageError(f"--out {self.out} is a file; name a folder")
        marks = [mark for mark in (STARTED, RUN) if storage.exists(storage.join(self.out, mark))]
        if not marks:
            strangers = self._visible()
            if strangers:
                raise UsageError(
                    f"{self.out} holds files that no sattile run left there (such as "
                    f"{strangers[0]}); name an empty or new folder"
                )
            return None
        previous = self._read_marks([storage.join(self.out, mark) for mark in marks])
        if previous.get("command") != self.command:
            raise UsageError(
                f"{self.out} was written by `sattile {previous.get('command')}`; `sattile {self.command}` needs "
                f"a folder of its own"
            )
        return previous

    def _read_marks(self, urls: Sequence[str]) -> dict[str, Any]:
        """What the first whole one says; of damaged ones whose they are: maps and tiles say what they are made of."""
        for url in urls:
            try:
                found = storage.read_json(url)
                if isinstance(found, dict) and isinstance(found.get("settings", 0), dict | None) and "command" in found:
                    return found
            except SattileError:
                pass
            log.warning("%s: %s is damaged; it is written anew", self.command, url)
        commands = (re.search(rb'"command": "(\w+)"', storage.read_bytes(url)) for url in urls)
        said = next((one.group(1).decode() for one in commands if one), self.command)
        return {"command": said, "settings": None}

    @property
    def finished_before(self) -> bool:
        """A whole run with these very settings lies here; if its inputs are the same, too, is the caller's to say."""
        return bool(self.previous) and not self.replacing and (self.previous or {}).get("finished", False)

    @contextmanager
    def stage(self, name: str, pixels: int = 0) -> Iterator[Stage]:
        """Time a stage; it is recorded even if it fails."""
        stage = Stage(name, pixels=pixels)
        self.stages.append(stage)
        log.info("%s: %s ...", self.command, name)
        start = time.monotonic()
        try:
            yield stage
        finally:
            stage.seconds += time.monotonic() - start
            speed = f", {stage.pixels / 1e6 / stage.seconds:.1f} Mpix/s" if stage.pixels and stage.seconds else ""
            log.info("%s: %s took %.1f s%s", self.command, name, stage.seconds, speed)

    @property
    def is_held(self) -> bool:
        """Whether the out folder is still this job's to write to."""
        return self._lease.look()

    def check_held(self) -> None:
        """Before anything that others see is written or removed: the machine may have slept.

        Raises:
            SattileError: if another job has taken the folder over meanwhile.
        """
        if not self.is_held:
            raise SattileError(
                f"{self.out} was taken over by another job while this one stood still; let that one finish, then "
                f"run this again"
            )

    def refuse(self, refusals: Sequence[Refusal]) -> None:
        """Put scenes into quarantine, and say so at once."""
        for one in refusals:
            log.warning("%s: refused %s (%s): %s", self.command, one.url, one.stage, one.reason)
        self.refused.extend(refusals)

    def _measured(self) -> dict[str, Any]:
        """What was measured; of the run that made what lies here, if this one found nothing to do."""
        measured = {
            "versions": versions(),
            "stages": [stage.to_dict() for stage in self.stages],
            "evaluated_mpix_per_s": None,
            "delivered_mpix_per_s": None,
            **self.extra,
            "peak_memory_mb": max(self.peak_memory, peak_mb()),
        }
        if self.skipped and not self.done and self.finished_before:
            measured |= {name: value for name, value in (self.previous or {}).items() if name in measured}
        return measured

    def finish(self, **now: Any) -> None:
        """Write the record and the quarantine table.

        Args:
            now: what the record says of this run alone, also if it found nothing to do.

        Raises:
            SattileError: if another job has taken the folder over meanwhile.
            SattileError: if nothing is left, of several, for a reason that nobody foresaw.
            TooManyRefused: if refused / given is above `max_failed_fraction`; everything is written first.
        """
        self.check_held()
        url = storage.join(self.out, QUARANTINE)
        if self.refused:
            rows = sorted({(one.url, one.stage, one.reason) for one in self.refused})
            table = pa.table(list(zip(*rows, strict=True)), schema=schema.QUARANTINE)
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            content = sink.getvalue().to_pybytes()
            if not storage.exists(url) or storage.read_bytes(url) != content:  # a rerun writes nothing but the record
                storage.write_bytes(url, content)
        else:
            storage.remove(url)
        storage.write_json(
            storage.join(self.out, RUN),
            {
                "command": self.command,
                "settings": self.settings,
                "inputs": sorted(self.inputs, key=lambda one: str(one["url"])),
                **self._measured(),
                **now,
                "done": self.done,
                "skipped": self.skipped,
                "quarantined": len(self.refused),
                "finished": True,
            },
        )
        storage.remove(storage.join(self.out, STARTED))
        failed = len({one.url for one in self.refused})
        if not self.given or not failed:
            return
        example, count = commonest(self.refused)
        if failed == self.given and count > 1 and 2 * count > failed and unforeseen(example.reason):
            raise SattileError(
                f"all {failed} {self.what} were refused, {count} of them by the same error that nobody foresaw: it is "
                f"probably sattile's own fault or that of its environment, not theirs; {url} has them all; "
                f"{why(self.refused)}"
            )
        if failed / self.given > self.max_failed_fraction:
            raise TooManyRefused(
                f"{failed} of {self.given} {self.what} were refused, more than max_failed_fraction "
                f"{self.max_failed_fraction:g} allows; {url} says why"
                + (" (the others are published)" if self.done + self.skipped else "")
                + f"; {why(self.refused)}"
            )


def commonest(refused: Sequence[Refusal]) -> tuple[Refusal, int]:
    """An example of the commonest kind of reason, the first one by URL, and how many scenes were refused for it.

    Reasons are of one kind if they differ in numbers, in folders and in the scene's own name alone; what nobody foresaw
    is of one kind by its type and place.
    """
    kinds: dict[str, dict[str, Refusal]] = {}
    for one in sorted(refused, key=lambda one: (one.url, one.reason)):
        kinds.setdefault(_kind(one), {}).setdefault(one.url, one)
    by_url = min(kinds.values(), key=lambda one: (-len(one), min(one)))
    return next(iter(by_url.values())), len(by_url)


def _kind(one: Refusal) -> str:
    if known := unforeseen(one.reason):
        return known
    own = storage.name(one.url).rpartition(".")[0] or storage.name(one.url)
    stem = re.escape(own)
    reason = re.sub(r"(?:[^\s/]*/)+", "", one.reason.replace(one.url, "URL").replace(f"/{own}/", "/"))
    reason = re.sub(rf"(?<![\w.-]){stem}(?=\.[A-Za-z]\w)", "NAME", reason)  # of a file
    if not re.fullmatch(r"[a-z]{1,3}|[\d.]+", own):  # a scene may be called `a`, or 4: so may be what is no name
        reason = re.sub(rf"(?<![\w-]){stem}(?![\w-])", "NAME", reason)
    return re.sub(r"\d+(?:\.\d+)?", "0", reason)


def why(refused: Sequence[Refusal]) -> str:
    """The commonest reason and an example, for the last line that a person reads."""
    example, count = commonest(refused)
    every = len({one.url for one in refused})
    which = "the reason" if count == every else f"the commonest reason ({count} of {every})"
    return f"{which}: {example.url}: {example.reason}"


def read_quarantine(out: str) -> list[Refusal]:
    """What the last run into this folder refused."""
    url = storage.join(out, QUARANTINE)
    if not storage.exists(url):
        return []
    return [Refusal(**row) for row in read_rows(url)]


def read_rows(url: str) -> list[dict[str, Any]]:
    """The rows of a small Parquet file.

    Raises:
        SattileError: if it is none.
    """
    try:
        rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(storage.read_bytes(url))).to_pylist()
    except pa.ArrowException as error:
        raise SattileError(f"{url} is not Parquet, it is damaged or cut short ({error}); make it again") from error
    return rows


def plain(value: Any) -> Any:
    """Settings as JSON has them: lists for tuples, NaN and infinities as text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between two settings, each as `name: before -> now`."""
    names = sorted({*before, *now})
    found = []
    for name in names:
        was, becomes = before.get(name), now.get(name)
        if was == becomes:
            continue
        inner = _differences(was, becomes) if isinstance(was, dict) and isinstance(becomes, dict) else []
        found += [f"{name}.{one}" for one in inner] or [f"{name}: {_short(was)} -> {_short(becomes)}"]
    return found


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def announce(message: str) -> None:
    """The one line a person, or a script, waits for: on standard output."""
    print(message, file=sys.stdout, flush=True)
