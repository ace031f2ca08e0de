"""Files by URL: list, read, write, publish. One class a scheme; all else in sattile takes URLs.

A URL is a plain path, `file:...`, or `scheme://...`. It is kept as it was given: never encoded, links not followed.
What is published appears by one rename, so that a reader sees the whole of it or nothing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO

from sattile.errors import Outage, SattileError, UsageError
from sattile.storage.elsewhere import cut_short, failed, own_folder, too_small
from sattile.storage.files import Entry, FileSystem, LocalFiles, join, local_path, name, parent
from sattile.storage.hdfs import Access, WebHdfsFiles, access, current, use
from sattile.storage.libhdfs import LibHdfsFiles

__all__ = [
    "Access", "Entry", "access", "cut_short", "failed", "join", "local_path", "name", "own_folder", "parent", "use",
]  # fmt: skip

GLOB = re.compile(r"[*?\[]")

_LOCAL = LocalFiles()
_HDFS: dict[str, FileSystem] = {"webhdfs": WebHdfsFiles(), "libhdfs": LibHdfsFiles()}


def scheme_of(url: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(?=/)", url)
    return match.group(1).lower() if match else "file"


def filesystem(url: str) -> FileSystem:
    """The file system a URL belongs to."""
    scheme = scheme_of(url)
    if scheme == "file":
        return _LOCAL
    if scheme == "hdfs":
        return _HDFS[current().way]
    raise UsageError(f"{url}: sattile has no storage for {scheme}:; it has file, hdfs")


def absolute(url: str) -> str:
    """The same place, said so that it means the same in every process. `.`, `..` and `file:` go, links stay."""
    return os.path.abspath(local_path(url)) if scheme_of(url) == "file" else url


def stat(url: str) -> Entry | None:
    return filesystem(url).stat(url)


def exists(url: str) -> bool:
    return stat(url) is not None


def list_folder(url: str) -> list[Entry]:
    """What lies directly in a folder, by name; nothing for a folder that is not there."""
    return filesystem(url).list(url) if exists(url) else []


def walk(url: str, *, unless: Collection[str] = ()) -> Iterator[Entry]:
    """Every file below a folder, in a fixed order. Names that begin with `.` or `_` are not data: left out.

    Args:
        unless: folders below it that hold a file of one of these names are left out, too.
    """
    inside, folder = _inside(Entry(url, is_folder=True, size=0, mtime=0), frozenset())
    return iter([folder]) if folder.problem else _walk(inside, frozenset(unless), frozenset([_real(url)]))


def _walk(entries: Sequence[Entry], unless: frozenset[str], above: frozenset[str]) -> Iterator[Entry]:
    for entry in entries:
        if name(entry.url)[:1] in "._":
            continue
        inside, entry = _inside(entry, above) if entry.is_folder else ([], entry)
        if not entry.is_folder or entry.problem:
            yield entry
        elif unless.isdisjoint(name(one.url) for one in inside):
            yield from _walk(inside, unless, above | {_real(entry.url)})


def _inside(folder: Entry, above: frozenset[str]) -> tuple[list[Entry], Entry]:
    """What lies in a folder, and the folder; of one that can't be listed, why. Nothing where a link leads back up."""
    if folder.problem or _real(folder.url) in above:
        return [], folder
    try:
        return list_folder(folder.url), folder
    except OSError as error:
        return [], replace(folder, problem=f"the folder can't be listed: {error.strerror or error}")


def _real(url: str) -> str:
    return os.path.realpath(local_path(url)) if scheme_of(url) == "file" else url


def glob(pattern: str) -> list[Entry]:
    """Files and folders that match a pattern (`*`, `?`, `[...]` within a path part, `**` for any depth)."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if GLOB.search(part))
    base = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
    prefix = "" if base == "." and not pattern.startswith("./") else (base if base == "/" else base + "/")
    entry = stat(base)
    if entry is None or not entry.is_folder:
        return []
    found: dict[str, Entry] = {}
    for one in _glob(list_folder(base), prefix, parts[first:], frozenset([_real(base)])):
        found.setdefault(one.url, one)
    return list(found.values())


def _glob(entries: Sequence[Entry], prefix: str, parts: list[str], above: frozenset[str]) -> Iterator[Entry]:
    """May give one twice."""
    head, rest = parts[0], parts[1:]
    if head == "**" and rest:
        yield from _glob(entries, prefix, rest, above)
    for entry in entries:
        base = name(entry.url)
        if head != "**" and not (fnmatch.fnmatchcase(base, head) and (base[0] != "." or head[0] == ".")):
            continue
        inside: list[Entry] = []
        if deeper := entry.is_folder and (bool(rest) or head == "**"):
            # A link back up ends `**`; where it is named, it is followed.
            inside, entry = _inside(entry, above if head == "**" else frozenset())
        if not entry.problem and deeper:
            above_it = above | {_real(entry.url)}
            yield from _glob(inside, prefix + base + "/", parts if head == "**" else rest, above_it)
        elif deeper or not rest:
            yield replace(entry, url=prefix + base)


def read_bytes(url: str) -> bytes:
    return filesystem(url).read_bytes(url)


def read_text(url: str) -> str:
    return read_bytes(url).decode("utf-8")


def read_json(url: str) -> Any:
    try:
        return json.loads(read_bytes(url))
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets
        raise SattileError(f"{url} is not JSON, it is damaged or cut short ({error}); make it again") from error


def write_bytes(url: str, data: bytes) -> None:
    """Write a file, whole or not at all; folders above it are made."""
    filesystem(url).write_bytes(url, data)


def write_text(url: str, text: str) -> None:
    write_bytes(url, text.encode("utf-8"))


def write_json(url: str, value: Any) -> None:
    write_bytes(url, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def open_local(url: str) -> str:
    """The path of a file on this machine: its own, or that of a copy on scratch, kept until this process ends."""
    return filesystem(url).open_local(url)


def open_file(url: str) -> BinaryIO:
    """A seekable reader; of a file elsewhere it reads what is asked for, not the whole."""
    return filesystem(url).open(url)


@contextmanager
def beside(url: str) -> Iterator[str]:
    """The path of a file on this machine with those of the same stem beside it: the parts of a shapefile."""
    if scheme_of(url) == "file":
        yield local_path(url)
        return
    stem = name(url).rpartition(".")[0] + "."
    with scratch() as folder:
        for entry in list_folder(parent(url)):
            if not entry.is_folder and name(entry.url).startswith(stem):
                Path(folder, name(entry.url)).write_bytes(read_bytes(entry.url))
        yield os.path.join(folder, name(url))


def make_folder(url: str) -> None:
    filesystem(url).make_folder(url)


def rename(source: str, target: str) -> None:
    filesystem(target).rename(source, target)


def remove(url: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing if it is not there."""
    filesystem(url).remove(url)


