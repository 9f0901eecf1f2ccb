"""For all tests: cache compiled programs, group and mark the tests, and run the Python blocks of the Markdown pages."""

import os
from collections import Counter
from pathlib import Path

import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from mtlgrad_jax.registry import METHODS

# Compiling takes most of the tests' time; these flags halve it. If XLA_FLAGS is set, even to nothing (`make peers`), it
# decides.
QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later versions always use the emitters
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).pytest()

# One method of each kind: without and with the Gramian, with per-task state, with a key, with an optional argument, on
# the stack itself, with buffers, on perturbed gradients.
REPRESENTATIVES = {"mean", "nash_mtl", "gradnorm", "pcgrad", "modo", "trimmed_mean", "db_mtl", "fs_mtl"}
OTHERS = {row.name for row in METHODS} - REPRESENTATIVES
LARGE = 5  # tasks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the nightly tests, and run the tests of a method in sequence, so that they share compiled programs."""
    taken: Counter[tuple[Path, str]] = Counter()
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        row = next((value for value in params.values() if isinstance(value, str) and value in OTHERS), None)
        large = isinstance(params.get("K"), int) and params["K"] >= LARGE
        if large or params.get("dtype") == "float64" or (row and not item.get_closest_marker("every_method")):
            item.add_marker(pytest.mark.nightly)
        sample, function = item.get_closest_marker("sample"), (item.path, item.name.split("[")[0])
        if sample and not item.get_closest_marker("nightly"):
            taken[function] += 1
            if taken[function] > sample.args[0]:
                item.add_marker(pytest.mark.nightly)
        item.method = str(row or next((value for value in params.values() if isinstance(value, str)), ""))
    files = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (files.index(item.path), item.method))
