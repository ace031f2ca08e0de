"""HDFS over WebHDFS, by HdfsCLI: the same client in the driver, in executors and in the decoder.

Where the NameNodes answer is worked out once, in the driver, from the Hadoop configuration, with the delegation token
of a Kerberos cluster. Both travel to the executors inside task closures (`Access`), fresh for each job, and are written
nowhere. All waits for a NameNode that is failing over, or a DataNode that died, happen here.
"""

from __future__ import annotations

import atexit
import getpass
import io
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from sattile.errors import SattileError, UsageError
from sattile.storage.files import Entry, join, name, parent

if TYPE_CHECKING:
    import hdfs

T = TypeVar("T")

PATIENCE = 90.0
"""Seconds that a request is tried again for: a failover takes 10 to 60. Less than the decoder waits for a read."""

TIMEOUT = (10, 60)
"""Seconds to connect, and without a byte."""

PAGE = 1 << 16
"""Small reads (a TIFF's directories) are served from pages of this size; larger ones take exactly what was asked."""

CHUNK = 4 << 20

PASSING = {"RetriableException", "StandbyException", "SafeModeException", "ConnectException", "BlockMissingException"}
"""What a NameNode says that may be otherwise in a moment."""

LOST = ("could not obtain", "no live", "connection", "failed to find datanode", "could only be written", "closed")
"""What its IOExceptions say that may be otherwise in a moment, too."""

FRESH = 60.0
"""Seconds after which the driver looks for newer tokens: Spark puts new ones beside the old long before they expire."""

RPC_PORT = 8020

LOG_IN = "run kinit first, or give spark-submit.sh --principal and --keytab"


@dataclass(frozen=True)
class Access:
    """How the processes of a job reach HDFS.

    Attributes:
        default: authority of `fs.defaultFS`, for `hdfs:///path`.
        addresses: WebHDFS addresses of each authority, all NameNodes of a nameservice, joined by `;`.
        user: for clusters without Kerberos.
        tokens: delegation token of each authority; never shown.
    """

    default: str = ""
    addresses: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)


_access: Access | None = None
_received = False
"""Whether it came from another process: this one could not find the tokens anew."""
_found = 0.0


def use(access: Access | None) -> None:
    """Make this process reach HDFS as the one that sent `access`; None leaves it to find its own way."""
    global _received
    if access is not None:
        _received = True
        _set(access)


def access() -> Access | None:
    """To be sent to other processes, with fresh tokens; None if HDFS was not used so far."""
    if _access is not None:
        _refresh()
    return _access


def _set(access: Access) -> None:
    global _access
    if access != _access:
        _access = access
        _clients.clear()


def _refresh() -> Access:
    """How this process reaches HDFS, looked up again where that may tell more than the last time."""
    global _found
    known = _access
    if known is not None and (_received or "pyspark" not in sys.modules):
        return known
    if known is not None and known.tokens and time.monotonic() - _found < FRESH:
        return known
    _found = time.monotonic()
    try:
        _set(find_access())
    except Exception:
        if known is None or not known.tokens:
            raise  # else a ticket has run out, or Spark ends: the token that we have is good for longer
    assert _access is not None
    return _access


