"""Fixtures for all tests."""

import os
import pathlib
import sys

import hypothesis
import jax
import jaxtyping
import pytest

# Elsewhere every run draws new samples; failures found are kept as examples in the test.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


MOST_REGIONS = 20_000


@pytest.fixture(autouse=True)
def forget_programs():
    """Free compiled programs in time: Linux allows 65530 mapped regions per process, and XLA:CPU crashes beyond that.

    A solver's program takes several hundred.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_REGIONS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def close_figures():
    """Close figures that a test has left open: matplotlib warns of more than twenty in one process."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def unchecked():
    """Switch off the type checks of the test run, as for users, so that the library's own errors are raised."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
