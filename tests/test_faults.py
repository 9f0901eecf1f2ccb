"""Faults in training: after each, no state holds a NaN, and training goes on as if it had not happened."""

import collections
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import (
    AT,
    STEPS,
    WRAPPED,
    K,
    Steps,
    all_finite,
    broken_faults,
    clean,
    extreme_faults,
    last_info,
    program,
    soak,
    train,
    update,
)
from harness import EVERY, flat, make, zeros

from mtlgrad_jax.registry import ROWS, needs
from mtlgrad_jax.solvers._solution import BIASED, INFEASIBLE, LAGGED, NONFINITE, SOLVED

EACH = [*EVERY, *(pytest.param(name, marks=pytest.mark.nightly, id=name) for name in WRAPPED)]
USUAL = (SOLVED, BIASED, LAGGED, INFEASIBLE)
SURVIVED = collections.Counter()


def memory(state):
    """The names of what a method keeps."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return {jax.tree_util.keystr(path[-1:]) for path in paths if ".info" not in jax.tree_util.keystr(path)}


@pytest.fixture(scope="module", autouse=True)
def count(request):
    """Print at the end what was tried."""
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(
            f"\nfaults: {SURVIVED['tried']} tried, {SURVIVED['survived']} survived, {SURVIVED['poisoned']} states bad"
        )


def survive(run, state, steps):
    """What was seen of the steps, all of it finite."""
    SURVIVED["tried"] += 1
    after, seen = run(state, steps)
    SURVIVED["poisoned"] += not seen.finite.all()
    assert seen.finite.all(), np.flatnonzero(~seen.finite)
    return after, seen


@pytest.mark.parametrize("name", EACH)
def test_a_step_with_a_nan_leaves_no_trace(name):
    """It is zero and counted, and all others are, bit for bit, as in a run without this step.

    Also where the update takes the mean of the tasks' gradients, which one broken task spoils.
    """
    start, run = program(name)
    steps = clean()
    without = Steps(*(np.concatenate([np.delete(each, AT, axis=0), each[-1:]]) for each in steps))
    _, wanted = run(start, without)
    for fault, broken in broken_faults(steps):
        _, seen = survive(run, start, broken)
        assert seen.result[AT] == NONFINITE, fault
        assert not seen.update[AT].any(), fault
        np.testing.assert_array_equal(seen.update[:AT], wanted.update[:AT], err_msg=fault)
        np.testing.assert_array_equal(seen.update[AT + 1 :], wanted.update[AT:-1], err_msg=fault)
        np.testing.assert_array_equal(seen.skipped, np.arange(STEPS) >= AT, err_msg=fault)
        SURVIVED["survived"] += 1


@pytest.mark.parametrize("name", EACH)
def test_a_broken_loss_matters_to_methods_that_look_at_losses(name):
    start, run = program(name)
    steps = clean()
    _, wanted = run(start, steps)
    for value in (np.nan, np.inf):
        broken = Steps(*map(np.copy, steps))
        broken.losses[AT, 1] = value
        _, seen = survive(run, start, broken)
        if {"losses", "losses_fn"} & {*needs(ROWS[name])}:
            assert seen.result[AT] == NONFINITE
            assert not seen.update[AT].any()
        else:
            np.testing.assert_array_equal(seen.update, wanted.update)
        SURVIVED["survived"] += 1


@pytest.mark.parametrize("name", EACH)
def test_finite_faults(name):
    """Solved as any other step; a method without memory has forgotten them in the next one."""
    start, run = program(name)
    steps = clean()
    _, wanted = run(start, steps)
    for fault, extreme in extreme_faults(steps):
        _, seen = survive(run, start, extreme)
        assert np.isin(np.delete(seen.result, AT), USUAL).all(), fault
        assert seen.result[AT] != NONFINITE, fault
        moved, usual = (each.update[AT + 1 :].any(axis=1) for each in (seen, wanted))
        np.testing.assert_array_equal(moved, usual, err_msg=fault)
        if fault == "all gradients are zero" and ROWS[name].folder != "buffers":
            assert not seen.update[AT].any(), fault
        if memory(start) <= {".key"}:
            np.testing.assert_array_equal(seen.update[AT + 1 :], wanted.update[AT + 1 :], err_msg=fault)
        SURVIVED["survived"] += 1


@pytest.mark.parametrize("name", EACH)
def test_a_task_that_vanishes_for_a_thousand_steps(name):
    """Its rows and losses are NaN meanwhile. When it is back, all tasks are combined as before."""
    start, run = program(name)
    away = clean()
    away.grads[:, 1], away.losses[:, 1], away.present[:, 1] = np.nan, np.nan, False
    state, _ = run(start, clean())
    for _ in range(1000 // STEPS):
        state, seen = survive(run, state, away)
        assert (seen.result != NONFINITE).all()
        SURVIVED["survived"] += 1
    _, back = survive(run, state, clean(1))
    assert np.isin(back.result, USUAL).all()
    _, first = run(start, clean(1))
    np.testing.assert_array_equal(back.update.any(axis=1), first.update.any(axis=1))
    if not memory(start):
        np.testing.assert_array_equal(back.update, first.update)
    SURVIVED["survived"] += 1


@pytest.mark.parametrize("name", EACH)
def test_overflow_in_float16(name):
    """Gradients near the largest number and beyond it: a finite update, or a zero one that is counted."""
    tx, losses, present = make(name, K), jnp.asarray([1.0, 2.0, 3.0]), jnp.ones(K, bool)
    state, rows = tx.init(zeros(jnp.float16)), jnp.asarray(clean().grads[0], jnp.float16)
    for grads in (rows, 2e4 * rows, 6e4 * jnp.sign(rows), jnp.full_like(rows, jnp.inf), rows):
        gradient, state = update(name, tx, state, Steps(grads, losses, present))
        SURVIVED["tried"] += 1
        assert all_finite((gradient, state))
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float16)}
        assert flat(gradient).any() or int(last_info(state).result) == NONFINITE
        SURVIVED["survived"] += 1
    assert int(last_info(state).result) in USUAL


@pytest.mark.parametrize("kill", ["after", pytest.param("before", marks=pytest.mark.nightly)])
def test_a_killed_process_goes_on_from_its_checkpoint(kill, tmp_path):
    """Killed between a checkpoint and the next step, and between a step and its checkpoint: bit for bit the same."""
    program = f"import faults; faults.train({str(tmp_path)!r}, 6, kill={(kill, 3)!r})"
    died = subprocess.run([sys.executable, "-c", program], cwd=pathlib.Path(__file__).parent, check=False)
    assert died.returncode == -signal.SIGKILL
    resumed = train(tmp_path, 6)
    (tmp_path / "other").mkdir()
    whole = train(tmp_path / "other", 6)
    for (path, got), wanted in zip(jax.tree_util.tree_leaves_with_path(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, wanted, err_msg=jax.tree_util.keystr(path))


@pytest.mark.nightly
@pytest.mark.parametrize("name", EACH)
def test_soaked(name):
    assert soak(name, 600) > 15