def find_access(folder: str | None = None) -> Access:
    """From the Hadoop configuration.

    Args:
        folder: of `core-site.xml` and `hdfs-site.xml`; that of HADOOP_CONF_DIR if not given.

    Raises:
        UsageError: if there is none.
    """
    folder = folder or os.environ.get("HADOOP_CONF_DIR")
    context = _active_context()
    conf = read_configuration(folder) if folder else {}
    given = {}
    if context is not None:
        given = dict(context.getConf().getAll())
        conf |= {key[len("spark.hadoop.") :]: value for key, value in given.items() if key.startswith("spark.hadoop.")}
    scheme, _, default = conf.get("fs.defaultFS", "").partition("://")
    default = default.rstrip("/") if scheme == "hdfs" else ""
    secure = "https" if conf.get("dfs.http.policy", "").upper() == "HTTPS_ONLY" else "http"
    port = {"http": 9870, "https": 9871}[secure]
    key = f"dfs.namenode.{secure}-address"
    addresses = {}
    for service in _words(conf.get("dfs.nameservices")):
        nodes = _words(conf.get(f"dfs.ha.namenodes.{service}"))
        named = [conf.get(f"{key}.{service}.{node}") for node in nodes] or [conf.get(f"{key}.{service}")]
        addresses[service] = ";".join(f"{secure}://{one}" for one in named if one)
    if default and default not in addresses:
        host = default.partition(":")[0]
        said = conf.get(key, f"{host}:{port}")
        said_host, _, said_port = said.rpartition(":")
        addresses[default] = f"{secure}://{host if said_host in ('', '0.0.0.0') else said_host}:{said_port}"
    user = os.environ.get("HADOOP_USER_NAME") or getpass.getuser()
    kerberos = conf.get("hadoop.security.authentication", "simple").lower() == "kerberos"
    others = _words(given.get("spark.kerberos.access.hadoopFileSystems"))
    tokens = _tokens(context, [f"hdfs://{default}"] * bool(default) + others) if kerberos else {}
    return Access(default, addresses, user, tokens)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def read_configuration(folder: str, files: Sequence[str] = ("core-site.xml", "hdfs-site.xml")) -> dict[str, str]:
    """The properties of Hadoop's configuration files; later ones win."""
    found: dict[str, str] = {}
    for file in files:
        path = os.path.join(folder, file)
        if os.path.exists(path):
            for entry in ElementTree.parse(path).getroot().iter("property"):
                found[(entry.findtext("name") or "").strip()] = (entry.findtext("value") or "").strip()
    return found


def _active_context() -> Any:
    """Spark's, in whatever thread this runs: an active session belongs to one."""
    if "pyspark" not in sys.modules:
        return None
    from pyspark import SparkContext

    if SparkContext._active_spark_context is not None:
        return SparkContext._active_spark_context
    from pyspark.sql import SparkSession

    spark = SparkSession.getActiveSession()
    if spark is not None and "connect" in type(spark).__module__:
        raise UsageError("HDFS needs a session's Hadoop configuration, and Spark Connect shows none: use a classic one")
    return None if spark is None else spark.sparkContext


def _tokens(context: Any, urls: Sequence[str]) -> dict[str, str]:
    """Delegation tokens by service: those that Spark keeps fresh; where it has none, new ones for these clusters.

    Under a token HDFS gives no further one, so that Spark's have to do where there are any.
    """
    if context is None:
        return {}
    from py4j.protocol import Py4JJavaError

    jvm, hadoop = context._jvm, context._jsc.hadoopConfiguration()
    try:
        user = jvm.org.apache.hadoop.security.UserGroupInformation.getCurrentUser()
        credentials = user.getCredentials()  # a copy: a token that is added stays with us
        found = _hdfs_tokens(credentials)
        if not found:
            for url in urls:
                system = jvm.org.apache.hadoop.fs.FileSystem.get(jvm.java.net.URI.create(url), hadoop)
                system.addDelegationTokens(user.getShortUserName(), credentials)
            found = _hdfs_tokens(credentials)
    except Py4JJavaError as error:
        reason = str(error.java_exception.toString())
        if any(word in reason for word in ("AccessControlException", "GSSException", "KerberosAuth", "SaslException")):
            raise UsageError(
                f"{', '.join(urls)}: HDFS wants a Kerberos login, and there is no valid ticket: {LOG_IN}"
            ) from None
        raise SattileError(f"{', '.join(urls)}: no delegation token: {_redacted(reason)[:300]}") from None
    return found


def _hdfs_tokens(credentials: Any) -> dict[str, str]:
    return {
        str(one.getService()).removeprefix("ha-hdfs:"): one.encodeToUrlString()
        for one in credentials.getAllTokens().toArray()
        if str(one.getKind()) == "HDFS_DELEGATION_TOKEN"
    }


# --- requests ------------------------------------------------------------------------------------------------------

_clients: dict[tuple[int, str], hdfs.Client] = {}
requests_sent = 0
"""HTTP requests of this process; for tests and benchmarks."""


def _split(url: str) -> tuple[str, str]:
    """(authority, path) of `hdfs://authority/path`, `hdfs:///path` or `hdfs:/path`; the path is kept as it is."""
    rest = url[len("hdfs:") :]
    if not rest.startswith("//"):
        return "", rest
    authority, slash, path = rest[2:].partition("/")
    return authority, slash + path or "/"


