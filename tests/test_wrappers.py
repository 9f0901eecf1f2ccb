"""The wrappers, and the tools that read their states."""

import certificates
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from families import FAMILIES, stack
from harness import P, flat, raises_naming, tree, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax.solvers._solution import BIASED, NO_TASKS, NONFINITE, SOLVED

K = 3
RNG = np.random.default_rng(0)
G = RNG.normal(size=(6, K, P)).astype(np.float32)
EVERYONE = np.ones(K, bool)
SHARED = {"b": False, "w": True}


def walk(tx, grads=G, masks=None, losses=None):
    """The updates and states of all steps."""
    step = jax.jit(lambda g, s, m, loss: tx.update(tree(g), s, zeros(), losses=loss, task_mask=m))
    state, updates, states = tx.init(zeros()), [], []
    for t in range(len(grads)):
        mask = EVERYONE if masks is None else masks[t]
        update, state = step(jnp.asarray(grads[t]), state, jnp.asarray(mask), None if losses is None else losses[t])
        updates.append(np.asarray(flat(update), float))
        states.append(state)
    return np.stack(updates), states


def weights_of(tx, **kwargs):
    _, states = walk(mtl.with_metrics(tx, num_tasks=K), **kwargs)
    return np.stack([mtl.metrics(state)["weights"] for state in states])


MASKS = np.asarray([[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]], bool)


@pytest.mark.sample(1)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_smoothed_averages_weights(decay):
    raw = weights_of(mtl.imtl_g(), masks=MASKS)
    wanted = reference.smoothed(raw, MASKS, decay)
    np.testing.assert_allclose(
        weights_of(mtl.smoothed(mtl.imtl_g(), K, decay), masks=MASKS), wanted, rtol=1e-5, atol=1e-6
    )


INIT = [0.3, 1.0, -2.0]


def test_smoothed_starts_at_given_weights():
    wanted = reference.smoothed(weights_of(mtl.imtl_g(), masks=MASKS), MASKS, 0.9, INIT)
    found = weights_of(mtl.smoothed(mtl.imtl_g(), K, 0.9, INIT), masks=MASKS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    tx = mtl.smoothed(mtl.mean(), K, 0.9, {"c": INIT[2], "a": INIT[0], "b": INIT[1]})
    _, state = tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()), losses=dict.fromkeys("abc", 1.0))
    np.testing.assert_allclose(state.weights, 0.9 * np.asarray(INIT) + 0.1 / 3, rtol=1e-6)


@pytest.mark.sample(1)
@pytest.mark.parametrize("init", [[1.0, 1.0], dict.fromkeys("abc", 1.0)], ids=["length", "names"])
def test_the_first_averages_belong_to_the_tasks(init):
    tx = mtl.smoothed(mtl.imtl_g(), K, init=init)
    with pytest.raises(ValueError, match=raises_naming("init")):
        tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()), losses=jnp.ones(K))


@pytest.mark.nightly
def test_weights_averaged_when_they_are_computed_or_in_every_step():
    raw, first, wanted = weights_of(mtl.imtl_g()), np.asarray(INIT), []
    for t in range(6):
        first = 0.9 * first + 0.1 * raw[t] if t % 2 == 0 else first
        wanted.append(first)
    rare = mtl.update_every(mtl.smoothed(mtl.imtl_g(), K, 0.9, INIT), K, 2)
    np.testing.assert_allclose(weights_of(rare), wanted, rtol=1e-5, atol=1e-6)
    always = mtl.smoothed(mtl.update_every(mtl.imtl_g(), K, 2), K, 0.9, INIT)
    stale = reference.smoothed(raw[[0, 0, 2, 2, 4, 4]], np.ones_like(MASKS), 0.9, INIT)
    np.testing.assert_allclose(weights_of(always), stale, rtol=1e-5, atol=1e-6)


def test_smoothed_survives_a_broken_step():
    broken = G.copy()
    broken[2] = np.nan
    updates, states = walk(mtl.smoothed(mtl.imtl_g(), K, 0.9), broken)
    assert not updates[2].any()
    assert np.isfinite(updates).all()
    np.testing.assert_array_equal(states[1].weights, states[2].weights)


