"""Files that are not on this machine: read by ranges or from a copy on scratch, written beside and renamed."""

from __future__ import annotations

import atexit
import fcntl
import glob
import io
import os
import shutil
import tempfile
import threading
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO

from sattile.errors import Outage
from sattile.storage.files import Entry, join, name, parent

PAGE = 1 << 16
"""Small reads (a TIFF's directories) are served from pages of this size; larger ones take exactly what was asked."""

CHUNK = 4 << 20

Fetch = Callable[[str, int, int], bytes]
"""(url, offset, length) -> exactly these bytes."""

Source = Callable[[], io.IOBase]
"""Opens what is to be written; called again where a try failed."""


class Elsewhere(ABC):
    """The part of a `storage.files.FileSystem` that follows from the rest where files are on other machines."""

    @abstractmethod
    def stat(self, url: str) -> Entry | None: ...

    @abstractmethod
    def rename(self, source: str, target: str) -> None: ...

    @abstractmethod
    def remove(self, url: str) -> None: ...

    @abstractmethod
    def fetch(self, url: str, offset: int, length: int) -> bytes:
        """Exactly these bytes of a file."""

    @abstractmethod
    def fill(self, url: str, source: Source) -> None:
        """Write a file, folders above it too."""

    def write_bytes(self, url: str, data: bytes) -> None:
        """Whole or not at all: written beside it, then renamed."""
        self.publish(url, lambda: io.BytesIO(data), len(data), self.rename)

    def upload(self, local: str, url: str) -> None:
        """Move a file of local scratch to `url`, whole or not at all."""
        self.publish(url, lambda: io.FileIO(local), os.path.getsize(local), self.rename)
        os.remove(local)

    def publish(self, url: str, source: Source, size: int, rename: Callable[[str, str], None]) -> None:
        """Fill a file beside `url`, see that all bytes arrived, and give it its name by `rename`."""
        part = join(parent(url), f".{name(url)}.{uuid.uuid4().hex[:8]}")
        try:
            self.fill(part, source)
            entry = self.stat(part)
            if entry is None or entry.size != size:
                raise Outage(f"{part}: {size} bytes were sent and {entry.size if entry else 'none'} arrived")
            rename(part, url)
        except BaseException:
            with suppress(Exception):
                self.remove(part)
            raise

    def open_local(self, url: str) -> str:
        """A copy on local scratch, made once by this process for each version of the file."""
        return _copies.get(self.fetch, self._there(url))

    def open(self, url: str) -> BinaryIO:
        """A seekable reader; see `Reader`."""
        return Reader(self.fetch, url, self._there(url).size)  # type: ignore[return-value]

    def _there(self, url: str) -> Entry:
        entry = self.stat(url)
        if entry is None:
            raise FileNotFoundError(f"{url} does not exist")
        return entry


