"""Losses and arguments that the oracles refuse."""

import re

import jax
import jax.numpy as jnp
import pytest

import mtlgrad_jax as mtl

W = jnp.ones(2)
WANTED = "`losses_fn` must return a (K,) array or a pytree of K scalars"
WRONG = {
    "a sum of losses": (lambda w: jnp.sum(w), {}, f"{WANTED}, got shape (). Stack the tasks' losses"),
    "a matrix": (lambda w: jnp.ones((3, 2)) * w, {}, f"{WANTED}, got shape (3, 2)"),
    "a leaf that is no scalar": (
        lambda w: {"a": w[0], "b": {"c": w}},
        {},
        f"{WANTED}, got shape (2,) at leaf ['b']['c'].",
    ),
    "integers": (lambda w: jnp.arange(2), {}, f"{WANTED} of floating dtype, got int32."),
    "a named integer": (
        lambda w: {"a": w[0], "b": 3},
        {},
        f"{WANTED} of floating dtype, got int32 at leaf ['b']. If it returns (losses, aux), pass has_aux=True.",
    ),
    "an empty dict": (lambda w: {}, {}, f"{WANTED}, got no loss at all."),
    "no tasks": (lambda w: jnp.zeros((0,)), {}, f"{WANTED}, got no loss at all."),
    "aux without has_aux": (
        lambda w: (w, {"accuracy": w}),
        {},
        f"{WANTED}, got shape (2,) at leaf [0]. If it returns (losses, aux), pass has_aux=True.",
    ),
    "no pair": (
        lambda w: w,
        {"has_aux": True},
        "`losses_fn` must return (losses, aux) under has_aux=True, got",
    ),
    "a triple": (
        lambda w: (w, w, w),
        {"has_aux": True},
        "`losses_fn` must return (losses, aux) under has_aux=True, got tuple",
    ),
    "argnums too large": (
        lambda w, v: w,
        {"argnums": 2},
        "`argnums` must name positional arguments, 2 were given, got argnums=2.",
    ),
    "argnums too small": (lambda w, v: w, {"argnums": (0, -3)}, "`argnums` must name positional arguments, 2 were"),
    "an integer argument": (
        lambda w, v: w,
        {"argnums": 1},
        "`argnums` must name trees with a floating leaf, got none.",
    ),
    "a complex argument": (
        lambda w, v: w,
        {"argnums": (0, 1), "args": (W, {"z": 1j * W})},
        "`argnums` must name trees of real numbers, got dtype complex64 at leaf [1]['z'].",
    ),
    "a random key": (
        lambda w: w["w"],
        {"args": ({"w": W, "key": jax.random.key(0)},)},
        "`argnums` must name trees of real numbers, got dtype key<fry> at leaf ['key'].",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_losses_and_arguments_that_raise(case, unchecked):
    losses_fn, options, message = WRONG[case]
    options = dict(options)
    args = options.pop("args", (W, jnp.arange(2))[: losses_fn.__code__.co_argcount])
    method = mtl.mean()
    calls = [lambda s=s: mtl.task_value_and_grad(losses_fn, strategy=s, **options)(*args) for s in ("auto", "vmap", 1)]
    calls.append(lambda: mtl.linearize(losses_fn, *args, **options))
    calls.append(
        lambda: mtl.balanced_value_and_grad(losses_fn, method, **options)(args[0], method.init(None), *args[1:])
    )
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("loop", "`strategy` must be one of 'auto', 'vmap', 'unrolled', got strategy='loop'."),
        (0, "`strategy` must be >= 1, got strategy=0."),
        (True, "`strategy` must be a static Python int, got strategy=True."),
        (2.0, "`strategy` must be a static Python int, got strategy=2.0."),
    ],
)
def test_strategies_that_raise(strategy, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        mtl.task_value_and_grad(lambda w: w, strategy=strategy)
    with pytest.raises(ValueError, match=re.escape(message)):
        mtl.linearize(lambda w: w, W).rows(strategy)


def test_other_arguments_that_raise(unchecked):
    with pytest.raises(ValueError, match=r"`method` must be one such as .*, got function\."):
        mtl.balanced_value_and_grad(lambda w: w, mtl.cagrad)
    with pytest.raises(ValueError, match="`losses_fn` must not take `extra_args`"):
        mtl.balanced_value_and_grad(lambda w, extra_args: w, mtl.mean())
    for rows, message in ((0, "`rows` must be >= 1, got rows=0."), (1.5, "`rows` must be a static Python int")):
        with pytest.raises(ValueError, match=re.escape(message)):
            mtl.linearize(lambda w: w, W, rows=rows)
    method = mtl.mean()
    step = mtl.balanced_value_and_grad(lambda w: {"a": w[0], "b": w[1]}, method)
    with pytest.raises(ValueError, match=r"`task_mask` must have the structure of the losses.*got a flat array"):
        step(W, method.init(None), extra_args={"task_mask": jnp.asarray([True, False])})
    with pytest.raises(ValueError, match=r"`task_mask` must be bool"):
        step(W, method.init(None), extra_args={"task_mask": {"a": 1.0, "b": 0.0}})


def test_models_that_are_no_trees_of_arrays(unchecked):
    """They would train with statistics that never change, or fail inside JAX."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    for params in (model, {"norm": model}):
        with pytest.raises(
            ValueError, match=r"`argnums` must name trees of arrays, got an nnx.Module.*integrations.nnx.*nnx.split"
        ):
            mtl.task_value_and_grad(lambda p: jnp.ones(2))(params)
    with pytest.raises(ValueError, match=r"`argnums` must name trees of arrays, .* at leaf \['act'\].*partition"):
        mtl.linearize(lambda p: p["w"], {"w": jnp.ones(2), "act": jnp.tanh})
