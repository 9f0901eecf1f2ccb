"""The oracles, checked against jax.jacrev of a flattened function, finite differences, and numpy in float64."""

import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from harness import WEIGHED, under_names
from jax import lax
from jax.flatten_util import ravel_pytree

import mtlgrad_jax as mtl
from mtlgrad_jax import registry, stacks
from mtlgrad_jax.solvers._solution import NONFINITE

STRATEGIES = "auto", "vmap", "unrolled", 1, 2, 3, 7


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def flat(losses):
    return losses if isinstance(losses, jax.Array) else jnp.stack(jax.tree.leaves(losses))


def dense(losses_fn, params):
    """The Jacobian (K, P) by jacrev, in the order of ravel_pytree."""
    vector, unravel = ravel_pytree(params)
    return jax.jacrev(lambda v: flat(losses_fn(unravel(v))))(vector)


def matrix(stack):
    """A stacked pytree as (K, P)."""
    return jax.vmap(lambda tree: ravel_pytree(tree)[0])(stack)


def assert_gramian(got, J, tolerance):
    """Entries within `tolerance` of n_i n_j."""
    J = np.asarray(J, np.float64)
    norms = np.linalg.norm(J, axis=1)
    assert got.dtype == jnp.float32
    np.testing.assert_array_less(np.abs(got - J @ J.T), tolerance * np.outer(norms, norms) + 1e-30)
    np.testing.assert_array_equal(got, np.asarray(got).T)


# -------------------------------------------------------------------------------------------------------- five tasks

MLP = {"w": normal(0, 4, 5), "b": normal(1, 5), "head": normal(2, 5, 3)}
X = normal(3, 8, 4)


