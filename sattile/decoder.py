"""Runs functions in a child process, so that a file on which GDAL dies or hangs costs that file and not the job.

Rasters that users bring reach GDAL through here only. The child is a plain interpreter started afresh: it holds no
Spark socket, no lock of a thread that was forked away, and never imports the caller's main module (multiprocessing's
spawn would: a script without the `__main__` guard would run itself again). Arrays come back out of band (pickle
protocol 5): large ones in memory that both processes share, small ones through the socket. What goes to the child with
every function, such as the shapes of a scene, goes once (`_Kept`).
"""

from __future__ import annotations

import atexit
import io
import json
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from sattile import memory, storage
from sattile.errors import Outage, Refused, SattileError, Unforeseen, keep_place, refusal

T = TypeVar("T")

TIMEOUT = 120.0

# What GDAL may do in the child; a setting of the user's own environment goes before it.
GDAL_SETTINGS = {
    # Bounded memory. A row of 512 px tiles of a Sentinel-2 scene, 4 bands and the halo's tiles included, is 90 MB.
    "GDAL_CACHEMAX": "256",
    # Spark gives a task one core.
    "GDAL_NUM_THREADS": "1",
    # Folders of 100,000 scenes are not listed at every open; sidecars (.msk, .aux.xml, .tfw) are found by their
    # names all the same, which EMPTY_DIR would prevent: a mask that is not seen makes nodata valid.
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",
    # A sidecar may name other files (an .aux.xml its overviews): none of them over the network.
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    # libtiff's remarks on every odd tag are not for a job's log; errors come as exceptions.
    "CPL_LOG": os.devnull,
}

LENT_FROM = 1 << 20
"""Bytes from which an array goes from process to process as shared memory, where the system has it."""

MOST_LENT = 16

KEPT_FROM, MOST_KEPT = 1 << 16, 32 << 20
"""Size from which `bytes` go to a child once; and how much of such is kept, but for the last one."""

_COUNT = struct.Struct("!Q")
_HEAD = struct.Struct("!QQB")
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from sattile.decoder import _serve; _serve(int(sys.argv[1]), int(sys.argv[3]))"
)


