"""What spark-submit.sh makes of its arguments; `k8s` at a server that records what it is told to make."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sattile.submit as submit_module

ROOT = Path(__file__).parents[1]


class ApiServer(http.server.ThreadingHTTPServer):
    """Keeps the objects it is given, as Kubernetes' API server does, and says that each pod ended with `status`."""

    def __init__(self, status: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.objects: dict[str, dict[str, Any]] = {}

    @property
    def url(self) -> str:
        return f"k8s://http://127.0.0.1:{self.server_address[1]}"

    def of_kind(self, kind: str) -> dict[str, Any]:
        (found,) = [one for one in self.objects.values() if one["kind"] == kind]
        return found


class Handler(http.server.BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, value: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(value).encode() + b"\n"
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        made["metadata"] |= {"uid": "1", "resourceVersion": "1", "namespace": "default"}
        if made["kind"] == "Pod":
            ended = {"terminated": {"exitCode": self.server.status, "reason": "Completed"}}
            container = {"name": made["spec"]["containers"][0]["name"], "image": "", "imageID": "", "state": ended}
            made["status"] = {
                "phase": "Failed" if self.server.status else "Succeeded",
                "containerStatuses": [container | {"ready": False, "restartCount": 0}],
            }
        self.server.objects[made["metadata"]["name"]] = made
        self._answer(made, 201)

    do_PATCH = do_POST  # noqa: N815

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = path.rsplit("/", 1)[1]
        if "watch=true" in query:
            self._answer({"type": "MODIFIED", "object": self.server.of_kind("Pod")})
        elif name in self.server.objects:
            self._answer(self.server.objects[name])
        else:
            self._answer({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}, 404)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[ApiServer]:
    with ApiServer(getattr(request, "param", 0)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "options",
    [
        [], ["--py-files", "a.py,b.py"], ["--py-files=a.py", "--verbose"],
        ["--conf", "spark.a=b.py", "--conf=spark.c=d.py", "--num-executors", "2"],
    ],
)  # fmt: skip
def test_the_job_is_the_first_word_that_is_neither_an_option_nor_its_value(options: list[str]) -> None:
    found = submit_module._parse(["yarn", *options, "jobs/index.py", "x.py", "--out", "o"])
    assert found == ("yarn", options, ROOT / "jobs" / "index.py", ["x.py", "--out", "o"])


def test_an_environment_behind_a_link_is_packed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "bin").mkdir(parents=True)
    (tmp_path / "real" / "bin" / "python").touch()
    (tmp_path / "venv").symlink_to(tmp_path / "real")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    submit_module.write_environment(str(tmp_path / "out.tar"))
    with tarfile.open(tmp_path / "out.tar") as packed:
        assert "./bin/python" in packed.getnames()


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK", "PYSPARK"))}
    return subprocess.run(
        [str(ROOT / "spark-submit.sh"), "k8s", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("server", [3], indirect=True)
def test_kubernetes_is_asked_for_a_driver_with_our_job_and_its_status_comes_back(server: ApiServer) -> None:
    image = ["--conf", "spark.kubernetes.container.image=example/sattile:1"]
    more = ["--conf", "spark.executor.memoryOverhead=9g"]
    job = ["jobs/predict.py", "--model", "hdfs:///m", "--scenes", "hdfs:///s p/*.tif", "--out", "hdfs:///o"]
    done = submit("--master", server.url, *image, *more, *job)
    assert done.returncode == 3, done.stderr[-3000:]
    pod = server.of_kind("Pod")
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "example/sattile:1"
    assert container["args"][-7:] == ["local:///opt/sattile/jobs/predict.py", *job[1:]]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["PYSPARK_PYTHON"] == "/opt/sattile/.venv/bin/python"
    assert environment["PYTHONPATH"] == "/opt/sattile"
    assert container["resources"]["limits"]["memory"] == "2048Mi"
    assert pod["spec"]["serviceAccountName"] == "spark"
    settings = server.of_kind("ConfigMap")["data"]["spark.properties"]
    assert "spark.executor.memoryOverhead=9g" in settings  # the user's word goes before the file's
    assert "spark.executorEnv.PYTHONPATH=/opt/sattile" in settings
    assert pod["metadata"]["name"] in done.stderr
    assert " INFO " not in done.stderr


def test_kubernetes_wants_a_master_and_an_image(server: ApiServer) -> None:
    without = submit("jobs/predict.py")
    assert without.returncode == 2
    assert "--master k8s://" in without.stderr
    without = submit("--master", server.url, "jobs/predict.py")
    assert without.returncode == 2
    assert "spark.kubernetes.container.image" in without.stderr
    assert not server.objects
