"""What programs for a GPU compute in their own way: the solvers try all sets of tasks at once for up to eight tasks."""

import harness
import pytest
import test_solvers
from test_solvers import CHECKS, dtype  # noqa: F401  a fixture

SOLVERS = ["min_norm", "project_rows", "project_weights", "max_min", "progress", "conic"]


@pytest.fixture(scope="module", autouse=True)
def gpu():
    with harness.traced_for("cuda"):
        yield


@pytest.mark.parametrize("K_and_P", [(5, 50), (8, 6)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solver(solver, K_and_P, dtype):  # noqa: F811
    for _, M in test_solvers.cases(*K_and_P, dtype):
        CHECKS[solver](M)


test_absent_tasks_are_as_if_removed = test_solvers.test_absent_tasks_are_as_if_removed
test_permuting_the_tasks_permutes_the_weights = test_solvers.test_permuting_the_tasks_permutes_the_weights
test_powers_of_two_change_nothing_but_the_scale = test_solvers.test_powers_of_two_change_nothing_but_the_scale
test_no_gradient_gives_finite_weights = test_solvers.test_no_gradient_gives_finite_weights
