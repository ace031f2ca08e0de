"""A real Hadoop for the tests of this folder, which run where SATTILE_HADOOP=1 asks for them (`make test-hadoop`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyspark
import pytest

from hadoop import libhdfs
from hadoop.cluster import Cluster, missing

# Minutes on two cores, and gigabytes: `make test` is quick and needs neither Maven nor a KDC.
collect_ignore_glob = [] if os.environ.get("SATTILE_HADOOP") == "1" else ["test_*.py"]


SMALL = [
    "--num-executors", "2", "--conf", "spark.executor.cores=1", "--conf", "spark.executor.memory=512m",
    "--conf", "spark.executor.memoryOverhead=1500m", "--conf", "spark.driver.memory=512m",
    # All nodes are this machine: neither environment (SATTILE_ENV=local) nor jars have to travel.
    "--conf", f"spark.yarn.jars=local:{Path(pyspark.__file__).parent}/jars/*",
]  # fmt: skip
"""Spark's options for jobs that share two cores with their cluster."""


GPUS = {"yarn.resource-types": "yarn.io/gpu", "yarn.nodemanager.resource-type.yarn.io/gpu": "2"}


def need(*, kerberos: bool = False, native: bool = False) -> None:
    """Skip the test where no Hadoop (`native`: no libhdfs) can be had, with the reason."""
    reason = missing(kerberos=kerberos) or (libhdfs.missing() if native else None)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two NameNodes, two DataNodes, two NodeManagers, which claim a GPU each. A test that kills one restarts it."""
    need()
    folder = tmp_path_factory.mktemp("hadoop")
    with Cluster(folder, namenodes=2, datanodes=2, nodemanagers=2, settings=GPUS) as running:
        yield running


@pytest.fixture(scope="session")
def kerberos_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One NameNode, one DataNode, one NodeManager, which refuse who has no ticket."""
    need(kerberos=True)
    folder = tmp_path_factory.mktemp("kerberos")
    with Cluster(folder, datanodes=1, nodemanagers=1, replication=1, kerberos=True) as running:
        yield running
