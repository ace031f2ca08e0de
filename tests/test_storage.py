"""Storage on local disk: names as given, listing in order, whole or nothing, one writer."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
import traceback

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from sattile import storage
from sattile.errors import Outage, SattileError, UsageError
from sattile.storage import hdfs, jni, libhdfs

AWKWARD = ["plain.tif", "a b, c.tif", "50%.tif", "20%20.tif", "ü+#;.tif", "q?.tif"]


def test_threads_that_ask_at_once_share_one_folder(monkeypatch, tmp_path):
    """Two would be two locks, of which one is lost, and its folder with it."""
    from concurrent.futures import ThreadPoolExecutor

    from sattile.storage import elsewhere

    made = []

    def slow():
        time.sleep(0.05)
        made.append(str(tmp_path / str(len(made))))
        return made[-1], (tmp_path / ".lock").open("w")

    monkeypatch.setattr(elsewhere, "_own", (0, "", None))
    monkeypatch.setattr(elsewhere, "_new_folder", slow)
    with ThreadPoolExecutor(8) as pool:
        assert {one.result() for one in [pool.submit(elsewhere.own_folder) for _ in range(8)]} == {made[0]}


@pytest.mark.parametrize("name", AWKWARD)
def test_names_are_kept_as_they_are(tmp_path, name):
    url = storage.join(str(tmp_path), name)
    storage.write_bytes(url, b"x")
    assert storage.read_bytes(url) == b"x"
    assert [entry.url for entry in storage.list_folder(str(tmp_path))] == [url]
    assert storage.read_bytes("file:" + url) == storage.read_bytes("file://" + url) == b"x"


def test_glob_and_walk_go_in_order_and_leave_out_marks(tmp_path):
    for name in ["b/2.tif", "a/1.tif", "a/_run.json", ".hidden/3.tif", "a/deep/er/4.tif", "5.tif"]:
        storage.write_bytes(storage.join(str(tmp_path), name), b"")
    base = str(tmp_path)
    assert [e.url[len(base) + 1 :] for e in storage.walk(base)] == ["5.tif", "a/1.tif", "a/deep/er/4.tif", "b/2.tif"]
    assert [e.url[len(base) + 1 :] for e in storage.glob(base + "/*/*.tif")] == ["a/1.tif", "b/2.tif"]
    found = sorted(e.url[len(base) + 1 :] for e in storage.glob(base + "/**/*.tif"))
    assert found == [".hidden/3.tif", "5.tif", "a/1.tif", "a/deep/er/4.tif", "b/2.tif"]
    assert storage.glob(base + "/nothing/*.tif") == []


def test_relative_globs_stay_relative(tmp_path, monkeypatch):
    storage.write_bytes(storage.join(str(tmp_path), "in/x.tif"), b"")
    monkeypatch.chdir(tmp_path)
    assert [entry.url for entry in storage.glob("in/*.tif")] == ["in/x.tif"]
    assert [entry.url for entry in storage.glob("*/x.tif")] == ["in/x.tif"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    url = str(tmp_path / "f")
    storage.write_bytes(url, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        storage.write_bytes(url, b"new")
    assert os.listdir(tmp_path) == ["f"]
    assert storage.read_bytes(url) == b"old"


def test_a_second_job_on_the_same_folder_is_refused(tmp_path):
    with (
        storage.Lease(str(tmp_path)),
        pytest.raises(UsageError, match="being written by another job"),
        storage.Lease(str(tmp_path)),
    ):
        pass
    with storage.Lease(str(tmp_path)):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("owner", "age"), [("elsewhere:1:x", 61), (f"{os.uname().nodename}:999999999:x", 1)], ids=["run out", "killed"]
)
def test_a_dead_jobs_lease_is_taken_over(tmp_path, owner, age):
    held = {"owner": owner, "time": time.time() - age, "seconds": 60}
    (tmp_path / storage.Lease.NAME).write_text(json.dumps(held))
    with storage.Lease(str(tmp_path)) as lease:
        assert json.loads((tmp_path / lease.NAME).read_text())["owner"] == lease.owner


def test_a_lease_is_renewed_while_its_holder_lives(tmp_path):
    with storage.Lease(str(tmp_path), seconds=0.4):
        time.sleep(1.0)
        with pytest.raises(UsageError), storage.Lease(str(tmp_path), seconds=0.4):
            pass


def test_a_lease_that_another_job_has_taken_is_not_taken_back(tmp_path):
    """A laptop was closed, the lease ran out, another job holds it now: the first one sees that and stops renewing."""
    with storage.Lease(str(tmp_path), seconds=0.2) as lease:
        other = {"owner": "elsewhere:1:abc", "time": time.time(), "seconds": 60}
        storage.write_json(lease.url, other)
        time.sleep(0.3)
        assert lease.lost
    assert storage.read_json(lease.url) == other


def test_a_lease_that_another_job_took_and_gave_back_is_lost_too(tmp_path):
    with storage.Lease(str(tmp_path)) as lease:
        assert lease.look()
        lock = tmp_path / lease.NAME
        kept = lock.read_bytes()
        lock.write_text("{")  # what can't be read just now says nothing
        assert lease.look()
        lock.unlink()
        assert not lease.look()
        lock.write_bytes(kept)
        assert not lease.look()
    with storage.Lease(str(tmp_path), seconds=0.2) as lease:
        (tmp_path / lease.NAME).unlink()
        time.sleep(0.3)
        assert lease.lost
        assert not (tmp_path / lease.NAME).exists()  # not made anew


@pytest.mark.parametrize("renewed", [True, False])
def test_a_lease_from_the_future_is_another_jobs_if_that_renews_it(tmp_path, renewed):
    """A clock that was set back must not block a folder for as long."""
    held = {"owner": "elsewhere:1:x", "time": time.time() + 86_400, "seconds": 1.0}
    lock = tmp_path / storage.Lease.NAME
    lock.write_text(json.dumps(held))
    if renewed:
        threading.Timer(0.2, lambda: lock.write_text(json.dumps(held | {"time": held["time"] + 0.25}))).start()
        with pytest.raises(UsageError, match=r"another job \(elsewhere"), storage.Lease(str(tmp_path)):
            pass
    else:
        with storage.Lease(str(tmp_path)) as lease:
            assert json.loads(lock.read_text())["owner"] == lease.owner


@pytest.mark.parametrize("content", ["[]", "{}", '{"owner": "x", "time": 1, "seconds": 60}', '{"owner": 3}'])
def test_a_lock_that_is_none_is_taken_over(tmp_path, content):
    (tmp_path / storage.Lease.NAME).write_text(content)
    with storage.Lease(str(tmp_path)):
        pass


def test_links_that_lead_back_up_end_and_those_that_lead_nowhere_are_told(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.tif").write_text("")
    (tmp_path / "in" / "deep" / "up").symlink_to("..")
    (tmp_path / "in" / "round.tif").symlink_to("round.tif")
    (tmp_path / "in" / "away").symlink_to(tmp_path / "disk" / "away")
    for found in (
        list(storage.walk(str(tmp_path / "in"))),
        storage.glob(str(tmp_path / "in" / "**" / "*.tif")),
        storage.glob(f"{tmp_path}/**/in/**/*"),
    ):
        files = {one.url.removeprefix(f"{tmp_path}/in/"): one.problem for one in found if not one.is_folder}
        assert files.pop("deep/a.tif") is None
        assert sorted(files) == ["round.tif"]
        assert [one.url for one in found if one.is_folder and one.problem] == [f"{tmp_path}/in/away"]
    assert [one.url for one in storage.glob(str(tmp_path / "in" / "*" / "*.tif"))] == [
        f"{tmp_path}/in/{one}" for one in ("away", "deep/a.tif")
    ]
    named = f"{tmp_path}/in/*/up/*/a.tif"
    assert [one.url for one in storage.glob(named) if not one.problem] == [f"{tmp_path}/in/deep/up/deep/a.tif"]


def test_a_lock_that_is_being_written_is_not_taken(tmp_path):
    """A file is made before its content is there."""
    lock = tmp_path / storage.Lease.NAME
    lock.touch()
    content = json.dumps({"owner": "elsewhere:1:abc", "time": time.time(), "seconds": 60})
    threading.Timer(0.05, lock.write_text, [content]).start()
    with pytest.raises(UsageError, match="another job"), storage.Lease(str(tmp_path)):
        pass


def test_unknown_schemes_are_refused():
    with pytest.raises(UsageError, match="no storage for ftp"):
        storage.read_bytes("ftp://host/file")


def test_too_small_scratch_says_so():
    with pytest.raises(Outage) as told, storage.scratch(needed=1 << 60):
        pass
    assert re.fullmatch(
        rf"local scratch {re.escape(tempfile.gettempdir())} has [\d,]+ MB free, and 1,152,921,504,607 MB are needed; "
        "point TMPDIR at a larger disk",
        str(told.value),
    )


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_the_digest_does_not_depend_on_order(value):
    assert storage.digest(value) == storage.digest(dict(reversed(value.items())))


@pytest.mark.parametrize("failure", ["TooManyRedirects", "ConnectionError"])
def test_a_delegation_token_is_never_shown(monkeypatch, failure):
    """`requests` writes whole addresses into its errors, and WebHDFS wants the token in them."""
    monkeypatch.setattr(hdfs, "PATIENCE", 0.0)
    for name in ("_access", "_received", "_found"):
        monkeypatch.setattr(hdfs, name, getattr(hdfs, name))
    monkeypatch.setattr(hdfs, "_clients", {})
    storage.use(storage.Access("nn:8020", {"nn:8020": "http://nn:9870"}, "me", {"nn:8020": "SECRET-tok_1"}))
    asked = []

    def send(self, request, **_):
        asked.append(request.url)
        raise getattr(requests, failure)(f"Max retries exceeded with url: {request.url} (at {request.url!r})")

    monkeypatch.setattr(requests.Session, "send", send)
    with pytest.raises(SattileError, match=r"delegation=\.\.\.") as told:
        storage.read_bytes("hdfs:///a b")
    assert "delegation=SECRET-tok_1" in asked[0]
    assert "SECRET" not in "".join(traceback.format_exception(told.value))
    assert "SECRET" not in repr(storage.access())


def test_what_came_from_the_driver_is_kept_and_sent_on(monkeypatch):
    """A worker has a Hadoop configuration, too, and would find no token by it."""
    for name in ("_access", "_received", "_found"):
        monkeypatch.setattr(hdfs, name, getattr(hdfs, name))
    monkeypatch.setitem(sys.modules, "pyspark", sys)
    given = storage.Access("nn:8020", {}, "me", {"nn:8020": "token"})
    storage.use(given)
    assert storage.access() is given


@pytest.mark.parametrize("service", ["host:8020", "127.0.0.1:8020"])
def test_a_token_is_found_by_each_name_of_its_service(monkeypatch, service):
    """https://hadoop.apache.org/docs/stable/hadoop-project-dist/hadoop-common/core-default.xml, token.service.use_ip"""
    monkeypatch.setattr("socket.gethostbyname", lambda _: "127.0.0.1")
    for authority in ("host", "host:8020"):
        assert hdfs._token_of(authority, {service: "t", "other:8020": "x"}) == "t"
    assert hdfs._token_of("host:9000", {service: "t"}) is None


