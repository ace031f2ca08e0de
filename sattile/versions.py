"""Versions of a model side by side, and which of them is the latest.

    ROOT/v1/ v2/ ...      bundles, each with its own run record; one that is whole is never written again
    ROOT/latest.json      {"version": "v2", "digest": ...}, replaced by one rename once v2 is whole;
                          with "taken": "v3" where v3 was there, and is no more

A small file and not a link, because HDFS has none. The lease of ROOT is held for the moments in which a number is taken
or `latest.json` moved, that of a version's folder while it is made: two trainings may run side by side.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from sattile import storage
from sattile.errors import SattileError, UsageError
from sattile.record import RUN, STARTED, Run, plain

BUNDLE, LATEST = "bundle.json", "latest.json"
MARK = "_version.json"
"""In a version's folder, from its first moment on: what it is made of. A failed run takes its own marks away."""

NAME = re.compile(r"v([1-9][0-9]{0,8})")
PATIENCE = 90
"""Seconds to wait for another job that takes a number: longer than a killed one's lease lasts."""


def resolve(url: str) -> str:
    """The bundle's folder: `url`, or the latest of the versions that it holds.

    Raises:
        UsageError: if its `latest.json` is missing, damaged, or names what is not there.
    """
    if storage.exists(storage.join(url, BUNDLE)):
        return url
    if not storage.exists(storage.join(url, LATEST)):
        there = _whole(url)
        if not there:
            return url
        raise UsageError(
            f"{url} holds versions of a model ({', '.join(there)}) and no {LATEST}, which says which is the latest: "
            f"name one, such as {storage.join(url, there[-1])}; a training with --versions writes it anew"
        )
    said, _ = _read(url)
    if said is None:
        raise UsageError(
            f"{storage.join(url, LATEST)} does not say which version is the latest: name one, such as "
            f"{storage.join(url, 'v1')}, or train with --versions again, which writes it anew"
        )
    found = storage.join(url, said)
    if not storage.exists(storage.join(found, BUNDLE)):
        there = _whole(url)
        raise UsageError(
            f"{storage.join(url, LATEST)} names {said}, which is not there"
            + (f"; there are {', '.join(there)}: name one, such as {storage.join(url, there[-1])}" if there else "")
            + "; a training with --versions names the latest anew"
        )
    return found


def _read(root: str) -> tuple[str | None, int]:
    """What `latest.json` names (only a name of our own making is followed), and the highest number ever taken."""
    try:
        found = storage.read_json(storage.join(root, LATEST))
    except SattileError:
        found = None
    said, taken = (found.get(key) if isinstance(found, dict) else None for key in ("version", "taken"))
    names = [one if isinstance(one, str) and NAME.fullmatch(one) else None for one in (said, taken)]
    return names[0], max(_numbers([one for one in names if one]), default=0)


def _whole(root: str) -> list[str]:
    """Names of the versions below a folder that are bundles."""
    names = _numbers([storage.name(entry.url) for entry in storage.list_folder(root)])
    folders = ((f"v{one}", storage.join(root, f"v{one}")) for one in names)
    return [name for name, folder in folders if all(storage.exists(storage.join(folder, x)) for x in (MARK, BUNDLE))]


def is_version(url: str) -> bool:
    """Whether this is one of the versions of a model."""
    if NAME.fullmatch(storage.name(url)) is None:
        return False
    return any(storage.exists(one) for one in (storage.join(url, MARK), storage.join(storage.parent(url), LATEST)))


