"""`sattile doctor`: a healthy session passes, and each thing that is broken is named with what to set."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from sattile import doctor
from sattile.doctor import FAILED, OK, WARNING, Exam, Finding, Report
from sattile.errors import SattileError, UsageError
from sattile.storage import Access

VERSIONS = {"python": "3.11.7", **dict.fromkeys(doctor.PACKAGES, "1.2.3")}


def report(place: str, *findings: Finding, **versions: str | None) -> Report:
    return Report(place, {**VERSIONS, **versions}, "/env/bin/python", findings)


def one(findings: list[Finding], status: str) -> Finding:
    """The only one of this status."""
    (found,) = [each for each in findings if each.status == status]
    return found


# --- in a session ---------------------------------------------------------------------------------------------------


def test_a_healthy_session_passes_and_nothing_is_left_behind(spark, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HADOOP_CONF_DIR", "")
    folder = tmp_path / "a folder" / "new"
    said = doctor.doctor(spark, folder=str(folder), workers=2)
    shown = capsys.readouterr().out
    assert "none failed" in said
    assert "FAILED" not in shown
    for check in ("java", "HDFS", "executors", "python", "packages", "GDAL", "decoder", "TensorFlow", "machine",
                  "scratch", "folder", "shared folder", "barrier", "memory"):  # fmt: skip
        assert any(line[9:].startswith(f"{check} ") for line in shown.splitlines()), check
    assert "1 of 1 answered" in shown
    assert "4 reads" in shown  # the driver and one executor, each its own file and the other's
    assert "2 ran together and reached each other" in shown
    assert not folder.exists()


def test_what_fails_is_said_with_a_remedy_and_exit_status_1(tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = subprocess.run(
        [sys.executable, "-m", "sattile.cli", "doctor", "--folder", str(tmp_path / "file"), "--workers", "3",
         "--master", "local[2]"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    failed = {line[9:24].strip(): index for index, line in enumerate(lines) if line.startswith(FAILED)}
    assert set(failed) == {"folder", "shared folder", "barrier"}
    assert "let the user who runs it" in lines[failed["folder"] + 1]
    assert "2 tasks at once, and 3 workers" in lines[failed["barrier"]]
    assert "--master local[3]" in lines[failed["barrier"] + 1]
    assert "3 of 15 checks failed (folder, shared folder, barrier)" in done.stderr
    assert (tmp_path / "file").read_text() == "no folder"


def test_executors_without_the_interpreter_are_diagnosed(spark, capsys, monkeypatch):
    monkeypatch.setattr(spark.sparkContext, "pythonExec", "/nowhere/bin/python")
    monkeypatch.setattr(doctor, "_tensorflow", lambda _: "not looked at")
    with pytest.raises(SattileError, match=r"checks failed \(executors\)") as raised:
        doctor.doctor(spark)
    assert raised.value.exit_status == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith(FAILED))
    assert "IOException: Cannot run program" in lines[at]
    assert "/nowhere/bin/python" in lines[at]
    assert "Lost task" not in lines[at]
    assert "PYSPARK_PYTHON" in lines[at + 1]


def test_wrong_usage_is_said_before_anything_runs(spark):
    with pytest.raises(UsageError, match="workers 0"):
        doctor.doctor(spark, workers=0)
    with pytest.raises(UsageError, match="no storage for ftp"):
        doctor.doctor(spark, folder="ftp://host/folder")


# --- checks of one machine ------------------------------------------------------------------------------------------


def test_a_check_that_crashes_is_a_failed_check():
    def crash() -> str:
        raise ZeroDivisionError("by zero\nand more")

    assert doctor.attempt("GDAL", crash) == Finding(
        "GDAL", FAILED, "ZeroDivisionError: by zero", doctor.REMEDIES["GDAL"]
    )
    assert doctor.attempt("GDAL", lambda: "fine") == Finding("GDAL", OK, "fine")


def test_a_folder_that_changes_what_is_written_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("sattile.storage.read_bytes", lambda _: b"other")
    found = doctor.attempt("folder", partial(doctor._folder, Exam("r", str(tmp_path)), "driver"))
    assert found.status == FAILED
    assert "read in" in found.found
    assert "other bytes" in found.found
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_storage_that_does_not_answer_the_driver_is_asked_once(tmp_path):
    exam = Exam("r", str(tmp_path), trouble="HDFS did not answer")
    assert doctor.attempt("folder", partial(doctor._folder, exam, "driver")).found == "HDFS did not answer"
    assert doctor.attempt("folder", partial(doctor._folder, exam, "an executor")).status == OK


def test_a_tensorflow_that_does_not_load_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "_LOAD_TENSORFLOW", "import no_such_module")
    found = doctor.attempt("TensorFlow", partial(doctor._tensorflow, False))
    assert found.status == FAILED
    assert "No module named 'no_such_module'" in found.found
    monkeypatch.setattr(doctor, "_LOAD_TENSORFLOW", "import os; os.kill(os.getpid(), 4)")
    assert "AVX" in doctor.attempt("TensorFlow", partial(doctor._tensorflow, False)).remedy


def test_a_gpu_that_tensorflow_does_not_see_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "_LOAD_TENSORFLOW", """print('["2.21.0", ["CPU"]]')""")
    assert doctor._tensorflow(False) == "2.21.0 loads and computes; devices: 1 CPU"
    found = doctor._tensorflow(True)
    assert isinstance(found, Finding)
    assert found.status == FAILED
    assert "sattile[gpu]" in found.remedy


def test_a_tmpdir_that_cannot_be_used_is_a_warning(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    found = doctor._scratch()
    assert isinstance(found, Finding)
    assert (found.status, "TMPDIR=/nowhere" in found.found) == (WARNING, True)


# --- what reports mean together -------------------------------------------------------------------------------------


def test_equal_versions_are_two_lines():
    found = doctor.compare([report("driver"), report("executor 1"), report("executor 2")])
    assert [(each.check, each.status) for each in found] == [("python", OK), ("packages", OK)]
    assert found[0].found == "driver and 2 executors: 3.11.7 (/env/bin/python)"


def test_another_version_is_named_with_its_executor():
    found = doctor.compare([report("driver"), report("executor 1"), report("executor 2", numpy="2.0.0")])
    failed = one(found, FAILED)
    assert failed.found == "numpy driver and executor 1: 1.2.3; executor 2: 2.0.0"
    assert "PYSPARK_PYTHON" in failed.remedy
    assert "--archives" in failed.remedy


def test_a_package_that_lacks_on_an_executor_or_everywhere_is_named():
    assert one(doctor.compare([report("driver"), report("executor 1", hdfs=None)]), FAILED).found == (
        "hdfs driver: 1.2.3; executor 1: none"
    )
    assert one(doctor.compare([report("driver", hdfs=None)]), FAILED).found == "hdfs is not installed"


@pytest.mark.parametrize(("version", "status"), [("3.11.9", WARNING), ("3.12.7", FAILED)])
def test_another_python_fails_by_its_minor_version(version, status):
    found = doctor.compare([report("driver"), report("executor 1", python=version)])
    assert (found[0].check, found[0].status) == ("python", status)


def test_what_many_machines_found_is_a_line_for_each_way_it_ended():
    reports = [report("driver", Finding("scratch", OK, "/tmp"))]
    reports += [report(f"executor {n}", Finding("scratch", OK, f"/disk{n}")) for n in range(1, 7)]
    reports += [report("executor 7", Finding("scratch", FAILED, "full", "set TMPDIR"))]
    failed, fine = doctor.merged(reports)
    assert (failed.status, failed.found, failed.remedy) == (FAILED, "executor 7: full", "set TMPDIR")
    assert fine.found == "driver: /tmp; executor 1: /disk1; executor 2: /disk2; and 4 others"


def test_executors_that_do_not_see_a_file_are_named():
    seen = {"driver": {"driver": "", "executor 1": "FileNotFoundError: gone"}, "executor 1": {"driver": "gone"}}
    found = doctor.sharing("/data", seen)
    assert found.status == FAILED
    assert "driver does not see what executor 1 wrote" in found.found
    assert "hdfs://" in found.remedy
    assert doctor.sharing("/data", {"driver": {"driver": ""}}).status == OK


def test_a_machine_reads_what_others_wrote(tmp_path):
    exam = Exam("r", str(tmp_path))
    doctor._folder(exam, "driver")
    assert doctor._read_marks(exam, ["driver"]) == {"driver": ""}
    assert "No such file" in doctor._read_marks(exam, ["executor"])["executor"]
    doctor._tidy(exam)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answered", "examined", "asked", "status"),
    [(["a"], ["a"], 1, OK), (["a"], ["a"], 3, WARNING), (["a", "b"], ["a"], 2, FAILED), ([], [], 1, FAILED)],
)
def test_executors_that_are_missing_are_counted(answered, examined, asked, status):
    assert doctor.presence(answered, examined, asked).status == status


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("x\n[PYTHON_VERSION_MISMATCH] Python in worker has 3.9", "PYSPARK_PYTHON"),
        ("ModuleNotFoundError: No module named 'sattile'", "spark-submit.sh"),
        ("ModuleNotFoundError: No module named 'pandas'", "--archives"),
        ('java.io.IOException: Cannot run program "x": error=2, No such file', "no such interpreter"),
        ("ExecutorLostFailure: Container killed, exit code 137", "spark.executor.memoryOverhead"),
        ("something else", "logs"),
        ("", "logs"),
    ],
)
def test_a_failed_job_is_understood(text, remedy):
    found = doctor.diagnose(text)
    assert (found.check, found.status) == ("executors", FAILED)
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("slots", "workers", "dynamic", "status"),
    [(4, None, False, OK), (4, 4, False, OK), (4, 5, False, FAILED), (4, 2, True, FAILED), (4, None, True, WARNING),
     (1, 1, True, OK)],
)  # fmt: skip
def test_barrier_slots(slots, workers, dynamic, status):
    assert doctor.barrier_slots(slots, workers, master="yarn", dynamic=dynamic).status == status


@pytest.mark.parametrize(
    ("conf", "status", "said"),
    [
        ({"spark.executor.memoryOverhead": "6g", "spark.executor.cores": "2"}, OK, "3.2 GB each"),
        ({"spark.executor.memoryOverhead": "1500", "spark.executor.cores": "1"}, WARNING, "1.6 GB each"),
        ({"spark.executor.memory": "1g"}, WARNING, "0.4 GB each"),
        ({"spark.executor.memory": "2g", "spark.executor.cores": "4", "spark.task.cpus": "4",
          "spark.executor.memoryOverheadFactor": "2"}, OK, "4.3 GB each"),
    ],
)  # fmt: skip
def test_room_for_python_beside_the_jvm(conf, status, said):
    found = doctor.container_memory(conf)
    assert (found.status, said in found.found) == (status, True), found
    assert status == OK or "spark.executor.memoryOverhead=" in found.remedy


def test_room_on_one_machine():
    assert doctor.local_memory(16, 4).status == OK
    assert "local[2]" in doctor.local_memory(7, 4).remedy


@pytest.mark.parametrize(
    ("master", "conf", "asked"),
    [
        ("local[4]", {}, 1),
        ("local-cluster[2,1,1024]", {}, 2),
        ("yarn", {"spark.executor.instances": "5"}, 5),
        ("yarn", {}, 2),
        ("yarn", {"spark.executor.instances": "5", "spark.dynamicAllocation.enabled": "true"}, 1),
    ],
)
def test_how_many_executors_there_should_be(master, conf, asked):
    assert doctor.executors_asked(master, conf) == asked


def test_no_secret_is_shown():
    access = Access("ns", {"ns": "http://a:9870;http://b:9870"}, "me", {"ns": "SECRET"})
    text = doctor.hdfs_text(access, configuration="/conf", kerberos=True)
    assert "SECRET" not in text
    assert "delegation tokens for ns" in text
    assert "http://a:9870 or http://b:9870" in text
    assert "no delegation token" in doctor.hdfs_text(Access(), configuration=None, kerberos=True)
    other = Access("ns", {"ns": "http://a:9870"}, "me", {}, "libhdfs", "dfs.webhdfs.enabled=false")
    assert "ns by libhdfs (dfs.webhdfs.enabled=false)" in doctor.hdfs_text(other, configuration="/conf", kerberos=False)
    shown = doctor.table(
        [
            Finding("folder", FAILED, "url: /webhdfs/v1/a?op=OPEN&delegation=SECRET&x=1 (Caused by ...)", "ask"),
            Finding("HDFS", OK, "http://me:SECRET@host/a, password=SECRET, and Token=SECRET"),
        ]
    )
    assert "SECRET" not in "\n".join(shown)
    assert "&x=1" in shown[0]
    assert shown[1].strip() == "-> ask"


def test_scratch_claims_are_one_for_each_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert [doctor._claims("a"), doctor._claims("a"), doctor._claims("b")] == [True, False, True]
    monkeypatch.setattr("tempfile.tempdir", str(Path(tmp_path, "gone")))
    assert doctor._claims("a")