class _Copies:
    """Files on local scratch, for what reads most of them: models, tiles."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, int, int], str] = {}
        self._lock = threading.Lock()

    def get(self, fetch: Fetch, entry: Entry) -> str:
        url = entry.url
        with self._lock:
            folder = own_folder()
            key = (folder, url, entry.size, entry.mtime)
            if key not in self._found:
                free = shutil.disk_usage(folder).free
                if free < entry.size + (1 << 26):
                    raise Outage(
                        f"{url} is copied to local scratch {folder}, which {too_small(free, entry.size + (1 << 26))}"
                    )
                path = os.path.join(folder, f"{len(self._found)}-{name(url)}")
                with Reader(fetch, url, entry.size) as source, open(path, "wb") as target:
                    while data := source.read(4 * CHUNK):
                        target.write(data)
                self._found[key] = path
            return self._found[key]


def too_small(free: int, needed: int) -> str:
    """What to say of scratch that does not hold so many bytes; the two numbers never round to the same."""
    has, wants = free // 1_000_000, -(-needed // 1_000_000)
    return f"has {has:,} MB free, and {wants:,} MB are needed; point TMPDIR at a larger disk"


_own: tuple[int, str, Any] = (0, "", None)
"""Process, its folder, and the open file that locks it."""


def own_folder() -> str:
    """A folder on scratch of this process alone, which goes with it.

    Spark kills its workers, which tidy up nothing then: the next process finds that the folder is locked no more.
    """
    global _own
    if _own[0] != os.getpid():
        with _making:
            if _own[0] != os.getpid():
                _own = (os.getpid(), *_new_folder())
                atexit.register(_own[2].close)  # after the folder has gone: the last one registered is called first
                atexit.register(shutil.rmtree, _own[1], ignore_errors=True)
    return _own[1]


_making = threading.Lock()


OWN = "sattile-own-"


def _new_folder() -> tuple[str, Any]:
    for old in glob.glob(os.path.join(tempfile.gettempdir(), f"{OWN}*")):
        with suppress(OSError), open(os.path.join(old, ".lock")) as file:  # another user's, or gone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    while True:
        folder = tempfile.mkdtemp(prefix=OWN)
        lock = open(os.path.join(folder, ".lock"), "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(folder):  # else another process took it for a dead one's, an instant before it was locked
            return folder, lock


_copies = _Copies()

bytes_fetched = 0
"""Of file contents, by this process; for tests and benchmarks."""


cut_short: set[str] = set()
"""URLs of files that end before what their own directory says is in them, as this process found when it read there."""


failed: dict[str, Exception] = {}
"""What this process was told when it last read a URL and got nothing: GDAL keeps such exceptions to itself."""


class Reader(io.RawIOBase):
    """Reads ranges of one file.

    Small reads come from whole pages that are kept; large ones take exactly the bytes asked for. Who uses
    `get_byte_ranges` has to look into `cut_short` afterwards.

    Args:
        fetch: of its file system.
        url: of the file.
        size: in bytes.
    """

    MOST_PAGES = 64

    def __init__(self, fetch: Fetch, url: str, size: int):
        super().__init__()
        self._fetch = fetch
        self.url, self.size = url, size
        self._at = 0
        self._pages: OrderedDict[int, bytes] = OrderedDict()

    def again(self) -> Reader:
        """Another reader of the same file, with a position of its own and the same pages."""
        other = Reader(self._fetch, self.url, self.size)
        other._pages = self._pages
        return other

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence], 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        start = min(self._at, self.size)
        stop = self.size if size < 0 else min(start + size, self.size)
        data = self._range(start, stop)
        self._at = stop
        return data

    def readall(self) -> bytes:
        return self.read(-1)

    def get_byte_ranges(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """Several ranges, asked for side by side (what GDAL calls for the tiles of a window)."""
        if len(offsets) == 1:
            return [self._whole(offsets[0], sizes[0])]
        with ThreadPoolExecutor(min(len(offsets), 4)) as pool:
            return list(pool.map(self._whole, offsets, sizes))

    def _whole(self, offset: int, size: int) -> bytes:
        """GDAL takes whatever comes for the whole, and what it finds behind it for pixels."""
        data = self._range(offset, min(offset + size, self.size))
        if len(data) < size:
            cut_short.add(self.url)
        return data.ljust(size, b"\0")

    def _range(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        if stop - start > PAGE:
            return self._counted(start, stop - start)
        parts = []
        for page in range(start // PAGE, (stop - 1) // PAGE + 1):
            if page not in self._pages:
                first = page * PAGE
                self._pages[page] = self._counted(first, min(PAGE, self.size - first))
                if len(self._pages) > self.MOST_PAGES:
                    self._pages.popitem(last=False)
            self._pages.move_to_end(page)
            data = self._pages[page]
            parts.append(data[max(start - page * PAGE, 0) : stop - page * PAGE])
        return b"".join(parts)

    def _counted(self, start: int, length: int) -> bytes:
        global bytes_fetched
        bytes_fetched += length
        try:
            data = self._fetch(self.url, start, length)
        except Exception as error:
            failed[self.url] = error
            raise
        failed.pop(self.url, None)
        return data