def _client(url: str) -> tuple[hdfs.Client, str]:
    authority, path = _split(url)
    # Looked up once, but for tokens: an XML file for each request would be slow.
    access = _access if _access is not None and not _access.tokens else _refresh()
    authority = authority or access.default
    if not authority:
        raise UsageError(
            f"{url} names no NameNode, and there is no fs.defaultFS: set HADOOP_CONF_DIR to the folder of core-site.xml"
        )
    key = (os.getpid(), authority)  # connections are not shared with a fork
    client = _clients.get(key)
    if client is None:  # another thread may clear them at any time
        client = _clients[key] = _connect(authority, access)
    return client, path or "/"


def _connect(authority: str, access: Access) -> hdfs.Client:
    import hdfs
    import requests

    address = access.addresses.get(authority)
    if address is None:
        host, colon, _ = authority.partition(":")
        if not colon and "." not in host and host != "localhost" and access.addresses:
            raise UsageError(
                f"hdfs://{authority}: no such nameservice in the Hadoop configuration; it has "
                f"{', '.join(sorted(access.addresses))}"
            )
        address = f"http://{host}:9870"

    class Session(requests.Session):
        """Counts its requests, redirected ones too."""

        def send(self, request: Any, **kwargs: Any) -> Any:
            global requests_sent
            requests_sent += 1
            return super().send(request, **kwargs)

    session = Session()
    session.trust_env = False  # proxies are for the world outside; a cluster is inside
    if token := _token_of(authority, access.tokens):
        return hdfs.TokenClient(address, token, session=session, timeout=TIMEOUT)
    return hdfs.InsecureClient(address, user=access.user, session=session, timeout=TIMEOUT)


def _token_of(authority: str, tokens: Mapping[str, str]) -> str | None:
    """Hadoop names a token's service by nameservice or by host and port, and by default writes the host as a number."""
    if not tokens or authority in tokens:
        return tokens.get(authority)
    host, _, port = authority.partition(":")
    port = port or str(RPC_PORT)
    with suppress(OSError):
        return tokens.get(f"{host}:{port}") or tokens.get(f"{socket.gethostbyname(host)}:{port}")
    return None


def _ask(url: str, request: Callable[[Any, str], T], *, again: Callable[[Any, str], T] | None = None) -> T:
    """The answer to a request, tried again while that may help.

    Args:
        request: takes the client and the path.
        again: instead of it, once a try was lost on the way: it may have been carried out.

    Raises:
        FileNotFoundError, FileExistsError, PermissionError, SattileError: as HDFS says.
    """
    import hdfs
    import requests
    import urllib3

    end, wait = time.monotonic() + PATIENCE, 0.2
    while True:
        client, path = _client(url)
        try:
            return request(client, path)
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
            urllib3.exceptions.HTTPError,  # of a body that is read without the help of `requests`
        ) as error:
            problem: Exception = error
            request = again or request
        except requests.RequestException as error:
            raise SattileError(f"{url}: {_short(error)}") from None  # its own text may hold an address with a token
        except hdfs.HdfsError as error:
            problem = _translated(url, error)
            if problem is not error:
                raise problem from None
        if time.monotonic() + wait > end:
            raise SattileError(f"{url}: HDFS did not answer for {PATIENCE:.0f} s: {_short(problem)}") from None
        time.sleep(wait)
        wait = min(wait * 2, 5)


def _translated(url: str, error: hdfs.HdfsError) -> Exception:
    """What an answer means in Python's own terms; the error itself if it may pass."""
    kind, text = error.exception or "", _short(error)
    if kind == "FileNotFoundException" or "does not exist" in text:
        return FileNotFoundError(f"{url} does not exist")
    if kind in ("FileAlreadyExistsException", "AlreadyBeingCreatedException"):
        return FileExistsError(f"{url} exists already")
    if kind in ("AccessControlException", "SecurityException") and "oken" not in text:
        return PermissionError(f"{url}: {text}")
    if "Authentication failure" in text or "oken" in text or kind == "AuthenticationException":
        return UsageError(
            f"{url}: HDFS wants a Kerberos login and this job has no valid delegation token for it ({text}): {LOG_IN}; "
            f"a cluster that is not fs.defaultFS goes into spark.kerberos.access.hadoopFileSystems"
        )
    if kind in PASSING or (kind == "IOException" and any(word in text.lower() for word in LOST)):
        return error
    return SattileError(f"{url}: {text or kind}")


