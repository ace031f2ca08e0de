"""The decoder survives what kills or stops its child, and leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from sattile.decoder import GDAL_SETTINGS, Decoder, decoder, read_ahead
from sattile.errors import Outage, Refused, SattileError, UsageError


def pid() -> int:
    return os.getpid()


def add(a: int, *, b: int) -> int:
    return a + b


def die(with_signal: int) -> None:
    os.kill(os.getpid(), with_signal)


def leave(status: int) -> None:
    os._exit(status)


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


def fail(kind: type[Exception]) -> None:
    raise kind("because")


def whereabouts(*large: bytes) -> list[tuple[int, int, bytes, bytes]]:
    return [(id(one), len(one), one[:1], one[-1:]) for one in large]


class Unpicklable(Exception):
    def __init__(self, a: int, b: int):
        super().__init__("only one argument is kept")


def fail_unpicklable() -> None:
    raise Unpicklable(1, 2)


def ramp(height: int, width: int, bands: int) -> tuple[np.ndarray, np.ndarray]:
    data = np.arange(height * width * bands, dtype=np.uint16).reshape(height, width, bands)
    return data, data[..., 0] % 2 == 0


def environment(name: str) -> str | None:
    return os.environ.get(name)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def gone_within(process: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(process)


def test_runs_in_another_process_and_keeps_it():
    with Decoder() as one:
        child = one.call(pid)
        assert child != os.getpid()
        assert one.call(pid) == child == one.pid
        assert one.call(add, 2, b=3) == 5
    assert not alive(child)


def test_arrays_come_back_equal_and_writable():
    with Decoder() as one:
        data, valid = one.call(ramp, 33, 21, 4)
        expected, expected_valid = ramp(33, 21, 4)
        assert data.dtype == np.uint16
        assert np.array_equal(data, expected)
        assert np.array_equal(valid, expected_valid)
        data[0, 0, 0] = 7


def turned(*shape: int) -> list[np.ndarray]:
    """The same numbers laid in other orders: a plane a band, columns first, a part of a larger one, backwards."""
    lying = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    return [np.moveaxis(lying, 0, -1), np.asfortranarray(lying), lying[:, 1:-1, 2:], lying[::-1], lying[:, :0]]


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 400, 500)], ids=["small", "lent"])
def test_arrays_come_back_as_they_lay_in_memory(shape):
    with Decoder() as one:
        found, expected = one.call(turned, *shape), turned(*shape)
    for data, was in zip(found, expected, strict=True):
        np.testing.assert_array_equal(data, was)
        assert data.dtype == was.dtype
    assert np.moveaxis(found[0], -1, 0).flags.c_contiguous
    assert found[1].flags.f_contiguous
    # Out of band: not a copy that was written into the message.
    assert not found[0].base.flags.owndata
    assert not found[2].base.flags.owndata


def test_a_large_window_comes_back_in_far_less_time_than_it_takes_to_decode():
    with Decoder() as one:
        one.call(ramp, 16, 16, 4)
        one.submit(ramp, 2048, 2048, 4)
        time.sleep(0.5)  # computed by now: what is left is the way back
        start = time.perf_counter()
        data, _ = one.result()
        seconds = time.perf_counter() - start
    assert data.shape == (2048, 2048, 4)
    assert seconds < 0.5  # about 0.02 on an idle core; decoding the same from deflate takes 0.1 to 0.4


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_refused_and_the_next_call_works(number):
    with Decoder() as one:
        first = one.call(pid)
        with pytest.raises(Refused, match=f"crashed .signal {int(number)}"):
            one.call(die, int(number))
        assert one.call(pid) != first


@pytest.mark.parametrize("is_seen_gone", [False, True])
def test_a_crash_of_an_idle_child_costs_nobody(is_seen_gone):
    """Also when it is still on its way out, and the message goes into its socket."""
    for _ in range(3):
        with Decoder() as one:
            child = one.call(pid)
            os.kill(child, signal.SIGKILL)
            if is_seen_gone:
                assert gone_within(child, 5)
            assert one.call(add, 1, b=1) == 2


def test_an_exit_is_refused():
    with Decoder() as one:
        with pytest.raises(Refused, match="exit status 3"):
            one.call(leave, 3)
        assert one.call(add, 1, b=1) == 2


def test_a_hang_is_refused_its_child_killed_and_the_next_call_works():
    with Decoder(timeout=30) as one:
        child = one.call(pid)
        one.timeout = 1
        with pytest.raises(Refused, match="longer than 1 s"):
            one.call(sleep, 60)
        assert not alive(child)
        one.timeout = 30
        assert one.call(add, 1, b=1) == 2


def test_what_was_ready_in_time_is_found_by_a_late_caller():
    with Decoder(timeout=30) as one:
        one.call(pid)
        one.timeout = 1.5
        one.submit(sleep, 0.1)
        time.sleep(2)
        assert one.result() == "awake"


@pytest.mark.parametrize("kind", [Refused, UsageError, ValueError, MemoryError])
def test_exceptions_pass_as_they_are(kind):
    with Decoder() as one:
        with pytest.raises(kind, match="because") as caught:
            one.call(fail, kind)
        assert type(caught.value) is kind
        assert one.call(add, 1, b=1) == 2
        if kind is Refused:
            assert caught.value.reason == "because"


def test_an_exception_that_cannot_travel_is_told():
    with Decoder() as one, pytest.raises(SattileError, match="Unpicklable: only one argument"):
        one.call(fail_unpicklable)


def test_one_outstanding():
    with Decoder() as one:
        with pytest.raises(SattileError, match="nothing was submitted"):
            one.result()
        one.submit(add, 1, b=1)
        with pytest.raises(SattileError, match="busy"):
            one.submit(add, 1, b=1)
        assert one.result() == 2


def test_gdal_is_bounded_in_the_child_only():
    with Decoder() as one:
        for name, value in GDAL_SETTINGS.items():
            assert one.call(environment, name) == os.environ.get(name, value)
    assert "GDAL_CACHEMAX" not in os.environ


def test_a_process_has_one_decoder_and_a_fork_another():
    mine = decoder()
    assert decoder() is mine
    child = mine.call(pid)
    fork = os.fork()
    if fork == 0:
        own = decoder()
        good = own is not mine and own.call(pid) != child
        mine.close()  # a copy: must not end the parent's child
        own.close()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
    assert mine.call(pid) == child


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_ends_with_its_parent(tmp_path, busy):
    """A script without a `__main__` guard, too, which spawn would run again in the child."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            sys.path.insert(0, {os.path.dirname(__file__)!r})
            import test_decoder
            from sattile.decoder import decoder
            print(decoder().call(test_decoder.pid), flush=True)
            if {busy}:
                decoder().submit(test_decoder.sleep, 60)
            time.sleep(60)
            """
        )
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    assert gone_within(child, 10)


def of(item: tuple[str, int]) -> Callable[[], Any] | None:
    """Of `bad` every read is refused; what has no number passes."""
    name, number = item
    if number < 0:
        return None
    return partial(fail_on, name, number)


def fail_on(name: str, number: int) -> int:
    if name == "bad":
        raise Refused(f"bad {number}")
    return number * number


def test_reading_ahead_keeps_the_order_and_leaves_out_what_was_refused():
    items = [("", -1), ("a", 1), ("", -2), ("bad", 2), ("", -3), ("", -4), ("bad", 3), ("a", 4), ("bad", 5), ("", -5)]
    taken = []
    given = (taken.append(item) or item for item in items)
    found = []
    for (name, number), read in read_ahead(given, of, lambda item: item[0]):
        found.append((name, number, read.reason if isinstance(read, Refused) else read))
        if number == 1:
            assert taken[-1] == ("bad", 2)  # the next is being read
    assert found == [
        ("", -1, None), ("a", 1, 1), ("", -2, None), ("bad", 2, "bad 2"), ("", -3, None), ("", -4, None), ("a", 4, 16),
        ("", -5, None),
    ]  # fmt: skip


def test_reading_ahead_that_is_given_up_leaves_the_decoder_free():
    for _ in read_ahead([("a", 1), ("a", 2), ("a", 3)], of, lambda item: item[0]):
        break
    assert decoder().call(add, 1, b=2) == 3


def test_large_bytes_travel_to_a_child_once():
    """The same object is there at the next function, though an equal one was sent; a new child is sent it again."""
    with Decoder() as reader:
        first = reader.call(whereabouts, b"a" * 3_000_000, b"b" * 100_000)
        with pytest.raises((AttributeError, TypeError), match="pickle"):
            reader.call(whereabouts, b"c" * 200_000, lambda: None)
        again = reader.call(whereabouts, b"b" * 100_000, b"c" * 200_000, b"a" * 3_000_000)
        assert [one[1:] for one in again] == [
            (n, x, x) for n, x in ((100_000, b"b"), (200_000, b"c"), (3_000_000, b"a"))
        ]
        assert (again[2], again[0]) == tuple(first)
        with pytest.raises(Refused, match="crashed"):
            reader.call(die, signal.SIGKILL)
        assert [one[1:] for one in reader.call(whereabouts, b"a" * 3_000_000)] == [(3_000_000, b"a", b"a")]


def test_parent_and_child_forget_the_same_large_bytes():
    with Decoder() as reader:
        for number in [*range(12), *range(12), 3, 3, 11, 0]:
            large = [bytes([one % 12]) * (9_000_000 + one) for one in range(number, number + 5)]
            found = reader.call(whereabouts, *large)
            assert [one[1:] for one in found] == [(len(one), one[:1], one[-1:]) for one in large]
        assert len(pickle.dumps(reader._kept)) < 60_000_000


def of_kind(item: tuple[str, int, type[Exception]]) -> Callable[[], Any]:
    return partial(fail_if_bad, *item)


def fail_if_bad(name: str, number: int, kind: type[Exception]) -> int:
    if name == "bad":
        raise kind("because")
    return number * number


@pytest.mark.parametrize("kind", [ValueError, RecursionError, UnicodeError, SattileError])
def test_whatever_an_item_raises_is_its_refusal(as_in_production, kind):
    items = [("a", 1, kind), ("bad", 2, kind), ("a", 3, kind), ("bad", 4, kind), ("a", 5, kind)]
    read = read_ahead(items, of_kind, lambda item: item[0])
    found = [(item[1], one.reason if isinstance(one, Refused) else one) for item, one in read]
    assert [number for number, _ in found] == [1, 2, 3, 5]
    assert [one for number, one in found if number != 2] == [1, 9, 25]
    reason = str(dict(found)[2])
    if kind is SattileError:
        assert reason == "because"
    else:
        assert reason.startswith(f"unexpected {kind.__name__}: because (decoder.py, line ")


def test_what_cannot_be_sent_to_the_decoder_is_refused(as_in_production):
    def call(item: int) -> Callable[[], Any]:
        return partial(add, item, b=threading.Lock()) if item == 2 else partial(add, item, b=1)  # type: ignore[arg-type]

    found = [one for _, one in read_ahead([1, 2, 3], call, str)]
    assert [one for one in found if not isinstance(one, Refused)] == [2, 4]
    assert "unexpected TypeError" in next(one.reason for one in found if isinstance(one, Refused))


def test_an_exception_that_cannot_travel_is_told_with_type_and_place(as_in_production):
    ((_, told),) = read_ahead([1], lambda _: fail_unpicklable, str)
    assert re.match(r"unexpected Unpicklable: only one argument is kept \(decoder.py, line \d+\)", told.reason)


@pytest.mark.parametrize("kind", [MemoryError, ConnectionRefusedError, TimeoutError, Outage, UsageError])
def test_outages_end_the_reading(as_in_production, kind):
    with pytest.raises(kind, match="because"):
        list(read_ahead([("a", 1, kind), ("bad", 2, kind), ("a", 3, kind)], of_kind, lambda item: item[0]))
    assert decoder().call(add, 1, b=2) == 3


def test_a_test_finds_what_nobody_foresaw():
    with pytest.raises(ValueError, match="because"):
        list(read_ahead([("bad", 2, ValueError)], of_kind, lambda item: item[0]))
