"""One solve for each group of leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import P, flat, tree, zeros
from walks import LABELS, MASKS, G, K, walk

import mtlgrad_jax as mtl


@pytest.mark.sample(1)
@pytest.mark.parametrize("method", [lambda: mtl.imtl_g(), lambda: mtl.gradvac(num_tasks=K, beta=0.5, order="fixed")])
def test_grouped_is_one_method_for_each_group(method):
    """The same as `partition` with one copy per group."""
    updates, _ = walk(mtl.grouped(method(), LABELS), masks=MASKS)
    wanted, _ = walk(mtl.partition({"one": method(), "two": method()}, LABELS), masks=MASKS)
    np.testing.assert_allclose(updates, wanted, rtol=1e-5, atol=1e-6)
    by_leaf, _ = walk(mtl.grouped(method(), lambda path: jax.tree_util.keystr(path)), masks=MASKS)
    np.testing.assert_array_equal(by_leaf, updates)


HEADS = {"trunk": "trunk", "heads": {"a": "a", "b": "b", "c": "c"}}
USES = {name: {task: task == name for task in "abc"} for name in "abc"}
NAMED = {"a": 1.0, "b": 2.0, "c": 3.0}


def with_heads():
    """Three tasks with one head each; in the trunk, the gradient of c is zero and that of b tiny."""
    trunk = np.array([[3.0, 1.0], [1e-25, -1e-25], [0.0, 0.0]])
    heads = {name: np.where(np.arange(3)[:, None] == i, i + 1.0, 0.0) for i, name in enumerate("abc")}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"trunk": trunk, "heads": heads})


def first_rows(grads):
    return jax.tree.map(lambda leaf: leaf[0], grads)


@pytest.mark.sample(2)
@pytest.mark.parametrize("uses", [None, USES])
@pytest.mark.parametrize("mask", [(True, True, True), (True, True, False), (False, True, False)])
def test_grouped_mean_is_the_mean(uses, mask):
    grads, tx = with_heads(), mtl.grouped(mtl.mean(), HEADS, uses)
    params, named = first_rows(grads), dict(zip("abc", map(jnp.asarray, mask), strict=True))
    update, state = tx.update(grads, tx.init(params), params, losses=NAMED, task_mask=named)
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf)[list(mask)].mean(0), grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), update, wanted)
    np.testing.assert_array_equal(state.info.result, 0)


def test_a_task_without_a_part_in_a_group_has_no_vote_there():
    """MGDA in the trunk is between a and b: all entries of c are zero, but of b only the squares are."""
    grads, tx = with_heads(), mtl.grouped(mtl.mgda(), HEADS)
    update, _ = tx.update(grads, tx.init(first_rows(grads)))
    np.testing.assert_allclose(update["trunk"], 2 / 3 * np.array([1e-25, -1e-25]), rtol=1e-4)
    assert [float(update["heads"][name][0]) for name in "abc"] == pytest.approx([1 / 3, 2 / 3, 1])
    tx = mtl.grouped(mtl.mgda(), HEADS, {**USES, "trunk": {"a": True, "b": False, "c": False}})
    update, _ = tx.update(grads, tx.init(first_rows(grads)), losses=NAMED)
    np.testing.assert_allclose(update["trunk"], [1, 1 / 3], rtol=1e-6)


def test_a_group_that_nobody_uses_is_no_empty_step():
    """Transformations after the method still run, even if all gradients are zero."""
    tx = mtl.chain(mtl.grouped(mtl.imtl_g(), LABELS), optax.sgd(0.1, momentum=0.9))
    state, first_leaf = tx.init(zeros()), np.arange(P) == 0
    for grads in (G[0], np.where(first_leaf, 0, G[1]), np.zeros((K, P))):
        update, state = tx.update(tree(jnp.asarray(grads, jnp.float32)), state, zeros())
        assert flat(update).all()
        np.testing.assert_array_equal(mtl.metrics(state)["result"], 0)


def test_grouped_refuses_uses(unchecked):
    grads = with_heads()
    for uses in ([True], {"d": [True] * 3}):
        with pytest.raises(ValueError, match="`uses` must"):
            mtl.grouped(mtl.imtl_g(), HEADS, uses).init(first_rows(grads))
    for flags, losses in (([True] * 2, None), ([1, 0, 0], None), ([True, False, False], NAMED)):
        tx = mtl.grouped(mtl.imtl_g(), HEADS, {"a": flags})
        with pytest.raises(ValueError, match=r"`uses\['a'\]` must"):
            tx.update(grads, tx.init(first_rows(grads)), losses=losses)


def test_groups_skip_together_and_count_apart():
    broken = G.copy()
    broken[1, 2, 0] = np.nan
    tx = mtl.grouped(mtl.smoothed(mtl.imtl_g(), K), LABELS)
    updates, states = walk(tx, broken)
    assert not updates[1].any()
    np.testing.assert_array_equal(np.delete(updates, 1, axis=0), walk(tx, np.delete(G, 1, axis=0))[0])
    assert mtl.metrics(states[-1])["skipped"].tolist() == [1, 1]


def test_groups_draw_on_their_own():
    """Two groups with the same gradients, many steps: their random orders differ."""
    state = mtl.grouped(mtl.pcgrad(), LABELS).init(zeros())
    first, second = state.method.key.data
    assert (first != second).any()


def test_a_group_of_integers_only():
    params = {"n": jnp.zeros(2, int), "w": jnp.ones(2)}
    method = mtl.grouped(mtl.mgda(), {"n": "a", "w": "b"})
    jacobian = mtl.linearize(lambda p: jnp.stack([p["w"][0], 2 * p["w"][1]]), params)
    update, _ = method.update(jacobian, method.init(params))
    np.testing.assert_allclose(update["w"], [0.8, 0.4], rtol=1e-6)
    assert not update["n"].any()