def _short(error: Exception) -> str:
    lines = _redacted(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _redacted(text: str) -> str:
    """Without the token that WebHDFS takes as a part of the address, which `requests` prints in its errors."""
    return re.sub(r"(?i)(\bdelegation(?:=|%3D))[^&\s'\")>]*", r"\1...", text)


class HdfsFiles:
    """Files of HDFS clusters; see `storage.files.FileSystem`."""

    def stat(self, url: str) -> Entry | None:
        try:
            return _entry(url, _ask(url, lambda client, path: client.status(path)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, url: str) -> list[Entry]:
        found = _ask(url, lambda client, path: client.list(path, status=True))
        return sorted((_entry(join(url, base), status) for base, status in found), key=lambda one: name(one.url))

    def read_bytes(self, url: str) -> bytes:
        def request(client: Any, path: str) -> bytes:
            with client.read(path) as reader:
                return reader.read()

        return _ask(url, request)

    def write_bytes(self, url: str, data: bytes) -> None:
        """Whole or not at all: written beside it, then renamed."""
        self._put(url, lambda: io.BytesIO(data), len(data))

    def create_exclusively(self, url: str, data: bytes) -> bool:
        def create(client: Any, path: str) -> bool:
            client.write(path, data=data, overwrite=False)
            return True

        def is_ours(client: Any, path: str) -> bool:
            with suppress(FileNotFoundError):
                return self.read_bytes(url) == data
            return create(client, path)

        try:
            return _ask(url, create, again=is_ours)
        except FileExistsError:
            return False

    def make_folder(self, url: str) -> None:
        _ask(url, lambda client, path: client.makedirs(path))

    def rename(self, source: str, target: str) -> None:
        """Atomic; a file is replaced, a folder must not exist or be empty."""
        self.make_folder(parent(target))
        _, place = _split(target)

        def rename(client: Any, path: str) -> None:
            client._rename(path, destination=place, renameoptions="OVERWRITE")

        def rename_again(client: Any, path: str) -> None:
            if self.stat(source) is None and self.stat(target) is not None:
                return  # done the first time
            rename(client, path)

        _ask(source, rename, again=rename_again)

    def remove(self, url: str) -> None:
        _ask(url, lambda client, path: client.delete(path, recursive=True))

    def upload(self, local: str, url: str) -> None:
        """Move a file of local scratch to `url`, whole or not at all."""
        self._put(url, lambda: io.FileIO(local), os.path.getsize(local))
        os.remove(local)

    def open_local(self, url: str) -> str:
        """A copy on local scratch, made once by this process for each version of the file."""
        entry = self.stat(url)
        if entry is None:
            raise FileNotFoundError(f"{url} does not exist")
        return _copies.get(url, entry)

    def open(self, url: str) -> BinaryIO:
        """A seekable reader; see `HdfsReader`."""
        entry = self.stat(url)
        if entry is None:
            raise FileNotFoundError(f"{url} does not exist")
        return HdfsReader(url, entry.size)  # type: ignore[return-value]

    def _put(self, url: str, source: Callable[[], Any], size: int) -> None:
        part = join(parent(url), f".{name(url)}.{uuid.uuid4().hex[:8]}")

        def write(client: Any, path: str) -> None:
            with source() as file:
                client.write(path, data=iter(lambda: file.read(CHUNK), b""), overwrite=True)

        try:
            _ask(part, write)
            entry = self.stat(part)
            if entry is None or entry.size != size:
                raise SattileError(f"{part}: {size} bytes were sent and {entry.size if entry else 'none'} arrived")
            self.rename(part, url)
        except BaseException:
            with suppress(Exception):
                self.remove(part)
            raise


def _entry(url: str, status: Mapping[str, Any]) -> Entry:
    is_folder = status["type"] == "DIRECTORY"
    return Entry(url, is_folder, 0 if is_folder else int(status["length"]), int(status["modificationTime"]) * 1_000_000)


class _Copies:
    """Files of HDFS on local scratch, for what reads most of them: models, tiles."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self._owner = 0
        self._found: dict[tuple[str, int, int], str] = {}
        self._lock = threading.Lock()

    def get(self, url: str, entry: Entry) -> str:
        key = (url, entry.size, entry.mtime)
        with self._lock:
            if self._folder is None or self._owner != os.getpid():
                self._folder, self._owner, self._found = tempfile.mkdtemp(prefix="sattile-"), os.getpid(), {}
                atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
            if key not in self._found:
                free = shutil.disk_usage(self._folder).free
                if free < entry.size + (1 << 26):
                    raise SattileError(
                        f"{url} is copied to local scratch {self._folder}, which has {free / 1e9:.1f} GB free, and "
                        f"{entry.size / 1e9:.1f} GB are needed; point TMPDIR at a larger disk"
                    )
                path = os.path.join(self._folder, f"{len(self._found)}-{name(url)}")
                with HdfsReader(url, entry.size) as source, open(path, "wb") as target:
                    while data := source.read(4 * CHUNK):
                        target.write(data)
                self._found[key] = path
            return self._found[key]


_copies = _Copies()


class HdfsReader(io.RawIOBase):
    """Reads ranges of one file of HDFS.

    Small reads come from whole pages that are kept; large ones take exactly the bytes asked for.

    Args:
        url: of the file.
        size: in bytes.
    """

    MOST_PAGES = 64

    def __init__(self, url: str, size: int):
        super().__init__()
        self.url, self.size = url, size
        self._at = 0
        self._pages: OrderedDict[int, bytes] = OrderedDict()

    def again(self) -> HdfsReader:
        """Another reader of the same file, with a position of its own and the same pages."""
        other = HdfsReader(self.url, self.size)
        other._pages = self._pages
        return other

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence], 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        start = min(self._at, self.size)
        stop = self.size if size < 0 else min(start + size, self.size)
        data = self._range(start, stop)
        self._at = stop
        return data

    def readall(self) -> bytes:
        return self.read(-1)

    def get_byte_ranges(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """Several ranges, asked for side by side (what GDAL calls for the tiles of a window)."""
        wanted = list(zip(offsets, sizes, strict=True))
        if len(wanted) == 1:
            return [self._range(offset, min(offset + size, self.size)) for offset, size in wanted]
        with ThreadPoolExecutor(min(len(wanted), 4)) as pool:
            return list(pool.map(lambda one: self._range(one[0], min(one[0] + one[1], self.size)), wanted))

    def _range(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        if stop - start > PAGE:
            return fetch(self.url, start, stop - start)
        parts = []
        for page in range(start // PAGE, (stop - 1) // PAGE + 1):
            if page not in self._pages:
                first = page * PAGE
                self._pages[page] = fetch(self.url, first, min(PAGE, self.size - first))
                if len(self._pages) > self.MOST_PAGES:
                    self._pages.popitem(last=False)
            self._pages.move_to_end(page)
            data = self._pages[page]
            parts.append(data[max(start - page * PAGE, 0) : stop - page * PAGE])
        return b"".join(parts)


bytes_fetched = 0
"""Of file contents, by this process; for tests and benchmarks."""


def fetch(url: str, offset: int, length: int) -> bytes:
    """Exactly these bytes of a file; from another DataNode if one fails."""
    import requests

    dead: set[str] = set()

    def request(client: Any, path: str) -> bytes:
        global bytes_fetched
        params = {"excludedatanodes": ",".join(sorted(dead))} if dead else {}
        try:
            with client._open(path, offset=offset, length=length, **params) as response:
                data = response.raw.read(length)  # `content` takes 10 kB at a time
        except requests.RequestException as error:
            # The NameNode goes on naming a DataNode for a while after it died.
            failed = urlsplit(str(error.request.url) if error.request is not None else "").netloc
            if failed and not any(failed in one for one in client.urls):
                dead.add(failed)
            raise
        if len(data) != length:
            raise requests.ConnectionError(f"{len(data)} of {length} bytes came")
        bytes_fetched += length
        return data

    return _ask(url, request)