@pytest.mark.parametrize("k", [1, 3])
def test_update_every_reuses_weights(k):
    raw, stale = weights_of(mtl.imtl_g()), weights_of(mtl.update_every(mtl.imtl_g(), K, k))
    np.testing.assert_allclose(stale, raw[np.arange(len(G)) // k * k], rtol=1e-5, atol=1e-6)


def test_between_solves_the_state_says_that_nothing_had_to_be_solved():
    masks = np.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    _, states = walk(
        mtl.update_every(mtl.nash_mtl(), K, 9), np.concatenate([np.full_like(G[:1], np.nan), G[:5]]), [masks[0], *masks]
    )
    infos = [state.inner.info for state in states]
    assert [int(info.result) for info in infos] == [NONFINITE, SOLVED, SOLVED, NO_TASKS, SOLVED, SOLVED]
    assert [int(info.steps) > 0 for info in infos[1:]] == [True, False, False, False, True]
    assert [float(info.residual) for info in infos[2:5]] == [0, 0, 0]
    assert {int(info.skipped) for info in infos} == {1}


def test_update_every_solves_again_for_other_tasks():
    masks = np.asarray([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1]], bool)
    raw = weights_of(mtl.imtl_g(), masks=masks)
    stale = weights_of(mtl.update_every(mtl.imtl_g(), K, 10), masks=masks)
    np.testing.assert_allclose(stale, raw[[0, 0, 2, 2, 4, 4]], atol=1e-6)


def test_update_every_between_solves_skips_a_broken_step_and_a_broken_solve_is_repeated():
    for broken_step in (0, 1):
        broken = G.copy()
        broken[broken_step] = np.nan
        updates, states = walk(mtl.update_every(mtl.imtl_g(), K, 3), broken)
        assert np.isfinite(updates).all()
        assert not updates[broken_step].any()
        assert int(mtl.metrics(states[-1])["skipped"]) == 1
    updates, _ = walk(mtl.update_every(mtl.imtl_g(), K, 3), np.concatenate([broken[1:2], G]))
    np.testing.assert_allclose(updates[1:], walk(mtl.update_every(mtl.imtl_g(), K, 3))[0], rtol=1e-5, atol=1e-6)


def test_the_gramian_is_only_formed_when_due():
    """Between solves no product of two stacks is computed: it is inside a branch."""
    tx = mtl.update_every(mtl.imtl_g(), K, 5)
    jaxpr = jax.make_jaxpr(lambda g, s: tx.update(tree(g), s))(jnp.asarray(G[0]), tx.init(zeros()))
    outside = [str(eqn.primitive) for eqn in jaxpr.eqns]
    assert "cond" in outside
    assert not {"dot_general", "while", "scan"} & set(outside)
    assert "dot_general" in str(jaxpr)


def test_skip_nonfinite_tasks_is_as_if_they_were_absent():
    broken, masks = G.copy(), np.ones((6, K), bool)
    broken[1, 2, 3], broken[3, 0] = np.inf, np.nan
    masks[1, 2] = masks[3, 0] = False
    for method in (mtl.imtl_g(), mtl.trimmed_mean(trim=0), mtl.gradnorm(num_tasks=K)):
        losses = jnp.abs(jnp.asarray(G[:, :, 0])) + 0.1
        updates, states = walk(mtl.skip_nonfinite_tasks(method), broken, losses=losses)
        wanted, _ = walk(method, G, masks, losses=losses)
        np.testing.assert_array_equal(updates, wanted)
        assert int(states[-1].dropped) == 2
    losses = losses.at[0, 1].set(jnp.nan)
    updates, states = walk(mtl.skip_nonfinite_tasks(mtl.uw(num_tasks=K)), losses=losses)
    assert np.isfinite(updates).all()
    assert int(states[-1].dropped) == 1
    _, states = walk(mtl.skip_nonfinite_tasks(mtl.mean()), broken, masks)
    assert int(states[-1].dropped) == 0  # they were absent anyway


def test_shared_private_own():
    tx = mtl.shared_private(mtl.imtl_g(), SHARED)
    updates, _ = walk(tx, masks=MASKS)
    alone, _ = walk(mtl.imtl_g(), np.where(np.arange(P) == 0, 0, G).astype(np.float32), MASKS)
    np.testing.assert_allclose(updates[:, 1:], alone[:, 1:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates[:, 0], (G[:, :, 0] * MASKS).sum(axis=1), rtol=1e-5, atol=1e-6)


def test_shared_private_weighted():
    updates, _ = walk(mtl.shared_private(mtl.imtl_g(), SHARED, private="weighted"))
    weights = weights_of(mtl.imtl_g(), grads=np.where(np.arange(P) == 0, 0, G).astype(np.float32))
    np.testing.assert_allclose(updates, np.einsum("tk,tkp->tp", weights, G), rtol=1e-4, atol=1e-5)


def test_shared_private_by_path_with_any_kind_of_weighting():
    def is_shared(path):
        return path[0].key == "w"

    for method in (mtl.trimmed_mean(), mtl.db_mtl(num_tasks=K), mtl.with_metrics(mtl.pcgrad(), K)):
        losses = jnp.ones((6, K))
        by_path, _ = walk(mtl.shared_private(method, is_shared), losses=losses)
        by_tree, _ = walk(mtl.shared_private(method, SHARED), losses=losses)
        np.testing.assert_array_equal(by_path, by_tree)


def test_a_broken_head_skips_the_step():
    broken = G.copy()
    broken[0, 1, 0] = np.nan
    updates, states = walk(mtl.shared_private(mtl.imtl_g(), SHARED), broken)
    assert not updates[0].any()
    assert np.isfinite(updates).all()
    assert int(mtl.metrics(states[-1])["skipped"]) == 1


def test_a_step_that_the_method_skips_leaves_the_heads():
    broken = G.copy()
    broken[0, 1, 3] = np.nan
    updates, states = walk(mtl.shared_private(mtl.imtl_g(), SHARED), broken)
    assert not updates[0].any()
    assert int(mtl.metrics(states[-1])["skipped"]) == 1
    tx = mtl.partition({"one": mtl.imtl_g(), "two": mtl.db_mtl(num_tasks=K)}, {"b": "one", "w": "two"})
    losses = jnp.ones((6, K))
    updates, states = walk(tx, broken, losses=losses)
    assert not updates[0].any()
    np.testing.assert_array_equal(updates[1:], walk(tx, G[1:], losses=losses)[0])


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
LABELS = {"b": "two", "w": "one"}


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


def test_scalars_are_named_by_task_and_place(unchecked):
    losses = {"seg": {"fine": 0.0, "coarse": 0.0}, "depth": 0.0}
    tx = mtl.partition(
        {"one": mtl.with_metrics(mtl.imtl_g(), K), "two": mtl.grouped(mtl.imtl_g(), lambda path: 0)}, LABELS
    )
    _, state = tx.update(tree(jnp.asarray(G[0], jnp.float32)), tx.init(zeros()))
    found, logged = mtl.metrics(state), mtl.scalars(mtl.metrics(state), like=losses)
    assert all(value.ndim == 0 for value in logged.values())
    assert {"one.norms/seg.fine", "one.inner.residual", "two.result/0"} <= logged.keys()
    names = ["depth", "seg.coarse", "seg.fine"]
    assert [logged[f"one.weights/{name}"] for name in names] == found["one.weights"].tolist()
    assert logged["one.cosines/depth/seg.fine"] == found["one.cosines"][0, 2]
    flat_names = mtl.scalars(found, like=jnp.zeros(3))
    assert flat_names["one.norms/2"] == logged["one.norms/seg.fine"]
    with pytest.raises(ValueError, match=r"`metrics` must have one\.weights of shape"):
        mtl.scalars(found, like=jnp.zeros(2))
    with pytest.raises(ValueError, match="`metrics` must be what"):
        mtl.scalars(jnp.zeros(3), like=losses)


def test_metrics_of_a_skipped_step_are_those_before():
    broken = G.copy()
    broken[2, 1] = np.nan
    for method in (mtl.imtl_g(), mtl.mean(), mtl.trimmed_mean()):
        _, states = walk(mtl.with_metrics(method, K), broken)
        for old, new in zip(states[1].metrics, states[2].metrics, strict=True):
            np.testing.assert_array_equal(old, new)


def test_metrics_around_a_wrapper_count_the_tasks_that_were_used():
    broken = G.copy()
    broken[0, 1] = np.nan
    tx = mtl.with_metrics(mtl.skip_nonfinite_tasks(mtl.imtl_g()), K)
    _, states = walk(tx, broken)
    n = np.linalg.norm(G[0, [0, 2]], axis=1)
    similarity = mtl.metrics(states[0])["magnitude_similarity"]
    assert float(similarity) == pytest.approx(2 * n.prod() / (n**2).sum(), rel=1e-5)


def test_shared_private_refuses():
    with pytest.raises(ValueError, match=r"`is_shared` must be true for some leaf"):
        mtl.shared_private(mtl.imtl_g(), {"b": False, "w": False}).init(zeros())
    with pytest.raises(ValueError, match=raises_naming("is_shared")):
        mtl.shared_private(mtl.imtl_g(), {"x": True}).init(zeros())
    with pytest.raises(ValueError, match=raises_naming("method")):
        mtl.shared_private(mtl.trimmed_mean(), SHARED, private="weighted")


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


def test_gram_over_weighs_by_some_leaves_and_applies_to_all():
    only_w = np.where(np.arange(P) == 0, 0, G).astype(np.float32)
    updates, _ = walk(mtl.gram_over(mtl.imtl_g(), SHARED), masks=MASKS)
    weights = weights_of(mtl.imtl_g(), grads=only_w, masks=MASKS)
    np.testing.assert_allclose(updates, np.einsum("tk,tkp->tp", weights, G), rtol=1e-4, atol=1e-5)
    by_path, _ = walk(mtl.gram_over(mtl.imtl_g(), lambda path: path[0].key == "w"), masks=MASKS)
    np.testing.assert_array_equal(by_path, updates)
    with pytest.raises(ValueError, match=raises_naming("where")):
        mtl.gram_over(mtl.imtl_g(), {"b": False, "w": False}).init(zeros())
    with pytest.raises(ValueError, match=raises_naming("method")):
        mtl.gram_over(mtl.trimmed_mean(), SHARED)


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


@pytest.mark.parametrize("column", [0, 3])
def test_gram_over_skips_a_step_that_is_broken_anywhere(column):
    broken = G.copy()
    broken[1, 2, column] = np.nan
    updates, states = walk(mtl.gram_over(mtl.smoothed(mtl.imtl_g(), K), SHARED), broken)
    assert not updates[1].any()
    assert int(mtl.metrics(states[-1])["skipped"]) == 1
    np.testing.assert_array_equal(
        np.delete(updates, 1, axis=0), walk(mtl.gram_over(mtl.smoothed(mtl.imtl_g(), K), SHARED), np.delete(G, 1, 0))[0]
    )


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


def test_per_task_is_the_transformation_on_every_row():
    updates, _ = walk(optax.chain(mtl.per_task(optax.adam(0.1), K), mtl.sum()))
    total = np.zeros((6, P))
    for i in range(K):
        adam = optax.adam(0.1)
        state = adam.init(jnp.zeros(P))
        for t in range(6):
            update, state = adam.update(jnp.asarray(G[t, i]), state)
            total[t] += np.asarray(update)
    np.testing.assert_allclose(updates, total, rtol=1e-4, atol=1e-6)


def test_per_task_clips_every_task():
    tx = mtl.per_task(optax.clip_by_global_norm(1.0), K)
    clipped, _ = tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()))
    norms = np.linalg.norm(G[0], axis=1, keepdims=True)
    np.testing.assert_allclose(flat(clipped), G[0] / np.maximum(norms, 1), rtol=1e-5)


