"""A cluster with Kerberos: refused without a ticket, at work with a keytab, and no secret left anywhere."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import rasterio
from scenes_for_tests import position_image, write_scene

from hadoop.cluster import SHELL, Cluster
from hadoop.conftest import SMALL
from sattile.errors import UsageError
from sattile.submit import logged_in

HERE = Path(__file__).resolve().parents[2]
EVENTS = [
    "--conf", "spark.eventLog.enabled=true", "--conf", "spark.eventLog.dir=hdfs:///events",
    "--conf", "spark.eventLog.compress=false",
]  # fmt: skip
SETTINGS = """\
tile: {size: 128}
train: {epochs: 1, arch: unet-tiny, workers: 2}
evaluate: {split: val}
"""
LOG_IN = r"kinit.*--principal and --keytab"


def run(cluster: Cluster, *command: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
    """As a user with a ticket, or as one without; standard error is in `stdout`."""
    environment = {**os.environ, **cluster.environment(user), "SATTILE_ENV": "local"}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=400
    )


def submit(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(cluster, str(HERE / "spark-submit.sh"), "yarn", *SMALL, *arguments)


def applications(cluster: Cluster) -> int:
    answer = cluster.get(f"{cluster.resourcemanager}/ws/v1/cluster/apps", user=cluster.superuser)
    assert answer is not None
    return len((answer["apps"] or {}).get("app", []))


@dataclass(frozen=True)
class Loop:
    """What came of `jobs/run.py` in cluster mode."""

    status: int
    said: str
    fetched: Path
    tokens: frozenset[Token]


@pytest.fixture(scope="module")
def scenes(kerberos_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of 256 px with labels, in hdfs:///in and in the folder."""
    folder = tmp_path_factory.mktemp("scenes") / "in"
    lines = ["scene,labels,split"]
    for number, part in enumerate(("train", "val")):
        image, west = position_image(256, 256, 2), 600_000 + 10_000 * number
        write_scene(folder / f"{part}.tif", image, west=west, names=("b1", "b2"))
        write_scene(folder / f"{part}_labels.tif", (image[:1] > image[1:]).astype(np.uint8), west=west)
        lines.append(f"hdfs:///in/{part}.tif,hdfs:///in/{part}_labels.tif,{part}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "settings.yaml").write_text(SETTINGS)
    kerberos_cluster.java(SHELL, "-mkdir", "-p", "/user/alice", "/events", user="alice")
    kerberos_cluster.java(SHELL, "-put", str(folder), "/", user="alice")
    return folder


@pytest.fixture(scope="module")
def loop(kerberos_cluster: Cluster, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    tokens, stop = set(), threading.Event()

    def watch() -> None:
        """YARN removes a container's tokens with the container."""
        while not stop.wait(0.2):
            for folder, _, files in os.walk(kerberos_cluster.folder / "data" / "nodemanager-1"):  # folders may vanish
                if "container_tokens" in files:
                    with suppress(OSError, AssertionError, struct.error):  # half written, or gone
                        tokens.update(tokens_in(Path(folder, "container_tokens")))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        done = submit(
            kerberos_cluster, "--principal", kerberos_cluster.principal("alice"),
            "--keytab", str(kerberos_cluster.keytab("alice")), *EVENTS, "jobs/run.py",
            "--pairs", "hdfs:///in/pairs.csv", "--classes", "land,water", "--out", "hdfs:///out",
            "--conf", str(scenes / "settings.yaml"),
        )  # fmt: skip
    finally:
        stop.set()
        thread.join()
    folder = tmp_path_factory.mktemp("fetched")
    for made in ("/out", "/events", "/user/alice"):
        kerberos_cluster.java(SHELL, "-get", made, str(folder), user="alice", check=False)
    return Loop(done.returncode, done.stdout, folder, frozenset(tokens))


def test_without_a_ticket_nothing_is_submitted(kerberos_cluster: Cluster) -> None:
    before, start = applications(kerberos_cluster), time.monotonic()
    done = submit(kerberos_cluster, "jobs/index.py", "hdfs:///in", "--out", "hdfs:///refused")
    assert done.returncode == 2, done.stdout
    assert re.search(LOG_IN, done.stdout), done.stdout
    assert time.monotonic() - start < 40
    assert applications(kerberos_cluster) == before


def test_local_spark_without_a_ticket_says_the_same(kerberos_cluster: Cluster) -> None:
    done = run(kerberos_cluster, sys.executable, "-m", "sattile.cli", "index", "hdfs:///in", "--out", "hdfs:///refused")
    assert done.returncode == 2, done.stdout
    assert re.search(LOG_IN, done.stdout), done.stdout
    assert "Traceback" not in done.stdout


def test_local_spark_works_with_a_ticket(kerberos_cluster: Cluster, scenes: Path) -> None:
    done = run(
        kerberos_cluster, sys.executable, "-m", "sattile.cli", "index", "hdfs:///in/*.tif", "--out",
        "hdfs:///indexed", "--master", "local[1]", user="alice",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "indexed" in kerberos_cluster.java(SHELL, "-ls", "/", user="alice").stdout
    assert found_secrets(done.stdout.encode()) == []


def test_a_keytab_that_gives_no_ticket_is_told_before_anything_is_submitted(kerberos_cluster: Cluster) -> None:
    keytab = str(kerberos_cluster.keytab("alice"))
    for principal in (["--principal", kerberos_cluster.principal("nobody")], []):
        done = submit(kerberos_cluster, *principal, "--keytab", keytab, "jobs/index.py", "hdfs:///in")
        assert done.returncode == 2, done.stdout
        assert re.search("no Kerberos ticket for nobody|needs both", done.stdout), done.stdout


def test_a_missing_kinit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["--principal=a@B", "--conf", f"spark.kerberos.keytab={tmp_path / 'k'}"]
    with pytest.raises(UsageError, match="no `kinit`"), logged_in(options):
        pass


def test_the_loop_runs_by_a_keytab(kerberos_cluster: Cluster, loop: Loop) -> None:
    assert loop.status == 0, loop.said[-5000:]
    mosaics = list((loop.fetched / "out").rglob("*.tif"))
    assert len(mosaics) >= 2, sorted((loop.fetched / "out").rglob("*"))
    for mosaic in mosaics:
        with rasterio.open(mosaic) as file:
            assert file.shape == (256, 256)
            assert set(np.unique(file.read(1))) <= {0, 1}
    owners = kerberos_cluster.java(SHELL, "-stat", "%u", "/out/*", user="alice").stdout
    assert "alice" in owners


# --- secrets -------------------------------------------------------------------------------------------------------

KIND = b"HDFS_DELEGATION_TOKEN"


def encoded(data: bytes) -> list[bytes]:
    """What base64 makes of these bytes somewhere within others, both alphabets: one text for each place to begin."""
    found = []
    for before in range(3):
        text = base64.b64encode(b"\0" * before + data)
        whole = text[-(-before * 8 // 6) : (before + len(data)) * 8 // 6]
        found += [whole, whole.replace(b"+", b"-").replace(b"/", b"_")]
    return sorted(set(found))


def secrets_of(data: bytes) -> list[bytes]:
    return [data, data.hex().encode(), data.hex().upper().encode(), *encoded(data)]


# Whatever token it is, of whichever job: its kind follows the password and is encoded together with it.
TOKEN = re.compile(b"|".join(map(re.escape, encoded(KIND))) + rb"|delegation(?:=|%3D)[A-Za-z0-9_-]{8}", re.IGNORECASE)


# A DataNode writes the address of each WebHDFS request into its own log, token and all, whoever the client is
# (org.apache.hadoop.hdfs.server.datanode.web.webhdfs.WebHdfsHandler); administrators set its logger
# `datanode.webhdfs` to WARN. Nothing else may hold one.
REQUEST = re.compile(rb"^\S+ INFO webhdfs: .*\n", re.MULTILINE)


def found_secrets(data: bytes, known: list[bytes] | None = None) -> list[bytes]:
    found = [match.group() for match in TOKEN.finditer(data)]
    return found + [one for one in known or [] if one in data]


def contents(path: Path) -> Iterator[bytes]:
    """A file as it is, and what is packed within it."""
    data = path.read_bytes()
    yield data
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(BytesIO(data)) as packed:
            yield from (packed.read(one) for one in packed.namelist())
    elif path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [one.name for one in file.schema_arrow if str(one.type) in ("string", "large_string")]
            yield json.dumps(file.read(names).to_pylist()).encode()


@dataclass(frozen=True)
class Token:
    identifier: bytes
    password: bytes
    kind: bytes
    service: bytes

    @property
    def text(self) -> bytes:
        """As `encodeToUrlString` writes it and WebHDFS takes it."""
        parts = (self.identifier, self.password, self.kind, self.service)
        return base64.urlsafe_b64encode(b"".join(_vint(len(one)) + one for one in parts)).rstrip(b"=")


def _vint(value: int) -> bytes:
    """Hadoop's `WritableUtils.writeVInt`, of lengths."""
    size = 0 if value < 128 else 1 if value < 256 else 2
    return value.to_bytes(1, "big") if not size else bytes([0x90 - size]) + value.to_bytes(size, "big")


def tokens_in(path: Path) -> list[Token]:
    """Of the file that YARN gives a container: `HDTS`, version 0, count, (alias, token)..."""
    file = BytesIO(path.read_bytes())
    assert file.read(5) == b"HDTS\0"

    def number() -> int:
        (first,) = struct.unpack("b", file.read(1))
        return first if first >= -112 else int.from_bytes(file.read(-112 - first), "big")

    found = []
    for _ in range(number()):
        file.read(number())
        found.append(Token(*(file.read(number()) for _ in range(4))))
    return found


def keys_in(keytab: Path) -> list[bytes]:
    """The keys of a keytab of version 0x502 (https://web.mit.edu/kerberos/krb5-latest/doc/formats/keytab_file_format.html)."""
    data, at, found = keytab.read_bytes(), 2, []
    while at < len(data):
        (size,) = struct.unpack_from(">i", data, at)
        entry, at = BytesIO(data[at + 4 : at + 4 + abs(size)]), at + 4 + abs(size)
        (components,) = struct.unpack(">H", entry.read(2))
        for _ in range(components + 1):  # and the realm
            entry.read(*struct.unpack(">H", entry.read(2)))
        entry.read(4 + 4 + 1 + 2)  # name type, time, version, key type
        found.append(entry.read(*struct.unpack(">H", entry.read(2))))
    return found


def test_no_secret_is_left_in_logs_conf_records_or_the_output(kerberos_cluster: Cluster, loop: Loop) -> None:
    node = kerberos_cluster.folder / "data" / "nodemanager-1"
    ours = [token for token in loop.tokens if token.kind == KIND]
    assert ours
    keys = keys_in(kerberos_cluster.keytab("alice"))
    assert [len(key) for key in keys] == [32, 16]
    known = [text for token in ours for part in (token.identifier, token.password) for text in secrets_of(part)]
    known += [text for key in keys for text in secrets_of(key)] + [token.text for token in ours]

    # What is searched for would be found: in the files that hold it, and in the forms that it might be printed in.
    for token in ours:
        assert found_secrets(b"got " + token.text)
        assert found_secrets(b"http://nn/webhdfs/v1/x?op=OPEN&delegation=" + token.text, known)
        assert found_secrets(base64.b64encode(b"12" + token.password + b"3456"), known)
    assert found_secrets(kerberos_cluster.keytab("alice").read_bytes(), known)

    logs = [path for path in kerberos_cluster.logs.rglob("*") if path.is_file()]
    confs = [path for path in node.rglob("*") if path.is_file() and re.search(r"__spark_conf__|launch_cont", str(path))]
    made = [path for path in loop.fetched.rglob("*") if path.is_file()]
    names = " ".join(map(str, [*logs, *confs, *made]))
    for expected in ("stdout", "stderr", "__spark_conf__.properties", "launch_container.sh", "/events/", "_run.json"):
        assert expected in names, expected
    assert b"SparkListenerApplicationEnd" in b"".join(path.read_bytes() for path in made if "/events/" in str(path))
    left = {}
    for path in [*logs, *confs, *made]:
        for data in contents(path):
            searched = REQUEST.sub(b"", data) if path.name.startswith("datanode") else data
            if found := found_secrets(searched, known):
                left[str(path)] = found
    assert left == {}
    assert found_secrets(loop.said.encode(), known) == []
    # Spark's copy of the keytab for its driver has gone with the job, and nothing made tells where the user's own is.
    assert not [path for path in made if "keytab" in path.name]
    keytab = str(kerberos_cluster.keytab("alice")).encode()
    assert not [path for path in [*made, *confs] if keytab in path.read_bytes()]