class Decoder:
    """One child process that runs functions one after the other; started at the first, and again after a crash.

    Not for several threads at once. A context manager; unclosed, the child ends when its parent does.

    Args:
        timeout: seconds that one function may take.
    """

    def __init__(self, timeout: float = TIMEOUT):
        self.timeout = timeout
        self._owner = os.getpid()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._borrower = _Borrower()
        self._kept = _Kept()
        self._deadline: float | None = None

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        return self._child.pid if self._child else None

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Start a function; its result is to be taken with `result` before the next.

        Args:
            function: importable by name in another process (module level, not of `__main__`).
        """
        if self._deadline is not None:
            raise SattileError("the decoder is busy: take the result of the last function first")
        for attempt in (1, 2):
            connection = self._start()
            told = self._borrower.given_back(), storage.access()
            message, fresh = self._kept.pack((function, args, kwargs, *told))
            try:
                connection.settimeout(max(self.timeout, 1.0))
                _send(connection, message, [memoryview(one) for one in fresh])
                _receive_exactly(connection, 1)
                break
            except (OSError, EOFError):
                # The child was killed before it began, by the system perhaps: no fault of this function. Only the
                # child's word that it has it tells: what ends takes messages for as long as one thread of it lives.
                self.close()
                if attempt == 2:
                    raise Outage("the process that reads files was ended twice before it began") from None
        self._deadline = time.monotonic() + self.timeout

    def result(self, timeout: float | None = None) -> Any:
        """What the submitted function returned.

        Args:
            timeout: seconds from now; else those of the decoder, from `submit` on.

        Raises:
            Refused: if GDAL crashed or took too long.
            Exception: what the function raised, as it is.
        """
        if self._deadline is None or self._socket is None:
            raise SattileError("nothing was submitted to the decoder")
        limit = self.timeout if timeout is None else timeout
        # A second at least: whoever waits late must still find what has been ready for long.
        remaining = max(self._deadline - time.monotonic(), 1.0) if timeout is None else timeout
        self._deadline = None
        ready, _, _ = select.select([self._socket], [], [], remaining)
        if not ready:
            self.close()
            raise Refused(f"reading took longer than {limit:g} s, and was given up; the file may be damaged")
        try:
            self._socket.settimeout(max(self.timeout, 1.0))
            message, buffers = _receive(self._socket, self._borrower)
        except (OSError, EOFError):
            raise Refused(self._obituary()) from None
        except BaseException:
            self.close()  # half a message is left in the pipe
            raise
        failed, value = pickle.loads(message, buffers=buffers)
        if failed:
            raise value
        return value

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`submit` and `result`."""
        try:
            self.submit(function, *args, **kwargs)
            return self.result()
        except KeyboardInterrupt:
            self.close()
            raise

    def _start(self) -> socket.socket:
        # Readable while nothing was asked: the other end is closed (the exit status comes a moment later).
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self.close()
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._socket is None:
            ours, theirs = socket.socketpair()
            with theirs:
                for end in (ours, theirs):
                    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                        end.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
                environment = {**GDAL_SETTINGS, **os.environ}
                self._child = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # a Spark worker's standard output is its line to the JVM
                    pass_fds=[theirs.fileno()],
                    env=environment,
                )
            self._socket = ours
        return self._socket

    def _obituary(self) -> str:
        """Why the child ended, after it did."""
        child = self._child
        status: int | None = None
        if child is not None:
            with suppress(subprocess.TimeoutExpired):
                status = child.wait(5)
        self.close()
        if status is not None and status < 0:
            name = signal.Signals(-status).name if -status in set(signal.Signals) else "?"
            hint = "; memory may have run out" if -status == signal.SIGKILL else ""
            return f"GDAL crashed (signal {-status}, {name}{hint}) on this file; it is probably damaged"
        return f"GDAL ended the reading process (exit status {status}) on this file; it is probably damaged"

    def close(self) -> None:
        """End the child."""
        connection, self._socket = self._socket, None
        child, self._child = self._child, None
        self._deadline = None
        self._borrower.close()
        self._borrower = _Borrower()  # loans of the child that ends are given back to nobody
        self._kept = _Kept()
        if connection is not None:
            connection.close()
        # A fork of the process that made this decoder holds a copy of it: the child is not the fork's to end.
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


_mine: Decoder | None = None


def decoder(timeout: float | None = None) -> Decoder:
    """The decoder of this process, started when first used; a fork gets its own.

    Args:
        timeout: seconds one function may take, from now on; unchanged if not given.
    """
    global _mine
    if _mine is None or _mine._owner != os.getpid():
        _mine = Decoder()
        atexit.register(_mine.close)
    if timeout is not None:
        _mine.timeout = timeout
    return _mine


def read_ahead(
    items: Iterable[T], call: Callable[[T], Callable[[], Any] | None], source: Callable[[T], str]
) -> Iterator[tuple[T, Any]]:
    """Read items in this process's decoder, each while the one before it is used.

    Args:
        call: what the decoder is to run for an item, a `partial`; None for an item that only passes, in its place.
        source: what an item is read from; once that is refused, further items of it are left out.

    Yields:
        (item, what was read), (item, Refused) by `errors.refusal`, or (item, None), in order.
    """
    queue, passing, bad = iter(items), deque[tuple[T, Any]](), set[str]()
    reader = decoder()
    submitted: list[T] = []

    def submit() -> None:
        for item in queue:
            try:
                wanted = call(item)
                if wanted is None:
                    passing.append((item, None))
                elif source(item) not in bad:
                    reader.submit(wanted)
                    submitted.append(item)
                    return
            except Exception as error:
                passing.append((item, refusal(error)))
                bad.add(source(item))

    submit()
    try:
        while submitted or passing:
            while passing:
                yield passing.popleft()
            if not submitted:
                continue
            item = submitted.pop()
            try:
                found = reader.result()
            except Exception as error:
                bad.add(source(item))
                found = refusal(error)
            submit()
            yield item, found
    finally:
        if submitted:  # the decoder serves other tasks of this process: leave nothing in it
            with suppress(Exception):
                reader.result()