def test_per_task_keeps_what_is_absent_or_broken_out_of_the_states():
    broken = G.copy()
    broken[1, 2, 4] = np.nan
    masks = np.ones((6, K), bool)
    masks[1, 2] = False
    momentum = optax.chain(mtl.per_task(optax.trace(0.9), K), mtl.skip_nonfinite_tasks(mtl.imtl_g()))
    with_nan, _ = walk(momentum, broken)
    absent, _ = walk(momentum, G, masks)
    np.testing.assert_array_equal(with_nan, absent)
    assert np.isfinite(with_nan).all()


@pytest.mark.usefixtures("unchecked")
def test_per_task_refuses():
    with pytest.raises(ValueError, match=raises_naming("transform")):
        mtl.per_task("adam", K)
    tx = mtl.per_task(optax.identity(), K + 1)
    with pytest.raises(ValueError, match=raises_naming("num_tasks")):
        tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()))


NOISE = [(kind, rate) for kind in ("gaussian", "binary") for rate in (0.1, 0.5)]


@pytest.mark.parametrize(("kind", "rate"), NOISE)
def test_dropgrad_keeps_the_mean(kind, rate):
    """E[g'] = g, the variance is p/(1-p) g^2, and noise is independent across coordinates, tasks and steps."""
    tx = mtl.dropgrad(rate, kind, key=1)
    grads = tree(jnp.asarray(G[0]))
    _, drawn = jax.lax.scan(lambda s, _: tx.update(grads, s)[::-1], tx.init(zeros()), length=20_000)
    noise = np.asarray(flat(drawn), float) / G[0]
    variance, count = rate / (1 - rate), len(noise)
    np.testing.assert_allclose(noise.mean(axis=0), np.ones((K, P)), atol=5 * np.sqrt(variance / count))
    np.testing.assert_allclose(noise.var(axis=0), np.full((K, P), variance), rtol=0.1)
    if kind == "binary":
        np.testing.assert_allclose(np.unique(noise.round(4)), [0, round(1 / (1 - rate), 4)])
    columns = np.concatenate([noise[1:].reshape(count - 1, -1), noise[:-1].reshape(count - 1, -1)], axis=1)
    correlation = np.corrcoef(columns.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 6 / np.sqrt(count)


@pytest.mark.parametrize("kind", ["gaussian", "binary"])
def test_dropgrad_of_nothing_and_of_broken_and_absent_rows(kind):
    """A rate of zero changes nothing; absent or non-finite rows pass unchanged and do not affect the others' noise."""
    grads, start = tree(jnp.asarray(G[0])), mtl.dropgrad(key=2).init(zeros())
    same, _ = mtl.dropgrad(0.0, kind).update(grads, start)
    np.testing.assert_array_equal(flat(same), G[0])
    tx = mtl.dropgrad(0.5, kind)
    plain, _ = tx.update(grads, start)
    assert (np.asarray(flat(plain)) != G[0]).any(axis=1).all()
    absent, _ = tx.update(grads, start, task_mask=jnp.asarray([True, False, True]))
    np.testing.assert_array_equal(flat(absent)[1], G[0, 1])
    np.testing.assert_array_equal(flat(absent)[::2], flat(plain)[::2])
    broken = {**grads, "w": grads["w"].at[1, 0, 0].set(jnp.inf)}
    passed, _ = tx.update(broken, start)
    np.testing.assert_array_equal(flat(passed)[1], flat(broken)[1])
    np.testing.assert_array_equal(flat(passed)[::2], flat(plain)[::2])


@pytest.mark.nightly
def test_dropgrad_in_a_chain_under_jit_vmap_donation_and_bfloat16():
    tx = optax.chain(mtl.dropgrad(key=jax.random.key(3)), mtl.sum())
    first, second = walk(tx)[0], walk(tx)[0]
    np.testing.assert_array_equal(first, second)
    assert (first != walk(mtl.sum())[0]).any(axis=1).all()
    grads = jnp.asarray(G)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), tx.init(zeros()))
    together, _ = jax.vmap(lambda g, s: tx.update(tree(g), s))(grads, states)
    np.testing.assert_allclose(flat(together)[0], first[0], rtol=1e-5)
    step = jax.jit(lambda g, s: tx.update(tree(g), s), donate_argnums=1)
    for _ in range(2):
        np.testing.assert_allclose(flat(step(grads[0], tx.init(zeros()))[0]), first[0], rtol=1e-5)
    half, _ = mtl.dropgrad().update(tree(grads[0].astype(jnp.bfloat16)), mtl.dropgrad().init(zeros()))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.usefixtures("unchecked")
