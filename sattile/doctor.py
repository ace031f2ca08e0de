"""`sattile doctor`: does what sattile needs work, here and on every executor, and if not, what has to be set?

Each machine examines itself and sends a `Report`. What the reports mean together is worked out by pure functions:
versions that differ, files that one sees and another does not. A check returns what it found or raises; what it raises
is its finding. Nothing but numpy is imported here that an executor might lack: that is for the report to say.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sattile
from sattile import engine, storage
from sattile.decoder import Decoder
from sattile.errors import SattileError, UsageError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

OK, WARNING, FAILED = "ok", "warning", "FAILED"

PACKAGES = ("pyspark", "pyarrow", "numpy", "pandas", "tensorflow", "keras", "rasterio", "GDAL", "petastorm", "hdfs",
            "sattile")  # fmt: skip
"""What has to be the same everywhere, beside Python itself: results, or what travels between machines, depend on it."""

ALSO_CALLED = {"tensorflow": ("tensorflow-cpu", "tensorflow-intel", "tensorflow-rocm")}

PAUSE = 0.3
"""Seconds a task stays in its slot, so that no executor takes the tasks of the others."""

WAIT = 60.0
"""Seconds for executors that were asked for to come."""

SHOWN = 3
"""Machines named in a line; of the others their number."""

MOST_READ = 20
"""Files of other machines that each reads."""

WORKER_GB = 3.0
"""Memory that a Python worker takes unless `--worker-memory` says otherwise."""

ENVIRONMENT = (
    "set PYSPARK_PYTHON to the same environment everywhere: spark-submit.sh packs this one (SATTILE_ENV=packed); by "
    "hand: --archives environment.tar#environment and PYSPARK_PYTHON=./environment/bin/python; SATTILE_ENV=local only "
    "where every node has it at the same path"
)

REMEDIES = {
    "GDAL": "unset GDAL_DATA, PROJ_LIB and PROJ_DATA if another GDAL set them; else install rasterio's wheel into the "
    "environment and pack it again",
    "decoder": "sattile starts a second interpreter for foreign files: let the container start processes, and give it "
    "memory (spark.executor.memoryOverhead)",
    "TensorFlow": "install `sattile[cpu]` or `sattile[gpu]` into the environment that PYSPARK_PYTHON names, and pack "
    "it again",
    "scratch": "set TMPDIR to a folder on a local disk that can be written (executors: --conf "
    "spark.executorEnv.TMPDIR=...; on YARN: yarn.nodemanager.local-dirs)",
    "java": "set JAVA_HOME to a Java 17, or 21 where Spark is 4",
    "HDFS": "set HADOOP_CONF_DIR to the folder of core-site.xml and hdfs-site.xml; on a cluster with Kerberos run "
    "kinit first, or give spark-submit.sh --principal and --keytab",
    "barrier": "tasks on several workers talk to each other: open the nodes' ports to each other, and let each node's "
    "name lead to it",
}
"""What to set, by check; where a check knows better, it says so itself."""


@dataclass(frozen=True)
class Finding:
    """What came of a check.

    Attributes:
        check: its name.
        status: OK, WARNING or FAILED.
        found: what was seen.
        remedy: what to set, if it is not OK.
    """

    check: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """What one machine says of itself.

    Attributes:
        place: `driver`, or the executor's own name, which ends up as `executor 1`.
        versions: {package: version}; None for one that is not there.
        interpreter: path of Python.
        findings: of the checks that every machine makes.
        wrote: whether it left its file in the folder for the others to read.
    """

    place: str
    versions: Mapping[str, str | None]
    interpreter: str
    findings: tuple[Finding, ...]
    wrote: bool = False


@dataclass(frozen=True)
class Exam:
    """What is asked of each machine.

    Attributes:
        run: tells the files of one run of doctor from another's.
        folder: to be tried, "" for none.
        made: whether doctor makes that folder itself.
        gpu: executors have a GPU by Spark's settings.
        trouble: what the driver met when it first looked at the folder: a storage that does not answer is asked once.
    """

    run: str
    folder: str = ""
    made: bool = False
    gpu: bool = False
    trouble: str = ""

    @property
    def work(self) -> str:
        return storage.join(self.folder, f".sattile-doctor-{self.run}")

    def mark(self, place: str) -> str:
        """URL of the file that a machine leaves for the others."""
        return storage.join(self.work, storage.digest(place))


def doctor(
    spark: SparkSession, *, folder: str | None = None, workers: int | None = None, model: str | None = None
) -> str:
    """Check what sattile needs on the driver and on every executor, and say what to set where something fails.

    Args:
        spark: the caller's session.
        folder: a folder that all machines have to share (a path or hdfs://...), to be written, read and tidied up;
            without it only each machine's own scratch is tried.
        workers: of the training that is planned; do so many tasks run at once?
        model: a bundle: which engine would run it here, in which precision, and how fast are both?

    Returns:
        A line that says how many checks were made.

    Raises:
        UsageError: for a folder of a scheme that sattile has no storage for, or fewer than 1 worker.
        SattileError: if a check failed; the table on standard output says which and what to do.
    """
    from sattile import record

    engine.check(spark)
    if workers is not None and workers < 1:
        raise UsageError(f"workers {workers}: give at least 1")
    exam = Exam(uuid.uuid4().hex[:8], gpu=float(_conf(spark).get("spark.executor.resource.gpu.amount", "0")) > 0)
    if folder is not None:
        storage.filesystem(folder)
        exam = replace(exam, folder=storage.absolute(folder))
        try:
            exam = replace(exam, made=not storage.exists(exam.folder))
        except Exception as error:
            exam = replace(exam, trouble=_said(error))
    findings = list(_examine_all(spark, exam, workers, model))
    for line in table(findings):
        record.announce(line)
    failed = [one.check for one in findings if one.status == FAILED]
    warned = [one.check for one in findings if one.status == WARNING]
    if failed:
        raise SattileError(
            f"doctor: {len(failed)} of {len(findings)} checks failed ({', '.join(dict.fromkeys(failed))}); the table "
            f"says what to set"
        )
    warnings = f", {len(warned)} with a warning ({', '.join(dict.fromkeys(warned))})" if warned else ""
    return f"doctor: {len(findings)} checks, none failed{warnings}"


def _examine_all(spark: SparkSession, exam: Exam, workers: int | None, model: str | None) -> Iterator[Finding]:
    log.info("doctor: looks at the driver")
    yield attempt("java", partial(_java, spark))
    yield attempt("HDFS", partial(_hdfs, spark, exam))
    reports = [examine(exam, "driver")]
    reached = False
    try:
        log.info("doctor: looks at the executors")
        asked = _wait_for_executors(spark)
        executors, answered = _survey(spark, exam)
        reached = bool(answered)
        yield presence(answered, [one.place for one in executors], asked)
        reports += executors
        yield from compare(numbered(reports))
        yield from merged(numbered(reports))
        if exam.folder:
            yield attempt("shared folder", partial(_shared, spark, exam, reports))
        yield attempt("barrier", partial(_barrier, spark, workers))
        yield attempt("memory", partial(_memory, spark))
        if model is not None:
            yield attempt("engines", partial(_engines, spark, model))
    except Exception as error:
        if len(reports) == 1:
            yield from compare(reports)
            yield from merged(reports)
        yield diagnose(f"{error}")
    finally:
        if reached:
            with suppress(Exception):
                _everywhere(spark, partial(_tidy, exam), exam, None)
        with suppress(Exception):
            _tidy(exam)
            if exam.folder and not exam.trouble:
                _tidy_folder(exam)


def attempt(check: str, function: Callable[[], Finding | str]) -> Finding:
    """A check's finding, whatever becomes of it: what it raises is FAILED."""
    try:
        found = function()
    except Exception as error:
        return Finding(check, FAILED, _said(error), REMEDIES.get(check, ""))
    return found if isinstance(found, Finding) else Finding(check, OK, found)


def _said(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip()[:400] if lines else ""
    return text if isinstance(error, SattileError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


# --- what the reports mean ------------------------------------------------------------------------------------------


def numbered(reports: Sequence[Report]) -> list[Report]:
    """The same with short names: driver, executor 1, executor 2, ..."""
    names = {"driver": "driver", **executor_names([one.place for one in reports if one.place != "driver"])}
    return [replace(one, place=names[one.place]) for one in reports]


def executor_names(places: Sequence[str]) -> dict[str, str]:
    return {place: f"executor {number}" for number, place in enumerate(sorted(set(places)), start=1)}


def presence(answered: Sequence[str], examined: Sequence[str], asked: int) -> Finding:
    """How many executors there are.

    Args:
        answered: places of those that ran a task.
        examined: of those that came to the end of their checks.
        asked: how many there should be.
    """
    names = executor_names(examined)
    lost = sorted(set(answered) - set(examined))
    where = "; ".join(f"{names[place]} is {place}" for place in sorted(names)[:SHOWN])
    found = f"{len(examined)} of {max(asked, len(examined))} answered{': ' if where else ''}{where}"
    found += f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
    if lost or not examined:
        dead = f"; no report from {', '.join(lost[:SHOWN])}: its Python ended amid the checks" if lost else ""
        return Finding("executors", FAILED, found + dead, _CAUSES[-1][1])
    if len(examined) < asked:
        return Finding(
            "executors", WARNING, found,
            "the cluster gave fewer than were asked for: see its queue, and ask for fewer or smaller ones "
            "(--num-executors, spark.executor.memory, spark.executor.memoryOverhead, spark.executor.cores)",
        )  # fmt: skip
    return Finding("executors", OK, found)


def compare(reports: Sequence[Report]) -> list[Finding]:
    """Whether all machines have the driver's Python and packages.

    Args:
        reports: the driver's first, with short names.
    """
    places = [one.place for one in reports]
    pythons = {one.place: f"{one.versions['python']} ({one.interpreter})" for one in reports}
    versions = {one.place: str(one.versions["python"]) for one in reports}
    status = OK
    if len(set(versions.values())) > 1:  # a bug-fix release more or less runs, and is worth knowing
        minor = {version.rpartition(".")[0] for version in versions.values()}
        status = FAILED if len(minor) > 1 else WARNING
    found = [Finding("python", status, _by_value(pythons, places), "" if status == OK else ENVIRONMENT)]
    same: list[str] = []
    for package in PACKAGES:
        seen = {one.place: one.versions.get(package) or "none" for one in reports}
        if len(set(seen.values())) > 1:
            found.append(Finding("packages", FAILED, f"{package} {_by_value(seen, places)}", ENVIRONMENT))
        elif seen[places[0]] == "none":
            remedy = "install the environment with `make env`, and pack it again"
            found.append(Finding("packages", FAILED, f"{package} is not installed", remedy))
        else:
            same.append(f"{package} {seen[places[0]]}")
    return [*found, Finding("packages", OK, _everyone(places, places) + ", ".join(same))] if same else found


def merged(reports: Sequence[Report]) -> list[Finding]:
    """The machines' own findings, those that ended alike in one line; bad ones first within a check."""
    places = [one.place for one in reports]
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    for report in reports:
        for one in report.findings:
            groups.setdefault((one.check, one.status, one.remedy), {})[report.place] = one.found
    checks = list(dict.fromkeys(check for check, _, _ in groups))
    rank = [FAILED, WARNING, OK]
    order = sorted(groups, key=lambda key: (checks.index(key[0]), rank.index(key[1])))
    return [Finding(key[0], key[1], _by_value(groups[key], places), key[2]) for key in order]


def _by_value(found: Mapping[str, str], places: Sequence[str]) -> str:
    """`driver: a; executor 1, executor 2: b`; a few of them, and the number of the others."""
    groups: dict[str, list[str]] = {}
    for place, text in found.items():
        groups.setdefault(text, []).append(place)
    texts = [_everyone(where, places) + text for text, where in groups.items()]
    more = sum(len(where) for where in list(groups.values())[SHOWN:])
    return "; ".join(texts[:SHOWN]) + (f"; and {more} others" if more else "")


def _everyone(where: Sequence[str], places: Sequence[str]) -> str:
    """`driver and 2 executors: ` where it is all of them, else their names."""
    executors = [place for place in where if place != "driver"]
    if len(executors) == len(places) - 1 and len(executors) > 1:
        names = ["driver"] * ("driver" in where) + [f"{len(executors)} executors"]
        return " and ".join(names) + ": "
    named = list(where[:SHOWN]) + ([f"{len(where) - SHOWN} others"] if len(where) > SHOWN else [])
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named) + ": "


def sharing(folder: str, seen: Mapping[str, Mapping[str, str]]) -> Finding:
    """Whether all see the same files.

    Args:
        folder: that is tried.
        seen: {reader: {writer: what was wrong with its file, "" if nothing}}.
    """
    wrong = [
        f"{reader} does not see what {writer} wrote: {text}"
        for reader, found in seen.items()
        for writer, text in found.items()
        if text
    ]
    if not wrong:
        files = sum(len(found) for found in seen.values())
        return Finding("shared folder", OK, f"{folder}: each sees what the others wrote ({files} reads)")
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return Finding(
        "shared folder", FAILED, f"{folder}: {'; '.join(wrong[:SHOWN])}{more}",
        "a local path means another disk on each machine: use hdfs:// for scenes, --dataset, --model and --out, or a "
        "folder that every machine mounts at the same path",
    )  # fmt: skip


_CAUSES = (
    (r"PYTHON_VERSION_MISMATCH|different (minor )?version", ENVIRONMENT),
    (
        r"No module named '?sattile",
        "submit with spark-submit.sh, which sends the library along, or set spark.executorEnv.PYTHONPATH to it",
    ),
    (r"No module named|ImportError|cannot import name", ENVIRONMENT),
    (r"Cannot run program|error=2,|error=13,", f"executors have no such interpreter: {ENVIRONMENT}"),
    (
        r"exit(ed|Code| status| code).{0,24}1(37|43)|crashed|beyond.*memory|ExecutorLost|lost|EOFException",
        "memory may have run out: raise spark.executor.memoryOverhead (Python lives there, beside the JVM), or ask for "
        "fewer spark.executor.cores",
    ),
)
"""What the text of a failed job means, and what to set; the first that fits."""


def diagnose(text: str) -> Finding:
    """What a failed Spark job says of the executors."""
    text = re.sub(r"(?m)^.*most recent failure: Lost task \S+ in stage \S+ \(TID \d+\) ", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for pattern, remedy in _CAUSES:
        hit = next((line for line in lines if re.search(pattern, line)), None)
        if hit:
            return Finding("executors", FAILED, hit[:400], remedy)
    return Finding("executors", FAILED, lines[0][:400] if lines else "a job failed", "see the executors' own logs")


def table(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding, and one below it that says what to set."""
    width = max(len(one.check) for one in findings)
    lines = []
    for one in findings:
        lines.append(f"{one.status:<8} {one.check:<{width}}  {scrubbed(one.found)}")
        if one.remedy and one.status != OK:
            lines.append(f"{'':<8} {'':<{width}}  -> {scrubbed(one.remedy)}")
    return lines


def scrubbed(text: str) -> str:
    """Without what is secret: tokens in the URLs of others' messages, passwords."""
    text = re.sub(
        r"(?i)((?:delegation|token|password|secret|signature|credential)[\w.-]*=)[^\s&;,'\")]+", r"\1...", text
    )
    return re.sub(r"(?<=://)[^/@\s]+:[^/@\s]+@", "...@", " ".join(text.split()))


# --- on each machine ------------------------------------------------------------------------------------------------


def examine(exam: Exam, place: str) -> Report:
    """This machine's report; of the driver or an executor alike."""
    findings = [
        attempt("GDAL", _gdal),
        attempt("decoder", _decoder),
        attempt("TensorFlow", partial(_tensorflow, exam.gpu and place != "driver")),
        attempt("machine", _machine),
        attempt("cpu", _cpu),
        attempt("scratch", _scratch),
    ]
    wrote = False
    if exam.folder:
        found = attempt("folder", partial(_folder, exam, place))
        wrote = found.status == OK
        findings.append(found if wrote else replace(found, remedy=_folder_remedy(exam.folder)))
    return Report(place, versions(), sys.executable, tuple(findings), wrote)


def _cpu() -> str:
    from sattile.scorers import cpu, has_openvino

    precision = "bfloat16" if cpu().bfloat16 else "float32"
    return f"{cpu()}" + (
        f"; OpenVINO would compute in {precision}" if has_openvino() else "; OpenVINO is not installed"
    )


def versions() -> dict[str, str | None]:
    """Of Python and `PACKAGES`, None for what is missing; read without importing what might not load."""
    import pyspark

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = None
        for name in (package, *ALSO_CALLED.get(package, ())):
            with suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(name)
                break
    # Those that travel by another way than the environment: what runs, not what is installed.
    found |= {"pyspark": pyspark.__version__, "sattile": sattile.__version__}
    with suppress(Exception):
        from sattile import raster

        found["GDAL"] = raster.rasterio.__gdal_version__
    return found


def _gdal() -> str:
    with Decoder(timeout=60) as child:  # should GDAL die of it, this process is still there to say so
        return child.call(write_and_read_raster)


def write_and_read_raster() -> str:
    """A small scene through the same code that publishes maps and reads scenes."""
    import numpy as np

    from sattile import cog, raster
    from sattile.grid import Window

    pixels = (np.arange(40 * 60) % 251).astype(np.uint8).reshape(40, 60)
    with storage.scratch() as folder:
        layer = cog.Layer("labels", "uint8", ("labels",), 255, "mode")
        place = {"crs": "EPSG:32632", "transform": (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_600_000.0)}
        canvas = cog.Canvas(os.path.join(folder, "a.tif"), layer, height=40, width=60, **place)  # type: ignore[arg-type]
        with canvas:
            canvas.write(Window(0, 0, 40, 60), pixels)
        path = os.path.join(folder, "b.tif")
        cog.to_cog(canvas, path)
        known = raster.describe_file(path)
        if not np.array_equal(cog.preview(path), pixels):
            raise SattileError("a small GeoTIFF was written, and other pixels came back")
    if known.crs != "EPSG:32632" or known.footprint is None:
        raise SattileError(f"a small GeoTIFF in EPSG:32632 came back as {known.crs}: PROJ does not find its tables")
    return "writes and reads a small GeoTIFF, EPSG:32632"


def _decoder() -> str:
    with Decoder(timeout=60) as child:
        if child.call(os.getpid) == os.getpid():
            raise SattileError("the child process is no process of its own")
    return "its child process starts and answers"


_LOAD_TENSORFLOW = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import tensorflow as tf
tf.reduce_sum(tf.ones((8, 8))).numpy()
print(json.dumps([tf.__version__, [one.device_type for one in tf.config.list_physical_devices()]]))
"""


def _tensorflow(wants_gpu: bool) -> Finding | str:
    """In a process of its own: it may end the one that loads it (a CPU without AVX), and holds memory and GPUs."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", _LOAD_TENSORFLOW, json.dumps(sys.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode == -4:
        return Finding(
            "TensorFlow", FAILED, "dies of an instruction that this CPU lacks (SIGILL)",
            "the wheel wants AVX: use nodes that have it (a YARN node label), or build TensorFlow for them",
        )  # fmt: skip
    if done.returncode == -9:
        return Finding(
            "TensorFlow", FAILED, "was killed while it was loaded (SIGKILL)", "raise spark.executor.memoryOverhead"
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SattileError(f"does not load: {lines[-1][:300]}")
    version, devices = json.loads(done.stdout.strip().splitlines()[-1])
    counted = ", ".join(f"{devices.count(one)} {one}" for one in dict.fromkeys(devices))
    found = f"{version} loads and computes; devices: {counted}"
    if wants_gpu and "GPU" not in devices:
        return Finding(
            "TensorFlow", FAILED, f"{found}; Spark gives this executor a GPU, and TensorFlow sees none",
            "install `sattile[gpu]` into the packed environment (sattile[cpu] has no CUDA), and look at the node's "
            "driver with nvidia-smi",
        )  # fmt: skip
    return found


def _machine() -> Finding | str:
    cores, free = cores_seen(), memory_free_gb()
    found = f"{cores} cores, {free:.1f} GB of memory free"
    if free < 1:
        return Finding("machine", WARNING, found, "other processes hold the memory: use fewer cores, or another node")
    return found


def cores_seen() -> int:
    """Cores that this process may run on; a container's quota counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(int(quota) // int(period), 1))
    return cores


def memory_free_gb() -> float:
    """Memory that can still be had; a container's limit counts."""
    free = float("inf")
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = (limit - int(Path("/sys/fs/cgroup/memory.current").read_text())) / 1e9
    with suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = min(free, int(match.group(1)) * 1024 / 1e9) if match else free
    return free if free < float("inf") else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _scratch() -> Finding | str:
    with storage.scratch() as folder:
        _round_trip(folder)
    base = tempfile.gettempdir()
    free = shutil.disk_usage(base).free / 1e9
    found = f"{base}, {free:.1f} GB free"
    asked = os.environ.get("TMPDIR")
    if asked and os.path.realpath(asked) != os.path.realpath(base):
        return Finding("scratch", WARNING, f"{found}; TMPDIR={asked} can't be used", REMEDIES["scratch"])
    if free < 5:
        return Finding("scratch", WARNING, found, f"maps are written there before they are copied; {_larger()}")
    return found


def _larger() -> str:
    return "set TMPDIR to a larger local disk (executors: --conf spark.executorEnv.TMPDIR=...)"


def _folder(exam: Exam, place: str) -> str:
    """Try the folder, and leave a file in it for the others."""
    if place == "driver" and exam.trouble:
        raise SattileError(exam.trouble)
    storage.make_folder(exam.work)
    _round_trip(exam.work)
    storage.write_text(exam.mark(place), place)
    return f"{exam.folder}: writes, lists, reads, renames and removes"


def _folder_remedy(folder: str) -> str:
    if storage.scheme_of(folder) == "hdfs":
        return (
            "set HADOOP_CONF_DIR (its dfs.namenode.http-address must answer, dfs.webhdfs.enabled be true, and the "
            "DataNodes' web ports be open to all nodes; else SATTILE_HDFS=libhdfs, with libhdfs.so on all nodes); "
            "kinit, or --principal and --keytab, on a cluster with Kerberos; `hdfs dfs -chown` or -chmod where the "
            "right to write is missing"
        )
    return (
        f"let the user who runs it ({_user()}) write there, on every machine, or choose another folder; executors of a "
        f"cluster often run as another user than the driver: hdfs:// suits them better"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def _round_trip(folder: str) -> None:
    """Write, list, read, rename and remove a small file.

    Raises:
        SattileError: if one of them does not do what it should; says which.
    """
    base, data = uuid.uuid4().hex[:12], secrets.token_bytes(1000)
    first, second = storage.join(folder, f"{base} a"), storage.join(folder, f"{base} b")
    step = "write"
    try:
        storage.write_bytes(first, data)
        step = "list"
        if storage.name(first) not in {storage.name(one.url) for one in storage.list_folder(folder)}:
            raise SattileError("a file that was written is not listed")
        step = "read"
        if storage.read_bytes(first) != data:
            raise SattileError("other bytes come back than were written")
        step = "rename"
        storage.rename(first, second)
        if storage.exists(first) or not storage.exists(second):
            raise SattileError("the file is not where it was renamed to")
        step = "remove"
        storage.remove(second)
        if storage.exists(second):
            raise SattileError("a file that was removed is still there")
    except Exception as error:
        for url in (first, second):
            with suppress(Exception):
                storage.remove(url)
        raise SattileError(f"{step} in {folder}: {_said(error)}") from error


def _tidy(exam: Exam) -> None:
    """Remove what this machine keeps of the run; files that all share are the driver's to remove."""
    with suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"sattile-doctor-{exam.run}-*"):
            path.unlink(missing_ok=True)
    if exam.folder and storage.scheme_of(exam.folder) == "file":
        _tidy_folder(exam)


def _tidy_folder(exam: Exam) -> None:
    with suppress(Exception):
        storage.remove(exam.work)
        if exam.made and not storage.list_folder(exam.folder):
            storage.remove(exam.folder)


# --- reaching every executor ----------------------------------------------------------------------------------------


def _conf(spark: SparkSession) -> dict[str, str]:
    return dict(spark.sparkContext.getConf().getAll())


def _master(spark: SparkSession) -> str:
    return str(spark.sparkContext.master)


def _is_dynamic(conf: Mapping[str, str]) -> bool:
    return conf.get("spark.dynamicAllocation.enabled", "false").lower() == "true"


def executors_asked(master: str, conf: Mapping[str, str]) -> int:
    """How many executors a session should have; 1 where nothing says it, and in local mode, where the driver is it."""
    match = re.fullmatch(r"local-cluster\[\s*(\d+)\s*,.*\]", master)
    if match:
        return int(match.group(1))
    if master.startswith("local") or _is_dynamic(conf):
        return 1
    usual = "2" if master.startswith(("yarn", "k8s")) else "1"
    return int(conf.get("spark.executor.instances", usual))


def _wait_for_executors(spark: SparkSession) -> int:
    """Until those that were asked for are there, or `WAIT` is over; returns how many were asked for."""
    master = _master(spark)
    asked = executors_asked(master, _conf(spark))
    end = time.monotonic() + WAIT
    if not master.startswith("local") or master.startswith("local-cluster"):
        tracker = spark.sparkContext._jsc.sc().statusTracker()
        while len(tracker.getExecutorInfos()) - 1 < asked and time.monotonic() < end:
            time.sleep(0.5)
    return asked


def _survey(spark: SparkSession, exam: Exam) -> tuple[list[Report], list[str]]:
    """A report from each executor, and the places of all that answered."""
    found = _everywhere(spark, partial(_examine_executor, exam), exam, "examine")
    reports = {one.place: one for _, one in found if one is not None}
    return [reports[place] for place in sorted(reports)], sorted({place for place, _ in found})


def _examine_executor(exam: Exam) -> Report:
    return examine(exam, identity())


def _everywhere(
    spark: SparkSession, function: Callable[[], Any], exam: Exam, phase: str | None
) -> list[tuple[str, Any]]:
    """Run a function on every executor: (place, its result, or None where another task of the executor ran it).

    Spark sends no task to an executor by name. So there are several for each slot, each stays a moment, and the first
    on an executor does the work (all of them if `phase` is None).
    """
    tasks = 4 * max(engine.concurrent_tasks(spark), 1)
    rows = spark.sparkContext.parallelize(range(tasks), tasks)
    return rows.mapPartitions(engine.on_worker(partial(_in_task, function, exam.run, phase))).collect()


def _in_task(
    function: Callable[[], Any], run: str, phase: str | None, _rows: Iterator[int]
) -> Iterator[tuple[str, Any]]:
    place = identity()
    mine = phase is None or _claims(f"sattile-doctor-{run}-{phase}-{storage.digest(place)}")
    result = function() if mine else None
    time.sleep(PAUSE)
    yield place, result


def _claims(name: str) -> bool:
    """Whether this is the first on its machine to say this name."""
    try:
        with open(os.path.join(tempfile.gettempdir(), name), "x"):
            return True
    except FileExistsError:
        return False
    except OSError:  # no scratch: the check will say so, once for each task
        return True


def identity() -> str:
    """Host and executor of this Python worker: its container, or the process that all its workers come from."""
    owner = os.environ.get("CONTAINER_ID") or os.environ.get("SPARK_EXECUTOR_ID") or f"process {os.getppid()}"
    return f"{owner} on {socket.gethostname()}"


def _shared(spark: SparkSession, exam: Exam, reports: Sequence[Report]) -> Finding:
    writers = [one.place for one in reports if one.wrote]
    if len(writers) < 2:
        found = "fewer than two machines could write there"
        return Finding("shared folder", FAILED, found, "mend what the check `folder` names")
    writers = writers[:MOST_READ]
    names = {"driver": "driver", **executor_names([one.place for one in reports if one.place != "driver"])}
    seen = {"driver": _read_marks(exam, writers)}
    for place, found in _everywhere(spark, partial(_read_marks, exam, writers), exam, "read"):
        if found is not None:
            seen[place] = found
    short = {
        names.get(reader, reader): {names[writer]: text for writer, text in found.items()}
        for reader, found in seen.items()
    }
    return sharing(exam.folder, short)


def _read_marks(exam: Exam, writers: Sequence[str]) -> dict[str, str]:
    """{writer: what is wrong with its file}."""
    found = {}
    for writer in writers:
        try:
            found[writer] = "" if storage.read_text(exam.mark(writer)) == writer else "it holds something else"
        except Exception as error:
            found[writer] = _said(error)
    return found


# --- on the driver --------------------------------------------------------------------------------------------------


def _engines(spark: SparkSession, url: str) -> Finding | str:
    from sattile import processors
    from sattile.model import load_models

    bundle = load_models(url)
    choice = processors.choose(spark, bundle, threads=int(spark.conf.get("spark.task.cpus", "1") or 1))
    speeds = "; ".join(
        f"TensorFlow {one['tensorflow']:.2f}, OpenVINO {one['openvino']:.2f} Mpix/s a task on {kind}"
        for kind, one in choice.speeds.items()
    )
    found = f"{choice.engine} in {choice.precision}: {choice.why}" + (f" ({speeds})" if speeds else "")
    if "could not be measured" in choice.why:
        return Finding("engines", WARNING, found, "the log above says why; --engine openvino takes it unmeasured")
    return found


def _java(spark: SparkSession) -> Finding | str:
    jvm: Any = spark.sparkContext._jvm
    if jvm is None:
        return Finding("java", WARNING, "this session shows no JVM", "use a classic session, not Spark Connect")
    said = jvm.java.lang.System.getProperty
    hadoop = jvm.org.apache.hadoop.util.VersionInfo.getVersion()
    found = f"driver: {said('java.version')} ({said('java.home')}), Spark {spark.version}, Hadoop client {hadoop}"
    major = int(said("java.version").removeprefix("1.").partition(".")[0].partition("-")[0])
    return found if engine.java_fits(major) else Finding("java", WARNING, found, REMEDIES["java"])


def _hdfs(spark: SparkSession, exam: Exam) -> Finding | str:
    from sattile.storage.hdfs import find_access

    wanted = storage.scheme_of(exam.folder) == "hdfs"
    configuration = os.environ.get("HADOOP_CONF_DIR")
    if not wanted and not configuration:
        return "not set up (no HADOOP_CONF_DIR); only hdfs:// needs it"
    jvm_conf = spark.sparkContext._jsc.hadoopConfiguration()
    kerberos = str(jvm_conf.get("hadoop.security.authentication")).lower() == "kerberos"
    access = find_access()
    found = hdfs_text(access, configuration=configuration, kerberos=kerberos)
    if not access.addresses:  # a URL may name a NameNode by itself: the check of the folder tells
        return Finding("HDFS", WARNING, found, REMEDIES["HDFS"])
    if kerberos and not access.tokens:
        return Finding("HDFS", FAILED, found, REMEDIES["HDFS"])
    return found if wanted else f"{found}; not tried without --folder hdfs://..."


def hdfs_text(access: storage.Access, *, configuration: str | None, kerberos: bool) -> str:
    """Which way HDFS is reached; of tokens only whether there are any."""
    addresses = "; ".join(
        f"{authority} by WebHDFS at {address.replace(';', ' or ')}"
        if access.way == "webhdfs"
        else f"{authority} by libhdfs"
        for authority, address in access.addresses.items()
        if ":" not in authority or authority == access.default
    )
    addresses += f" ({access.why})" * bool(addresses and access.why)
    login = f"as user {access.user}, no Kerberos, no tokens needed"
    if kerberos:
        held = ", ".join(sorted(access.tokens))
        login = f"Kerberos, delegation tokens for {held}" if held else "Kerberos, and no delegation token"
    where = f"HADOOP_CONF_DIR {configuration}" if configuration else "no HADOOP_CONF_DIR"
    return f"{addresses or 'no NameNode named'}; {login}; {where}"


def _barrier(spark: SparkSession, workers: int | None) -> Finding:
    conf = _conf(spark)
    found = barrier_slots(engine.concurrent_tasks(spark), workers, master=_master(spark), dynamic=_is_dynamic(conf))
    if found.status != OK:
        return found
    together = workers or min(engine.concurrent_tasks(spark), 2)
    rows = spark.sparkContext.parallelize(range(together), together).barrier()
    problems = sorted({text for text in rows.mapPartitions(engine.on_worker(_meet)).collect() if text})
    if problems:
        return Finding("barrier", FAILED, "; ".join(problems[:SHOWN]), REMEDIES["barrier"])
    return replace(found, found=f"{found.found}; {together} ran together and reached each other")


def barrier_slots(slots: int, workers: int | None, *, master: str, dynamic: bool) -> Finding:
    """Whether so many tasks run at once, as `train --workers N` needs.

    Args:
        slots: how many tasks do.
        workers: N; None if it is only to be said how many there may be.
        master: Spark's.
        dynamic: dynamic allocation is on.
    """
    found = f"{_tasks(slots)} at once: `train --workers` up to {slots}"
    if dynamic and (workers is None or workers > 1):
        remedy = f"for training: --conf spark.dynamicAllocation.enabled=false --num-executors {workers or 'N'}"
        return Finding("barrier", FAILED if workers else WARNING, f"dynamic allocation is on; {found}", remedy)
    if workers is not None and slots < workers:
        larger = "--num-executors, spark.executor.cores; a full queue gives fewer executors"
        if re.match(r"local(\[|$)", master):
            larger = f"--master local[{workers}]"
        remedy = f"use --workers {slots}, or make the session larger ({larger})"
        return Finding(
            "barrier", FAILED, f"{_tasks(slots)} at once, and {workers} workers have to run together", remedy
        )
    return Finding("barrier", OK, found)


def _tasks(number: int) -> str:
    return f"{number} task{'' if number == 1 else 's'}"


def _meet(_rows: Iterator[int]) -> Iterator[str]:
    """In a barrier task: reach all others, as TensorFlow's workers have to; yields what went wrong, or ""."""
    from pyspark import BarrierTaskContext

    context: Any = BarrierTaskContext.get()
    mine = context.getTaskInfos()[context.partitionId()].address.rpartition(":")[0]
    problem = ""
    with socket.create_server(("", 0)) as server:
        for place in context.allGather(f"{mine}:{server.getsockname()[1]}"):
            host, _, port = place.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=10).close()
            except OSError as error:
                problem = f"a worker on {mine} does not reach one on {host}: {error}"
        context.barrier()
    yield problem


def _memory(spark: SparkSession) -> Finding:
    master, conf = _master(spark), _conf(spark)
    if master.startswith("local"):
        return local_memory(memory_free_gb(), engine.concurrent_tasks(spark))
    return container_memory(conf)


def local_memory(free: float, tasks: int) -> Finding:
    """Whether the machine has room for a Python worker for each slot."""
    found = f"{free:.1f} GB free for {tasks} Python worker{'s' if tasks > 1 else ''}: {free / tasks:.1f} GB each"
    if free / tasks >= WORKER_GB:
        return Finding("memory", OK, found)
    few = max(int(free / WORKER_GB), 1)
    remedy = f"for predict: --worker-memory {max(int(free / tasks * 1000), 500)}m, or --master local[{few}]"
    return Finding("memory", WARNING, f"{found}, and predict takes {WORKER_GB:g} GB unless told otherwise", remedy)


def container_memory(conf: Mapping[str, str]) -> Finding:
    """Whether an executor's container has room for its Python workers: beside the JVM, in the overhead."""
    heap = mebibytes(conf.get("spark.executor.memory", "1g"))
    factor = float(conf.get("spark.executor.memoryOverheadFactor", "0.1"))
    said = conf.get("spark.executor.memoryOverhead")
    overhead = mebibytes(said) if said else max(heap * factor, 384.0)
    tasks = max(int(conf.get("spark.executor.cores", "1")) // int(conf.get("spark.task.cpus", "1")), 1)
    each = overhead * 1.048576 / 1000 / tasks
    found = (
        f"executors of {heap:.0f} MiB with spark.executor.memoryOverhead {overhead:.0f} MiB for {tasks} Python "
        f"worker{'s' if tasks > 1 else ''}: {each:.1f} GB each"
    )
    if each >= WORKER_GB:
        return Finding("memory", OK, found)
    return Finding(
        "memory", WARNING, f"{found}, and predict takes {WORKER_GB:g} GB unless told otherwise",
        f"set spark.executor.memoryOverhead={int(tasks * WORKER_GB)}g (cores x worker memory), or for predict "
        f"--worker-memory {int(overhead / tasks)}m",
    )  # fmt: skip


def mebibytes(text: str) -> float:
    """A size as Spark's memory settings have it: `1500m`, `3g`, `6gb`, or a bare number of MiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if not match:
        raise UsageError(f"{text!r} is no size; write 1500m or 3g")
    return float(match.group(1)) * {"k": 1 / 1024, "": 1, "m": 1, "g": 1024, "t": 1024**2}[match.group(2)]
