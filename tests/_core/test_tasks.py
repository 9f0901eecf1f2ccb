"""Tasks under names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


NESTED = {
    "alone": lambda m: m,
    "in a chain": lambda m: mtl.chain(m, optax.sgd(1.0)),
    "skipping": mtl.skip_nonfinite_tasks,
    "with heads": lambda m: mtl.shared_private(m, lambda path: True),
    "behind a stranger": lambda m: mtl.skip_nonfinite_tasks(optax.chain(m, optax.identity())),
    "accumulated": lambda m: mtl.accumulate(mtl.chain(mtl.skip_nonfinite_tasks(m), optax.sgd(1.0)), K, 1),
    "deep": lambda m: mtl.skip_nonfinite_tasks(mtl.partition({True: mtl.with_metrics(m, K)}, lambda path: True)),
}


@pytest.mark.parametrize("around", NESTED)
def test_the_functions_of_a_method_get_arrays(around):
    """In the order of the sorted names, which come beside them."""
    seen = []

    def update(task_grads, state, params, **extra):
        seen.append(extra)
        return mtl.stacks.combine(jnp.ones(K), task_grads), state

    tx = NESTED[around](mtl.Method(mtl.mean().init, update))
    mask = {"c": jnp.asarray(False), "a": jnp.asarray(True), "b": jnp.asarray(True)}
    named = {"losses": {"c": 3.0, "a": 1.0, "b": 2.0}, "preference": {"c": 0.3, "b": 0.2, "a": 0.1}}
    tx.update(arguments()[0], tx.init(zeros()), zeros(), task_mask=mask, **named)
    for extra in seen:
        np.testing.assert_allclose(extra["losses"][:2], [1, 2])
        np.testing.assert_allclose(extra["preference"], [0.1, 0.2, 0.3])
        assert extra["task_mask"].tolist() == [True, True, False]
        assert extra["task_names"] == jax.tree.structure(mask)
    tx.update(arguments()[0], tx.init(zeros()), zeros())
    assert seen[-1]["task_mask"].tolist() == [True] * K
    assert seen[-1].get("losses") is None


@jax.tree_util.register_pytree_node_class
class Counted:
    """Losses that count how often they are taken apart."""

    def __init__(self, *losses):
        self.losses, self.times = losses, 0

    def tree_flatten(self):
        self.times += 1
        return self.losses, None

    @classmethod
    def tree_unflatten(cls, _, losses):
        return cls(*losses)


@pytest.mark.parametrize("around", NESTED)
def test_named_losses_are_taken_apart_no_more_often_inside_other_wrappers(around):
    counts = []
    for tx in (mtl.gls(), NESTED[around](mtl.smoothed(mtl.update_every(mtl.gls(), K, 2), K))):
        losses = Counted(1.0, 2.0, 3.0)
        tx.update(arguments()[0], tx.init(zeros()), zeros(), losses=losses)
        counts.append(losses.times)
    assert counts[0] == counts[1]
