"""The test cluster does what other tests rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import hdfs
import pytest

from hadoop.cluster import MARKER, SHELL, Cluster, ClusterError, processes_with
from hadoop.conftest import need

NODES = "org.apache.hadoop.yarn.client.cli.NodeCLI"
ROOT = Path(__file__).resolve().parents[2]


def wait_for(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def client(cluster: Cluster) -> hdfs.InsecureClient:
    return hdfs.InsecureClient(";".join(cluster.webhdfs), user=cluster.superuser)


def test_a_file_of_many_blocks_comes_back(cluster):
    data = os.urandom(3 << 20) + b"end"
    files = client(cluster)
    files.write("/put/a b,ä.bin", data=data, overwrite=True)
    status = files.status("/put/a b,ä.bin")
    assert (status["length"], status["blockSize"], status["replication"]) == (len(data), 1 << 20, 2)
    with files.read("/put/a b,ä.bin", offset=(1 << 20) - 5, length=10) as reader:
        assert reader.read() == data[(1 << 20) - 5 : (1 << 20) + 5]


def test_another_user_writes_below_the_root(cluster):
    files = hdfs.InsecureClient(";".join(cluster.webhdfs), user="somebody")
    files.write("/user/somebody/own", data=b"x", overwrite=True)
    assert files.status("/user/somebody/own")["owner"] == "somebody"


def test_yarn_lists_its_nodes(cluster):
    nodes = cluster.nodes()
    assert [node["state"] for node in nodes] == ["RUNNING"] * 2
    assert len({node["nodeHTTPAddress"] for node in nodes}) == 2


def test_a_client_goes_on_through_failovers(cluster):
    """One by hand with both alive, one after kill -9; every file written meanwhile is there."""
    files, written, stop = client(cluster), [], threading.Event()

    def write() -> None:
        while not stop.is_set():
            try:
                files.write(f"/failover/{len(written)}", data=str(len(written)).encode(), overwrite=True)
            except (OSError, hdfs.HdfsError):  # none is active at this instant
                time.sleep(0.1)
            else:
                written.append(len(written))

    def wait_for_more() -> None:
        wanted = len(written) + 3
        wait_for(lambda: len(written) >= wanted)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        wait_for_more()
        assert cluster.active == "namenode-1"
        cluster.failover("namenode-2")
        assert cluster.active == "namenode-2"
        wait_for_more()
        cluster.kill("namenode-2")
        cluster.failover("namenode-1")
        wait_for_more()
        cluster.restart("namenode-2")
        assert cluster.active == "namenode-1"
    finally:
        stop.set()
        thread.join()
    assert sorted(map(int, files.list("/failover"))) == written
    for number in written:
        with files.read(f"/failover/{number}") as reader:
            assert reader.read() == str(number).encode()


def test_a_killed_datanode_is_seen_dead_and_comes_back(cluster):
    files = client(cluster)
    files.write("/dead", data=b"x" * (1 << 20), overwrite=True)
    cluster.kill("datanode-2")
    wait_for(lambda: cluster.dead_datanodes() == 1)
    with files.read("/dead") as reader:
        assert len(reader.read()) == 1 << 20
    cluster.restart("datanode-2")
    assert cluster.dead_datanodes() == 0


def test_a_killed_nodemanager_is_seen_lost_and_comes_back(cluster):
    cluster.kill("nodemanager-1")
    wait_for(lambda: len(cluster.nodes("LOST")) == 1)
    cluster.restart("nodemanager-1")
    assert len(cluster.nodes()) == 2


def test_a_restart_waits_for_the_server_itself(cluster):
    """Not for what others still believe of the one that was killed a moment ago."""
    files = client(cluster)
    for datanode in ("datanode-1", "datanode-2"):
        cluster.restart(datanode)
    files.write("/restarted", data=b"x", overwrite=True)
    for nodemanager in ("nodemanager-1", "nodemanager-2"):
        before = {node["id"]: node["lastHealthUpdate"] for node in cluster.nodes()}
        cluster.restart(nodemanager)
        after = {node["id"]: node["lastHealthUpdate"] for node in cluster.nodes()}
        assert set(after) == set(before)
        assert any(after[node] > before[node] for node in before)


def test_every_process_ends_with_the_block(tmp_path):
    need()
    with pytest.raises(KeyboardInterrupt), Cluster(tmp_path, datanodes=1, replication=1) as small:
        started = {name: process.pid for name, process in small.processes.items()}
        assert set(started) == {"namenode-1", "datanode-1"}
        raise KeyboardInterrupt
    assert not any(Path(f"/proc/{pid}").exists() for pid in started.values())


def test_every_process_ends_when_its_python_is_killed(tmp_path):
    need()
    command = [sys.executable, "-m", "tests.hadoop.cluster", "--folder", str(tmp_path)]
    options = ["--namenodes", "1", "--datanodes", "1", "--nodemanagers", "0"]
    with subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True) as python:
        assert "is up" in python.stdout.readline()
        exported = (tmp_path / "environment.sh").read_text()
        marker = exported.split(f"{MARKER}=")[1].split("/")[0]
        assert len(list(processes_with(f"{MARKER}={marker}/".encode()))) == 2
        python.send_signal(signal.SIGKILL)
    wait_for(lambda: not list(processes_with(f"{MARKER}={marker}/".encode())), 10)


def test_a_server_that_dies_is_told_with_its_log(tmp_path):
    need()
    with pytest.raises(ClusterError, match=r"namenode-1 ended(?s:.*)Invalid URI|nonsense"):
        Cluster(tmp_path, settings={"dfs.namenode.http-address": "nonsense"}).__enter__()


def test_kerberos_refuses_who_has_no_ticket(kerberos_cluster):
    address = f"{kerberos_cluster.webhdfs[0]}/webhdfs/v1/?op=LISTSTATUS&user.name=alice"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(address)
    refused.value.close()
    assert refused.value.code == 401
    nobody = kerberos_cluster.java(SHELL, "-ls", "/", check=False)
    assert nobody.returncode
    assert "Client cannot authenticate via:[TOKEN, KERBEROS]" in nobody.stdout


def test_kerberos_lets_in_who_has_a_keytab(kerberos_cluster):
    kerberos_cluster.java(SHELL, "-mkdir", "-p", "/user/alice", user="alice")
    assert "alice" in kerberos_cluster.java(SHELL, "-ls", "/user", user="alice").stdout
    assert "Total Nodes:1" in kerberos_cluster.java(NODES, "-list", user="alice").stdout


def test_kerberos_writes_blocks_and_gives_tokens(kerberos_cluster, tmp_path):
    """The bytes of a file of several blocks come back; WebHDFS takes a token in place of a ticket."""
    data = os.urandom(2_500_000)
    (tmp_path / "in").write_bytes(data)
    kerberos_cluster.java(SHELL, "-put", str(tmp_path / "in"), "/blocks", user="alice")
    address = kerberos_cluster.webhdfs[0]
    answer = kerberos_cluster.get(f"{address}/webhdfs/v1/?op=GETDELEGATIONTOKEN", user="alice")
    files = hdfs.TokenClient(address, token=answer["Token"]["urlString"])
    with files.read("/blocks") as reader:
        assert reader.read() == data
