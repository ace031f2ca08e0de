"""What can go wrong, by whose fault it is; each class carries the exit status of the commands."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class SattileError(Exception):
    """Something went wrong; the message says what, with the values seen, and what to do about it."""

    exit_status = 1


class UsageError(SattileError):
    """The caller asked for something that cannot be: an unknown setting, a missing file, a bad geometry.

    Raised before any work is done, where it can be known by then.
    """

    exit_status = 2


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
