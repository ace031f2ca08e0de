"""A real Hadoop on loopback: NameNodes, DataNodes, ResourceManager and NodeManagers as processes of their own.

The servers are Hadoop's own classes, from the artefacts that `pom.xml` names. By hand:

    python -m tests.hadoop.cluster --folder DIR [--namenodes 2] [--kerberos]

which keeps one running until Enter or a signal; DIR/environment.sh then holds what a client wants in its environment.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
NAMESERVICE = "sattile"
REALM = "SATTILE.TEST"
MARKER = "SATTILE_TEST_HADOOP"
"""In the environment of every process of a cluster, YARN's containers and tests' clients included: who ends with it."""

NAMENODE = "org.apache.hadoop.hdfs.server.namenode.NameNode"
DATANODE = "org.apache.hadoop.hdfs.server.datanode.DataNode"
RESOURCEMANAGER = "org.apache.hadoop.yarn.server.resourcemanager.ResourceManager"
NODEMANAGER = "org.apache.hadoop.yarn.server.nodemanager.NodeManager"
HA_ADMIN = "org.apache.hadoop.hdfs.tools.DFSHAAdmin"
SHELL = "org.apache.hadoop.fs.FsShell"
RESOURCE_CALCULATOR = "org.apache.hadoop.yarn.util.resource.DominantResourceCalculator"

# Hadoop 3.4 reaches into the JDK; its own start scripts do the same.
JAVA_17 = [
    f"--add-opens=java.base/{package}=ALL-UNNAMED"
    for package in ("java.lang", "java.lang.reflect", "java.io", "java.net", "java.nio", "java.util",
                    "java.util.concurrent", "java.util.concurrent.atomic", "sun.nio.ch", "sun.security.action")
]  # fmt: skip
JAVA_KERBEROS = ["--add-exports=java.security.jgss/sun.security.krb5=ALL-UNNAMED"]
KERBEROS_PROGRAMS = ("krb5kdc", "kdb5_util", "kadmin.local", "kinit", "curl")
KERBEROS_PACKAGES = ("krb5-kdc", "krb5-admin-server", "krb5-user", "curl")
SBIN = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Debian keeps the KDC where an ordinary user's path does not look."""


class ClusterError(Exception):
    """Hadoop did not do what was asked; carries the end of the logs that tell why."""


def missing(*, kerberos: bool = False) -> str | None:
    """Why no cluster can be started here, None if one can. Installs the KDC where Debian's packages may be."""
    if not sys.platform.startswith("linux"):
        return f"Hadoop's test cluster needs Linux (/proc), and this is {sys.platform}"
    if java_home() is None:
        return "Hadoop needs Java: set JAVA_HOME or put java on PATH (Debian: openjdk-17-jre-headless)"
    if not _classpath_file().is_file() and shutil.which("mvn") is None:
        return "Hadoop's jars come by Maven, and there is no mvn on PATH (Debian: maven)"
    return _install_kerberos() if kerberos else None


def java_home() -> str | None:
    """JAVA_HOME, else that of `java` on the path."""
    if home := os.environ.get("JAVA_HOME"):
        return home if os.access(os.path.join(home, "bin", "java"), os.X_OK) else None
    java = shutil.which("java")
    return os.path.dirname(os.path.dirname(os.path.realpath(java))) if java else None