def upload(local: str, url: str) -> None:
    """Put a finished local file at `url`, whole or not at all; the local file is gone afterwards."""
    filesystem(url).upload(local, url)


def upload_folder(local: str, url: str) -> None:
    """Put every file below a local folder under `url`."""
    for path in sorted(Path(local).rglob("*")):
        if path.is_file():
            upload(str(path), join(url, path.relative_to(local).as_posix()))


def sha256_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """A short digest of a JSON value, the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


@contextmanager
def scratch(needed: int = 0) -> Iterator[str]:
    """A folder on local disk that is gone afterwards.

    Args:
        needed: bytes that will be written there.

    Raises:
        Outage: if less is free; says how much, where, and how to choose another disk.
    """
    base = tempfile.gettempdir()
    free = shutil.disk_usage(base).free
    if free < needed:
        raise Outage(f"local scratch {base} {too_small(free, needed)}")
    with tempfile.TemporaryDirectory(prefix="sattile-", ignore_cleanup_errors=True) as folder:
        yield folder


class Lease:
    """The right to write into an out folder, held by one job at a time.

    A file `_lock.json` with owner and time, renewed while the job lives, taken over when it has run out (a killed
    job's lease ends by itself).

    Args:
        folder: the out folder.
        seconds: how long it lasts unrenewed.

    Attributes:
        lost: another job has taken it over: this one slept (a laptop that was closed) for longer than it lasts.
    """

    NAME = "_lock.json"

    def __init__(self, folder: str, seconds: float = 60):
        self.url = join(folder, self.NAME)
        self.seconds = seconds
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.lost = False
        self._stop = Event()
        self._thread: Thread | None = None

    def _content(self) -> bytes:
        return json.dumps({"owner": self.owner, "time": time.time(), "seconds": self.seconds}).encode()

    def __enter__(self) -> Lease:
        if not filesystem(self.url).create_exclusively(self.url, self._content()):
            held = self._held()
            if held is None:  # made this instant, and not written yet?
                time.sleep(0.1)
                held = self._held()
            if held and not _is_dead(held["owner"]) and (left := self._left(held)) > 0:
                raise UsageError(
                    f"{parent(self.url)} is being written by another job ({held['owner']}); wait for it, or, if it "
                    f"was killed, try again in {left:.0f} s"
                )
            write_bytes(self.url, self._content())
            time.sleep(0.05)  # two that take over at once: the later writer wins, the other sees it here
            if (self._held() or {}).get("owner") != self.owner:
                raise UsageError(f"{parent(self.url)} was taken by another job just now; wait for it")
        self._thread = Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def _held(self) -> dict[str, Any] | None:
        try:
            held = json.loads(read_bytes(self.url))
            return {"owner": str(held["owner"]), "time": float(held["time"]), "seconds": float(held["seconds"])}
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _left(self, held: dict[str, Any]) -> float:
        """Seconds that another's lease has still to run."""
        if (age := time.time() - held["time"]) > -held["seconds"]:
            return held["seconds"] - age
        # Its clock is far ahead of ours, or ours was set back: a job that lives renews it meanwhile.
        for _ in range(20):
            time.sleep(held["seconds"] / 20)
            if self._held() not in (held, None):
                return held["seconds"]
        return 0

    def look(self) -> bool:
        """Whether it is still ours, by what is written now: it is not where another job took it over, even if that one
        has ended meanwhile. What can't be read just now says nothing."""
        with suppress(OSError, SattileError):
            held = self._held()
            self.lost = self.lost or (held["owner"] != self.owner if held else not exists(self.url))
        return not self.lost

    def _renew(self) -> None:
        while not self._stop.wait(self.seconds / 4):
            if not self.look():
                return
            with suppress(OSError, SattileError):
                write_bytes(self.url, self._content())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if (self._held() or {}).get("owner") == self.owner:
            remove(self.url)


def _is_dead(owner: str) -> bool:
    """Whether a job of this machine has ended without giving its lease back. Other machines' jobs: unknown, so no."""
    try:
        host, pid, _ = owner.rsplit(":", 2)
        if host != socket.gethostname():
            return False
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