def _serve(descriptor: int, parent: int) -> None:
    """The child's life: functions in, results out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    memory.keep_freed()
    connection = socket.socket(fileno=descriptor)
    lender, kept = _Lender(), _Kept()
    while True:
        try:
            message, fresh = _receive(connection)
            connection.sendall(b"!")
        except (EOFError, OSError):
            break
        buffers: list[pickle.PickleBuffer] = []
        try:
            function, args, kwargs, given_back, access = kept.unpack(message, fresh)
            lender.returned(given_back)
            storage.use(access)
            answer = _pickled((False, function(*args, **kwargs)), buffers.append)
        except BaseException as error:
            buffers = []
            answer = _pack(error)
        try:
            _send(connection, answer, [buffer.raw() for buffer in buffers], lender)
        except OSError:
            break
    os._exit(0)  # no clean-up of libraries: it has been seen to hang, and there is nothing to save


def _end_with(parent: int) -> None:
    """A child that is inside a long read does not see its pipe close: it watches its parent too."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


class _Pickler(pickle.Pickler):
    def reducer_override(self, one: Any) -> Any:
        """Arrays whose axes were turned, and parts of arrays, go out of band, too: without gaps, to be turned again.

        pickle would take a part pixel by pixel, as long as a quarter of the time that unpacking the file takes.
        """
        if type(one) is not np.ndarray or one.flags.forc or one.dtype.hasobject:
            return NotImplemented
        axes = sorted(range(one.ndim), key=lambda axis: -one.strides[axis])
        return np.transpose, (np.ascontiguousarray(one.transpose(axes)), np.argsort(axes).tolist())


def _pickled(value: Any, take: Callable[[pickle.PickleBuffer], Any]) -> bytes:
    """A value pickled with its arrays beside it."""
    written = io.BytesIO()
    _Pickler(written, protocol=5, buffer_callback=take).dump(value)
    return written.getvalue()


def _pack(error: BaseException) -> bytes:
    keep_place(error)
    if not isinstance(error, SattileError):
        error.add_note("in the decoder:\n" + "".join(traceback.format_exception(error)))
    error.__traceback__ = None
    try:
        packed = pickle.dumps((True, error), protocol=5)
        pickle.loads(packed)  # some exceptions pickle and cannot be made again
        return packed
    except Exception:
        stands = Unforeseen(f"{type(error).__name__}: {error}")
        stands.__dict__ |= {name: one for name, one in vars(error).items() if name in ("place", "subject")}
        return pickle.dumps((True, stands), protocol=5)


class _Kept:
    """Large `bytes` that went to a child, as both sides know them: what was sent before is a number in a message.

    Both forget the oldest ones, the same ones at the same time: after each message.
    """

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._count = 0

    def pack(self, value: Any) -> tuple[bytes, list[bytes]]:
        """A message for the child, and the bytes that are to go with it."""
        written = io.BytesIO()
        packer = _Packer(written, self._numbers, self._count)
        packer.dump(value)  # may fail: then nothing has happened
        self._add(packer.fresh)
        return written.getvalue(), list(packer.fresh)

    def unpack(self, message: bytes, fresh: Iterable[bytes]) -> Any:
        """What `pack` took."""
        fresh = [bytes(one) for one in fresh]
        known = {number: one for one, number in self._numbers.items()} | dict(enumerate(fresh, self._count))
        self._add(fresh)
        return _Unpacker(io.BytesIO(message), known).load()

    def _add(self, fresh: Iterable[bytes]) -> None:
        for one in fresh:
            self._numbers[one] = self._count
            self._count += 1
        while len(self._numbers) > 1 and sum(map(len, self._numbers)) > MOST_KEPT:
            del self._numbers[next(iter(self._numbers))]


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, known: dict[bytes, int], count: int):
        super().__init__(file, protocol=5)
        self.known, self.count, self.fresh = known, count, dict[bytes, int]()

    def persistent_id(self, one: Any) -> int | None:
        if type(one) is not bytes or len(one) < KEPT_FROM:
            return None
        number = self.known.get(one)
        return self.fresh.setdefault(one, self.count + len(self.fresh)) if number is None else number


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, known: dict[int, bytes]):
        super().__init__(file)
        self.known = known

    def persistent_load(self, number: int) -> bytes:
        return self.known[number]