def outputs(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["head"]


def five(params, x=X):
    o = outputs(params, x)
    return [jnp.mean(o[:, 0] ** 2), jnp.mean(jnp.sin(o[:, 1])), jnp.sum(o[:, 2]), jnp.mean(o), 1e3 * jnp.max(o)]


class Five(NamedTuple):
    z: jax.Array
    y: jax.Array
    x: jax.Array
    w: jax.Array
    v: jax.Array


FORMS = {
    "array": jnp.stack,
    "dict": lambda v: dict(zip("edcba", v, strict=True)),
    "nested dict": lambda v: {"z": {"b": v[0], "a": v[1]}, "y": [v[2], v[3]], "x": (v[4],)},
    "tuple": tuple,
    "NamedTuple": lambda v: Five(*v),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_jacobian_under_every_strategy(form):
    strategies = STRATEGIES if form in ("array", "dict") else ("auto", "vmap")

    def losses_fn(params):
        return FORMS[form](five(params))

    @jax.jit
    def every(params):
        results = {str(s): mtl.task_value_and_grad(losses_fn, strategy=s)(params) for s in strategies}
        jacobian = mtl.linearize(losses_fn, params)
        results["linearized"] = jacobian.losses, jacobian.rows()
        return dense(losses_fn, params), losses_fn(params), results

    J, losses, results = every(MLP)
    size = np.linalg.norm(J, axis=1).max()
    for found, grads in results.values():
        chex.assert_trees_all_equal_structs(found, losses)
        chex.assert_trees_all_close(found, losses, rtol=1e-5)
        chex.assert_trees_all_equal_structs(grads, MLP)
        assert jax.tree.map(jnp.shape, grads) == jax.tree.map(lambda leaf: (5, *leaf.shape), MLP)
        np.testing.assert_allclose(matrix(grads), J, rtol=1e-4, atol=1e-6 * size)


def test_rows_are_finite_differences():
    def numpy_losses(vector):
        w, b, head = np.split(vector, [20, 25])
        o = np.tanh(np.asarray(X, np.float64) @ w.reshape(4, 5) + b) @ head.reshape(5, 3)
        return np.array([np.mean(o[:, 0] ** 2), np.mean(np.sin(o[:, 1])), np.sum(o[:, 2]), o.mean(), 1e3 * o.max()])

    point = np.concatenate([np.ravel(MLP[name]) for name in ("w", "b", "head")]).astype(np.float64)
    steps = 1e-6 * np.eye(len(point))
    J = np.stack([(numpy_losses(point + s) - numpy_losses(point - s)) / 2e-6 for s in steps], axis=1)
    losses, grads = mtl.task_value_and_grad(lambda params: jnp.stack(five(params)))(MLP)
    got = np.concatenate([np.reshape(grads[name], (5, -1)) for name in ("w", "b", "head")], axis=1)
    np.testing.assert_allclose(losses, numpy_losses(point), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, J, rtol=1e-4, atol=1e-5 * np.linalg.norm(J, axis=1).max())


def test_many_tasks_go_through_vmap_and_few_do_not():
    """The choice of `auto` is detected by a function that cannot be vmapped."""
    f = refuses_vmap()
    few, many = (lambda w, K=K: {f"{i:02d}": jnp.sum(f(w)) * i for i in range(K)} for K in (8, 9))
    _, grads = mtl.task_value_and_grad(few)(jnp.ones(2))
    np.testing.assert_allclose(grads, np.cos(1.0) * np.arange(8)[:, None] * np.ones(2), rtol=1e-6)
    with pytest.raises(NotImplementedError, match="no batching rule"):
        mtl.task_value_and_grad(many)(jnp.ones(2))
    with pytest.raises(NotImplementedError, match="no batching rule"):
        mtl.linearize(many, jnp.ones(2)).rows("auto")
    assert mtl.linearize(few, jnp.ones(2)).rows("auto").shape == (8, 2)


def test_tasks_are_in_sorted_order_and_unstack_names_them():
    def losses_fn(w):
        return {"seg": jnp.sum(w**2), "depth": {"near": jnp.sum(3 * w), "far": w[0]}}

    w = jnp.asarray([1.0, 2.0])
    losses, grads = mtl.task_value_and_grad(losses_fn)(w)
    np.testing.assert_array_equal(grads, [[1, 0], [3, 3], [2, 4]])  # far, near, seg
    named = mtl.unstack(grads, like=losses)
    chex.assert_trees_all_equal(named, jax.jacrev(losses_fn)(w))
    assert jax.tree.structure(named) == jax.tree.structure(losses)
    assert mtl.unstack(grads, like=jnp.zeros(3)) is grads
    with pytest.raises(ValueError, match="`values` must have one row per task of `like`, 3, got 2"):
        mtl.unstack(grads[:2], like=losses)


def refuses_vmap():
    """Return sin with a backward pass that has no batching rule."""

    @jax.custom_batching.custom_vmap
    def times(a, b):
        return a * b

    @times.def_vmap
    def _(*_):
        raise NotImplementedError("no batching rule")

    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, cotangent: (times(cos, cotangent),))
    return f


@pytest.mark.parametrize("named", [False, True])
def test_strategies_without_vmap(named):
    f, w = refuses_vmap(), jnp.asarray([0.5, 2.0])

    def losses_fn(w):
        losses = [jnp.sum(f(w)), jnp.sum(f(w) ** 2), w[0]]
        return dict(zip("abc", losses, strict=True)) if named else jnp.stack(losses)

    expected = np.stack([np.cos(w), 2 * np.sin(w) * np.cos(w), [1, 0]])
    for strategy in (1, "unrolled"):
        _, grads = mtl.task_value_and_grad(losses_fn, strategy=strategy)(w)
        np.testing.assert_allclose(grads, expected, rtol=1e-6)
        np.testing.assert_allclose(mtl.linearize(losses_fn, w).rows(strategy), expected, rtol=1e-6)
    for strategy in (2, "vmap"):
        with pytest.raises(NotImplementedError, match="no batching rule"):
            mtl.task_value_and_grad(losses_fn, strategy=strategy)(w)


def test_unrolled_named_losses_share_one_forward_pass_under_jit():
    def flops(form):
        def losses_fn(params):
            return FORMS[form](five(params, jnp.ones((256, 4))))

        function = mtl.task_value_and_grad(losses_fn, strategy="unrolled")
        return jax.jit(function).lower(MLP).compile().cost_analysis()["flops"]

    assert flops("dict") < 1.1 * flops("array")


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("argnums", [0, -1, (-1, 0), [2]])
def test_argnums_and_keyword_arguments(argnums):
    def losses_fn(a, n, b, *, scale):
        return jnp.stack([jnp.sum(a["x"] * b) * n, scale * jnp.sum(b**3), jnp.prod(a["x"])])

    args = {"x": jnp.asarray([1.0, 2.0])}, 3, jnp.asarray([0.5, -1.5])
    expected = jax.jacrev(losses_fn, tuple(argnums) if isinstance(argnums, list) else argnums)(*args, scale=0.1)
    losses, grads = mtl.task_value_and_grad(losses_fn, argnums=argnums)(*args, scale=0.1)
    chex.assert_trees_all_close(grads, expected, rtol=1e-6)
    np.testing.assert_allclose(losses, losses_fn(*args, scale=0.1))
    jacobian = mtl.linearize(losses_fn, *args, argnums=argnums, scale=0.1)
    chex.assert_trees_all_close(jacobian.rows(), expected, rtol=1e-6)
    method = mtl.constant([1.0, -2.0, 3.0])
    step = mtl.balanced_value_and_grad(losses_fn, method, argnums=argnums)
    _, gradient, _ = step(args[0], method.init(None), *args[1:], scale=0.1)
    weighted = jax.tree.map(lambda rows: np.tensordot([1.0, -2.0, 3.0], rows, 1), expected)
    chex.assert_trees_all_close(gradient, weighted, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["unrolled", "vmap", 2])
@pytest.mark.parametrize("named", [False, True])
def test_aux(named, strategy):
    def losses_fn(w, label):
        losses = [jnp.sum(w**2), jnp.sum(w) * 3]
        losses = dict(zip("ba", losses, strict=True)) if named else jnp.stack(losses)
        return losses, {"accuracy": w > 1, "name": label}

    w = jnp.asarray([1.0, 2.0])
    (losses, aux), grads = mtl.task_value_and_grad(losses_fn, has_aux=True, strategy=strategy)(w, "x")
    chex.assert_trees_all_equal(losses, losses_fn(w, "x")[0])
    assert (aux["accuracy"].tolist(), aux["name"]) == ([False, True], "x")
    chex.assert_trees_all_equal(matrix(grads), dense(lambda w: losses_fn(w, "x")[0], w))
    jacobian = mtl.linearize(losses_fn, w, "x", has_aux=True)
    assert jacobian.aux["accuracy"].tolist() == [False, True]
    method = mtl.sum()
    (losses, aux), gradient, _ = mtl.balanced_value_and_grad(losses_fn, method, has_aux=True)(w, method.init(None), "x")
    assert aux["accuracy"].tolist() == [False, True]
    np.testing.assert_array_equal(gradient, grads.sum(0))
    assert mtl.linearize(lambda w: w, w).aux is None


@pytest.mark.nightly
@pytest.mark.parametrize("named", [False, True])
def test_leaves_that_are_not_floating_get_zeros_of_their_dtype(named):
    params = {
        "w": normal(0, 4, 2),
        "rows": jnp.asarray([3, 1]),
        "byte": jnp.asarray([[1]], jnp.uint8),
        "flag": jnp.asarray(True),
        "half": jnp.ones(3, jnp.bfloat16),
        "nothing": None,
        "number": 2.0,
        "count": 3,
    }

    def losses_fn(p):
        picked = p["w"][p["rows"]] * jnp.where(p["flag"], p["number"], 1)
        losses = [jnp.sum(picked), jnp.sum(picked**2) * p["byte"][0, 0], jnp.sum(p["half"]).astype(jnp.float32)]
        return dict(zip("abc", losses, strict=True)) if named else jnp.stack(losses)

    rest = {name: value for name, value in params.items() if name not in ("w", "half", "number")}
    moving = {name: params[name] for name in ("w", "half", "number")}
    expected = jax.jacrev(lambda moving: flat(losses_fn(moving | rest)))(moving)
    jacobian = mtl.linearize(losses_fn, params)
    stacks_found = [mtl.task_value_and_grad(losses_fn, strategy=s)(params)[1] for s in ("vmap", "unrolled", 2)]
    for grads in (*stacks_found, jacobian.rows()):
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        for name in moving:
            np.testing.assert_allclose(grads[name].astype(float), expected[name].astype(float), rtol=1e-6)
            assert grads[name].dtype == jnp.result_type(params[name])
        for name in ("rows", "byte", "flag", "count"):
            assert (grads[name].shape, grads[name].dtype) == (
                (3, *jnp.shape(rest[name])),
                jnp.asarray(rest[name]).dtype,
            )
            assert not grads[name].any()
    gradient = jacobian.pullback(jnp.ones(3))
    for name in ("rows", "byte", "flag", "count"):
        assert (gradient[name].shape, gradient[name].dtype) == (jnp.shape(rest[name]), jnp.asarray(rest[name]).dtype)
    J = np.concatenate([np.reshape(expected[name], (3, -1)).astype(float) for name in moving], axis=1)
    direction = {name: jnp.ones(jnp.shape(value)) for name, value in params.items() if value is not None}
    np.testing.assert_allclose(jacobian.pushforward(direction | {"nothing": None}), J.sum(1), rtol=1e-5)
    assert_gramian(jacobian.gramian(), J, 1e-6)
    assert_gramian(mtl.linearize(losses_fn, params, rows=2).gramian(), J, 1e-6)


@pytest.mark.parametrize("params", [np.asarray([1.0, 2.0], np.float32), 1.5, jnp.asarray(1.5)])
def test_params_may_be_one_array_or_number(params):
    def losses_fn(w):
        return {"a": jnp.sum(w**2), "b": jnp.sum(w), "constant": 1.0}

    expected = np.stack([2 * np.asarray(params), np.ones_like(params), np.zeros_like(params)])
    for strategy in STRATEGIES:
        losses, grads = mtl.task_value_and_grad(losses_fn, strategy=strategy)(params)
        np.testing.assert_array_equal(grads, expected)
        assert losses["constant"] == 1
    jacobian = mtl.linearize(losses_fn, params)
    assert_gramian(jacobian.gramian(), expected.reshape(3, -1), 1e-6)
    np.testing.assert_array_equal(jacobian.pullback(jnp.asarray([1.0, 2.0, 3.0])), expected[0] + 2 * expected[1])


def test_one_task():
    for losses_fn in (lambda w: jnp.sum(w**2)[None], lambda w: {"only": jnp.sum(w**2)}):
        _, grads = mtl.task_value_and_grad(losses_fn)(jnp.asarray([1.0, 2.0]))
        np.testing.assert_array_equal(grads, [[2, 4]])
        jacobian = mtl.linearize(losses_fn, jnp.asarray([1.0, 2.0]))
        by_rows = mtl.linearize(losses_fn, jnp.asarray([1.0, 2.0]), rows=3)
        assert (jacobian.num_tasks, jacobian.gramian().tolist(), by_rows.gramian().tolist()) == (
            1,
            [[20]],
            [[20]],
        )


# ------------------------------------------------------------------------------------------------- models and operators


def rnn():
    params = {"w": 0.5 * normal(0, 6, 6), "u": normal(1, 3, 6), "v": normal(2, 6)}
    inputs = normal(3, 7, 3)

    def losses_fn(p):
        hidden, seen = lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["u"]),) * 2, jnp.zeros(6), inputs)
        return {"last": hidden @ p["v"], "mean": jnp.mean(seen**2), "max": jnp.max(seen @ p["v"])}

    return losses_fn, params


