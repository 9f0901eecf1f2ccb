"""Fixtures for all tests."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Switch the type checks of the test run off, as they are for users, where an error of the library's is wanted."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
