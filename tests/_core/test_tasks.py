"""Tasks under names."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import ALL, FACTORIES, K, arguments
from harness import EVERY, flat, make, raises_naming, under_names, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import ROWS


@pytest.mark.parametrize("name", ALL)
def test_named_tasks(name):
    """Names are sorted; a mask must have the same names."""
    smallest = ROWS[name].kwargs(K) if name in EVERY else {}
    per_task = {key: under_names(values) for key, values in smallest.items() if isinstance(values, (list, tuple))}
    tx = make(name, K, **per_task) if per_task else FACTORIES[name]()
    grads, losses, _ = arguments()
    named = dict(zip("abc", losses, strict=True))
    mask = {"c": jnp.asarray(False), "a": jnp.asarray(True), "b": jnp.asarray(True)}
    one, _ = tx.update(grads, tx.init(zeros()), losses=named, task_mask=mask)
    plain = FACTORIES[name]()
    other, _ = plain.update(grads, plain.init(zeros()), losses=losses, task_mask=jnp.asarray([True, True, False]))
    np.testing.assert_array_equal(flat(one), flat(other))
    with pytest.raises(ValueError, match=raises_naming("task_mask")):
        tx.update(grads, tx.init(zeros()), losses=named, task_mask=jnp.ones(K, bool))
    with pytest.raises(ValueError, match=raises_naming("task_mask")):
        tx.update(grads, tx.init(zeros()), losses=named, task_mask={"a": True, "b": True, "d": True})


def test_flat_losses_with_named_arguments_would_swap_tasks():
    grads = arguments()[0]
    tx = mtl.constant({"a": 1.0, "b": 2.0, "c": 3.0})
    with pytest.raises(ValueError, match=raises_naming("weights")):
        tx.update(grads, tx.init(zeros()), losses=jnp.ones(K))
    tx = mtl.mean()
    with pytest.raises(ValueError, match=raises_naming("task_mask")):
        tx.update(grads, tx.init(zeros()), losses=jnp.ones(K), task_mask=dict.fromkeys("abc", True))


def test_preference_of_upgrad():
    named = mtl.upgrad(preference={"a": 1.0, "b": 0.0, "c": 2.0})
    flat_one = mtl.upgrad(preference=[1.0, 0.0, 2.0])
    grads, losses, _ = arguments()
    one, _ = named.update(grads, named.init(zeros()), losses=dict(zip("abc", losses, strict=True)))
    other, _ = flat_one.update(grads, flat_one.init(zeros()))
    np.testing.assert_array_equal(flat(one), flat(other))
    with pytest.raises(ValueError, match=raises_naming("preference")):
        mtl.upgrad(preference=[-1.0, 2.0])


def test_unstack_names_the_tasks():
    losses = {"seg": jnp.asarray(2.0), "depth": jnp.asarray(1.0)}
    assert mtl.unstack(jnp.asarray([1.0, 2.0]), like=losses) == losses
    assert mtl.unstack(jnp.asarray([1.0, 2.0]), like=jnp.zeros(2)).shape == (2,)
    with pytest.raises(ValueError, match=raises_naming("values")):
        mtl.unstack(jnp.ones(3), like=losses)
