"""Every public factory has a row, and help and the page of methods say what the rows say."""

import inspect
import pathlib
import pickle
import runpy

import pytest
from harness import make

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import METHODS, ROWS, describe

K = 3


@pytest.mark.parametrize("name", list(ROWS))
def test_help_shows_the_real_thing(name):
    row = ROWS[name]
    public = getattr(mtl, name)
    assert public is row.factory
    assert pickle.loads(pickle.dumps(public)) is public
    assert public.__name__ == public.__qualname__ == name
    assert describe(row).splitlines()[0] in public.__doc__
    assert ">>>" in public.__doc__
    if row in METHODS:
        assert inspect.signature(public).return_annotation is mtl.Method
        assert isinstance(make(name, K), mtl.Method)


def test_every_public_factory_has_a_row():
    tools = {"from_rule", "from_kernel", "metrics", "scalars", "unstack", "under", "linearize", "chain", "accumulate"}
    tools |= {"linearize_features", "has_updated", "pareto_front", "ntk_traces", "cite"}
    tools |= {"task_value_and_grad", "balanced_value_and_grad"}
    tools |= {"sam_value_and_grad", "sam_perturbation", "perturbed_task_grad"}
    public = {name for name, value in vars(mtl).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert public - tools == set(ROWS)


def test_the_page_of_methods_is_what_the_rows_say():
    docs = pathlib.Path(__file__).parent.parent / "docs"
    tables = runpy.run_path(str(docs / "pages.py"))["method_tables"]()
    text = (docs / "methods.md").read_text()
    assert text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip() == tables
