"""Where a NaN label goes: which rows it spoils, and what a step then does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import MLP, X, matrix, normal, outputs

import mtlgrad_jax as mtl
from mtlgrad_jax import registry
from mtlgrad_jax.solvers._solution import NONFINITE

LABELS = normal(4, 8, 3)
BROKEN = LABELS.at[2, 1].set(jnp.nan)  # task 1, "b"


def vector_valued(params, labels):
    return jnp.mean((outputs(params, X) - labels) ** 2, axis=0)


def named(params, labels):
    return dict(zip("abc", vector_valued(params, labels), strict=True))


def entry_by_entry(params, labels):
    """Named losses that are not slices of one array: the cotangent of one does not pass through another."""
    out = outputs(params, X)
    return {name: jnp.mean((out[:, i] - labels[:, i]) ** 2) for i, name in enumerate("abc")}


def clean_rows(grads):
    leaves = [np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(grads)]
    return np.isfinite(np.concatenate(leaves, axis=1)).all(axis=1).tolist()


@pytest.mark.parametrize("jit", [False, True])
def test_where_a_nan_label_goes(jit):
    def grads_of(losses_fn, strategy, labels=BROKEN):
        function = mtl.task_value_and_grad(losses_fn, strategy=strategy)
        return (jax.jit(function) if jit else function)(MLP, labels)[1]

    # With a vector-valued losses_fn one NaN label makes every task's gradient NaN.
    for strategy in ("vmap", "unrolled"):
        assert clean_rows(grads_of(vector_valued, strategy)) == [False] * 3
    # Named losses differentiated entry by entry keep it in its task; under other strategies it affects all rows.
    expected = matrix(grads_of(entry_by_entry, "unrolled", LABELS))
    for strategy in ("unrolled", "auto"):
        grads = grads_of(entry_by_entry, strategy)
        assert clean_rows(grads) == [True, False, True]
        np.testing.assert_allclose(matrix(grads)[::2], expected[::2], rtol=1e-6)
    for strategy in ("vmap", 1)[: 1 + jit]:
        assert clean_rows(grads_of(entry_by_entry, strategy)) == [False] * 3
    # Zero weights then skip the step: their gradient is zero even so.
    if not jit:
        assert not ravel_pytree(mtl.linearize(vector_valued, MLP, BROKEN).pullback(jnp.zeros(3)))[0].any()
    # Names alone do not isolate: these losses are entries of one array.
    assert clean_rows(grads_of(named, "unrolled")) == [False] * 3


@pytest.mark.parametrize("oracle", [mtl.task_value_and_grad, mtl.perturbed_task_grad])
def test_up_to_how_many_tasks_a_nan_stays_in_its_task_by_default(oracle):
    def isolates(num_tasks):
        scales = [jnp.nan if i == 1 else 1.0 + i for i in range(num_tasks)]

        def losses_fn(w):
            return {f"{i:02}": jnp.sum(w * scale) for i, scale in enumerate(scales)}

        found = oracle(losses_fn)(jnp.ones(2), *(jnp.zeros((num_tasks, 2)),) * (oracle is mtl.perturbed_task_grad))
        rows = found[1] if oracle is mtl.task_value_and_grad else found
        clean = np.isfinite(rows).all(axis=1)
        assert not clean[1]
        return clean.sum() == num_tasks - 1

    assert [isolates(K) for K in (2, 40, 41)] == [True, True, False]


def test_a_nan_label_stays_in_its_task_under_vmap_over_data():
    def loss_fn(params, x, label):
        return jnp.mean((outputs(params, x)[:, 0] - label) ** 2)

    x, labels = normal(5, 3, 8, 4), BROKEN.T
    _, grads = jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0, 0))(MLP, x, labels)
    assert clean_rows(grads) == [True, False, True]
    alone = [jax.grad(loss_fn)(MLP, x[i], labels[i]) for i in (0, 2)]
    np.testing.assert_allclose(matrix(grads)[::2], [ravel_pytree(grad)[0] for grad in alone], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["gradnorm", "pcgrad", "uw"])
def test_task_mask_does_not_clean_a_nan_label(method):
    """The rows of the present tasks are NaN too: a counted zero update that leaves the state as it was."""
    row = registry.ROWS[method]
    tx, mask = registry.make(row, 3), jnp.asarray([True, False, True])
    step = mtl.balanced_value_and_grad(vector_valued, tx)

    @jax.jit
    def both(labels, state, mask):
        losses, grads = mtl.task_value_and_grad(vector_valued)(MLP, labels)
        stacked = tx.update(grads, state, MLP, losses=losses, task_mask=mask)
        return stacked, step(MLP, state, labels, extra_args={"task_mask": mask})[1:]

    (_, state), _ = both(LABELS, tx.init(MLP), jnp.ones(3, bool))
    assert int(mtl.metrics(state)["skipped"]) == 0
    for update, new_state in both(BROKEN, state, mask):
        chex.assert_trees_all_equal(update, jax.tree.map(jnp.zeros_like, MLP))
        chex.assert_trees_all_equal(new_state.method, state.method)
        found = mtl.metrics(new_state)
        assert (int(found["skipped"]), int(found["result"]), int(found["fallbacks"])) == (1, NONFINITE, 0)


def test_isolated_and_skipped_a_broken_task_leaves_the_others_as_if_alone():
    def train(losses_fn, method):
        tx = optax.chain(method, optax.adam(0.05))

        @jax.jit
        def step(params, state):
            losses, grads = mtl.task_value_and_grad(losses_fn, strategy="unrolled")(params, BROKEN)
            updates, state = tx.update(grads, state, params, losses=losses)
            return optax.apply_updates(params, updates), state

        params, state = MLP, tx.init(MLP)
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    def alone(params, labels):
        losses = entry_by_entry(params, labels)
        return {"a": losses["a"], "c": losses["c"]}

    params, state = train(entry_by_entry, mtl.skip_nonfinite_tasks(mtl.mgda()))
    expected, _ = train(alone, mtl.mgda())
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    assert int(state[0].dropped) == 3
    assert int(mtl.metrics(state)["skipped"]) == 0
    tx = mtl.skip_nonfinite_tasks(mtl.mean())  # without isolation all tasks are broken
    losses, grads = mtl.task_value_and_grad(vector_valued)(MLP, BROKEN)
    update, state = tx.update(grads, tx.init(MLP), MLP, losses=losses)
    assert not ravel_pytree(update)[0].any()
    assert int(state.dropped) == 3
