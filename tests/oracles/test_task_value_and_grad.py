"""`task_value_and_grad`, and the rows of `linearize`, against jax.jacrev and finite differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import FORMS, MLP, X, assert_gramian, dense, five, flat, matrix, normal

import mtlgrad_jax as mtl

STRATEGIES = "auto", "vmap", "unrolled", 1, 2, 3, 7


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

    def named(w, num_tasks):
        return {f"{i:02d}": jnp.sum(f(w)) * i for i in range(num_tasks)}

    def in_an_array(w, num_tasks):
        return jnp.sum(f(w)) * jnp.arange(float(num_tasks))

    for losses_fn, few in ((named, 40), (in_an_array, 8)):
        _, grads = mtl.task_value_and_grad(losses_fn)(jnp.ones(2), few)
        np.testing.assert_allclose(grads, np.cos(1.0) * np.arange(few)[:, None] * np.ones(2), rtol=1e-6)
        with pytest.raises(NotImplementedError, match="no batching rule"):
            mtl.task_value_and_grad(losses_fn)(jnp.ones(2), few + 1)
    with pytest.raises(NotImplementedError, match="no batching rule"):
        mtl.linearize(named, jnp.ones(2), 9).rows("auto")
    assert mtl.linearize(named, jnp.ones(2), 8).rows("auto").shape == (8, 2)


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


@pytest.mark.parametrize(("num_tasks", "named"), [(2, True), (8, True), (8, False)])
def test_a_step_holds_the_stack_once_beside_its_rows(num_tasks, named):
    size = 256
    params, inputs = normal(0, size, size), normal(1, 32, size)

    def losses_fn(params):
        outputs = jnp.tanh(inputs @ params)
        losses = [jnp.mean(outputs[:, i::num_tasks] ** (1 + i % 3)) for i in range(num_tasks)]
        return {str(i): loss for i, loss in enumerate(losses)} if named else jnp.stack(losses)

    method = mtl.mgda()

    def step(params, state):
        losses, grads = mtl.task_value_and_grad(losses_fn)(params)
        return method.update(grads, state, params, losses=losses)

    memory = jax.jit(step).lower(params, method.init(params)).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 2.1 * num_tasks * params.nbytes


def test_leaves_without_entries_and_losses_of_two_dtypes():
    def losses_fn(params):
        return {"a": jnp.sum(params["w"] ** 2), "b": jnp.sum(params["w"]).astype(jnp.bfloat16)}

    with jax.numpy_dtype_promotion("strict"):
        _, grads = jax.jit(mtl.task_value_and_grad(losses_fn))({"w": jnp.ones(2), "none": jnp.zeros((0, 3))})
    chex.assert_trees_all_equal(grads, {"w": jnp.asarray([[2.0, 2.0], [1.0, 1.0]]), "none": jnp.zeros((2, 0, 3))})


def test_a_mesh_of_one_device():
    mesh = jax.make_mesh((1,), ("d",))
    params, inputs = normal(0, 3), normal(1, 8, 3)

    def losses_fn(params, inputs):
        outputs = inputs @ params
        return {"a": jnp.mean(outputs**2), "b": jnp.mean(jnp.sin(outputs))}

    def averaged(params, inputs):
        return jax.lax.pmean(losses_fn(params, inputs), "d")

    specs = {"in_specs": (jax.P(), jax.P("d")), "out_specs": jax.P()}
    split = jax.device_put(inputs, jax.NamedSharding(mesh, jax.P("d")))
    found = jax.jit(jax.shard_map(mtl.task_value_and_grad(averaged), mesh=mesh, **specs))(params, split)
    chex.assert_trees_all_close(found, mtl.task_value_and_grad(losses_fn)(params, inputs), rtol=1e-6)
