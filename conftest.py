"""For all tests: compiled programs are kept, tests of one method run together, some tests are left to `make nightly`.

Also runs the Python blocks of the Markdown pages, with one namespace a page.
"""

from pathlib import Path

import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from mtlgrad_jax.registry import METHODS

if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).pytest()

# One method for each way in which the shell makes one: without and with the Gramian, with a state per task, with a key,
# with an argument that is stood in for, of rows, with buffers, of perturbed gradients.
REPRESENTATIVES = {"mean", "nash_mtl", "gradnorm", "pcgrad", "modo", "trimmed_mean", "db_mtl", "fs_mtl"}
OTHERS = {row.name for row in METHODS} - REPRESENTATIVES
LARGE = 5  # tasks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is left to the nightly run, and keep the tests of one method together, so that programs are shared."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        row = next((value for value in params.values() if isinstance(value, str) and value in OTHERS), None)
        large = isinstance(params.get("K"), int) and params["K"] >= LARGE
        if large or params.get("dtype") == "float64" or (row and not item.get_closest_marker("every_method")):
            item.add_marker(pytest.mark.nightly)
        item.method = str(row or next((value for value in params.values() if isinstance(value, str)), ""))
    files = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (files.index(item.path), item.method))
