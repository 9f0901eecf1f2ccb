"""`linearize`: its Gramian, weighted sums and inner products against jax.jacrev and numpy in float64; its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax
from jax.flatten_util import ravel_pytree
from problems import FORMS, MLP, X, assert_gramian, dense, five, flat, matrix, normal

import mtlgrad_jax as mtl
from mtlgrad_jax import stacks
from mtlgrad_jax.solvers._solution import SOLVED


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


@pytest.mark.parametrize(("K", "gain"), [(8, 5), (40, 50)])
def test_memory_is_that_of_one_backward_pass(K, gain):
    """The promise of the matrix-free route, on a 4-layer MLP of width 1024 with batch 64; compiled only."""
    width = 1024

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
    one_pass = temporaries(plain, params, *data)
    assert matrix_free < 4 * one_pass
    assert matrix_free < one_pass + 4 * width**2  # and one layer's gradient, until it is known to be finite
    assert gain * matrix_free < temporaries(stacked, params, method.init(None), *data)


def masked_root(t):
    """Losses whose gradients are not finite at zero, which the mask of their Jacobian hides from the Gramian."""
    z = jnp.where(t > 0, jnp.sqrt(t), 0)
    return {"a": jnp.sum(z), "b": -jnp.sum(3 * z) + z[1]}


@pytest.mark.parametrize(
    "method",
    [mtl.mean(), mtl.mgda(), mtl.non_conflicting(mtl.sum()), mtl.smoothed(mtl.mgda(), 2)],
    ids=["mean", "mgda", "non_conflicting", "smoothed"],
)
def test_a_gradient_that_is_not_finite_behind_a_finite_gramian_is_skipped(method):
    t = jnp.asarray([0.0, 1.0])
    jacobian = mtl.linearize(masked_root, t)
    assert np.isfinite(jacobian.gramian()).all()
    assert not np.isfinite(jacobian.rows()).all()
    update, state = method.update(jacobian, method.init(t))
    assert not update.any()
    assert int(mtl.metrics(state)["skipped"]) == 1


def test_features_may_have_a_finite_gramian_and_the_trunk_no_finite_gradient():
    jacobian = mtl.linearize_features(
        lambda p: jnp.where(p["t"] > 0, jnp.sqrt(p["t"]), 0),
        lambda p, z: {"a": jnp.sum(z * p["a"]), "b": jnp.sum(p["a"] - 2 * z)},
        {"t": jnp.asarray([0.0, 1.0]), "a": jnp.ones(2)},
        bound=True,
    )
    params = {"t": jnp.zeros(2), "a": jnp.zeros(2)}
    update, state = mtl.mgda().update(jacobian, mtl.mgda().init(params))
    assert not any(leaf.any() for leaf in jax.tree.leaves(update))
    assert int(state.info.skipped) == 1


def test_a_task_at_its_optimum():
    """The square of a gradient that is only rounding may come out negative from a pass forward and one back."""

    @jax.jit
    def step(x, y, w):
        jacobian = mtl.linearize(lambda w: {"a": jnp.mean((x @ w - y) ** 2), "b": jnp.sum((w - 1) ** 2)}, w)
        square = jacobian.pushforward(jacobian.pullback(jnp.asarray([1.0, 0.0])))[0]
        return square, jacobian.gramian(), *mtl.mgda().update(jacobian, mtl.mgda().init(w))

    rng, negative = np.random.default_rng(0), 0
    for _ in range(40):
        x, y = rng.normal(size=(64, 4)), rng.normal(size=(64, 3))
        w = np.linalg.lstsq(x, y, rcond=None)[0]
        square, gramian, update, state = step(*(jnp.asarray(value, jnp.float32) for value in (x, y, w)))
        negative += bool(square < 0)
        assert gramian[0, 0] >= 0
        assert int(state.info.result) == SOLVED
        assert jnp.linalg.norm(update) < 1e-5
    assert negative