def classpath() -> str:
    """Hadoop's jars, as Java takes them. Maven fetches them the first time: 110 MB, a minute or two.

    Raises:
        ClusterError: with what Maven said.
    """
    file = _classpath_file()
    if file.is_file():
        found = file.read_text()
        if all(os.path.exists(jar) for jar in found.split(":")):  # ~/.m2 may have been cleared meanwhile
            return found
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    command = [
        "mvn",
        "-q",
        "-B",
        "-f",
        str(HERE / "pom.xml"),
        "dependency:build-classpath",
        f"-Dmdep.outputFile={part}",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or not part.is_file():
        raise ClusterError(f"Maven did not bring Hadoop's jars ({shlex.join(command)}):\n{done.stdout[-3000:]}")
    os.replace(part, file)
    return file.read_text()


def _classpath_file() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sattile-tests"
    return cache / f"hadoop-{hashlib.sha256((HERE / 'pom.xml').read_bytes()).hexdigest()[:16]}.classpath"


def _install_kerberos() -> str | None:
    def absent() -> list[str]:
        return [program for program in KERBEROS_PROGRAMS if shutil.which(program, path=SBIN) is None]

    if not absent():
        return None
    reason = f"Kerberos needs {', '.join(absent())} (Debian: {', '.join(KERBEROS_PACKAGES)})"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return reason
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *KERBEROS_PACKAGES]
    for command in (["apt-get", "update", "-qq"], install):
        done = subprocess.run(
            command, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    return f"{reason}, and apt-get did not install them:\n{done.stdout[-1000:]}" if absent() else None


class Cluster:
    """A running Hadoop; a context manager, which ends every process of it.

    Whatever becomes of the Python that started it (Ctrl-C, a failed test, kill -9), a watchdog ends the servers, YARN's
    containers and the clients that got `environment()`.

    Args:
        folder: holds conf, logs (kept) and data (removed at the end).
        namenodes: 1, or 2 for a nameservice with failover by hand (`failover`); the first is active at the start.
        datanodes: how many; `replication` of them hold each block.
        nodemanagers: how many; 0 for HDFS alone. Each has `memory` MB and `cores` to give.
        blocksize: bytes; small, so that small files have many blocks.
        webhdfs: whether HDFS answers over HTTP.
        kerberos: HDFS, its HTTP and YARN refuse who has no ticket; hosts are then `localhost`, for the principals.
        settings: Hadoop settings on top, by name.
        seconds: how long a server may take to answer.

    Attributes:
        url: of HDFS, `hdfs://127.0.0.1:PORT` or `hdfs://sattile`.
        webhdfs: addresses `http://...` of the NameNodes; empty if closed.
        resourcemanager: REST address `http://...`; None without NodeManagers.
        conf_dir: what HADOOP_CONF_DIR of a client is.
        logs: a file for each server; containers' own are in `logs/nodemanager-N/APPLICATION/CONTAINER/`.
        processes: by name: namenode-1, datanode-1, resourcemanager, nodemanager-1, kdc, ...
        superuser: may do everything in HDFS.
    """

    def __init__(
        self, folder: Path, *, namenodes: int = 1, datanodes: int = 2, nodemanagers: int = 0, replication: int = 2,
        blocksize: int = 1 << 20, memory: int = 8192, cores: int = 8, webhdfs: bool = True, kerberos: bool = False,
        settings: Mapping[str, str] | None = None, seconds: float = 120,
    ):  # fmt: skip
        self.folder = Path(folder).resolve()
        self.kerberos = kerberos
        self.seconds = seconds
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.conf_dir = self.folder / "conf"
        self.logs = self.folder / "logs"
        self._data = self.folder / "data"
        # Beside conf_dir, which clients ship to their containers: what only the servers want on their class path.
        self._servers_conf = self.folder / "servers"
        self._secrets = self.folder / "kerberos"
        self._marker = uuid.uuid4().hex
        self._ports = _free_ports()
        self._host = "localhost" if kerberos else "127.0.0.1"
        self._namenodes = {
            f"namenode-{number}": (self._address(), self._address()) for number in range(1, namenodes + 1)
        }
        self._datanodes = [f"datanode-{number}" for number in range(1, datanodes + 1)]
        self._nodemanagers = [f"nodemanager-{number}" for number in range(1, nodemanagers + 1)]
        self._rm_address = self._address()
        self._kdc_port = next(self._ports)
        self._node_ports: dict[str, list[str]] = {}
        self._started: dict[str, float] = {}
        self.ha = namenodes > 1
        self.superuser = f"hdfs/{self._host}" if kerberos else _user()
        self.url = f"hdfs://{NAMESERVICE}" if self.ha else f"hdfs://{self._namenodes['namenode-1'][0]}"
        self.webhdfs = [f"http://{http}" for _, http in self._namenodes.values()] if webhdfs else []
        self.resourcemanager = f"http://{self._rm_address}" if nodemanagers else None
        self._settings = self._common(memory, cores) | self._hdfs(replication, blocksize, webhdfs) | self._yarn()
        if kerberos:
            self._settings |= self._secure()
        self._settings |= settings or {}

    def _address(self) -> str:
        return f"{self._host}:{next(self._ports)}"

    # -- started and ended

    def __enter__(self) -> Cluster:
        self._watchdog = _Watchdog(self._marker)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self._classpath = classpath()
        for old in (self._data, self._secrets):  # of a cluster by hand whose end was a kill -9
            shutil.rmtree(old, ignore_errors=True)
        for folder in (self.conf_dir, self.logs, self._data, self._servers_conf, self._secrets):
            folder.mkdir(parents=True, exist_ok=True)
        self._write_conf()
        if self.kerberos:
            self._start_kdc()
        (self.folder / "environment.sh").write_text(
            "".join(f"export {key}={shlex.quote(value)}\n" for key, value in self.environment().items())
        )
        # All at once: each server asks again until the one it needs answers.
        if self._nodemanagers:
            self.start("resourcemanager")
        self._format()
        for name in (*self._namenodes, *self._datanodes, *self._nodemanagers):
            self.start(name)
        if self.ha:
            self._until("the NameNodes answer", self._namenodes_answer)
            self.java(HA_ADMIN, "-transitionToActive", "nn1", user=self.superuser)
        self.wait()
        # Several users' jobs write where they like, as below /user and /tmp of a real cluster.
        self._open_root()

    def wait(self) -> None:
        """Until every server that was started, and not killed, does its work."""
        self._until("a NameNode is active", lambda: self.active is not None)
        alive = [name for name in self._datanodes if self._alive(name)]
        self._until(
            f"{len(alive)} DataNodes are live at every NameNode",
            lambda: all(
                self._jmx(name, "FSNamesystemState").get("NumLiveDataNodes", 0) >= len(alive)
                and not self._jmx(name, "NameNodeInfo").get("Safemode")
                for name in self._namenodes
                if self._alive(name)
            ),
        )
        self._until("the DataNodes serve every NameNode", lambda: all(map(self._serves, alive)))
        alive = [name for name in self._nodemanagers if self._alive(name)]
        if self._alive("resourcemanager"):
            self._until(f"{len(alive)} NodeManagers are running", lambda: all(map(self._runs, alive)))

    def __exit__(self, *_: object) -> None:
        # The watchdog ends everything, in this way as in the others, so that it is tried by every test.
        self._watchdog.close()
        for process in self.processes.values():
            process.wait()
        shutil.rmtree(self._data, ignore_errors=True)

    # -- what tests do to it

    def start(self, name: str) -> None:
        """Start a server; does not wait for it."""
        command, environment = self._command(name), os.environ | self.environment()
        if self.kerberos:
            environment |= {"KRB5_KDC_PROFILE": str(self._secrets / "kdc.conf")}
        # YARN gives its containers the marker, and so the node that they belong to.
        environment |= {MARKER: f"{self._marker}/{name}/", "CLASSPATH": f"{self._servers_conf}:{self._classpath}"}
        self._started[name] = time.time()
        with open(self.logs / f"{name}.log", "ab") as log:
            # A session of its own: Ctrl-C is for pytest, whose fixtures want the servers to answer until the end.
            self.processes[name] = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str, *, containers: bool = True) -> None:
        """kill -9 a server; a NodeManager's containers with it, as when the machine is lost."""
        process = self.processes[name]
        process.kill()
        process.wait()
        if containers:
            _end(f"{self._marker}/{name}/")

    def restart(self, name: str) -> None:
        """Kill a server (if it runs), start it and wait until it does its work. A NameNode comes back as standby."""
        if self._alive(name):
            self.kill(name)
        self.start(name)
        if name in self._namenodes:
            self._until(f"{name} answers", lambda: self._state(name) in ("active", "standby"))
        self.wait()

    def failover(self, to: str) -> None:
        """Make a NameNode active, whether the other one still lives or not."""
        number = {name: f"nn{index}" for index, name in enumerate(self._namenodes, 1)}
        others = [name for name in self._namenodes if name != to]
        if any(self._alive(name) for name in others):
            self.java(HA_ADMIN, "-failover", number[others[0]], number[to], user=self.superuser)
        else:
            self.java(HA_ADMIN, "-transitionToActive", "--forceactive", number[to], user=self.superuser, answers="Y\n")
        self._until(f"{to} is active", lambda: self._state(to) == "active")

    @property
    def active(self) -> str | None:
        """The active NameNode's name."""
        return next((name for name in self._namenodes if self._state(name) == "active"), None)

    def dead_datanodes(self) -> int:
        """How many DataNodes the active NameNode takes for dead."""
        active = self.active
        return self._jmx(active, "FSNamesystemState").get("NumDeadDataNodes", 0) if active else 0

    def nodes(self, *states: str) -> list[dict[str, Any]]:
        """YARN's nodes in these states (RUNNING), as the ResourceManager's REST tells them."""
        query = ",".join(states or ("RUNNING",))
        answer = self.get(f"{self.resourcemanager}/ws/v1/cluster/nodes?states={query}", user=self.superuser)
        return ((answer or {}).get("nodes") or {}).get("node") or []

    def log_tail(self, name: str, lines: int = 30) -> str:
        file = self.logs / f"{name}.log"
        return "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) if file.is_file() else "(no log)"

    # -- what clients need

    def environment(self, user: str | None = None) -> dict[str, str]:
        """What a client sets on top of its own environment.

        Args:
            user: who it is: any name without Kerberos (the superuser if None); with Kerberos one who gets a ticket
                from his keytab, or nobody if None.
        """
        home = java_home() or ""
        found = {
            "HADOOP_CONF_DIR": str(self.conf_dir),
            "YARN_CONF_DIR": str(self.conf_dir),
            "JAVA_HOME": home,
            # Else Spark announces another address of this machine than the one it may be reached at.
            "SPARK_LOCAL_IP": "127.0.0.1",
            MARKER: f"{self._marker}/client/",
        }
        if not self.kerberos:
            return found | {"HADOOP_USER_NAME": user or self.superuser}
        # Stands for the /etc/krb5.conf of a real cluster's machines: Java does not read KRB5_CONFIG.
        return found | {
            "JDK_JAVA_OPTIONS": " ".join([f"-Djava.security.krb5.conf={self.krb5_conf}", *JAVA_KERBEROS]),
            "KRB5_CONFIG": str(self.krb5_conf),
            "KRB5CCNAME": f"FILE:{self._ticket(user) if user else self._secrets / 'no-ticket'}",
        }

    def java(
        self, main: str, *args: str, user: str | None = None, answers: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a class of Hadoop as a client (`SHELL` is `hadoop fs`); standard error is in its `stdout` as well.

        Args:
            user: as for `environment`.
            answers: its standard input.

        Raises:
            ClusterError: if it exits with another code than 0 and `check` is set.
        """
        classpath = {"CLASSPATH": f"{self._servers_conf}:{self._classpath}"}
        done = subprocess.run(
            [*self._java_command(256), main, *args], env=os.environ | self.environment(user) | classpath,
            input=answers, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            timeout=self.seconds,
        )  # fmt: skip
        if check and done.returncode:
            raise ClusterError(f"{main} {shlex.join(args)} exited with {done.returncode}:\n{done.stdout[-3000:]}")
        return done

    def get(self, url: str, *, user: str | None = None) -> dict[str, Any] | None:
        """The JSON that a server answers, None if it gives none. With Kerberos curl shows the user's ticket."""
        try:
            if self.kerberos and user:
                command = ["curl", "-s", "-f", "-m", "10", "--noproxy", "*", "--negotiate", "-u", ":", url]
                environment = os.environ | self.environment(user)
                return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False).stdout)
            with _OPENER.open(url, timeout=10) as answer:
                return json.load(answer)
        except (OSError, ValueError):
            return None

    def principal(self, user: str) -> str:
        return f"{user}@{REALM}"

    @property
    def krb5_conf(self) -> Path:
        return self._secrets / "krb5.conf"

    def keytab(self, user: str) -> Path:
        """The keytab of a user; the principal is made where it does not exist."""
        keytab = self._secrets / f"{user.replace('/', '_')}.keytab"
        if not keytab.is_file():
            self._kadmin(f"addprinc -randkey {self.principal(user)}")
            self._kadmin(f"ktadd -norandkey -k {keytab} {self.principal(user)}")
        return keytab

    def _ticket(self, user: str) -> Path:
        cache = self._secrets / f"{user.replace('/', '_')}.ticket"
        if not cache.is_file():
            self._kerberos("kinit", "-c", f"FILE:{cache}", "-k", "-t", str(self.keytab(user)), self.principal(user))
        return cache

    def _kadmin(self, query: str) -> None:
        self._kerberos("kadmin.local", "-q", query)

    def _kerberos(self, program: str, *args: str) -> None:
        environment = os.environ | {
            "KRB5_CONFIG": str(self.krb5_conf),
            "KRB5_KDC_PROFILE": str(self._secrets / "kdc.conf"),
        }
        done = subprocess.run(
            [shutil.which(program, path=SBIN) or program, *args], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ClusterError(f"{program} {shlex.join(args)} failed:\n{done.stdout}")

    # -- servers

    def _command(self, name: str) -> list[str]:
        own: dict[str, str] = {}
        kind = name.partition("-")[0]
        data = self._data / name
        if kind == "kdc":
            return [shutil.which("krb5kdc", path=SBIN) or "krb5kdc", "-n", "-P", str(self._secrets / "kdc.pid")]
        if kind == "namenode":
            own["dfs.namenode.name.dir"] = data.as_uri()
            if self.ha:
                own["dfs.ha.namenode.id"] = f"nn{name.partition('-')[2]}"
            main, heap = NAMENODE, 384
        elif kind == "datanode":
            rpc, http, ipc = self._ports_of(name, 3)
            own |= {
                "dfs.datanode.data.dir": data.as_uri(), "dfs.datanode.address": rpc,
                "dfs.datanode.http.address": http, "dfs.datanode.ipc.address": ipc,
            }  # fmt: skip
            main, heap = DATANODE, 256
        elif kind == "resourcemanager":
            main, heap = RESOURCEMANAGER, 384
        else:
            node, localizer, web = self._ports_of(name, 3)
            own |= {
                "yarn.nodemanager.local-dirs": str(data), "yarn.nodemanager.log-dirs": str(self.logs / name),
                "yarn.nodemanager.address": node, "yarn.nodemanager.localizer.address": localizer,
                "yarn.nodemanager.webapp.address": web, "yarn.resourcemanager.connect.max-wait.ms": "120000",
            }  # fmt: skip
            main, heap = NODEMANAGER, 256
        return [*self._java_command(heap), main, *(f"-D{key}={value}" for key, value in own.items())]

    def _ports_of(self, name: str, count: int) -> list[str]:
        """The same again after a restart."""
        if name not in self._node_ports:
            self._node_ports[name] = [self._address() for _ in range(count)]
        return self._node_ports[name]

    def _java_command(self, heap: int) -> list[str]:
        # Started often and on few cores: the small collector and the quick compiler halve the start.
        options = [f"-Xmx{heap}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.net.preferIPv4Stack=true"]
        return [f"{java_home()}/bin/java", *options, *JAVA_17]

    def _format(self) -> None:
        """An empty file system in the first NameNode's folder; the second starts from a copy, which saves a JVM."""
        first, *rest = (self._data / name for name in self._namenodes)
        command = self._command("namenode-1")
        own = command[command.index(NAMENODE) + 1 :]
        self.java(NAMENODE, *own, "-format", "-nonInteractive", "-force", user=self.superuser)
        for other in rest:
            shutil.copytree(first, other)

    def _open_root(self) -> None:
        if self.webhdfs and not self.kerberos:
            query = urllib.parse.urlencode({"op": "SETPERMISSION", "permission": "1777", "user.name": self.superuser})
            address = self._namenodes[self.active or "namenode-1"][1]
            request = urllib.request.Request(f"http://{address}/webhdfs/v1/?{query}", method="PUT")
            _OPENER.open(request, timeout=self.seconds).close()
        else:
            self.java(SHELL, "-chmod", "1777", "/", user=self.superuser)

    def _start_kdc(self) -> None:
        self.krb5_conf.write_text(
            f"""[libdefaults]
  default_realm = {REALM}
  dns_lookup_realm = false
  dns_lookup_kdc = false
  dns_canonicalize_hostname = false
  rdns = false
  udp_preference_limit = 1
  forwardable = true

[realms]
  {REALM} = {{
    kdc = 127.0.0.1:{self._kdc_port}
  }}

[domain_realm]
  localhost = {REALM}
"""
        )
        (self._secrets / "kdc.conf").write_text(
            f"""[kdcdefaults]
  kdc_listen = 127.0.0.1:{self._kdc_port}
  kdc_tcp_listen = 127.0.0.1:{self._kdc_port}

[realms]
  {REALM} = {{
    database_name = {self._secrets}/principal
    key_stash_file = {self._secrets}/stash
    acl_file = {self._secrets}/kadm5.acl
    max_renewable_life = 7d
  }}
"""
        )
        (self._secrets / "http.secret").write_text(uuid.uuid4().hex)
        self._kerberos("kdb5_util", "create", "-s", "-r", REALM, "-P", uuid.uuid4().hex)
        for service in ("hdfs", "yarn", "HTTP"):
            self.keytab(f"{service}/{self._host}")
        self.start("kdc")
        self._until("the KDC answers", lambda: _listens(self._kdc_port))

    # -- what the servers say

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.seconds
        started = {name for name in self.processes if self._alive(name)}
        while not condition():
            died = sorted(name for name in started if not self._alive(name))
            if died or time.monotonic() > deadline:
                why = f"{', '.join(died)} ended" if died else f"not within {self.seconds:.0f} s"
                tails = "".join(f"\n--- {name}\n{self.log_tail(name)}" for name in died or sorted(started))
                raise ClusterError(f"Hadoop in {self.folder}: waiting until {what}: {why}{tails}")
            time.sleep(0.1)

    def _alive(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def _namenodes_answer(self) -> bool:
        return all(self._state(name) for name in self._namenodes)

    def _state(self, name: str) -> str | None:
        return self._jmx(name, "NameNodeStatus").get("State") if self._alive(name) else None

    def _jmx(self, namenode: str, bean: str) -> dict[str, Any]:
        address = self._namenodes[namenode][1]
        answer = self.get(f"http://{address}/jmx?qry=Hadoop:service=NameNode,name={bean}", user=self.superuser)
        return next(iter((answer or {}).get("beans") or []), {})

    def _serves(self, datanode: str) -> bool:
        """Asked of itself: a NameNode takes a killed one for live for some seconds, and its restart for nothing new."""
        _, http, _ = self._ports_of(datanode, 3)
        answer = self.get(f"http://{http}/jmx?qry=Hadoop:service=DataNode,name=DataNodeInfo", user=self.superuser)
        actors = json.loads(next(iter((answer or {}).get("beans") or []), {}).get("BPServiceActorInfo", "[]"))
        running = sum(actor["ActorState"] == "RUNNING" for actor in actors)
        return running >= sum(self._alive(name) for name in self._namenodes)

    def _runs(self, nodemanager: str) -> bool:
        """Registered since it was started: the ResourceManager takes a killed one for running for some seconds."""
        port = self._ports_of(nodemanager, 3)[0].rpartition(":")[2]
        own = [node for node in self.nodes() if node["id"].endswith(f":{port}")]
        return bool(own) and own[0]["lastHealthUpdate"] >= self._started[nodemanager] * 1000

    # -- configuration

    def _write_conf(self) -> None:
        for prefixes, file in ((("dfs.",), "hdfs-site"), (("yarn.",), "yarn-site"), ((), "core-site")):
            chosen = {
                key: value
                for key, value in self._settings.items()
                if (key.startswith(prefixes) if prefixes else not key.startswith(("dfs.", "yarn.")))
                and not key.startswith("yarn.scheduler.capacity.")
            }
            (self.conf_dir / f"{file}.xml").write_text(_xml(chosen))
        capacity = {key: value for key, value in self._settings.items() if key.startswith("yarn.scheduler.capacity.")}
        (self._servers_conf / "capacity-scheduler.xml").write_text(_xml(capacity))
        for file in self.conf_dir.glob("*.xml"):
            shutil.copy(file, self._servers_conf)
        # Maven's jars lack the pages, and without the folders no HTTP server starts.
        for page in ("hdfs", "datanode", "secondary", "journal", "cluster", "node"):
            (self._servers_conf / "webapps" / page).mkdir(parents=True, exist_ok=True)
        (self._servers_conf / "log4j.properties").write_text(
            "log4j.rootLogger=INFO,console\n"
            "log4j.appender.console=org.apache.log4j.ConsoleAppender\n"
            "log4j.appender.console.target=System.err\n"
            "log4j.appender.console.layout=org.apache.log4j.PatternLayout\n"
            "log4j.appender.console.layout.ConversionPattern=%d{HH:mm:ss,SSS} %p %c{1}: %m%n\n"
            # An INFO line for each block and each request would bury the reasons that tests print.
            "log4j.logger.http.requests=WARN\n"
            "log4j.logger.BlockStateChange=WARN\n"
            "log4j.logger.org.apache.hadoop.hdfs.StateChange=WARN\n"
        )

    def _common(self, memory: int, cores: int) -> dict[str, str]:
        return {
            "fs.defaultFS": self.url,
            "hadoop.tmp.dir": str(self._data / "tmp"),
            # A server that is being started, or is gone, is asked again soon.
            "ipc.client.connect.retry.interval": "200",
            "ipc.client.connect.max.retries": "100",
            "ipc.client.connect.timeout": "5000",
            "yarn.nodemanager.resource.memory-mb": str(memory),
            "yarn.nodemanager.resource.cpu-vcores": str(cores),
            "yarn.scheduler.maximum-allocation-mb": str(memory),
            "yarn.scheduler.maximum-allocation-vcores": str(cores),
        }

    def _hdfs(self, replication: int, blocksize: int, webhdfs: bool) -> dict[str, str]:
        found = {
            "dfs.replication": str(replication),
            "dfs.blocksize": str(blocksize),
            "dfs.namenode.fs-limits.min-block-size": "65536",
            "dfs.webhdfs.enabled": str(webhdfs).lower(),
            "dfs.datanode.hostname": self._host,
            "dfs.namenode.datanode.registration.ip-hostname-check": "false",
            "dfs.namenode.resource.du.reserved": "1048576",
            "dfs.namenode.safemode.extension": "0",
            # A kill -9 of the process loses nothing that was written; only a power failure would.
            "dfs.namenode.edits.noeditlogchannelflush": "true",
            # A lost DataNode is stale after 3 s and dead after 2 * 1 s + 10 * 1 s, not after 10.5 minutes.
            "dfs.heartbeat.interval": "1",
            "dfs.namenode.heartbeat.recheck-interval": "1000",
            "dfs.namenode.stale.datanode.interval": "3000",
            "dfs.namenode.avoid.read.stale.datanode": "true",
            "dfs.namenode.avoid.write.stale.datanode": "true",
            "dfs.namenode.redundancy.interval.seconds": "1s",
            "dfs.client.socket-timeout": "10000",
        }
        if not self.ha:
            rpc, http = self._namenodes["namenode-1"]
            return found | {"dfs.namenode.rpc-address": rpc, "dfs.namenode.http-address": http}
        for number, (rpc, http) in enumerate(self._namenodes.values(), 1):
            found[f"dfs.namenode.rpc-address.{NAMESERVICE}.nn{number}"] = rpc
            found[f"dfs.namenode.http-address.{NAMESERVICE}.nn{number}"] = http
        proxy = "org.apache.hadoop.hdfs.server.namenode.ha.ConfiguredFailoverProxyProvider"
        return found | {
            "dfs.nameservices": NAMESERVICE,
            f"dfs.ha.namenodes.{NAMESERVICE}": ",".join(f"nn{number + 1}" for number in range(len(self._namenodes))),
            f"dfs.client.failover.proxy.provider.{NAMESERVICE}": proxy,
            "dfs.namenode.shared.edits.dir": (self._data / "edits").as_uri(),
            # `-failover` wants a way to make sure that the other is off; the test that killed it has seen to that.
            "dfs.ha.fencing.methods": "shell(/bin/true)",
            "dfs.ha.tail-edits.period": "1",
            "dfs.ha.log-roll.period": "5",
            "dfs.client.failover.sleep.base.millis": "100",
            "dfs.client.failover.sleep.max.millis": "1000",
            "dfs.client.failover.max.attempts": "60",
        }

    def _yarn(self) -> dict[str, str]:
        rpc = {
            f"yarn.resourcemanager.{name}address": self._address()
            for name in ("", "scheduler.", "resource-tracker.", "admin.")
        }
        queue = "yarn.scheduler.capacity.root"
        return rpc | {
            "yarn.resourcemanager.hostname": self._host,
            "yarn.resourcemanager.webapp.address": self._rm_address,
            "yarn.resourcemanager.bind-host": self._host,
            "yarn.nodemanager.bind-host": self._host,
            "yarn.scheduler.minimum-allocation-mb": "256",
            "yarn.nodemanager.vmem-check-enabled": "false",
            "yarn.nodemanager.pmem-check-enabled": "false",
            "yarn.nodemanager.disk-health-checker.max-disk-utilization-per-disk-percentage": "100.0",
            "yarn.nodemanager.disk-health-checker.min-free-space-per-disk-mb": "0",
            "yarn.nodemanager.env-whitelist": f"JAVA_HOME,HADOOP_CONF_DIR,PATH,LANG,TZ,SPARK_LOCAL_IP,KRB5_CONFIG,"
            f"JDK_JAVA_OPTIONS,{MARKER}",
            "yarn.nodemanager.delete.debug-delay-sec": "3600",  # containers' logs outlive their test
            # A lost node after 10 s, not after 10 minutes; a driver may be busy for a little longer.
            "yarn.nm.liveness-monitor.expiry-interval-ms": "10000",
            "yarn.am.liveness-monitor.expiry-interval-ms": "240000",
            "yarn.resourcemanager.nodemanagers.heartbeat-interval-ms": "250",
            "yarn.resourcemanager.connect.retry-interval.ms": "500",
            # Without a ticket a client of YARN asks again and again, by default for a quarter of an hour.
            "yarn.resourcemanager.connect.max-wait.ms": "10000",
            "yarn.nodemanager.sleep-delay-before-sigkill.ms": "500",
            "yarn.scheduler.capacity.resource-calculator": RESOURCE_CALCULATOR,
            "yarn.scheduler.capacity.maximum-am-resource-percent": "0.8",
            "yarn.scheduler.capacity.node-locality-delay": "0",
            # One container a heartbeat: executors are spread over the nodes, as tests that lose a node want them.
            "yarn.scheduler.capacity.per-node-heartbeat.multiple-assignments-enabled": "false",
            f"{queue}.queues": "default",
            f"{queue}.default.capacity": "100",
            f"{queue}.default.maximum-capacity": "100",
            f"{queue}.default.state": "RUNNING",
        }  # fmt: skip

    def _secure(self) -> dict[str, str]:
        found = {
            "hadoop.security.authentication": "kerberos",
            "hadoop.security.authorization": "true",
            "hadoop.security.token.service.use_ip": "false",
            # WebHDFS follows it, and would else believe any `user.name=`.
            "hadoop.http.authentication.type": "kerberos",
            "hadoop.http.authentication.signature.secret.file": str(self._secrets / "http.secret"),
            "dfs.block.access.token.enable": "true",
            "ignore.secure.ports.for.testing": "true",  # of DataNodes, which want ports below 1024 or SASL and HTTPS
            "yarn.resourcemanager.webapp.delegation-token-auth-filter.enabled": "false",
        }
        for server, service in (
            ("dfs.namenode", "hdfs"), ("dfs.datanode", "hdfs"), ("yarn.resourcemanager", "yarn"),
            ("yarn.nodemanager", "yarn"),
        ):  # fmt: skip
            principal = "principal" if service == "yarn" else "kerberos.principal"
            found[f"{server}.{principal}"] = self.principal(f"{service}/{self._host}")
            found[f"{server}.keytab" + (".file" if service == "hdfs" else "")] = self._keytab_name(service)
        for prefix in ("hadoop.http.authentication", "dfs.web.authentication"):
            found[f"{prefix}.kerberos.principal"] = self.principal(f"HTTP/{self._host}")
            found[f"{prefix}.kerberos.keytab"] = self._keytab_name("HTTP")
        return found

    def _keytab_name(self, service: str) -> str:
        return str(self._secrets / f"{service}_{self._host}.keytab")


class _Watchdog:
    """A process that ends a cluster when this one closes it or is gone, in whatever way."""

    def __init__(self, marker: str):
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, "--watchdog", marker, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def close(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    @staticmethod
    def watch(marker: str, parent: int) -> None:
        import select

        # The pipe tells at once; but a forked child of the parent may hold it open: the parent is looked for as well.
        while os.getppid() == parent and not select.select([sys.stdin], [], [], 1)[0]:
            pass
        _end(f"{marker}/")


def _end(marker: str) -> None:
    """kill -9 every process whose environment has this marker, but this one, until there is none."""
    wanted = f"{MARKER}={marker}".encode()
    while found := [pid for pid in processes_with(wanted) if pid not in (os.getpid(), os.getppid())]:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def processes_with(entry: bytes) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if any(part.startswith(entry) for part in (folder / "environ").read_bytes().split(b"\0")):
                    yield int(folder.name)


def _free_ports() -> Iterator[int]:
    """Free ports below those that the system gives to clients: a restarted server finds its own free again."""
    candidates = list(range(15000, 32000))
    random.SystemRandom().shuffle(candidates)
    for port in candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy


def _xml(settings: Mapping[str, str]) -> str:
    lines = (
        f"  <property><name>{escape(key)}</name><value>{escape(value)}</value></property>\n"
        for key, value in sorted(settings.items())
    )
    return f'<?xml version="1.0"?>\n<configuration>\n{"".join(lines)}</configuration>\n'


def _user() -> str:
    import getpass

    return getpass.getuser()


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep a Hadoop running on loopback until Enter or a signal.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--namenodes", type=int, default=2)
    parser.add_argument("--datanodes", type=int, default=2)
    parser.add_argument("--nodemanagers", type=int, default=2)
    parser.add_argument("--kerberos", action="store_true")
    chosen = parser.parse_args()
    reason = missing(kerberos=chosen.kerberos)
    if reason:
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    started = time.monotonic()
    with Cluster(**vars(chosen)) as cluster:
        print(f"{cluster.url} is up after {time.monotonic() - started:.1f} s: . {cluster.folder}/environment.sh")
        print(f"WebHDFS {';'.join(cluster.webhdfs)}, YARN {cluster.resourcemanager}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            if sys.stdin.isatty():
                input("Enter ends it\n")
            else:
                signal.pause()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watchdog"]:
        _Watchdog.watch(sys.argv[2], int(sys.argv[4]))
    else:
        main()
