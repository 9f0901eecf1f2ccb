"""What programs for a GPU compute in their own way: the solvers try all sets of tasks at once for up to eight tasks."""

import families
import harness
import jax
import numpy as np
import pytest
import test_solvers
from test_solvers import CHECKS, dtype  # noqa: F401  a fixture

from mtlgrad_jax import solvers
from mtlgrad_jax.solvers._solution import MAX_STEPS

SOLVERS = ["min_norm", "project_rows", "project_weights", "max_min", "progress", "conic"]


@pytest.fixture(scope="module")
def gpu():
    with harness.traced_for("cuda"):
        yield


@pytest.mark.parametrize("K_and_P", [(5, 50), (8, 6)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solver(solver, K_and_P, dtype, gpu):  # noqa: F811
    for _, M in test_solvers.cases(*K_and_P, dtype):
        CHECKS[solver](M)


@pytest.mark.parametrize(
    ("dtype", "family", "P", "draw"),
    [
        ("float64", "proportional_integers", 8, 30055),  # a singular set had the best value, and a wrong multiplier
        ("float64", "rank_one", 1000, 30023),
        ("float32", "scales", 3, 30133),  # a point too long for its length to be known
    ],
)
def test_where_cagrad_chose_a_wrong_piece(dtype, family, P, draw, gpu):  # noqa: F811
    with jax.enable_x64(dtype == "float64"):
        CHECKS["max_min"](families.gramian(families.stack(family, 5, P, draw), dtype))


@pytest.mark.nightly
def test_absent_tasks(dtype, gpu):  # noqa: F811
    test_solvers.test_absent_tasks_are_as_if_removed(dtype)


@pytest.mark.nightly
def test_permutations(dtype, gpu):  # noqa: F811
    test_solvers.test_permuting_the_tasks_permutes_the_weights("scales", dtype)


@pytest.mark.nightly
def test_powers_of_two(dtype, gpu):  # noqa: F811
    test_solvers.test_powers_of_two_change_nothing_but_the_scale(-17, dtype)


@pytest.mark.nightly
def test_no_gradient(dtype, gpu):  # noqa: F811
    test_solvers.test_no_gradient_gives_finite_weights(5, dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("K", [3, 5])
def test_a_gramian_that_is_not_finite_is_not_called_solved(K, bad, gpu):
    M = np.eye(K, dtype="float32")
    M[1, 1] = bad
    uniform, present = M[0] * 0 + 1, M[0] >= 0
    for solved in (
        solvers.min_norm(M, present),
        solvers.project_rows(M, uniform),
        solvers.project_weights(M, uniform),
        solvers.max_min_direction(M, np.float32(0.4), present),
    ):
        assert solved.result == MAX_STEPS
