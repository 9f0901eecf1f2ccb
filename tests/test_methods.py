"""Every method of the registry: against its reference, and in the properties that all share or that it promises."""

import numpy as np
import pytest
import reference
from families import FAMILIES, stack
from harness import EVERY, P, hyper, run

from mtlgrad_jax._registry import (
    HOMOGENEOUS,
    ROWS,
)

STEPS = 3
SHAPES = [3, 5]

OPTIONS = [
    *((name, {}) for name in EVERY),
    ("mgda", {"normalization": "l2", "apply_to": "normalized"}),
    ("mgda", {"normalization": "loss", "apply_to": "normalized"}),
    ("mgda", {"normalization": "loss+", "apply_to": "normalized"}),
    ("mgda", {"normalization": "l2"}),
    ("mgda", {"normalization": "loss"}),
    ("mgda", {"normalization": "loss+"}),
    ("pcgrad", {"reduction": "mean"}),
    ("cagrad", {"c": 0.9, "rescale": "1+c^2"}),
    ("cagrad", {"c": 0.1, "rescale": "1+c"}),
    ("fairgrad", {"alpha": 0.5}),
    ("fairgrad", {"alpha": 10.0}),
    ("upgrad", {"regularization": 1e-4}),
    ("uw", {"init": -0.5}),
    ("gradnorm", {"alpha": 0.12, "learning_rate": 0.1}),
    ("trimmed_mean", {"trim": 0}),
    ("db_mtl", {"beta": 0.5, "sigma": 0.5}),
]


def identity(case):
    name, kwargs = case
    return "-".join([name, *(f"{key}={value}" for key, value in kwargs.items())])


def steps_of(family, num_tasks, seed=0):
    """Three steps of a family, positive losses, and masks that leave tasks out."""
    rng = np.random.default_rng(seed)
    grads = np.stack([stack(family, num_tasks, P) * scale for scale in (1.0, 0.5, 2.0)])
    losses = rng.uniform(0.1, 3.0, size=(STEPS, num_tasks))
    present = np.ones((STEPS, num_tasks), bool)
    present[1, 0] = False
    present[2, num_tasks - 1] = False
    return grads, losses, present


ILL_POSED = {"rank_deficient", "rank_one", "duplicate", "opposite", "zero_row", "all_zero"}  # several optimal weights


def compare(name, kwargs, family, num_tasks, dtype, tolerance):
    grads, losses, present = steps_of(family, num_tasks)
    updates, state = run(name, grads, losses, present, dtype=dtype, **kwargs)
    assert np.isfinite(updates).all()
    assert int(state.info.skipped) == 0
    grads = np.asarray(grads, dtype).astype(float)
    arguments = hyper(name, num_tasks, **kwargs)
    size = np.linalg.norm(grads, axis=2).max(axis=1)
    slices = [slice(t, t + 1) for t in range(STEPS)] if ROWS[name].state == "none" else [slice(0, STEPS)]
    for part in slices:
        try:
            wanted = reference.REFERENCES[name](grads[part], losses[part], present[part], **arguments)
        except ValueError:  # a Pareto-stationary point, at which the paper's equation has no solution
            assert name in ("fairgrad", "nash_mtl")
            continue
        scale = np.linalg.norm(wanted, axis=1) + (size[part] if HOMOGENEOUS in ROWS[name].promises else 0)
        error = np.abs(updates[part] - wanted).max(axis=1)
        assert (error <= tolerance * scale).all(), (family, error / scale)


@pytest.mark.parametrize("case", OPTIONS, ids=identity)
def test_reference_in_float64(case):
    name, kwargs = case
    unique = name == "mgda" and kwargs.get("normalization", "none") != "none" and "apply_to" not in kwargs
    for family in FAMILIES:
        if not (unique and family in ILL_POSED):
            compare(name, kwargs, family, 3, np.float64, 2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_reference_with_five_tasks(name):
    for family in FAMILIES:
        compare(name, {}, family, 5, np.float64, 2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_reference_in_float32(name):
    for family in ("normal", "correlated", "duplicate", "zero_row", "all_zero", "scales", "tiny", "huge"):
        compare(name, {}, family, 3, np.float32, 5e-4 if family == "scales" else 5e-5)
