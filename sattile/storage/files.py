"""What a scheme has to offer, and the files of this machine."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO, Protocol
from urllib.parse import unquote


def local_path(url: str) -> str:
    """The path of a plain path or `file:` URL on this machine."""
    if not re.match(r"file:/", url, re.IGNORECASE):
        return url
    path = url[len("file:") :]
    if path.startswith("//"):
        path = "/" + path[2:].partition("/")[2]  # file://host/path: the host is this one
    # Spark and pystac write spaces as %20 in file: URLs; a file that really has a % in its name wins.
    return path if os.path.exists(path) or "%" not in path else unquote(path)


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/") if url != "/" else "", *names])


def parent(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[0] if "/" in url.rstrip("/") else "."


def name(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Entry:
    """A file or folder as listed: size in bytes, mtime in ns (0 and folder's own for folders).

    `problem`: why it is not known what it is, or holds. A link that leads nowhere is taken for one to a folder (of a
    disk that is away) unless it is called like a file.
    """

    url: str
    is_folder: bool
    size: int
    mtime: int
    problem: str | None = None


_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class FileSystem(Protocol):
    """What a scheme has to offer; everything by its URL."""

    def stat(self, url: str) -> Entry | None: ...

    def list(self, url: str) -> list[Entry]: ...

    def read_bytes(self, url: str) -> bytes: ...

    def write_bytes(self, url: str, data: bytes) -> None: ...

    def create_exclusively(self, url: str, data: bytes) -> bool: ...

    def make_folder(self, url: str) -> None: ...

    def rename(self, source: str, target: str) -> None: ...

    def remove(self, url: str) -> None: ...

    def upload(self, local: str, url: str) -> None: ...

    def open_local(self, url: str) -> str: ...

    def open(self, url: str) -> BinaryIO: ...


class LocalFiles:
    """Files of this machine, or of a disk that all machines mount."""

    def stat(self, url: str) -> Entry | None:
        try:
            info = os.stat(local_path(url))
        except OSError as error:
            if error.errno in _NOWHERE:
                return None
            raise
        is_folder = S_ISDIR(info.st_mode)
        problem = None if is_folder or S_ISREG(info.st_mode) else "it is no file, but a pipe, a socket or a device"
        return Entry(url, is_folder, 0 if is_folder else info.st_size, info.st_mtime_ns, problem)

    def list(self, url: str) -> list[Entry]:
        """What has gone meanwhile is left out; a link to what is not there (a disk that is away) is not."""
        with os.scandir(local_path(url)) as entries:
            names = sorted((entry.name, entry.is_symlink()) for entry in entries)
        found = []
        for name, is_link in names:
            one = join(url, name)
            try:
                entry = self.stat(one)
                problem = "it is a link that leads nowhere (a disk that is away?)" if is_link else None
            except OSError as error:
                entry, problem = None, f"the system says: {error.strerror}"
            if entry or problem:
                is_file = re.search(r"^[._]|\.[a-z0-9]{1,4}$", name)
                found.append(entry or Entry(one, is_folder=not is_file, size=0, mtime=0, problem=problem))
        return found

    def read_bytes(self, url: str) -> bytes:
        return Path(local_path(url)).read_bytes()

    def write_bytes(self, url: str, data: bytes) -> None:
        """Whole or not at all: written beside it, then renamed."""
        target = Path(local_path(url))
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            part.write_bytes(data)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def create_exclusively(self, url: str, data: bytes) -> bool:
        target = Path(local_path(url))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(target, "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def make_folder(self, url: str) -> None:
        os.makedirs(local_path(url), exist_ok=True)

    def rename(self, source: str, target: str) -> None:
        """Atomic; a file is replaced, a folder must not exist or be empty."""
        Path(local_path(target)).parent.mkdir(parents=True, exist_ok=True)
        os.replace(local_path(source), local_path(target))

    def remove(self, url: str) -> None:
        path = local_path(url)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            with suppress(FileNotFoundError):
                os.remove(path)

    def upload(self, local: str, url: str) -> None:
        """Move a file of local scratch to `url`, whole or not at all."""
        target = Path(local_path(url))
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            shutil.move(local, part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def open_local(self, url: str) -> str:
        """The path of a local copy, to be read and left as it is."""
        return local_path(url)

    def open(self, url: str) -> BinaryIO:
        """A seekable reader."""
        return open(local_path(url), "rb")