CLOSED = "<configuration><property><name>dfs.webhdfs.enabled</name><value>false</value></property></configuration>"


@pytest.mark.parametrize(
    ("said", "conf", "way"),
    [(None, "", "webhdfs"), (None, CLOSED, "libhdfs"), ("webhdfs", CLOSED, "webhdfs"), ("libhdfs", "", "libhdfs")],
)
def test_the_configuration_says_which_way_hdfs_is_reached_and_the_user_first(tmp_path, monkeypatch, said, conf, way):
    monkeypatch.delenv("SATTILE_HDFS", raising=False)
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.delitem(sys.modules, "pyspark")
    if said:
        monkeypatch.setenv("SATTILE_HDFS", said)
    if conf:
        (tmp_path / "hdfs-site.xml").write_text(conf)
    found = hdfs.find_access(str(tmp_path))
    assert found.way == way
    assert "SATTILE_HDFS" in found.why if said else "dfs.webhdfs.enabled" in found.why


def test_another_way_to_hdfs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SATTILE_HDFS", "http")
    with pytest.raises(UsageError, match="webhdfs or libhdfs"):
        hdfs.find_access(str(tmp_path))


def test_without_libhdfs_the_error_says_what_to_set(tmp_path, monkeypatch):
    for name in ("_access", "_received", "_found"):
        monkeypatch.setattr(hdfs, name, getattr(hdfs, name))
    monkeypatch.setenv("ARROW_LIBHDFS_DIR", str(tmp_path))
    monkeypatch.setenv("HADOOP_HOME", str(tmp_path))
    storage.use(storage.Access("nn:8020", {}, "me", {}, "libhdfs", "dfs.webhdfs.enabled=false"))
    with pytest.raises(UsageError, match=r"\(dfs\.webhdfs\.enabled=false\).*ARROW_LIBHDFS_DIR.*CLASSPATH"):
        storage.read_bytes("hdfs:///a")


def test_the_class_path_is_what_was_said_else_sparks_jars(tmp_path):
    for jar in ("b.jar", "a.jar", "no.txt"):
        (tmp_path / jar).touch()
    found = libhdfs.class_path({"CLASSPATH": f"/conf:{tmp_path}/*", "HADOOP_CONF_DIR": "/other"})
    assert found == f"/conf:{tmp_path}/a.jar:{tmp_path}/b.jar"
    first, *jars = libhdfs.class_path({"HADOOP_CONF_DIR": "/other"}).split(":")
    assert first == "/other"
    assert any("hadoop-client-api" in jar for jar in jars)


@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        ("java.io.FileNotFoundException: no\nsuch", "FileNotFoundException", "no\nsuch"),
        ("org.apache.hadoop.ipc.RemoteException(java.io.IOException): not empty", "IOException", "not empty"),
        ("java.lang.NullPointerException", "NullPointerException", ""),
    ],
)
def test_javas_exceptions_are_taken_apart(said, kind, text):
    error = jni.JavaError(said)
    assert (error.kind, error.text) == (kind, text)
