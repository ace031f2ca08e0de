"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Machines are noisy: a slow example is not a wrong one.
settings.register_profile("sattile", deadline=None)
settings.load_profile("sattile")

# What nobody foresaw is raised instead of refusing its scene: our own faults must not pass for bad files.
os.environ.setdefault("SATTILE_RAISE_UNFORESEEN", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# A scorer fixes TensorFlow's threads before it starts; tests that load it themselves must agree.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")


@pytest.fixture
def all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of this test take all cores, as a user's do."""
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)


@pytest.fixture
def as_in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw refuses its scene, as for users."""
    monkeypatch.setenv("SATTILE_RAISE_UNFORESEEN", "0")


@pytest.fixture(scope="session")
def spark() -> Iterator[object]:
    """One local[2] session for all tests; retries as in production."""
    import sattile.engine

    session = sattile.engine.session("local[2]")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real imagery, which is not part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have the real imagery at {folder}")
        pytest.skip(f"needs the real imagery at {folder}, which is not here")
    return folder
