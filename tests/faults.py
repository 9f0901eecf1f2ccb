"""One compiled program a method, in which every fault is data: for the tests of faults, and for `make soak`."""

import functools
import os
import pathlib
import signal
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import EVERY, UNSTACKED, P, flat, functions, make, tree, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax._core.step import infos
from mtlgrad_jax.registry import WRAPPERS
from mtlgrad_jax.solvers._solution import NONFINITE

K, STEPS, AT = 3, 40, 8  # tasks, steps of the program, the step of the fault


# The wrappers around a method; skip_nonfinite_tasks, which has another answer to NaN, is tested on its own.
WRAPPED = [row.name for row in WRAPPERS if row.wraps]
WRAPPED.remove("skip_nonfinite_tasks")
NAMES = EVERY + WRAPPED


class Steps(NamedTuple):
    """What the program is given."""

    grads: np.ndarray  # (STEPS, K, P)
    losses: np.ndarray  # (STEPS, K)
    present: np.ndarray  # (STEPS, K)


class Seen(NamedTuple):
    """What it returns for every step."""

    update: np.ndarray
    finite: np.ndarray  # whether the update and the state are
    result: np.ndarray
    skipped: np.ndarray  # so far
    fallbacks: np.ndarray  # so far


def all_finite(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def last_info(state):
    """What the method says of its last step; the largest of what it says of its groups."""
    return jax.tree.map(jnp.max, infos(state)[0])


def update(name, tx, state, now):
    """One step. At the parameters, which are zero, its functions have these losses and gradients, and curvature one."""

    def losses_fn(params):
        p = flat(params)
        return [loss + row @ p + p @ p / 2 for loss, row in zip(now.losses, now.grads, strict=True)]

    grads = now.grads.mean(axis=0, where=now.present[:, None]) if name in UNSTACKED else now.grads
    own = {"losses": now.losses, "task_mask": now.present, **functions(name, losses_fn)}
    return tx.update(tree(grads), state, zeros(grads.dtype), **own)


@functools.cache
def program(name):
    """The first state of a method, and a function of a state and Steps that gives the last state and what was Seen."""
    tx = make(name, K)

    def step(state, now):
        gradient, state = update(name, tx, state, now)
        info = last_info(state)
        return state, Seen(flat(gradient), all_finite((gradient, state)), info.result, info.skipped, info.fallbacks)

    run = jax.jit(lambda state, steps: jax.lax.scan(step, state, steps))

    def numpy_run(state, steps):
        state, seen = run(state, jax.tree.map(jnp.asarray, steps))
        return state, jax.tree.map(np.asarray, seen)

    return tx.init(zeros()), numpy_run


def clean(seed=0):
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(STEPS, K, P)).astype(np.float32)
    return Steps(grads, rng.uniform(0.5, 2, size=(STEPS, K)).astype(np.float32), np.ones((STEPS, K), bool))


def changed(steps, t, grads=None, losses=None):
    """Copies of the steps in which step t has other gradients and losses."""
    new = Steps(*map(np.copy, steps))
    if grads is not None:
        new.grads[t] = grads
    if losses is not None:
        new.losses[t] = losses
    return new


def broken_faults(steps):
    """Steps with a NaN or inf in step AT."""
    rows, losses = steps.grads[AT], steps.losses[AT]
    for value in (np.nan, np.inf, -np.inf):
        entry, row, leaf, nothing, loss = (
            rows.copy(),
            rows.copy(),
            rows.copy(),
            np.full_like(rows, value),
            losses.copy(),
        )
        entry[1, 4], row[1], leaf[:, 0], loss[1] = value, value, value, value
        yield f"{value} in one entry", changed(steps, AT, entry)
        yield f"{value} in one label", changed(steps, AT, row, loss)
        yield f"{value} in one leaf", changed(steps, AT, leaf)
        yield f"{value} in all tasks", changed(steps, AT, nothing, np.full_like(losses, value))