def remat():
    @jax.checkpoint
    def block(h, w):
        return jnp.tanh(h @ w)

    def losses_fn(ws):
        h = X
        for w in ws:
            h = block(h, w)
        return jnp.mean(h**2, axis=0)

    return losses_fn, [normal(i, 4, 4) for i in range(3)]


def straight_through():
    """A custom_vjp with a gradient that is not that of its function."""

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), x), lambda x, cotangent: (cotangent * jnp.cos(x),))
    return lambda w: {"a": jnp.sum(rounded(w) ** 2), "b": jnp.sum(rounded(2 * w)), "c": w[0]}, normal(5, 4)


def flax_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(4, (3,))(x[..., None]).reshape(len(x), -1))
            return linen.Dense(2, name="seg")(x), linen.Dense(1, name="depth")(x)

    net = Net()
    variables = net.init(jax.random.key(0), X)

    def losses_fn(variables):
        seg, depth = net.apply(variables, X)
        return {
            "seg": optax.softmax_cross_entropy_with_integer_labels(seg, jnp.arange(8) % 2).mean(),
            "depth": jnp.mean((depth - 1) ** 2),
        }

    return losses_fn, variables


def flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.Linear(4, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.heads = nnx.List([nnx.Linear(6, 1, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            x = jnp.tanh(self.norm(self.trunk(x)))
            return [head(x) for head in self.heads]

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def losses_fn(params):
        left, right = nnx.merge(graph, params, rest, copy=True)(X)
        return {"left": jnp.mean((left - 1) ** 2), "right": jnp.mean(jnp.abs(right))}

    return losses_fn, params


@pytest.mark.sample(3)
@pytest.mark.parametrize("model", [rnn, remat, straight_through, flax_linen, flax_nnx])
def test_the_operator_is_the_jacobian(model):
    losses_fn, params = model()
    K = len(flat(losses_fn(params)))
    weights = jnp.arange(1.0, K + 1)
    direction = jax.tree.map(lambda leaf: normal(9, *leaf.shape), params)

    @jax.jit
    def everything(params, direction):
        jacobian, by_rows = mtl.linearize(losses_fn, params), mtl.linearize(losses_fn, params, rows=2)
        stacked = {s: mtl.task_value_and_grad(losses_fn, strategy=s)(params)[1] for s in ("vmap", "unrolled")}
        stacked["rows"] = jacobian.rows(strategy=1)
        return (
            dense(losses_fn, params),
            {name: matrix(grads) for name, grads in stacked.items()},
            [jacobian.gramian(), by_rows.gramian(), stacks.gramian(stacked["vmap"])],
            [ravel_pytree(each.pullback(weights))[0] for each in (jacobian, by_rows)],
            [each.pushforward(direction) for each in (jacobian, by_rows)],
        )

    J, stacked, gramians, pulled, pushed = everything(params, direction)
    J = np.asarray(J, np.float64)
    norms = np.linalg.norm(J, axis=1)
    assert norms.min() > 0
    for got in stacked.values():
        np.testing.assert_allclose(got, J, rtol=1e-4, atol=1e-5 * norms.max())
    for got in gramians:
        assert_gramian(got, J, 3e-6)
    along = np.asarray(ravel_pytree(direction)[0], np.float64)
    for down, up in zip(pulled, pushed, strict=True):
        np.testing.assert_allclose(down, weights @ J, rtol=1e-4, atol=1e-5 * norms.max())
        np.testing.assert_array_less(np.abs(up - J @ along), 1e-5 * norms * np.linalg.norm(along))


def test_block_sizes_give_one_gramian():
    def losses_fn(params):
        *losses, last = five(params)
        return FORMS["dict"]([*losses, last / 1e3])

    @jax.jit
    def gramians(params):
        return [mtl.linearize(losses_fn, params, rows=b).gramian() for b in (None, 1, 2, 5, 6)]

    J = jax.jit(lambda params: dense(losses_fn, params))(MLP)
    for got in gramians(MLP):
        assert_gramian(got, J, 3e-6)


def test_more_tasks_than_are_unrolled():
    matrix_ = normal(0, 11, 7)
    J = np.cos(matrix_ @ normal(1, 7))[:, None] * matrix_
    for rows in (None, 4):
        assert_gramian(mtl.linearize(lambda w: jnp.sin(matrix_ @ w), normal(1, 7), rows=rows).gramian(), J, 1e-6)


def test_named_weights():
    jacobian = mtl.linearize(lambda w: {"seg": w[0] ** 2, "depth": 3 * w[1]}, jnp.asarray([1.0, 1.0]))
    expected = [2 * 10.0, 3 * 1.0]
    np.testing.assert_array_equal(jacobian.pullback({"depth": 1.0, "seg": 10.0}), expected)
    np.testing.assert_array_equal(jacobian.pullback(jnp.asarray([1.0, 10.0])), expected)  # as weightings return them
    np.testing.assert_array_equal(mtl.linearize(lambda w: w, jnp.ones(2)).pullback([1, 10]), [1, 10])
    for wrong in ([1.0, 10.0], (1.0, 10.0), {"seg": 1.0, "height": 1.0}, {"seg": 1.0}):
        with pytest.raises(ValueError, match=r"`weights` must have the structure of the losses.*got"):
            jacobian.pullback(wrong)
    with pytest.raises(ValueError, match=r"`weights` must have shape \(2,\), .*got shape \(3,\)"):
        jacobian.pullback(jnp.ones(3))


def test_a_direction_fits_the_parameters():
    jacobian = mtl.linearize(lambda p: jnp.stack([p["a"] @ p["a"], p["b"]]), {"a": jnp.ones(2), "b": 1.0})
    np.testing.assert_array_equal(jacobian.pushforward({"a": np.asarray([1, 2]), "b": 3}), [6, 3])
    with pytest.raises(ValueError, match=r"`direction` must have its parameter's shape \(2,\), got \(3,\) at .*'a'"):
        jacobian.pushforward({"a": jnp.ones(3), "b": 1.0})
    with pytest.raises(ValueError, match=r"`direction` must have the structure of the parameters, .*got"):
        jacobian.pushforward(jnp.ones(3))


def test_a_backward_pass_that_is_not_linear_has_a_gramian_by_rows():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.clip(cotangent, -1, 1),))

    def losses_fn(w):
        return {"a": jnp.sum(3 * clipped(w)), "b": w[0]}

    np.testing.assert_array_equal(mtl.linearize(losses_fn, jnp.ones(2)).rows(), [[1, 1], [1, 0]])
    for rows in (1, 2):
        by_rows = mtl.linearize(losses_fn, jnp.ones(2), rows=rows)
        np.testing.assert_array_equal(by_rows.gramian(), [[2, 1], [1, 1]])
        np.testing.assert_array_equal(by_rows.pullback(jnp.asarray([10.0, 1.0])), [11, 10])  # not clipped at 1
    with pytest.raises(ValueError, match=r"`rows` must be given: JAX cannot transpose"):
        mtl.linearize(losses_fn, jnp.ones(2)).gramian()


def test_a_jacobian_is_opaque():
    """It is not a stack without leaves, which transformations before a method would silently ignore."""
    jacobian = mtl.linearize(lambda w: w**2, jnp.asarray([1.0, 2.0]))
    for use in (lambda: 2 * jacobian, lambda: jacobian**2, lambda: -jacobian, lambda: jnp.asarray(jacobian)):
        with pytest.raises(TypeError, match=r"rows\(\)"):
            use()
    for name in ("shape", "dtype", "real"):
        with pytest.raises(AttributeError, match=r"rows\(\)"):
            getattr(jacobian, name)
    assert jax.tree.leaves(jacobian) == [jacobian]
    with pytest.raises(ValueError, match="__jax_array__"):
        jax.jit(lambda jac: jac.gramian())(jacobian)
    refused = {r"rows\(\)": (optax.scale(3.0), optax.clip_by_global_norm(1.0)), "__jax_array__": (optax.clip(1.0),)}
    for message, transforms in refused.items():
        for first in transforms:
            tx = optax.chain(first, mtl.mgda())
            with pytest.raises((TypeError, AttributeError, ValueError), match=message):
                tx.update(jacobian, tx.init(jnp.ones(2)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_losses_of_16_bits(dtype):
    """Their Gramian would overflow or round in their dtype: this raises an error; by rows the Gramian is exact."""

    def losses_fn(w):
        return {"x": (300 * w[0]).astype(dtype), "y": (300 * w[1] - 299 * w[0]).astype(dtype)}

    with pytest.raises(ValueError, match=r"`rows` must be given for losses of dtype"):
        mtl.linearize(losses_fn, jnp.ones(2)).gramian()
    for rows in (1, 2):
        found = mtl.linearize(losses_fn, jnp.ones(2), rows=rows)
        J = np.asarray(found.rows(), np.float64)
        np.testing.assert_allclose(found.gramian(), J @ J.T, rtol=1e-6)
        np.testing.assert_allclose(
            found.pullback(jnp.asarray([1 / 3, 1 / 7])), np.asarray([1 / 3, 1 / 7]) @ J, rtol=1e-6
        )
    for method in (mtl.mean(), mtl.constant({"x": 1.0, "y": 0.5})):  # these do not use the Gramian
        step = mtl.balanced_value_and_grad(losses_fn, method)
        assert np.isfinite(step(jnp.ones(2), method.init(None))[1]).all()


def test_bf16_gradients_reach_float32_accuracy_by_rows():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"w": normal(0, 32, 64), "head": normal(1, 64, 6)})
    x = normal(2, 16, 32).astype(jnp.bfloat16)

    def losses_fn(p):
        out = jnp.tanh(x @ p["w"] / 6) @ p["head"] / 8
        return jnp.mean(jnp.square(out), axis=0)

    @jax.jit
    def gramians(params):
        jacobian = mtl.linearize(lambda p: losses_fn(p).astype(jnp.float32), params)
        by_rows = [mtl.linearize(losses_fn, params, rows=b).gramian() for b in (1, 4, 6)]
        return jacobian.gramian(), by_rows, jacobian.rows()

    plain, by_rows, grads = gramians(params)
    assert jax.tree.map(lambda leaf: leaf.dtype, grads) == {"w": jnp.bfloat16, "head": jnp.bfloat16}
    J = matrix(grads)
    assert_gramian(plain, J, 1e-2)
    for got in by_rows:
        assert_gramian(got, J, 1e-6)


def test_float64():
    A = np.random.default_rng(0).normal(size=(3, 4))
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(1).normal(size=4))
        J = np.cos(A @ w)[:, None] * A
        for rows in (None, 2):
            jacobian = mtl.linearize(lambda w: dict(zip("abc", jnp.sin(jnp.asarray(A) @ w), strict=True)), w, rows=rows)
            gramian = jacobian.gramian()
            assert gramian.dtype == jnp.float64
            np.testing.assert_allclose(gramian, J @ J.T, rtol=1e-13)
            np.testing.assert_allclose(jacobian.pushforward(jnp.asarray(A[0])), J @ A[0], rtol=1e-13)


def test_memory_is_that_of_one_backward_pass():
    """The promise of the matrix-free route, on a 4-layer MLP of width 1024 with K = 40 and batch 64; compiled only."""
    K, width = 40, 1024

    def losses_fn(params, x, y):
        for w in params:
            x = jax.nn.relu(x @ w)
        return jnp.mean((x[:, :K] - y) ** 2, axis=0)

    def stacked(params, state, x, y):
        losses, grads = mtl.task_value_and_grad(losses_fn)(params, x, y)
        return losses, *mtl.constant([1.0] * K).update(grads, state, params)

    def plain(params, x, y):
        return jax.value_and_grad(lambda *args: losses_fn(*args).sum())(params, x, y)

    def temporaries(step, *args):
        return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes

    params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * 4
    data = jax.ShapeDtypeStruct((64, width), jnp.float32), jax.ShapeDtypeStruct((64, K), jnp.float32)
    method = mtl.mgda()
    step = mtl.balanced_value_and_grad(losses_fn, method)
    matrix_free = temporaries(step, params, jax.eval_shape(lambda: method.init(None)), *data)
    assert matrix_free < 4 * temporaries(plain, params, *data)
    assert matrix_free < 4 * width**2  # one layer's gradient
    assert 50 * matrix_free < temporaries(stacked, params, method.init(None), *data)


# ----------------------------------------------------------------------------------------------------- broken labels

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


# ------------------------------------------------------------------------------------------------------------- errors


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


# --------------------------------------------------------------------------------------------------------- two routes


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
        (update, gradient), states, losses, norms = both(params, states, normal(10 + i, 8, 4), mask)
        chex.assert_trees_all_close(*losses, rtol=1e-6)
        size = float(max(optax.tree.norm(update), norms.max()))
        chex.assert_trees_all_close(update, gradient, rtol=1e-3, atol=1e-4 * size)
        (state, wstate) = ((s.method, s.info.result, s.info.fallbacks, s.info.skipped) for s in states)
        chex.assert_trees_all_close(state, wstate, rtol=1e-3, atol=1e-4)
        assert float(optax.tree.norm(gradient)) > 0 or not any(jax.tree.leaves(mask))
        params = optax.apply_updates(params, optax.tree.scale(-0.1 / (1e-9 + size), update))
    assert both._cache_size() == 1


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


def subjaxprs(value):
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return [jaxpr for entry in value for jaxpr in subjaxprs(entry)] if isinstance(value, (tuple, list)) else []


def count_products(jaxpr):
    """Matrix products run unconditionally, and those in each branch of every cond."""
    products, branches = 0, []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            branches.append([count_products(branch.jaxpr)[0] for branch in eqn.params["branches"]])
            continue
        matrices = any(getattr(operand.aval, "ndim", 0) > 1 for operand in eqn.invars)  # not two vectors of K numbers
        products += eqn.primitive.name == "dot_general" and matrices
        for inner in (jaxpr for value in eqn.params.values() for jaxpr in subjaxprs(value)):
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


# ------------------------------------------------------------------------------------------------------------ the docs


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
