"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

# Machines are noisy: a slow example is not a wrong one.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# The same examples everywhere and always: a change that breaks nothing fails nowhere.
settings.register_profile("sattile", derandomize=True, **PATIENT)
# `make test-random`: others each time, and many more.
settings.register_profile("random", derandomize=False, print_blob=True, **PATIENT)
settings.load_profile("sattile")

# What nobody foresaw is raised instead of refusing its scene: our own faults must not pass for bad files.
os.environ.setdefault("SATTILE_RAISE_UNFORESEEN", "1")

TIMES_MORE_EXAMPLES = 10
"""How many times the examples of `make test` a test draws in `make test-random`."""

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# A scorer fixes TensorFlow's threads before it starts; tests that load it themselves must agree.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests say themselves how many examples they can pay for, which no profile changes."""
    if settings.get_current_profile_name() == "random":
        functions = {item.function for item in items if isinstance(item, pytest.Function)}
        for function in filter(is_hypothesis_test, functions):
            usual = function._hypothesis_internal_use_settings
            more = settings(usual, max_examples=TIMES_MORE_EXAMPLES * usual.max_examples)
            function._hypothesis_internal_use_settings = more


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI nothing is skipped: what a test needs has to be there."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"CI must run this test. {reason}"
    return report


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
    from sattile.errors import UsageError

    try:
        sattile.engine.find_java()
    except UsageError as error:
        pytest.skip(str(error))
    session = sattile.engine.session("local[2]")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of small Keras networks, random and untrained: `identity`, `constant`, `convolutions`, `pooling`."""
    import keras

    from sattile.model import bundle

    folder = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(1)
    given = keras.Input((None, None, 2))
    conv = keras.layers.Conv2D(6, 3, padding="same", activation="relu")(given)
    pooled = keras.layers.Conv2D(6, 3, padding="same", activation="relu")(keras.layers.MaxPooling2D(2)(conv))
    back = keras.layers.Concatenate()([keras.layers.UpSampling2D(2)(pooled), conv])
    networks = {
        "identity": keras.Model(given, keras.layers.Activation("linear")(given)),
        "constant": keras.Model(
            given, keras.layers.Conv2D(2, 1, kernel_initializer="zeros", bias_initializer="ones")(given)
        ),
        "convolutions": keras.Model(given, keras.layers.Conv2D(2, 3, padding="same")(conv)),
        "pooling": keras.Model(given, keras.layers.Conv2D(2, 1)(back)),
    }
    for name, network in networks.items():
        network.save(folder / f"{name}.keras")
        described = {"bands": "x,y", "classes": "land=0,water=7", "fill": "3,5", "activation": "none"}
        bundle(str(folder / f"{name}.keras"), **described, out=str(folder / name))
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real imagery, which is not part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real imagery at {folder}, which is not here")
    return folder