def extreme_faults(steps):
    """Steps with a finite fault in step AT."""
    rows, losses = steps.grads[AT], steps.losses[AT]
    loud = np.asarray([1, 1e6, 1], np.float32)
    yield "one loss jumps by 1e6", changed(steps, AT, loud[:, None] * rows, loud * losses)
    yield "all losses jump by 1e6", changed(steps, AT, 1e6 * rows, 1e6 * losses)
    yield "all losses fall by 1e6", changed(steps, AT, 1e-6 * rows, 1e-6 * losses)
    yield "one gradient is zero", changed(steps, AT, rows * [[1], [0], [1]])
    yield "all gradients are zero", changed(steps, AT, 0 * rows)
    yield "opposite tasks", changed(steps, AT, rows[0] * [[1], [-1], [1]])
    yield "the same gradient for all", changed(steps, AT, rows[0] * np.ones((K, 1)))


def random_faults(rng):
    """Steps with absent tasks, and faults of all kinds in a fifth of them."""
    steps = clean(rng)
    struck = rng.uniform(size=(STEPS, K)) < 0.2 / K
    kind = np.where(struck, rng.integers(1, 7, size=(STEPS, K)), 0)
    scale = np.select([kind == 1, kind == 2, kind == 3], [1e6, 1e-6, 0.0], 1.0).astype(np.float32)
    grads, losses = scale[:, :, None] * steps.grads, np.where(kind < 3, scale, 1) * steps.losses
    grads[kind == 4, 3] = np.nan
    grads[kind == 5] = np.inf
    losses[kind == 6] = np.nan
    grads[rng.uniform(size=STEPS) < 0.02] *= np.sign([[1], [-1], [1]])
    alike = rng.uniform(size=STEPS) < 0.02
    grads[alike] = grads[alike, :1] * [[1], [-1], [1]]
    return Steps(grads.astype(np.float32), losses.astype(np.float32), rng.uniform(size=(STEPS, K)) < 0.8)


WHOLE = {"modo": 1, "sdmgrad": 1, "moco": 1, "gradnorm": K, "excess_mtl": K}
"""What the weights in a state sum to."""


def soak(name, updates, seed=0):
    """Run a method for many updates with random faults; return how many of them were skipped."""
    state, run = program(name)
    rng, skipped, live = np.random.default_rng(seed), 0, None
    for chunk in range(updates // STEPS):
        steps = random_faults(rng)
        state, seen = run(state, steps)
        where = f"{name}, chunk {chunk} of seed {seed}"
        assert seen.finite.all(), where
        empty = seen.result == NONFINITE
        assert not seen.update[empty | ~steps.present.any(axis=1)].any(), where
        skipped += int(empty.sum())
        assert int(seen.skipped[-1]) == skipped, where
        assert (np.diff(seen.fallbacks) >= 0).all(), where
        if name in WHOLE:
            weights = np.asarray(getattr(state.method.weights, "value", state.method.weights), float)
            assert weights.min() >= 0, where
            assert abs(weights.sum() - WHOLE[name]) < 4 * K * WHOLE[name] * np.finfo(np.float32).eps, where
        size = sum(array.nbytes for array in jax.live_arrays())
        live = live or size
        assert size <= live, where
    return skipped


def train(folder, steps, kill=None):
    """Train for some steps from the last checkpoint on; die after or before the checkpoint of a step."""
    path = pathlib.Path(folder) / "checkpoint"
    method = mtl.with_metrics(mtl.partition({"w": mtl.pcgrad(key=3), "b": mtl.gradnorm(K)}, {"w": "w", "b": "b"}), K)
    tx = mtl.chain(method, optax.adam(0.1))
    params = tree(jnp.arange(1.0, 1 + P))
    now = {"step": 0, "params": params, "state": tx.init(params)}
    if path.exists():
        now = flax.serialization.from_bytes(now, path.read_bytes())
    data = clean()

    @jax.jit
    def step(params, state, t):
        grads, losses = jnp.asarray(data.grads)[t], jnp.asarray(data.losses)[t]
        updates, state = tx.update(tree(grads * flat(params)), state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    for t in range(now["step"], steps):
        params, state = step(now["params"], now["state"], t)
        now = {"step": t + 1, "params": params, "state": state}
        if kill == ("before", t):
            os.kill(os.getpid(), signal.SIGKILL)
        path.with_suffix(".new").write_bytes(flax.serialization.to_bytes(now))
        path.with_suffix(".new").replace(path)
        if kill == ("after", t):
            os.kill(os.getpid(), signal.SIGKILL)
    return now
