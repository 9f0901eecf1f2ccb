"""Run a method of the registry on stacks (T, K, P): T steps as one compiled scan over a tree of two leaves."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import METHODS, ROWS, WRAPPERS
from mtlgrad_jax.registry import make as make_row

P = 7
PARAMS = {"b": (1,), "w": (2, 3)}
EVERY = [row.name for row in METHODS]
WEIGHED = [row.name for row in METHODS if make_row(row, 3).weigh is not None]
FIXED = {name: {"order": "fixed"} for name in ("pcgrad", "gradvac")} | {"relobralo": {"rho": 1.0}}
"""Arguments that make a method deterministic."""
IN_LAW = {row.name for row in METHODS if row.randomized} - set(FIXED)  # compared with a law in tests of their own
REFERENCED = [name for name in EVERY if name not in IN_LAW]


def tree(G):
    """(..., P) as a tree like PARAMS."""
    lead = G.shape[:-1]
    return {"b": G[..., :1], "w": G[..., 1:].reshape(*lead, 2, 3)}


def flat(tree):
    lead = tree["b"].shape[:-1]
    return jnp.concatenate([tree["b"], tree["w"].reshape(*lead, 6)], axis=-1)


def zeros(dtype=None):
    return {name: jnp.zeros(shape, dtype) for name, shape in PARAMS.items()}


def make(name, num_tasks, **kwargs):
    return make_row(ROWS[name], num_tasks, **{**FIXED.get(name, {}), **kwargs})


def hyper(name, num_tasks, **kwargs):
    """The arguments of a method in the form that its reference takes."""
    own = {**ROWS[name].kwargs(num_tasks), **FIXED.get(name, {}), **kwargs}
    own.pop("num_tasks", None)
    return {key: np.asarray(value) if isinstance(value, list | tuple) else value for key, value in own.items()}


@functools.cache
def _runner(name, num_tasks, kwargs):
    tx = make(name, num_tasks, **dict(kwargs))

    @jax.jit
    def run(grads, losses, present):
        def step(state, now):
            update, state = tx.update(tree(now[0]), state, zeros(grads.dtype), losses=now[1], task_mask=now[2])
            return state, flat(update)

        state, updates = jax.lax.scan(step, tx.init(zeros(grads.dtype)), (grads, losses, present))
        return updates, state

    return run


def run(name, grads, losses=None, present=None, dtype=np.float32, **kwargs):
    """Updates (T, P) and the last state."""
    grads = np.asarray(grads)
    steps, K, _ = grads.shape
    losses = np.ones((steps, K)) if losses is None else losses
    present = np.ones((steps, K), bool) if present is None else present
    with jax.enable_x64(np.dtype(dtype) == np.float64):
        arrays = jnp.asarray(grads, dtype), jnp.asarray(losses, dtype), jnp.asarray(present)
        updates, state = _runner(name, K, tuple(kwargs.items()))(*arrays)
        return np.asarray(updates, float), state


def under_names(values, names="abc"):
    """Per-task arguments of a row, which are lists, or tuples of lists, under the tasks' names."""
    if isinstance(values, list):
        return dict(zip(names, values, strict=True))
    return tuple(under_names(value, names) for value in values) if isinstance(values, tuple) else values


def raises_naming(argument):
    """A pattern for errors in the common form: the argument, the requirement, and the value given."""
    return re.compile(rf"^`{argument}` must .*", re.DOTALL)


def inside(equation):
    """The programs inside an equation."""
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    return [getattr(value, "jaxpr", value) for value in values if hasattr(value, "eqns") or hasattr(value, "jaxpr")]


def primitives(program):
    """The names of all primitives in a program."""
    names, seen, left = set(), set(), [program.jaxpr]
    while left:
        jaxpr = left.pop()
        if id(jaxpr) not in seen:
            seen.add(id(jaxpr))
            names |= {equation.primitive.name for equation in jaxpr.eqns}
            left += [inner for equation in jaxpr.eqns for inner in inside(equation)]
    return names


def precisions(program):
    """The precision of every product of floating matrices in a program."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general" and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
            yield equation.params["precision"]
        for inner in inside(equation):
            yield from precisions(inner)


def losses_of(params, num_tasks=3):
    """Losses of parameters with a leaf "w"."""
    return jnp.arange(1.0, 1 + num_tasks) * jnp.sum(params["w"] ** 2)


def functions(name, losses_fn=losses_of):
    """The functions that an update of a row requires, of these losses."""
    known = {
        "value_fn": lambda params: jnp.sum(losses_fn(params)),
        "losses_fn": losses_fn,
        "grad_fn": mtl.perturbed_task_grad(losses_fn),
    }
    return {key: function for key, function in known.items() if key in " ".join(ROWS[name].functions)}


UNSTACKED = [row.name for row in WRAPPERS if {"value_fn", "losses_fn"} & {*row.functions}]
"""Those that evaluate losses themselves take an ordinary gradient."""


@contextlib.contextmanager
def traced_for(platform):
    """Within it, everything is traced as for a platform, though it runs on this one."""
    chosen = lax.platform_dependent

    def choose(*args, default=None, **branches):
        assert set(branches) <= {"cpu", "cuda", "rocm", "tpu"}
        return branches.get(platform, default)(*args)

    jax.clear_caches()
    lax.platform_dependent = choose
    try:
        yield
    finally:
        lax.platform_dependent = chosen
        jax.clear_caches()
