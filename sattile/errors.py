"""What can go wrong, by whose fault it is; each class carries the exit status of the commands."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import socket
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger("sattile")


class SattileError(Exception):
    """Something went wrong; the message says what, with the values seen, and what to do about it."""

    exit_status = 1


class UsageError(SattileError):
    """The caller asked for something that cannot be: an unknown setting, a missing file, a bad geometry.

    Raised before any work is done, where it can be known by then.
    """

    exit_status = 2


class Outage(SattileError):
    """Storage, memory or a process of ours failed while a scene was used: the scene is not to blame, the job ends."""


class Unforeseen(SattileError):
    """Stands for an exception that could not leave its process; the message says its type and its words."""


class TooManyRefused(SattileError):
    """More scenes were refused than `max_failed_fraction` allows; what is good was published all the same."""

    exit_status = 3


class Refused(SattileError):
    """One scene can't be used. It goes to the quarantine table with this reason; the others go on.

    Args:
        reason: what is wrong with it and what to do, in words a person understands.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


# --- what an exception means for the scene that raised it -------------------------------------------------------------

RAISE = "SATTILE_RAISE_UNFORESEEN"
"""Environment variable: `1` raises what nobody foresaw instead of refusing the scene; tests find our own faults so."""

OUTAGES = frozenset(
    getattr(errno, name)
    for name in (
        "ENOMEM", "ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "EPIPE", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED",
        "ENOTCONN", "ESHUTDOWN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET",
    )
    if hasattr(errno, name)
)  # fmt: skip
"""Errors of the system that say nothing of the file at hand."""

_FOREIGN_OUTAGES = {"requests", "urllib3", "hdfs"}
"""Packages that raise exceptions of their own when a server fails."""

_level = logging.DEBUG
_raises: bool | None = None
_logged: set[str] = set()


def refusal(error: Exception) -> Refused:
    """Turns what a scene, a label, an item or a date raised into its refusal: the one rule of all commands.

    Returns:
        The refusal: in the error's own words where it was foreseen (`Refused`, `SattileError`, what the system says of
        a file); else with its type and place, which `unforeseen` finds again, and its traceback goes to the log.

    Raises:
        Exception: the error itself if it is wrong usage or an outage; if nobody foresaw it, where `RAISE` says so.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, UsageError) or is_outage(error):
        raise error
    subject = getattr(error, "subject", "")
    before = f"{subject}: " if subject else ""
    if isinstance(error, SattileError) and not isinstance(error, Unforeseen):
        return Refused(f"{before}{error}")
    if isinstance(error, OSError):
        remedy = "; grant the right to read it" if isinstance(error, PermissionError) else ""
        return Refused(f"{before}cannot be read: {error.strerror or first_line(error)}{remedy}")
    if raises():
        raise error
    words = f"{type(error).__name__}: {first_line(error)}" if not isinstance(error, Unforeseen) else first_line(error)
    reason = f"{before}unexpected {words[:300]} ({place_of(error)}); please report it, with its traceback from the log"
    kind = unforeseen(reason) or reason
    if kind not in _logged:  # a thousand scenes may raise it
        _logged.add(kind)
        log.log(_level, "unexpected %s", words, exc_info=error)
    return Refused(reason)


def unforeseen(reason: str) -> str | None:
    """Type and place of the exception that nobody foresaw, out of the reason that `refusal` made of it; else None."""
    found = re.search(r"unexpected (\w+):? .*\(([\w.<>-]+, line \d+|somewhere)\); please report", reason)
    return f"{found.group(1)} ({found.group(2)})" if found else None


def is_outage(error: BaseException) -> bool:
    """Whether storage, memory or the network failed, which is no fault of what is read."""
    if isinstance(error, Outage | MemoryError | ConnectionError | TimeoutError | socket.gaierror):
        return True
    if isinstance(error, OSError) and error.errno in OUTAGES:
        return True
    kinds = type(error).__mro__
    return kinds[0].__module__.partition(".")[0] in _FOREIGN_OUTAGES or any(
        kind.__name__ == "ResourceExhaustedError"
        for kind in kinds  # TensorFlow's, which is not imported for this
    )


def place_of(error: BaseException) -> str:
    """`file.py, line N`: the innermost line of sattile that an exception came through."""
    if found := getattr(error, "place", None):
        return str(found)
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if os.path.dirname(__file__) in one.filename] or frames
    return f"{os.path.basename(own[-1].filename)}, line {own[-1].lineno}" if own else "somewhere"


def keep_place(error: BaseException) -> None:
    """Lets an exception say its place once its traceback is gone: when it goes to another process."""
    place = place_of(error)
    with suppress(AttributeError, TypeError):
        error.place = place  # type: ignore[attr-defined]


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Names what is read beside the scene (its labels) in whatever is raised inside."""
    try:
        yield
    except Refused as error:
        raise (error if subject in error.reason else Refused(f"{subject}: {error.reason}")) from None
    except Exception as error:
        with suppress(AttributeError, TypeError):
            error.subject = subject  # type: ignore[attr-defined]
        raise


def raises() -> bool:
    """Whether `refusal` raises what nobody foresaw: in a task as the driver does, else as the environment says."""
    return os.environ.get(RAISE) == "1" if _raises is None else _raises


def in_task(driver_raises: bool) -> None:
    """Behave as the driver would; tracebacks go to the standard error of this worker."""
    global _level, _raises
    _level, _raises = logging.WARNING, driver_raises


# --- words ------------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """What a foreign error says, as far as a person wants to read it."""
    return next(iter(str(error).strip().splitlines()), repr(error))


HINTS = {
    errno.ENOSPC: "; free some space there, or choose another --out (scratch files go to TMPDIR), and run it again: "
    "what is published is whole",
    errno.EDQUOT: "; the quota is used up: free some space, or choose another --out, and run it again",
    errno.EACCES: "; you may not read or write there: choose another --out, or ask for the right",
    errno.EROFS: "; choose an --out that can be written",
}
"""What to do, by the system's error."""


def remedy(error: OSError) -> str:
    """What to do about an error of the system, to stand behind its words."""
    return HINTS.get(error.errno or 0, "")


def said_by_task(text: str) -> SattileError | None:
    """What a task of ours raised, out of what Spark makes of it: pages of Java."""
    if found := re.findall(rf"{re.escape(__name__)}\.(\w+): (.+)", text):
        name, words = found[-1]
        return UsageError(words) if name == UsageError.__name__ else SattileError(words)
    for number, words in re.findall(r"Error: (?:\[Errno (\d+)\] )(.+)", text)[-1:]:
        if int(number) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # what a task reads is told by itself
            return SattileError(f"a task says: {words}{HINTS[int(number)]}")
    return None


def nearest(name: str, known: Iterable[str], section: str = "") -> str:
    """`; did you mean ...?`, or the list of what there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    prefix = f"{section}." if section else ""
    return f"; did you mean {prefix}{close[0]}?" if close else f"; there are {', '.join(sorted(known))}"
