"""HDFS over WebHDFS, by HdfsCLI; and how a job reaches HDFS at all, also where `libhdfs` does it.

Where the NameNodes answer is worked out once, in the driver, from the Hadoop configuration, with the delegation token
of a Kerberos cluster. Both travel to the executors inside task closures (`Access`), fresh for each job, and are written
nowhere. All waits for a NameNode that is failing over, or a DataNode that died, happen here.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from sattile.errors import Outage, SattileError, UsageError
from sattile.storage.elsewhere import CHUNK, Elsewhere, Source
from sattile.storage.files import Entry, join, name, parent

if TYPE_CHECKING:
    import hdfs

T = TypeVar("T")

PATIENCE = 90.0
"""Seconds that a request is tried again for: a failover takes 10 to 60. Less than the decoder waits for a read."""

TIMEOUT = (10, 60)
"""Seconds to connect, and without a byte."""

PASSING = {"RetriableException", "StandbyException", "SafeModeException", "ConnectException", "BlockMissingException"}
"""What a NameNode says that may be otherwise in a moment."""

LOST = ("could not obtain", "no live", "connection", "failed to find datanode", "could only be written", "closed")
"""What its IOExceptions say that may be otherwise in a moment, too."""

FRESH = 60.0
"""Seconds after which the driver looks for newer tokens: Spark puts new ones beside the old long before they expire."""

RPC_PORT = 8020

WAYS = ("webhdfs", "libhdfs")

LOG_IN = "run kinit first, or give spark-submit.sh --principal and --keytab"


@dataclass(frozen=True)
class Access:
    """How the processes of a job reach HDFS.

    Attributes:
        default: authority of `fs.defaultFS`, for `hdfs:///path`.
        addresses: WebHDFS addresses of each authority, all NameNodes of a nameservice, joined by `;`.
        user: for clusters without Kerberos.
        tokens: delegation token of each authority; never shown.
        way: one of WAYS.
        why: it is that one.
    """

    default: str = ""
    addresses: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    way: str = "webhdfs"
    why: str = ""


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
        for node in nodes:  # a NameNode may be named by itself, too
            rpc, web = (conf.get(f"{one}.{service}.{node}") for one in ("dfs.namenode.rpc-address", key))
            if rpc and web:
                addresses[rpc] = f"{secure}://{web}"
    if default and default not in addresses:
        host = default.partition(":")[0]
        said = conf.get(key, f"{host}:{port}")
        said_host, _, said_port = said.rpartition(":")
        addresses[default] = f"{secure}://{host if said_host in ('', '0.0.0.0') else said_host}:{said_port}"
    user = os.environ.get("HADOOP_USER_NAME") or getpass.getuser()
    kerberos = conf.get("hadoop.security.authentication", "simple").lower() == "kerberos"
    others = _words(given.get("spark.kerberos.access.hadoopFileSystems"))
    tokens = _tokens(context, [f"hdfs://{default}"] * bool(default) + others) if kerberos else {}
    return Access(default, addresses, user, tokens, *_way(conf))


def _way(conf: Mapping[str, str]) -> tuple[str, str]:
    """One of WAYS, and why. Asked for in the driver only: nodes have environments of their own."""
    if said := os.environ.get("SATTILE_HDFS"):
        if said not in WAYS:
            raise UsageError(f"SATTILE_HDFS={said}: there is no such way to HDFS; set {' or '.join(WAYS)}")
        return said, f"SATTILE_HDFS={said}"
    closed = conf.get("dfs.webhdfs.enabled", "true").lower() == "false"
    return ("libhdfs", "dfs.webhdfs.enabled=false") if closed else ("webhdfs", "dfs.webhdfs.enabled is not false")


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


def current() -> Access:
    """How this process reaches HDFS. Looked up once, but for tokens: an XML file for each request would be slow."""
    return _access if _access is not None and not _access.tokens else _refresh()


def place(url: str, access: Access) -> tuple[str, str]:
    """(authority, path) of a URL, which may leave the authority to `fs.defaultFS`."""
    authority, path = _split(url)
    authority = authority or access.default
    if not authority:
        raise UsageError(
            f"{url} names no NameNode, and there is no fs.defaultFS: set HADOOP_CONF_DIR to the folder of core-site.xml"
        )
    return authority, path or "/"


def _client(url: str) -> tuple[hdfs.Client, str]:
    access = current()
    authority, path = place(url, access)
    key = (os.getpid(), authority)  # connections are not shared with a fork
    client = _clients.get(key)
    if client is None:  # another thread may clear them at any time
        client = _clients[key] = _connect(authority, access)
    return client, path


def _connect(authority: str, access: Access) -> hdfs.Client:
    import hdfs
    import requests

    address = access.addresses.get(authority)
    if address is None:
        host, colon, _ = authority.partition(":")
        if not colon and "." not in host and host != "localhost" and access.addresses:
            raise UsageError(
                f"hdfs://{authority}: no such nameservice in the Hadoop configuration; it has "
                f"{', '.join(sorted(one for one in access.addresses if ':' not in one))}"
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
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True  # its own authority, where it speaks HTTPS
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
            found = translated(url, error.exception or "", _short(error))
            if found is not None:
                raise found from None
            problem = error
        if time.monotonic() + wait > end:
            raise Outage(f"{url}: HDFS did not answer for {PATIENCE:.0f} s: {_short(problem)}") from None
        time.sleep(wait)
        wait = min(wait * 2, 5)


def translated(url: str, kind: str, text: str) -> Exception | None:
    """What Hadoop's answer means in Python's own terms; None if it may pass.

    Args:
        kind: the Java exception's name, without its package.
        text: its message.
    """
    if kind == "FileNotFoundException" or "does not exist" in text:
        return FileNotFoundError(f"{url} does not exist")
    if kind in ("FileAlreadyExistsException", "AlreadyBeingCreatedException"):
        return FileExistsError(f"{url} exists already")
    if kind in ("AccessControlException", "SecurityException") and "oken" not in text:
        return PermissionError(f"{url}: {text}")
    refused = ("Authentication failure", "cannot authenticate", "oken")
    if kind == "AuthenticationException" or any(word in text for word in refused):
        return UsageError(
            f"{url}: HDFS wants a Kerberos login and this job has no valid delegation token for it ({text}): {LOG_IN}; "
            f"a cluster that is not fs.defaultFS goes into spark.kerberos.access.hadoopFileSystems"
        )
    if kind in PASSING or (kind == "IOException" and any(word in text.lower() for word in LOST)):
        return None
    return SattileError(f"{url}: {text or kind}")


def _short(error: Exception) -> str:
    lines = _redacted(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _redacted(text: str) -> str:
    """Without the token that WebHDFS takes as a part of the address, which `requests` prints in its errors."""
    return re.sub(r"(?i)(\bdelegation(?:=|%3D))[^&\s'\")>]*", r"\1...", text)


class WebHdfsFiles(Elsewhere):
    """Files of HDFS clusters by WebHDFS; see `storage.files.FileSystem`."""

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

    def fetch(self, url: str, offset: int, length: int) -> bytes:
        """Exactly these bytes of a file; from another DataNode if one fails."""
        import requests

        dead: set[str] = set()

        def request(client: Any, path: str) -> bytes:
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
            return data

        return _ask(url, request)

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

    def fill(self, url: str, source: Source) -> None:
        def write(client: Any, path: str) -> None:
            with source() as file:
                client.write(path, data=iter(lambda: file.read(CHUNK), b""), overwrite=True)

        _ask(url, write)


def _entry(url: str, status: Mapping[str, Any]) -> Entry:
    is_folder = status["type"] == "DIRECTORY"
    return Entry(url, is_folder, 0 if is_folder else int(status["length"]), int(status["modificationTime"]) * 1_000_000)
