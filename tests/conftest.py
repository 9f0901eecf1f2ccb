"""Fixtures for all tests."""

import os
import pathlib

import hypothesis
import jax
import jaxtyping
import pytest

# Anywhere else every run draws anew; what it finds is kept as an example in the test.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


MOST_REGIONS = 20_000


@pytest.fixture(autouse=True)
def forget_programs():
    """Free the compiled programs in time: Linux maps 65530 regions a process, and XLA:CPU crashes without one.

    A solver's program takes some hundreds.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_REGIONS:
        jax.clear_caches()


@pytest.fixture
def unchecked():
    """Switch the type checks of the test run off, as they are for users, where an error of the library's is wanted."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