@contextmanager
def opened(
    command: str, out: str, settings: dict[str, Any], overwrite: bool = False, versions: bool = False
) -> Iterator[Run]:
    """The `Run` that makes a bundle: in `out` or, with `versions`, in the folder of a version below it.

    That is the version made of these settings, whole or not: an unfinished one is gone on with. Else it is a new one,
    numbered one above all that are there; so unfinished ones of other settings, which may still be under way, keep
    their numbers. `latest.json` is moved when the run has ended well.

    Raises:
        UsageError: as `Run` does; if `out` holds a bundle and is to hold versions, or the other way round.
    """
    if is_version(out):
        raise UsageError(
            f"--out {out} is a version of a model, and versions stay as they are: "
            f"--versions --out {storage.parent(out)} makes the next one"
        )
    if not versions:
        if storage.exists(storage.join(out, LATEST)) or _whole(out):
            raise UsageError(f"--out {out} holds versions of a model: --versions makes the next one")
        with Run(command, out, settings, overwrite) as run:
            yield run
        return
    with ExitStack() as stack:
        with _held(out):
            folder = _take(out, {"command": command, "settings": plain(settings)})
            run = stack.enter_context(Run(command, folder, settings))
        yield run
    move_latest(out)


def is_made(run: Run, versions: bool) -> bool:
    """Whether the bundle of a run is there already.

    In a version's folder, which is never made anew, a bundle is whole and of these settings.
    """
    return (run.finished_before or versions) and storage.exists(storage.join(run.out, BUNDLE))


@contextmanager
def _held(root: str) -> Iterator[None]:
    """The lease of a folder of versions, which no job keeps for long: waited for."""
    entry = storage.stat(root)
    if entry is not None and not entry.is_folder:
        raise UsageError(f"--out {root} is a file; name a folder")
    lease, end = storage.Lease(root), time.monotonic() + PATIENCE
    while True:
        try:
            lease.__enter__()
            break
        except UsageError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UsageError(f"--out {root} can't be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lease.__exit__(None, None, None)


def _take(root: str, made_of: Mapping[str, Any]) -> str:
    """The folder of the version made of this, marked as its own. The root's lease is ours."""
    names = [storage.name(entry.url) for entry in storage.list_folder(root)]
    if {BUNDLE, RUN, STARTED} & {*names}:
        raise UsageError(f"--out {root} holds a model without versions; name another folder for --versions")
    numbers = _numbers(names)
    strangers = [one for one in names if not one.startswith((".", "_")) and one != LATEST and not NAME.fullmatch(one)]
    if strangers and not numbers:
        raise UsageError(
            f"--out {root} holds files that no sattile run left there (such as {strangers[0]}); name an empty or new "
            f"folder"
        )
    taken = 0
    for number in numbers:
        folder = storage.join(root, f"v{number}")
        mark = storage.join(folder, MARK)
        if storage.exists(mark) and storage.read_json(mark) == made_of:
            return folder
        # What a run that made nothing leaves is free again: who is at work there has a lease.
        if {storage.name(entry.url) for entry in storage.list_folder(folder)} - {MARK}:
            taken = number
    if LATEST in names:  # a number is never used twice, even where its folder was removed by hand
        taken = max(taken, _read(root)[1])
    folder = storage.join(root, f"v{taken + 1}")
    storage.write_json(storage.join(folder, MARK), dict(made_of))
    return folder


def _numbers(names: list[str]) -> list[int]:
    return sorted(int(match.group(1)) for one in names if (match := NAME.fullmatch(one)))


def move_latest(root: str) -> None:
    """Have `latest.json` name the highest version that is whole, if it does not yet.

    The last one of two that end in the other order than they began stays the latest. A run that was killed before it
    came here is made up for by the next one.
    """
    with _held(root):
        for number in reversed(_numbers([storage.name(entry.url) for entry in storage.list_folder(root)])):
            folder = storage.join(root, f"v{number}")
            if all(storage.exists(storage.join(folder, one)) for one in (BUNDLE, RUN)):
                break
        else:
            return
        url = storage.join(root, LATEST)
        said = {"version": f"v{number}", "digest": storage.read_json(storage.join(folder, BUNDLE))["digest"]}
        taken = _read(root)[1] if storage.exists(url) else 0
        if taken > number:
            said["taken"] = f"v{taken}"
        if not storage.exists(url) or storage.read_bytes(url) != storage.json_bytes(said):
            storage.write_json(url, said)
