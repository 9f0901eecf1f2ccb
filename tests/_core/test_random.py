"""Random keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import arguments
from harness import flat, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax._core.random import uniform


def test_a_given_key_survives_donation():
    key = jax.random.key(5)
    tx = mtl.pcgrad(key=key)
    step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=1)
    first, second = (step(arguments()[0], tx.init(zeros()))[0] for _ in range(2))
    np.testing.assert_array_equal(flat(first), flat(second))
    jax.random.normal(key)


@pytest.mark.parametrize(
    "key", [7, np.int32(7), jax.random.key(7), jax.random.PRNGKey(7)], ids=["int", "array", "typed", "raw"]
)
@pytest.mark.usefixtures("unchecked")
def test_keys_in_any_form(key):
    grads, _, _ = arguments()
    first, second = (tx.update(grads, tx.init(zeros()))[0] for tx in (mtl.pcgrad(key=7), mtl.pcgrad(key=key)))
    np.testing.assert_array_equal(flat(first), flat(second))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("partitionable", [True, False])
def test_uniform_draws_are_those_of_jax(impl, dtype, partitionable):
    """On a CPU they are computed here, and only there: results must not depend on the device."""
    with jax.threefry_partitionable(partitionable):
        for seed in (0, 1, 2**32 - 1):
            for shape in ((), (0,), (3,), (5, 1, 7)):
                key = jax.random.key(seed, impl=impl)
                draws = uniform(key, shape, dtype)
                assert draws.dtype == dtype
                np.testing.assert_array_equal(draws, jax.random.uniform(key, shape, dtype))
    assert len(set(np.asarray(uniform(jax.random.key(0, impl=impl), (1000,), jnp.float32)).tolist())) > 990
