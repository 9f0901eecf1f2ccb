"""Short leaves are joined for functions that treat all leaves alike; nobody but the compiler notices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlgrad_jax as mtl
from mtlgrad_jax._core.joined import Leaves, draw_like, joined

K = 3
SHAPES = {
    "a": (4,),
    "b": (),
    "c": (2, 3),
    "d": (0, 5),
    "long": (10_000,),
    "e": (4,),
    "half": (3,),
    "ids": (2,),
    "f": (2, 3),
}
DTYPES = {"half": jnp.bfloat16, "ids": jnp.int32}
PARAMS = {key: jnp.zeros(shape, DTYPES.get(key, jnp.float32)) for key, shape in SHAPES.items()}


def stack():
    rng = np.random.default_rng(0)
    return {key: jnp.asarray(rng.integers(-20, 20, (K, *leaf.shape)), leaf.dtype) for key, leaf in PARAMS.items()}


def test_a_function_sees_fewer_leaves_and_its_results_are_cut():
    """Also of other leading axes, and where a dtype differs in only one of the trees."""
    seen = []

    def function(weights, grads, buffer):
        seen.append(len(jax.tree.leaves(grads)))
        sums = jax.tree.map(lambda g: jnp.tensordot(weights.astype(g.dtype), g, 1), grads)
        return Leaves(sums), (Leaves(jax.tree.map(lambda g, m: g + m.astype(g.dtype), grads, buffer)), 2 * weights)

    def call(weights, grads, buffer):
        return joined(function, PARAMS, weights, Leaves(grads), Leaves(buffer))

    buffer = {**stack(), "e": stack()["e"].astype(jnp.float16)}
    args = jnp.asarray([1.0, 2.0, -1.0]), stack(), buffer
    plain = call(*args)
    compiled = jax.jit(call)(*args)
    assert seen == [9, 5, 9]  # float32, the long one, one with a float16 buffer, bfloat16, int32; then other platforms
    jax.tree.map(np.testing.assert_array_equal, plain, compiled)
    assert jax.tree.map(jnp.shape, compiled[0]) == SHAPES
    assert jax.tree.map(lambda leaf: leaf.dtype, compiled[1][0]) == jax.tree.map(lambda leaf: leaf.dtype, PARAMS)


def test_draws_do_not_depend_on_joining():
    def draws(params):
        return joined(
            lambda params: Leaves(draw_like(jax.random.uniform, jax.random.key(1), params)), params, Leaves(params)
        )

    params = {key: leaf for key, leaf in PARAMS.items() if key not in DTYPES}
    plain, compiled = draws(params), jax.jit(draws)(params)
    jax.tree.map(np.testing.assert_array_equal, plain, compiled)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(plain)])
    assert len(set(flat.tolist())) > 0.99 * flat.size


@pytest.mark.parametrize("wrapped", [False, True])
def test_states_keep_the_structure_of_the_parameters(wrapped):
    tx = mtl.conflict_free_momentum(K)
    tx = mtl.shared_private(tx, mtl.under(*"abc")) if wrapped else tx
    state = tx.init(PARAMS)
    update, after = jax.jit(lambda grads, state: tx.update(grads, state, PARAMS))(stack(), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), update) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), PARAMS
    )


@pytest.mark.parametrize("mixed", ["params", "clean_grads"])
def test_a_wrapper_draws_the_same_numbers_whatever_the_dtypes(mixed):
    dtypes = {"a": jnp.float32, "b": jnp.bfloat16, "c": jnp.float32, "d": jnp.bfloat16}
    shapes = {"a": (4,), "b": (2, 3), "c": (5,), "d": (4,)}
    rng = np.random.default_rng(0)
    grads = {name: jnp.asarray(rng.normal(size=(K, *shape)), jnp.float32) for name, shape in shapes.items()}
    narrow = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), grads, dtypes)
    params = jax.tree.map(lambda leaf: leaf[0], narrow if mixed == "params" else grads)
    clean = grads if mixed == "params" else narrow
    tx = mtl.fs_mtl(mtl.graddrop(), mode="direct")
    state = tx.init(params)

    def update(grads, clean):
        return tx.update(grads, state, params, clean_grads=clean)[0]

    jax.tree.map(np.testing.assert_array_equal, update(grads, clean), jax.jit(update)(grads, clean))


@pytest.mark.parametrize("mode", ["individual", "direct"])
def test_a_wrapper_joins_leaves_for_a_method_that_treats_all_alike(mode):
    """The method's state and parameters too; results are those without jit, where nothing is joined."""
    seen = []

    def rule(task_grads, *, state):
        seen.append(len(jax.tree.leaves(task_grads)))
        held = jax.tree.map(lambda m, g: 0.5 * m + g.astype(m.dtype), state, task_grads)
        return jax.tree.map(lambda m: jnp.mean(m, 0, dtype=m.dtype), held), held

    params = {name: leaf for name, leaf in PARAMS.items() if name != "ids"}
    grads, clean = ({name: factor * stack()[name] for name in params} for factor in (1, 2))
    base = mtl.from_rule(rule, mtl.stacks.zeros, num_tasks=K, leaves_alike=True)
    tx = mtl.fs_mtl(mtl.with_metrics(base, K), mode=mode)

    def two(grads, clean):
        state = tx.init(params)
        _, state = tx.update(grads, state, params, clean_grads=clean)
        return tx.update(clean, state, params, clean_grads=grads)

    plain = two(grads, clean)
    eager = len(seen)
    compiled = jax.jit(two)(grads, clean)
    assert set(seen[:eager]) == {8}
    assert set(seen[eager:]) == {3, 8}  # float32, the long one, bfloat16; then other platforms
    assert jax.tree.structure(plain) == jax.tree.structure(compiled)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled), strict=True):
        eps = float(jnp.finfo(a.dtype).eps) if jnp.issubdtype(a.dtype, jnp.floating) else 0
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=32 * eps, atol=32 * eps)
