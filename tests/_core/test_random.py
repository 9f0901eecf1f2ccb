"""Random keys."""

import jax
import numpy as np
import pytest
from factories import arguments
from harness import flat, zeros

import mtlgrad_jax as mtl


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
