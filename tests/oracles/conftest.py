"""Networks compute in float32 here, also on a GPU or TPU, where less precise products are the default."""

import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest" if jax.default_backend() != "cpu" else None):
        yield
