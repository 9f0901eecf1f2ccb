"""What holds for several wrappers, alone and nested."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import P, raises_naming, tree, zeros
from walks import LABELS, RNG, SHARED, G, K, walk

import mtlgrad_jax as mtl

OUTER = {
    "alone": lambda m: m,
    "shared_private": lambda m: mtl.shared_private(m, SHARED),
    "weighted": lambda m: mtl.shared_private(m, SHARED, private="weighted"),
    "partition": lambda m: mtl.partition({"one": m, "two": optax.chain(mtl.mean(), optax.sgd(0.1, 0.9))}, LABELS),
    "gram_over": lambda m: mtl.gram_over(m, SHARED),
    "grouped": lambda m: mtl.grouped(m, LABELS),
    "non_conflicting": lambda m: mtl.non_conflicting(m),
    "with_metrics": lambda m: mtl.with_metrics(m, K),
    "skip_nonfinite_tasks": lambda m: mtl.skip_nonfinite_tasks(m),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", [lambda m: mtl.update_every(m, K, 9), lambda m: mtl.smoothed(m, K)])
def test_training_goes_on_after_a_skipped_step(inner, outer):
    """The steps after a step with a NaN are the same as without it."""
    broken = np.insert(G, 1, np.nan, axis=0)
    tx = OUTER[outer](inner(mtl.imtl_g()))
    updates, states = walk(tx, broken)
    assert not updates[1].any()
    np.testing.assert_array_equal(np.delete(updates, 1, axis=0), walk(tx, G)[0])
    found = mtl.metrics(states[-1])
    assert all((value == 0).all() for key, value in found.items() if key.endswith("result"))


@pytest.mark.parametrize(
    ("wrap", "head"),
    [(lambda m: mtl.shared_private(m, SHARED), 1), (mtl.skip_nonfinite_tasks, 2)],
    ids=["shared", "skip"],
)
def test_what_keeps_the_task_axis_is_refused(wrap, head):
    """An ordinary optimizer would change the shapes of the parameters; after a method it is accepted."""
    for transform in (optax.sgd(0.1), mtl.per_task(optax.identity(), K)):
        tx = wrap(transform)
        with pytest.raises(ValueError, match=r"`method` must take the task axis away: leaf \["):
            tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()), zeros())
    chained, _ = walk(wrap(optax.chain(mtl.imtl_g(), optax.scale(2.0))))
    np.testing.assert_allclose(chained, [head, *[2] * (P - 1)] * walk(wrap(mtl.imtl_g()))[0], rtol=1e-6)


TRUNK = mtl.under("first", "last")
AROUND = {
    "shared_private": lambda m: mtl.shared_private(m, TRUNK),
    "partition": lambda m: mtl.partition({True: m, False: mtl.sum()}, TRUNK),
}
INSIDE = {
    "function": (mtl.gram_over(mtl.mgda(), mtl.under("last")), 6.0),
    "tree": (mtl.gram_over(mtl.mgda(), {"first": False, "last": True, "heads": {"a": False, "b": False}}), 6.0),
    "labels": (mtl.grouped(mtl.mgda(), {"first": "first", "last": "last", "heads": "heads"}), 4.0),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("inside", INSIDE)
def test_leaves_are_named_alike_inside_another_wrapper(around, inside):
    """The unit gradients of the last layer get halves; the first layer's 4 and 8 get these, or MGDA's own weights."""

    def losses_fn(p):
        return {"a": p["last"][0] + 4 * p["first"] + 5 * p["heads"]["a"], "b": p["last"][1] + 8 * p["first"]}

    method, first = INSIDE[inside]
    tx, zero = AROUND[around](method), jnp.zeros(())
    params = {"first": zero, "last": jnp.zeros(2), "heads": {"a": zero, "b": zero}}

    @jax.jit
    def both(params, state):
        stored = tx.update(mtl.task_value_and_grad(losses_fn)(params)[1], state, params)[0]
        return stored, tx.update(mtl.linearize(losses_fn, params), state, params)[0]

    for update in both(params, tx.init(params)):
        np.testing.assert_allclose(update["first"], first, rtol=1e-6)
        np.testing.assert_allclose(update["last"], 0.5, rtol=1e-6)
        assert (update["heads"]["a"], update["heads"]["b"]) == (5, 0)


@pytest.mark.parametrize(
    "wrap", [lambda m: mtl.smoothed(m, K), lambda m: mtl.update_every(m, K, 2), lambda m: mtl.non_conflicting(m)]
)
def test_wrappers_of_weights_refuse_what_has_none(wrap):
    assert wrap(mtl.imtl_g()).weigh is not None
    for other in (mtl.trimmed_mean(), mtl.shared_private(mtl.imtl_g(), SHARED), mtl.skip_nonfinite_tasks(mtl.imtl_g())):
        with pytest.raises(ValueError, match=raises_naming("method")):
            wrap(other)


@pytest.mark.parametrize("wrapper", ["smoothed", "update_every"])
def test_per_task_arguments_keep_their_names_inside_wrappers(wrapper):
    wrap = {"smoothed": lambda m: mtl.smoothed(m, 2), "update_every": lambda m: mtl.update_every(m, 2, 1)}[wrapper]
    grads, losses = jnp.asarray([[1.0, 0.0], [0.0, 3.0]]), {"seg": jnp.asarray(0.1), "depth": jnp.asarray(0.2)}
    tx = wrap(mtl.constant({"seg": 1.0, "depth": 2.0}))
    update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
    assert update.tolist() == [2.0, 3.0]
    tx = wrap(mtl.constant([1.0, 2.0]))
    with pytest.raises(ValueError, match=raises_naming("weights")):
        tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)


@pytest.mark.usefixtures("unchecked")
def test_wrappers_under_inject_hyperparams():
    """A float may be a schedule; a count must be static, and the error says how."""
    half = optax.inject_hyperparams(mtl.smoothed, static_args=("num_tasks",))(
        method=mtl.imtl_g(), num_tasks=K, decay=lambda step: 0.5
    )
    np.testing.assert_allclose(walk(half)[0], walk(mtl.smoothed(mtl.imtl_g(), K, 0.5))[0], rtol=1e-5, atol=1e-6)
    for factory, name, kwargs in (
        (mtl.trimmed_mean, "trim", {"trim": 1}),
        (mtl.update_every, "k", {"method": mtl.imtl_g(), "num_tasks": K, "k": 2}),
    ):
        static = [other for other in kwargs if other != name]
        with pytest.raises(ValueError, match=rf"`{name}` must.*static_args=\('{name}',\)"):
            optax.inject_hyperparams(factory, static_args=static)(**kwargs).init(zeros())


@jax.tree_util.register_pytree_with_keys_class
class Model:
    """A callable pytree, like Equinox models."""

    def __init__(self, trunk, heads):
        self.trunk, self.heads = trunk, heads

    def __call__(self, x):
        raise AssertionError

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("trunk"), self.trunk), (key("heads"), self.heads)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


CONTAINERS = {
    "dict": lambda trunk, heads: {"trunk": trunk, "heads": heads},
    "model": Model,
    "tuple": lambda trunk, heads: (trunk, heads),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_flags_and_labels_in_any_form(container):
    """Whole trees, upper parts of trees, functions of a path; callable models count as trees."""
    of = CONTAINERS[container]
    params = of({"a": jnp.zeros(2), "b": jnp.zeros(1)}, [jnp.zeros(1), jnp.zeros(2)])
    grads = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=(K, *p.shape)), jnp.float32), params)
    first = 0 if container == "tuple" else "trunk"
    flags = [of({"a": True, "b": True}, [False, False]), of(True, False), mtl.under(first)]
    for wrap in (mtl.shared_private, mtl.gram_over, mtl.grouped):
        updates = []
        for each in flags:
            tx = wrap(mtl.imtl_g(), each)
            updates.append(jax.tree.leaves(tx.update(grads, tx.init(params))[0]))
        for other in updates[1:]:
            for a, b in zip(updates[0], other, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("unchecked")
def test_flags_that_do_not_fit_are_refused():
    for wrong in ({"w": True}, {"w": True, "b": True, "c": False}, [True, False], True):
        with pytest.raises(ValueError, match=raises_naming("is_shared")):
            mtl.shared_private(mtl.imtl_g(), wrong).init(zeros())
    for names in ((), (None,), (True,), (1.5,)):
        with pytest.raises(ValueError, match=raises_naming("names")):
            mtl.under(*names)