def test_the_rate_of_dropgrad_may_be_a_schedule():
    """Rates 0, 0.5: the first step changes nothing, the second is that of a fixed rate."""
    tx = optax.inject_hyperparams(mtl.dropgrad)(rate=lambda step: 0.5 * step, kind="binary", key=4)
    grads = tree(jnp.asarray(G[0]))
    first, state = jax.jit(tx.update)(grads, tx.init(zeros()))
    np.testing.assert_array_equal(flat(first), G[0])
    second, _ = jax.jit(tx.update)(grads, state)
    assert set(np.unique(np.asarray(flat(second) / G[0]).round(5))) == {0, 2}


WEIGHTINGS = {
    "mean": lambda: mtl.mean(),
    "constant": lambda: mtl.constant([1.0, -2.0, 0.5]),
    "cagrad": lambda: mtl.cagrad(),
    "pcgrad": lambda: mtl.pcgrad(),
    "uw": lambda: mtl.uw(num_tasks=K),
    "smoothed": lambda: mtl.smoothed(mtl.mgda(), K),
    "update_every": lambda: mtl.update_every(mtl.pcgrad(), K, 2),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_non_conflicting(name):
    """No task ascends, whatever the method and the gradients; a direction without conflict is unchanged."""
    losses = jnp.ones((len(FAMILIES), K))
    grads = np.stack([stack(family, K, P) for family in FAMILIES if family not in ("tiny", "huge")]).astype(np.float32)
    weights = weights_of(mtl.non_conflicting(WEIGHTINGS[name]()), grads=grads, losses=losses)
    for M, w in zip(np.einsum("tkp,tlp->tkl", grads, grads), weights, strict=True):
        n = np.sqrt(np.diag(M).astype(float))
        assert certificates.conflict(M, w, max(n.max(), n @ abs(w)) or 1) <= 1e-5
    orthogonal = np.broadcast_to(np.eye(K, P, dtype=np.float32), (2, K, P))
    plain, projected = (
        weights_of(m, grads=orthogonal, losses=losses)
        for m in (WEIGHTINGS[name](), mtl.non_conflicting(WEIGHTINGS[name]()))
    )
    np.testing.assert_allclose(projected, np.maximum(plain, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_non_conflicting_mean_is_dualproj():
    updates, _ = walk(mtl.non_conflicting(mtl.mean()), masks=MASKS)
    np.testing.assert_allclose(updates, walk(mtl.dualproj(), masks=MASKS)[0], rtol=1e-5, atol=1e-6)


def test_non_conflicting_skips_a_broken_step_of_a_method_that_sees_no_gradients():
    broken = G.copy()
    broken[1, 2, 4] = np.nan
    tx, losses = mtl.non_conflicting(mtl.uw(num_tasks=K)), jnp.ones((6, K))
    updates, states = walk(tx, broken, losses=losses)
    assert not updates[1].any()
    assert int(mtl.metrics(states[-1])["skipped"]) == 1
    np.testing.assert_array_equal(np.delete(updates, 1, axis=0), walk(tx, np.delete(G, 1, axis=0), losses=losses)[0])


def test_non_conflicting_counts_its_solve():
    _, states = walk(mtl.non_conflicting(mtl.mean()))
    assert max(int(mtl.metrics(state)["steps"]) for state in states) > 0


@pytest.mark.parametrize("make", [lambda: mtl.modo(num_tasks=K), lambda: mtl.sdmgrad(num_tasks=K)])
def test_a_cross_gramian_takes_the_place_of_the_gramian(make):
    """It need not be symmetric; the Gramian is then not computed; the result code says if it is missing."""
    method = make()
    cross = mtl.stacks.cross_gramian(tree(jnp.asarray(G[0])), tree(jnp.asarray(G[1])))
    np.testing.assert_allclose(cross, G[0] @ G[1].T, rtol=1e-4, atol=1e-5)

    def never():
        raise AssertionError

    weights, state = method.weigh(never, method.init(None), cross_gramian=cross)
    assert state.info.result == SOLVED
    assert float(jnp.sum(weights)) == pytest.approx(1, rel=1e-5)
    alone, state = method.weigh(cross @ cross.T, method.init(None))
    assert state.info.result == BIASED
    assert np.abs(weights - alone).max() > 1e-3
    present = jnp.asarray([True, False, True])
    spoiled = cross.at[1].set(jnp.nan).at[:, 1].set(jnp.inf)
    masked, state = method.weigh(None, method.init(None), cross_gramian=spoiled, task_mask=present)
    assert masked[1] == 0
    assert np.isfinite(masked).all()
    assert state.method.weights[1] == pytest.approx(1 / K)
    assert float(jnp.sum(state.method.weights)) == pytest.approx(1, rel=1e-5)
    skipped, state = method.weigh(None, method.init(None), cross_gramian=spoiled)
    assert not skipped.any()
    assert state.info.skipped == 1


@pytest.mark.parametrize("make", [lambda: mtl.modo(num_tasks=K), lambda: mtl.sdmgrad(num_tasks=K)])
def test_tasks_without_weight_learn_where_the_others_are_absent(make):
    """From a corner of the simplex, they learn as from equal weights of the present tasks alone."""
    method, alone = make(), make()
    M = jnp.asarray(G[0] @ G[0].T)
    state = method.init(None)
    state = state._replace(method=state.method._replace(weights=jnp.asarray([1.0, 0, 0])))
    absent = {"task_mask": jnp.asarray([False, True, True])}
    found, wanted, fresh = [], [], alone.init(None)
    for _ in range(3):
        weights, state = method.weigh(None, state, cross_gramian=M, **absent)
        others, fresh = alone.weigh(None, fresh, cross_gramian=M, **absent)
        found.append(weights)
        wanted.append(others)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert state.method.weights[0] == state.method.weights.sum() == 1


def test_a_cross_gramian_goes_the_matrix_free_way():
    step = mtl.balanced_value_and_grad(lambda w: jnp.asarray(G[0]) @ w, mtl.modo(num_tasks=K))
    cross = jnp.asarray(G[0] @ G[1].T)
    _, gradient, state = step(jnp.zeros(P), mtl.modo(num_tasks=K).init(None), extra_args={"cross_gramian": cross})
    assert state.info.result == SOLVED
    w = np.full(K, 1 / K)
    w = reference.simplex(w - 0.1 * (G[0] @ G[1].T @ w + 0.1 * w))
    np.testing.assert_allclose(gradient, w @ G[0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_a_cross_gramian_of_another_size_is_refused():
    method = mtl.modo(num_tasks=K)
    with pytest.raises(ValueError, match=raises_naming("cross_gramian")):
        method.weigh(None, method.init(None), losses=jnp.ones(K), cross_gramian=jnp.eye(K + 1)[:K])


@pytest.mark.parametrize(
    "wrap", [lambda m: mtl.smoothed(m, K), lambda m: mtl.update_every(m, K, 2), lambda m: mtl.non_conflicting(m)]
)
def test_wrappers_of_weights_refuse_what_has_none(wrap):
    assert wrap(mtl.imtl_g()).weigh is not None
    for other in (mtl.trimmed_mean(), mtl.shared_private(mtl.imtl_g(), SHARED), mtl.skip_nonfinite_tasks(mtl.imtl_g())):
        with pytest.raises(ValueError, match=raises_naming("method")):
            wrap(other)


def test_partition_gives_each_group_its_own_solve():
    tx = mtl.partition({"one": mtl.imtl_g(), "two": optax.chain(mtl.sum(), optax.scale(2.0))}, {"b": "one", "w": "two"})
    updates, _ = walk(tx)
    head, _ = walk(mtl.imtl_g(), np.where(np.arange(P) == 0, G, 0).astype(np.float32))
    np.testing.assert_allclose(updates[:, 0], head[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates[:, 1:], 2 * G[:, :, 1:].sum(axis=1), rtol=1e-5)


def test_partition_refuses():
    stuck = mtl.partition({"one": mtl.imtl_g(), "two": optax.identity()}, {"b": "one", "w": "two"})
    with pytest.raises(ValueError, match=r"`transforms\['two'\]` must take the task axis away: .*w"):
        stuck.update(tree(jnp.asarray(G[0])), stuck.init(zeros()))
    with pytest.raises(ValueError, match=r"`transforms` must have an entry for every label, none for two"):
        mtl.partition({"one": mtl.imtl_g()}, {"b": "one", "w": "two"}).init(zeros())


def test_metrics_are_facts_about_the_gradients():
    grads = np.stack([stack("opposite", K, P)]).astype(np.float32)
    _, states = walk(mtl.with_metrics(mtl.mean(), K), grads)
    found = mtl.metrics((optax.EmptyState(), states[0]))
    unit = grads[0] / np.linalg.norm(grads[0], axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.testing.assert_allclose(found["cosines"], cosines, rtol=1e-4, atol=1e-5)
    upper = np.triu_indices(K, 1)
    assert float(found["conflict_fraction"]) == pytest.approx((cosines[upper] < 0).mean())
    n = np.linalg.norm(grads[0], axis=1)
    similarity = np.mean([2 * n[i] * n[j] / (n[i] ** 2 + n[j] ** 2) for i, j in zip(*upper, strict=True)])
    assert float(found["magnitude_similarity"]) == pytest.approx(similarity, rel=1e-5)
    np.testing.assert_allclose(found["predicted_change"], -grads[0] @ grads[0].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_metrics_of_a_method_without_weights():
    _, states = walk(mtl.with_metrics(mtl.trimmed_mean(), K))
    updates, _ = walk(mtl.trimmed_mean())
    for t, state in enumerate(states):
        found = mtl.metrics(state)
        assert "weights" not in found
        np.testing.assert_allclose(found["predicted_change"], -G[t] @ updates[t], rtol=1e-4, atol=1e-4)


def test_metrics_of_several_methods_say_where():
    tx = mtl.partition({"one": mtl.imtl_g(), "two": mtl.mean()}, {"b": "one", "w": "two"})
    _, states = walk(tx)
    assert {key.rsplit(".", 1)[0] for key in mtl.metrics(states[0])} == {"one", "two"}
    with pytest.raises(ValueError, match=raises_naming("opt_state")):
        mtl.metrics(optax.adam(1e-3).init(zeros()))


def test_unstack_names_the_tasks():
    losses = {"seg": jnp.asarray(2.0), "depth": jnp.asarray(1.0)}
    assert mtl.unstack(jnp.asarray([1.0, 2.0]), like=losses) == losses
    assert mtl.unstack(jnp.asarray([1.0, 2.0]), like=jnp.zeros(2)).shape == (2,)
    with pytest.raises(ValueError, match=raises_naming("values")):
        mtl.unstack(jnp.ones(3), like=losses)


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


@pytest.mark.parametrize(
    "method", [mtl.imtl_g(), mtl.db_mtl(num_tasks=K), mtl.trimmed_mean()], ids=["mgda", "db", "trim"]
)
def test_the_update_has_the_dtype_of_the_gradients(method):
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree(jnp.asarray(G[0])))
    update, _ = method.update(grads, method.init(zeros()), zeros(), losses=jnp.ones(K))
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}


H = np.diag(np.arange(1.0, 1.0 + P))


def quadratic(params):
    x = flat(params)
    return x @ jnp.asarray(H, x.dtype) @ x / 2


def test_gen_learning_rate_finds_newton_s_step():
    """For a quadratic loss, the best step along any direction is known: <d, g> / <d, Hd>."""
    with jax.enable_x64(True):
        x, d = np.ones(P), RNG.uniform(0.5, 1.5, size=P)
        best = d @ H @ x / (d @ H @ d)
        for first in (0.7 * best, 1.4 * best, 0.1 * best, 10 * best):
            tx = mtl.gen_learning_rate(first, every=1, smoothing=0.0)
            update, state = tx.update(tree(jnp.asarray(d)), tx.init(zeros()), tree(jnp.asarray(x)), value_fn=quadratic)
            wanted = np.clip(best, first / 2, first * 2)
            np.testing.assert_allclose(flat(update), -wanted * d, rtol=1e-9)
            assert float(state.learning_rate) == pytest.approx(wanted)


def test_gen_learning_rate_follows_the_official_fit():
    """Least-squares parabola through zero, clipped minimum, smoothing: 40 steps on a loss that is not a parabola."""

    def loss(x):
        return np.logaddexp(0, -x).sum() + 0.1 * (x**4).sum()

    def slope(x):
        return -1 / (1 + np.exp(x)) + 0.4 * x**3

    def value_fn(params):
        x = flat(params)
        return jnp.logaddexp(0, -x).sum() + 0.1 * (x**4).sum()

    with jax.enable_x64(True):
        tx = mtl.gen_learning_rate(0.05, every=3)
        step = jax.jit(lambda g, s, p, value: tx.update(g, s, p, value_fn=value_fn, value=value))
        params, state = tree(jnp.linspace(-2.0, 2.0, P)), tx.init(zeros())
        x, rate, fits = np.linspace(-2.0, 2.0, P), 0.05, 0
        for t in range(1, 41):
            d = slope(x)
            if t % 3 == 0:
                along = rate * np.asarray([-1.0, 1.0])
                y = np.asarray([loss(x - eta * d) for eta in along]) - loss(x)
                (bend, fall), residual, _, _ = np.linalg.lstsq(np.stack([along**2 / 2, -along], axis=1), y)
                assert residual.sum() <= 1e-20
                if bend > 0 and fall > 0:
                    rate, fits = 0.9 * rate + 0.1 * np.clip(fall / bend, rate / 2, rate * 2), fits + 1
            update, state = step(tree(jnp.asarray(d)), state, params, jnp.asarray(loss(x)))
            params, x = optax.apply_updates(params, update), x - rate * d
            np.testing.assert_allclose(state.learning_rate, rate, rtol=1e-6)
        np.testing.assert_allclose(flat(params), x, rtol=1e-6)
        assert int(state.accepted) == fits > 10
        assert int(state.step) == 40


@pytest.mark.parametrize(("given", "evaluations"), [(False, 3), (True, 2)])
def test_gen_learning_rate_evaluates_only_when_due(given, evaluations):
    calls = []

    def value_fn(params):
        jax.debug.callback(lambda: calls.append(1))
        return quadratic(params)

    tx = mtl.gen_learning_rate(0.1, every=4)
    params = tree(jnp.ones(P))
    value = quadratic(params) if given else None
    step = jax.jit(lambda s: tx.update(params, s, params, value_fn=value_fn, value=value)[1])
    state = tx.init(params)
    for count in (0, 0, 0, 1, 1, 1, 1, 2):
        state = step(state)
        jax.effects_barrier()
        assert len(calls) == count * evaluations
    assert int(state.accepted) == 2


UNFIT = {
    "uphill": (quadratic, -1.0),
    "concave": (lambda params: -quadratic(params), -1.0),
    "flat": (lambda params: 3.0, 1.0),
    "no step": (quadratic, 0.0),
    "nan": (lambda params: quadratic(params) * jnp.nan, 1.0),
    "infinite ahead": (lambda params: jnp.where(flat(params)[0] < 1, jnp.inf, quadratic(params)), 1.0),
    "infinite behind": (lambda params: jnp.where(flat(params)[0] > 1, jnp.inf, quadratic(params)), 1.0),
    "broken step": (quadratic, jnp.nan),
}


@pytest.mark.parametrize("name", UNFIT)
def test_gen_learning_rate_stays_where_the_parabola_has_no_minimum_ahead(name):
    value_fn, sign = UNFIT[name]
    tx = mtl.gen_learning_rate(0.1, every=1)
    params = tree(jnp.ones(P))
    direction = jax.tree.map(lambda leaf: sign * leaf, params)
    update, state = tx.update(direction, tx.init(params), params, value_fn=value_fn)
    np.testing.assert_allclose(flat(update), -0.1 * flat(direction), rtol=1e-6)
    assert (float(state.learning_rate), int(state.accepted), int(state.rejected)) == (pytest.approx(0.1), 0, 1)


def test_gen_learning_rate_is_an_ordinary_optax_transformation():
    """Scan, vmap, donation, bfloat16, and training: a learning rate 1000 times too small grows by 1.1 a fit."""
    tx = optax.chain(mtl.sum(), optax.scale_by_adam(), mtl.gen_learning_rate(1e-5, every=2))

    def train(params, state):
        grads = jax.tree.map(lambda leaf: leaf[None], jax.grad(quadratic)(params))
        update, state = tx.update(grads, state, params, value_fn=quadratic)
        return optax.apply_updates(params, update), state

    @jax.jit
    def run(params):
        return jax.lax.scan(lambda c, _: (train(*c), quadratic(c[0])), (params, tx.init(params)), length=400)

    starts = {"b": jnp.ones((2, 1)), "w": jnp.ones((2, 2, 3))}
    (_, state), values = jax.vmap(run)(starts)
    assert (values[:, -1] < 0.1 * values[:, 0]).all()
    assert (optax.tree.get(state, "learning_rate") > 1e-3).all()
    donated = jax.jit(train, donate_argnums=(0, 1))
    for _ in range(2):
        params = tree(jnp.ones(P))
        donated(params, tx.init(params))
    half = tree(jnp.ones(P, jnp.bfloat16))
    halved, _ = train(half, tx.init(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype(jnp.bfloat16)}


def test_gen_learning_rate_refuses():
    tx = mtl.gen_learning_rate(0.1)
    params = tree(jnp.ones(P))
    with pytest.raises(ValueError, match=raises_naming("value_fn")):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=raises_naming("params")):
        tx.update(params, tx.init(params), value_fn=quadratic)
    with pytest.raises(ValueError, match=raises_naming("value_fn")):
        tx.update(params, tx.init(params), params, value_fn=flat)
    with pytest.raises(ValueError, match=raises_naming("value")):
        tx.update(params, tx.init(params), params, value_fn=quadratic, value=jnp.ones(2))


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


@pytest.mark.parametrize("make", [lambda: mtl.db_mtl(K), lambda: mtl.emtl(1.0), lambda: mtl.mgda(normalization="loss")])
def test_a_finished_task_does_not_stop_the_others(make):
    """A loss of exactly zero is outside the formula's domain: the other tasks train as if it were absent."""
    tx, plain = mtl.skip_nonfinite_tasks(make()), make()
    losses = jnp.asarray([1.0, 0.0, 2.0])
    grads = tree(jnp.asarray(G[0]).at[1].set(0))
    update, state = tx.update(grads, tx.init(zeros()), losses=losses)
    mask = jnp.asarray([True, False, True])
    wanted, _ = plain.update(grads, plain.init(zeros()), losses=losses, task_mask=mask)
    np.testing.assert_array_equal(flat(update), flat(wanted))
    assert flat(update).any()
    assert int(state.dropped) == 1
