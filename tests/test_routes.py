"""Stored and matrix-free: the same numbers, and what a step without a Gramian costs."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from harness import WEIGHED, inside, under_names
from jax import lax
from problems import MLP, X, flat, normal, outputs

import mtlgrad_jax as mtl
from mtlgrad_jax import registry


def three(params, x):
    o = outputs(params, x)
    return {"seg": jnp.mean((o[:, 0] - 1) ** 2), "depth": jnp.mean(jnp.abs(o[:, 1] + o[:, 0])), "ac": jnp.mean(o**2)}


NAMES = ("ac", "depth", "seg")


@pytest.mark.nightly
@pytest.mark.parametrize("row", [registry.ROWS[name] for name in WEIGHED], ids=lambda row: row.name)
def test_both_routes_give_the_same_numbers(row):
    kwargs = {name: under_names(v, NAMES) for name, v in row.kwargs(3).items()}
    tx, method = row.factory(**kwargs), row.factory(**kwargs)
    step = mtl.balanced_value_and_grad(three, method)

    @jax.jit
    def both(params, states, x, task_mask):
        losses, grads = mtl.task_value_and_grad(three)(params, x)
        update, state = tx.update(grads, states[0], params, losses=losses, task_mask=task_mask)
        found, gradient, wstate = step(params, states[1], x, extra_args={"task_mask": task_mask})
        return (update, gradient), (state, wstate), (losses, found), mtl.stacks.task_norms(grads)

    params, states = MLP, (tx.init(MLP), method.init(None))
    masks = [[True] * 3, [True, False, True], [True] * 3, [False, True, False], [False] * 3]
    for i, mask in enumerate(masks):
        mask = under_names([jnp.asarray(entry) for entry in mask], NAMES)
        x = normal(10 + i, 8, 4)
        with jax.no_tracing(i > 0):
            (update, gradient), states, losses, norms = both(params, states, x, mask)
        chex.assert_trees_all_close(*losses, rtol=1e-6)
        size = float(max(optax.tree.norm(update), norms.max()))
        chex.assert_trees_all_close(update, gradient, rtol=1e-3, atol=1e-4 * size)
        (state, wstate) = ((s.method, s.info.result, s.info.fallbacks, s.info.skipped) for s in states)
        chex.assert_trees_all_close(state, wstate, rtol=1e-3, atol=1e-4)
        assert float(optax.tree.norm(gradient)) > 0 or not any(jax.tree.leaves(mask))
        params = optax.apply_updates(params, optax.tree.scale(-0.1 / (1e-9 + size), update))


def test_absent_tasks_do_not_move_the_matrix_free_gradient():
    method = mtl.mgda()
    step = mtl.balanced_value_and_grad(three, method)
    mask = {"seg": True, "depth": False, "ac": True}
    losses, gradient, _ = step(MLP, method.init(None), X, extra_args={"task_mask": mask})
    two = mtl.balanced_value_and_grad(lambda p, x: {k: v for k, v in three(p, x).items() if mask[k]}, method)
    _, expected, _ = two(MLP, method.init(None), X)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert set(losses) == set(mask)


@pytest.mark.nightly
def test_training_in_a_scan():
    """One compilation, carried states of fixed type, the same numbers as step by step; seeds under vmap."""
    method, optimizer, traces = mtl.mgda(), optax.adam(0.03), []

    def losses_fn(params, x):
        traces.append(None)
        return three(params, x)

    balanced = mtl.balanced_value_and_grad(losses_fn, method)

    def step(carry, x):
        params, wstate, opt_state = carry
        losses, gradient, wstate = balanced(params, wstate, x)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), wstate, opt_state), losses

    start = MLP, method.init(None), optimizer.init(MLP)
    xs = jnp.broadcast_to(X, (20, 8, 4))
    _, losses = jax.jit(lambda carry: lax.scan(step, carry, xs))(start)
    assert all(values[-1] < values[0] for values in losses.values())

    traces.clear()
    jitted, carries = jax.jit(step), [start]
    for i, x in enumerate(xs[:3]):
        carry, found = jitted(carries[-1], x)
        carries.append(carry)
        chex.assert_trees_all_close(found, mtl.unstack(flat(losses).T[i], like=losses), rtol=1e-4)
        if i == 0:
            first = len(traces)
    assert len(traces) == first

    seeds = jax.tree.map(lambda *leaves: jnp.stack(leaves), *carries[:2])
    (params, _, _), _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(seeds, X)
    for i in range(2):
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], params), carries[i + 1][0], rtol=1e-3)


def count_products(jaxpr):
    """Matrix products run unconditionally, and those in each branch of every cond."""
    products, branches = 0, []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            branches.append([count_products(branch.jaxpr)[0] for branch in eqn.params["branches"]])
            continue
        matrices = any(getattr(operand.aval, "ndim", 0) > 1 for operand in eqn.invars)  # not two vectors of K numbers
        products += eqn.primitive.name == "dot_general" and matrices
        for inner in inside(eqn):
            more, nested = count_products(inner)
            products += more
            branches += nested
    return products, branches


def products_of_a_step(method):
    step = mtl.balanced_value_and_grad(three, method)
    return count_products(jax.make_jaxpr(step)(MLP, method.init(None), X).jaxpr)


def test_a_step_without_gramian_is_a_plain_step():
    """Always for loss weightings, and between solves for update_every: the rest is in one branch of a cond."""
    plain, _ = count_products(jax.make_jaxpr(jax.value_and_grad(lambda p: flat(three(p, X)).sum()))(MLP).jaxpr)
    names = sorted(three(MLP, X))
    for row in [registry.ROWS[name] for name in WEIGHED]:
        kwargs = {key: under_names(value, names) for key, value in row.kwargs(3).items()}
        always, conds = products_of_a_step(row.factory(**kwargs))
        without = row.folder == "losses"
        assert (always == plain) == without
        assert not (without and any(any(counts) for counts in conds))
    always, conds = products_of_a_step(mtl.update_every(mtl.mgda(), num_tasks=3, k=4))
    assert always == plain
    (branches,) = [counts for counts in conds if any(counts)]
    assert branches[0] == 0  # reuse
    assert branches[1] >= 2 * 3  # two passes for every column of the Gramian


@pytest.mark.parametrize("names", [False, True])
def test_the_two_routes_as_documented(names):
    params, batch = MLP, X
    task_batches = normal(7, 3, 8, 4)

    def loss_fn(params, batch):
        return jnp.mean(outputs(params, batch) ** 2)

    # (a) the optax way: a pure GradientTransformation over stacked per-task gradients
    tx = optax.chain(mtl.cagrad(c=0.4), optax.adamw(1e-3))
    state = tx.init(params)  # params are NOT stacked

    def losses_fn(params, batch):  # -> (K,) or a pytree of K scalars, e.g. {"seg": ..., "depth": ...}
        losses = three(params, batch)
        return losses if names else flat(losses)

    losses, grads = mtl.task_value_and_grad(losses_fn)(params, batch)  # grads: leaves (K, *leaf.shape)
    updates, state = tx.update(grads, state, params, losses=losses)  # updates: leaves leaf.shape
    params = optax.apply_updates(params, updates)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, MLP)

    # tasks that are rows of data need nothing from us: plain JAX
    losses, grads = jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0))(params, task_batches)
    updates, state = tx.update(grads, state, params, losses=losses)

    # (b) the matrix-free way: the same update, never storing K gradients
    jac = mtl.linearize(losses_fn, params, batch)  # TaskJacobian: losses, aux, gramian(), pullback(w), pushforward(d)
    method = mtl.cagrad(c=0.4)
    wstate = method.init(None)
    weights, wstate = method.weigh(jac.gramian(), wstate, losses=jac.losses)
    grad = jac.pullback(weights)  # an ordinary gradient; any optax optimizer follows

    # (b) in one call, the everyday form
    step = mtl.balanced_value_and_grad(losses_fn, method, has_aux=False)
    losses, again, wstate = step(params, wstate, batch)
    chex.assert_trees_all_close(again, grad, rtol=1e-4, atol=1e-6)
    stacked = mtl.task_value_and_grad(losses_fn)(params, batch)[1]
    expected, _ = mtl.cagrad(c=0.4).update(stacked, method.init(None), params, losses=losses)
    chex.assert_trees_all_close(grad, expected, rtol=1e-4, atol=1e-6)
