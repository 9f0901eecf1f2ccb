"""A state that meets another number of tasks."""

import jax.numpy as jnp
import optax
import pytest
from harness import zeros

import mtlgrad_jax as mtl
from mtlgrad_jax import stacks

MADE = {
    "a method": lambda K: mtl.uw(K),
    "buffers": lambda K: mtl.db_mtl(num_tasks=K),
    "a wrapper": lambda K: mtl.with_metrics(mtl.mgda(), K),
    "in a chain": lambda K: mtl.chain(mtl.gradnorm(K), optax.adam(1e-3)),
    "per_task": lambda K: optax.chain(mtl.per_task(optax.adam(1e-3), K), mtl.mean()),
    "accumulate": lambda K: mtl.accumulate(mtl.mean(), K, steps=2),
}


@pytest.mark.parametrize("old", [1, 3])
@pytest.mark.parametrize("kind", MADE)
def test_a_state_for_another_number_of_tasks_raises(kind, old, unchecked):
    """A state for one task, too, although its entries would broadcast."""
    state = MADE[kind](old).init(zeros())
    with pytest.raises(ValueError, match=r"`state` must be made by init, with the same num_tasks .* expected \(4"):
        MADE[kind](4).update(stacks.zeros(zeros(), 4), state, zeros(), losses=jnp.ones(4))