class _Lender:
    """The child's memory that arrays are handed over in (Linux): lent, given back, lent again.

    A socket takes some 100 kB at a time and both sides copy; fresh memory costs a page fault every 4 kB. For a block of
    36 MB either takes half as long as decoding it.
    """

    def __init__(self) -> None:
        self._slots: dict[int, tuple[int, mmap.mmap]] = {}
        self._free: set[int] = set()
        self._next = 0

    def returned(self, slots: Iterable[int]) -> None:
        self._free |= set(slots)

    def lend(self, buffer: memoryview) -> tuple[int, int | None] | None:
        """Copy a buffer into a slot: (its number, its descriptor if it is new); None if the socket has to do."""
        if buffer.nbytes < LENT_FROM or not hasattr(os, "memfd_create"):
            return None
        fitting = [slot for slot in self._free if len(self._slots[slot][1]) >= buffer.nbytes]
        descriptor = None
        if fitting:
            slot = min(fitting, key=lambda one: len(self._slots[one][1]))
        elif len(self._slots) - len(self._free) >= MOST_LENT:
            return None
        else:
            for unfit in self._free:  # too small: other sizes are read now
                descriptor, memory = self._slots.pop(unfit)
                memory.close()
                os.close(descriptor)
            self._free.clear()
            size = -(-buffer.nbytes // LENT_FROM) * LENT_FROM
            slot, self._next = self._next, self._next + 1
            descriptor = os.memfd_create("sattile")
            os.ftruncate(descriptor, size)
            self._slots[slot] = descriptor, mmap.mmap(descriptor, size)
        self._free.discard(slot)
        self._slots[slot][1][: buffer.nbytes] = buffer
        return slot, descriptor


class _Loan(mmap.mmap):
    """A slot as the parent sees it; arrays that lie in it keep it alive, and its end gives the slot back."""


class _Borrower:
    """The parent's side of `_Lender`."""

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._ended: list[int] = []

    def take(self, slot: int, size: int, descriptor: int | None) -> _Loan:
        if descriptor is not None:
            self._descriptors[slot] = descriptor
        loan = _Loan(self._descriptors[slot], size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        weakref.finalize(loan, self._ended.append, slot).atexit = False
        return loan

    def given_back(self) -> list[int]:
        slots = self._ended[:]
        del self._ended[: len(slots)]
        return slots

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _send(connection: socket.socket, message: bytes, buffers: list[memoryview], lender: _Lender | None = None) -> None:
    """A message and the arrays beside it: each as (size, slot + 1, whether its descriptor follows), 0 for no slot."""
    lent = [lender.lend(buffer) if lender else None for buffer in buffers]
    heads = [(len(message), 0, 0)]
    for buffer, loan in zip(buffers, lent, strict=True):
        heads.append((buffer.nbytes, loan[0] + 1 if loan else 0, int(loan is not None and loan[1] is not None)))
    connection.sendall(_COUNT.pack(len(heads)) + b"".join(_HEAD.pack(*head) for head in heads) + message)
    for buffer, loan in zip(buffers, lent, strict=True):
        if loan is None:
            connection.sendall(buffer)
        elif loan[1] is not None:
            socket.send_fds(connection, [b"m"], [loan[1]])


def _receive(connection: socket.socket, borrower: _Borrower | None = None) -> tuple[bytes, list[Any]]:
    (count,) = _COUNT.unpack(_receive_exactly(connection, _COUNT.size))
    heads = [_HEAD.unpack(_receive_exactly(connection, _HEAD.size)) for _ in range(count)]
    message = bytes(_receive_exactly(connection, heads[0][0]))
    buffers: list[Any] = []
    for size, slot, is_new in heads[1:]:
        if not slot or borrower is None:
            buffers.append(_receive_exactly(connection, size))
            continue
        descriptor = None
        if is_new:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if not descriptors:
                raise EOFError
            descriptor = descriptors[0]
        buffers.append(borrower.take(slot - 1, size, descriptor))
    return message, buffers


def _receive_exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data
