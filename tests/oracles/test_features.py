"""`linearize_features` against jax.jacrev of the whole network, numpy in float64, and the flops of a plain step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import mtlgrad_jax as mtl

WIDTH, BATCH = 16, 8


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


def network(K, named=True, width=WIDTH):
    """A trunk with two features, and heads that also look at the trunk's scale directly."""
    params = {
        "trunk": {"w": normal(0, width, width), "v": normal(1, width, width), "scale": jnp.asarray(0.7)},
        "heads": {f"task{i}": normal(2 + i, width, width) for i in range(K)},
        "step": jnp.asarray(3),
    }

    def trunk(params, x):
        hidden = jnp.tanh(x @ params["trunk"]["w"])
        return {"low": hidden, "high": jnp.sin(hidden @ params["trunk"]["v"]), "count": jnp.asarray(2)}

    def heads(params, features, x):
        values = {}
        for i, (name, w) in enumerate(params["heads"].items()):
            out = jnp.tanh(features["high"] @ w) + features["low"]
            values[name] = jnp.mean((params["trunk"]["scale"] * out - i) ** 2) / features["count"]
        return values if named else jnp.stack(list(values.values()))

    return params, normal(40, BATCH, width), trunk, heads


def whole(trunk, heads):
    return lambda params, x: heads(params, trunk(params, x), x)


def jacobian_of(losses_fn, params, x):
    """K×P in float64, by jax.jacrev over the floating leaves."""
    floating = {"trunk": params["trunk"], "heads": params["heads"]}
    vector, unravel = ravel_pytree(floating)

    def losses(vector):
        return jnp.stack(jax.tree.leaves(losses_fn({**unravel(vector), "step": params["step"]}, x)))

    rows = jax.jacrev(losses)(vector)
    return np.asarray(rows if rows.ndim == 2 else rows[0], np.float64), vector, unravel


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("named", [True, False])
def test_the_operator_is_that_of_the_whole_network(named, rows):
    params, x, trunk, heads = network(3, named)
    J, _, unravel = jacobian_of(whole(trunk, heads), params, x)
    weights = jnp.asarray([0.5, -1.0, 2.0])

    @jax.jit
    def products(params, x):
        jacobian = mtl.linearize_features(trunk, heads, params, x, rows=rows)
        stack = jacobian.rows()
        return jacobian.losses, jacobian.gramian(), jacobian.pullback(weights), stack

    losses, gramian, gradient, stack = products(params, x)
    np.testing.assert_allclose(jax.tree.leaves(losses), jax.tree.leaves(whole(trunk, heads)(params, x)), rtol=1e-6)
    np.testing.assert_allclose(gramian, J @ J.T, rtol=2e-6, atol=2e-6 * np.max(J @ J.T))
    wanted = {**unravel(jnp.asarray(np.asarray(weights) @ J, jnp.float32)), "step": jnp.asarray(0)}
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), gradient, wanted)
    for i, row in enumerate(J):
        own = {**unravel(jnp.asarray(row, jnp.float32)), "step": jnp.asarray(0)}
        jax.tree.map(lambda got, want, i=i: np.testing.assert_allclose(got[i], want, atol=1e-6), stack, own)


@pytest.mark.parametrize("named", [True, False])
def test_the_bound_is_the_gramian_of_the_features(named):
    """MGDA-UB: the weights are those of min-norm on the features' gradients, the gradient is the weighted sum."""
    params, x, trunk, heads = network(2, named)
    features = trunk(params, x)

    def losses_at(low, high):
        values = heads(params, {**features, "low": low, "high": high}, x)
        return jnp.stack(jax.tree.leaves(values)) if named else values

    Z = np.concatenate(
        [
            np.asarray(z, np.float64).reshape(2, -1)
            for z in jax.jacrev(losses_at, (0, 1))(*[features[k] for k in ("low", "high")])
        ],
        1,
    )
    J, _, unravel = jacobian_of(whole(trunk, heads), params, x)
    first, second = Z
    share = np.clip((second - first) @ second / ((first - second) @ (first - second)), 0, 1)

    @jax.jit
    def step(params, x):
        jacobian = mtl.linearize_features(trunk, heads, params, x, bound=True)
        method = mtl.mgda()
        return jacobian.gramian(), method.update(jacobian, method.init(params), params)[0]

    gramian, gradient = step(params, x)
    np.testing.assert_allclose(gramian, Z @ Z.T, rtol=1e-5, atol=1e-6 * np.max(Z @ Z.T))
    wanted = {**unravel(jnp.asarray(np.asarray([share, 1 - share]) @ J, jnp.float32)), "step": jnp.asarray(0)}
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), gradient, wanted)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("K", [2, 6])
def test_heads_run_once_and_with_the_bound_the_trunk_too(K):
    params, x, trunk, heads = network(K, width=64)
    method = mtl.shared_private(mtl.mgda(), mtl.under("trunk"))

    def step(params, x, **options):
        jacobian = mtl.linearize_features(trunk, heads, params, x, **options)
        return method.update(jacobian, method.init(params), params)[0]

    def plain(params, x):
        return jax.grad(lambda p: sum(whole(trunk, heads)(p, x).values()), allow_int=True)(params)

    trunk_pass = 2 * 2 * BATCH * 64**2  # two layers
    check = 2 * sum(leaf.size for leaf in jax.tree.leaves(params["trunk"]))  # whether its gradient is finite
    plain_flops = flops(plain, params, x) + check
    assert flops(lambda p, x: step(p, x, bound=True), params, x) < 1.2 * plain_flops
    # K columns of the Gramian, each one backward and one forward pass through the trunk, which cost up to two each.
    assert flops(step, params, x) < 1.2 * plain_flops + 4 * K * trunk_pass


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the workspace of a GPU's matmuls takes more memory")
@pytest.mark.parametrize("options", [{"rows": 16}, {"bound": True}])
def test_heads_of_many_tasks_are_not_stacked(options):
    """The stack of the heads alone would take twice the memory."""
    K = 16
    params, x, trunk, heads = network(K, width=64)
    method = mtl.shared_private(mtl.mgda(), mtl.under("trunk"))

    def step(params, x):
        jacobian = mtl.linearize_features(trunk, heads, params, x, **options)
        return method.update(jacobian, method.init(params), params)[0]

    memory = jax.jit(step).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert memory < K * K * 64**2 * 4 / 2


