"""The command line: parse, call, say how it ended."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import sattile
from sattile import config, engine, record
from sattile.config import COMMANDS, Command, Option
from sattile.errors import SattileError, UsageError, nearest, remedy, said_by_task
from sattile.pipeline import STEPS

log = logging.getLogger("sattile")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 (done), 2 (wrong usage), 3 (too many refused) or 1 (anything else)."""
    status = _main(list(sys.argv[1:] if arguments is None else arguments))
    if status and "PYSPARK_GATEWAY_PORT" in os.environ and "CONTAINER_ID" in os.environ:
        time.sleep(LAST_WORDS)
    return status


LAST_WORDS = 3
"""Seconds that a driver on the cluster stays after a failure: its container's log goes with it, unread."""


def _main(arguments: list[str]) -> int:
    try:
        name = arguments[0] if arguments else ""
        return _run(COMMANDS[name], arguments[1:]) if name in COMMANDS else _overview(arguments)
    except SattileError as error:
        print(f"sattile: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("sattile: interrupted; what is published is whole, and the next run goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        log.debug("where it happened:", exc_info=True)
        print(f"sattile: {error}{remedy(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        said = said_by_task(str(error))
        if said is None:
            raise
        print(f"sattile: {said}", file=sys.stderr)
        return said.exit_status


def _overview(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"sattile {sattile.__version__}")
        return 0
    if name not in ("--help", "-h"):
        named = next((one for one in arguments if one in COMMANDS), None)
        if name.startswith("-") and named:
            raise UsageError(f"{name}: the command comes first: sattile {named} {name} ...")
        raise UsageError(f"{name!r} is no command{nearest(name, COMMANDS)}")
    print("sattile: from an archive of satellite scenes to stitched maps, on Spark\n\ncommands:")
    for command in COMMANDS.values():
        print(f"  {command.name:<10} {command.summary}")
    print("\n`sattile COMMAND --help` shows options and an example; `sattile demo` shows all of it at work.")
    return 0


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any):
        super().__init__(**settings)
        # argparse takes -1 and -1.5 for values, but not float32's least number, nor --rescale -1,-1000.
        self._negative_number_matcher = re.compile(r"-\.?\d[\d.,eE+-]*$")

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\n  `{self.prog} --help` lists the options")

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """{option: value} of those that were given."""
        given, unknown = self.parse_known_intermixed_args(arguments)
        for word in unknown:
            flag = word.partition("=")[0]
            if flag.startswith("--"):
                known = [one for one in self._option_string_actions if one.startswith("--")]
                self.error(f"{flag} is no option{nearest(flag, known)}")
        if unknown:
            self.error(f"what is {' '.join(unknown)}? Options are written --name value")
        return vars(given)


def parser(command: Command) -> _Parser:
    """The parser of one command, from the parameters of its function."""
    options = command.options()
    built = _Parser(
        prog=f"sattile {command.name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"example:\n  {command.example}\n\nexit status: 0 done, 2 wrong usage or settings, 3 too many scenes "
        f"refused, 1 anything else",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for option in options:
        _add(built, option, command.bare == option.name)
    job = built.add_argument_group("job")
    job.add_argument("--conf", metavar="FILE.yaml", help="settings, a section per command")
    job.add_argument("--set", action="append", metavar="A.B=C", help="one setting: train.epochs=10")
    known = {option.name for option in options}
    if command.needs_spark:
        job.add_argument("--master", help=config.JOB_KEYS["master"][1])
    if "max_failed_fraction" not in known:
        job.add_argument("--max-failed-fraction", type=float, help=argparse.SUPPRESS)
    job.add_argument("--verbose", action="store_true", help="say more")
    return built


def _add(built: argparse.ArgumentParser, option: Option, positional: bool) -> None:
    text = option.help.rstrip(".").replace("%", "%%")
    if option.required:
        text += " (required)"
    elif option.default not in (None, "", ()) and option.default is not False:
        text += f" (default: {'on' if option.default is True else option.default})"
    flag = "--" + option.name.replace("_", "-")
    if positional:
        built.add_argument(option.name, nargs="*", metavar=option.name.upper(), help=text)
    elif option.kind == "bool":
        built.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif option.kind == "list":
        built.add_argument(flag, nargs="+", metavar=option.name.upper(), help=text)
    else:
        kind, metavar = {"int": (int, "N"), "float": (float, "X")}.get(option.kind, (str, option.name.upper()))
        built.add_argument(flag, type=kind, metavar=metavar, help=text)


def _run(command: Command, arguments: Sequence[str]) -> int:
    given = parser(command).parse(arguments)
    engine.check_working_folder()
    assignments = given.pop("set", ())
    settings = config.load(given.pop("conf", None), assignments)
    _check_sections(command, assignments)
    job = {key: given.pop(key, settings.get(key)) for key in ("master", "verbose")}
    _log(bool(job["verbose"]))
    known = {option.name: option for option in command.options()}
    values = {**settings.get(command.name, {}), **{name: value for name, value in given.items() if name in known}}
    if "max_failed_fraction" in known and "max_failed_fraction" in settings:  # of the job, unless said for the command
        values.setdefault("max_failed_fraction", settings["max_failed_fraction"])
    required = [option.name for option in known.values() if option.required]
    missing = [name for name in required if values.get(name) in (None, [], "")]  # "": of an unset variable
    if missing:
        names = ", ".join(name if name == command.bare else "--" + name.replace("_", "-") for name in missing)
        raise UsageError(f"`sattile {command.name}` needs {names}\n  for example: {command.example}")
    if command.chains:
        values["settings"] = {name: part for name, part in settings.items() if name in STEPS[command.name]}
    start = time.monotonic()
    if command.needs_spark:
        result = _with_session(command, values, job["master"], settings.get("spark", {}))
    else:
        result = command.function()(**values)
    if result:
        record.announce(f"{result}")
    log.info("%s: done in %.0f s", command.name, time.monotonic() - start)
    return 0


def _check_sections(command: Command, assignments: Sequence[str]) -> None:
    """A file may be shared by several commands; what is said on the command line is meant for this one."""
    taken = [command.name, *STEPS.get(command.name, ())]
    for assignment in assignments:
        section = assignment.partition("=")[0].partition(".")[0].strip()
        if section in config.COMMANDS and section not in taken:
            raise UsageError(
                f"--set {assignment}: `sattile {command.name}` takes no settings of {section}, "
                f"only of {', '.join(taken)}"
            )


def _with_session(command: Command, values: dict[str, Any], master: str | None, conf: dict[str, Any]) -> Any:
    # Under spark-submit the master is set already.
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ or "SPARK_ENV_LOADED" in os.environ
    spark = engine.session(
        master or (None if submitted else "local[*]"), conf={key: str(value) for key, value in conf.items()}
    )
    try:
        with _interruptible(spark):
            return command.function()(spark, **values)
    finally:
        spark.stop()


@contextmanager
def _interruptible(spark: Any) -> Iterator[None]:
    """Let Ctrl-C end the Spark jobs, then us: an exception amid a call to the JVM would garble all later calls."""
    interrupted, ended = threading.Event(), threading.Event()

    def cancel() -> None:
        spark.sparkContext.setLogLevel("OFF")  # tasks that are cut short complain at length
        while not ended.wait(0.2):
            spark.sparkContext.cancelAllJobs()

    def handle(_: int, frame: FrameType | None) -> None:
        again = interrupted.is_set()
        interrupted.set()
        if not again:
            threading.Thread(target=cancel, daemon=True).start()
        while frame is not None and not again:
            if frame.f_globals.get("__name__", "").startswith("py4j."):
                return  # this call ends with its job
            frame = frame.f_back
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception:
        if interrupted.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        ended.set()
        signal.signal(signal.SIGINT, before)


def _log(verbose: bool) -> None:
    """Messages go to standard error, results to standard output; others' logs are kept quiet."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


if __name__ == "__main__":
    sys.exit(main())
