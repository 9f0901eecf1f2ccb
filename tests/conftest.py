"""Fixtures for all tests."""

import os

import hypothesis
import jax
import jaxtyping
import pytest

# Anywhere else every run draws anew; what it finds is kept as an example in the test.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Free the compiled programs of a module: Linux maps 65530 regions a process, XLA crashes when they run out."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked():
    """Switch the type checks of the test run off, as they are for users, where an error of the library's is wanted."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