def test_aux_and_its_errors(unchecked):
    params, x, trunk, heads = network(2)

    def with_aux(params, features, x):
        return heads(params, features, x), {"seen": features["count"]}

    jacobian = mtl.linearize_features(trunk, with_aux, params, x, has_aux=True)
    assert jacobian.aux == {"seen": 2}
    with pytest.raises(ValueError, match=re.escape("`losses_fn` must return (losses, aux) under has_aux=True")):
        mtl.linearize_features(trunk, heads, params, x, has_aux=True)
    with pytest.raises(ValueError, match="`features_fn` must be a function"):
        mtl.linearize_features(params, heads, params, x)
    with pytest.raises(ValueError, match="`bound` must be"):
        mtl.linearize_features(trunk, heads, params, x, bound="yes")
    grouped = mtl.grouped(mtl.mgda(), {"trunk": "t", "heads": "h", "step": "t"})
    bounded = mtl.linearize_features(trunk, heads, params, x, bound=True)
    with pytest.raises(ValueError, match="`bound` must be False"):
        grouped.update(bounded, grouped.init(params), params)


def test_features_of_16_bits_have_a_gramian_of_32():
    params, x, trunk, heads = network(2)

    def half(params, x):
        return jax.tree.map(lambda z: z.astype(jnp.bfloat16) if z.ndim else z, trunk(params, x))

    with jax.numpy_dtype_promotion("strict"):
        jacobian = mtl.linearize_features(
            half,
            lambda p, z, x: heads(p, jax.tree.map(lambda z: z.astype(jnp.float32) if z.ndim else z, z), x),
            params,
            x,
        )
        gramian = np.asarray(jacobian.gramian())
    J, *_ = jacobian_of(lambda p, x: heads(p, {**half(p, x), "count": 2}, x), params, x)
    assert not np.isin(gramian, np.asarray(jnp.asarray(gramian, jnp.bfloat16), np.float32)).all()
    np.testing.assert_allclose(gramian, J @ J.T, atol=3e-3 * np.max(J @ J.T))


def test_losses_are_those_of_the_network_where_features_are_infinite():
    def trunk(params, x):
        return jnp.where(x > 0, params * x, -jnp.inf)

    def heads(params, features, x):
        return {"a": jnp.sum(jax.nn.softmax(features) * x), "b": jnp.sum(jnp.exp(features))}

    params, x = jnp.asarray(0.5), jnp.asarray([1.0, -1.0, 2.0])
    jacobian = mtl.linearize_features(trunk, heads, params, x)
    rows = jax.jacrev(lambda p: jnp.stack(jax.tree.leaves(heads(p, trunk(p, x), x))))(params)
    wanted = heads(params, trunk(params, x), x)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6), jacobian.losses, wanted)
    np.testing.assert_allclose(jacobian.rows(), rows, rtol=1e-5)


def test_heads_are_traced_once_for_all_tasks():
    params, x, trunk, heads = network(24)
    calls = []

    def counted(*args):
        calls.append(None)
        return heads(*args)

    jax.eval_shape(lambda p, x: mtl.linearize_features(trunk, counted, p, x, bound=True).gramian(), params, x)
    assert len(calls) < 6


def test_one_pass_through_the_trunk_with_rows_too():
    params, x, trunk, heads = network(6, width=64)
    method = mtl.mgda()

    def step(rows):
        def update(params, x):
            jacobian = mtl.linearize_features(trunk, heads, params, x, bound=True, rows=rows)
            return method.update(jacobian, method.init(params), params)[0]

        return flops(update, params, x)

    assert step(2) == step(None)


@pytest.mark.parametrize("features", [jnp.ones(2, int), jnp.ones(2, complex), {}])
def test_features_that_cannot_be_differentiated(features, unchecked):
    with pytest.raises(ValueError, match="`features_fn` must return trees"):
        mtl.linearize_features(lambda p: features, lambda p, z: {"a": p, "b": p}, jnp.asarray(1.0))
