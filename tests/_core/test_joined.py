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
    return {key: jnp.asarray(9 * rng.normal(size=(K, *leaf.shape)), leaf.dtype) for key, leaf in PARAMS.items()}


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
