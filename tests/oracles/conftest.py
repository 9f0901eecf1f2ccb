"""Networks compute in float32 here, also on a GPU or TPU, where less precise products are the default."""

import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision(request):
    """Blocks of rows keep the default, with which their products must be accurate too."""
    rows = getattr(request.node, "callspec", None) and request.node.callspec.params.get("rows")
    with jax.default_matmul_precision("highest" if jax.default_backend() != "cpu" and not rows else None):
        yield
