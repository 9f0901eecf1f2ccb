"""Methods composed with optimizers: skipped, empty and accumulated steps, for optax's public optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import P, flat, raises_naming, tree, zeros

import mtlgrad_jax as mtl

K, RNG = 3, np.random.default_rng(0)
G = RNG.normal(size=(6, K, P)).astype(np.float32)
LOSSES = jnp.asarray([1.0, 2.0, 3.0])
NOBODY = jnp.zeros(K, bool)

NAMES = (
    *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad"),
    *("fromage", "lamb", "lars", "lion", "nadam", "nadamw", "novograd", "optimistic_gradient_descent", "polyak_sgd"),
    *("radam", "rmsprop", "rprop", "sgd", "sign_sgd", "sm3", "yogi"),
)
OPTIMIZERS = {name: lambda name=name: getattr(optax, name)(0.1) for name in NAMES} | {
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "schedule": lambda: optax.sgd(optax.exponential_decay(0.1, 1, 0.5)),
    "lbfgs": lambda: optax.lbfgs(0.1, linesearch=None),
    "plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


def without_infos(state):
    """The leaves of a state by path, without those of infos and records."""
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: isinstance(node, mtl.Info))
    return {jax.tree_util.keystr(path): leaf for path, leaf in found if not isinstance(leaf, mtl.Info)}


def same(before, after):
    before, after = without_infos(before), without_infos(after)
    assert before.keys() == after.keys()
    for path, old in before.items():
        np.testing.assert_array_equal(*map(plain, (old, after[path])), err_msg=path)


def plain(leaf):
    """A leaf as an array, also if it is a key."""
    return jax.random.key_data(leaf) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf


def stepper(tx):
    @jax.jit
    def step(rows, state, params, mask=None):
        extra = {} if mask is None else {"task_mask": mask}
        return tx.update(tree(rows), state, params, losses=LOSSES, value=jnp.asarray(1.0), **extra)

    return step


COMMON = ("adam", "adamw", "lbfgs", "momentum", "noisy_sgd", "schedule")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COMMON else pytest.mark.nightly) for name in OPTIMIZERS]
)
def test_a_step_that_is_skipped_or_empty_moves_nothing(name):
    tx = mtl.chain(mtl.per_task(optax.trace(0.5), K), mtl.imtl_g(), OPTIMIZERS[name]())
    step, params = stepper(tx), tree(jnp.asarray(G[0, 0]))
    state, everybody = tx.init(params), jnp.ones(K, bool)
    for t in range(2):
        updates, state = step(jnp.asarray(G[t]), state, params, everybody)
        params = optax.apply_updates(params, updates)
    assert np.abs(flat(updates)).max() > 0
    skipped, after = step(jnp.asarray(G[2]).at[0, 0].set(jnp.nan), state, params, everybody)
    assert not flat(skipped).any()
    same(state, after)
    assert int(mtl.metrics(after)["skipped"]) == 1
    empty, after = step(jnp.asarray(G[2]), state, params, NOBODY)
    assert not flat(empty).any()
    same(state, after)
    if name not in ("adam", "momentum", "schedule"):
        return
    usual = optax.chain(mtl.per_task(optax.trace(0.5), K), mtl.imtl_g(), OPTIMIZERS[name]())
    for found, wanted in zip(
        *(jax.tree.leaves(each(jnp.asarray(G[3]), state, params, everybody)) for each in (step, stepper(usual))),
        strict=True,
    ):
        np.testing.assert_allclose(plain(found), plain(wanted), rtol=1e-5, atol=1e-6)


def moving():
    """A method and a momentum of its gradient, which is no single method any more."""
    return optax.chain(mtl.mean(), optax.trace(0.9))


ENTRIES = {
    "method": lambda: mtl.gradnorm(K),
    "inject_hyperparams": lambda: optax.inject_hyperparams(mtl.cagrad)(c=lambda step: 0.5 / (1 + step)),
    "nested chain": lambda: optax.chain(mtl.imtl_g(), optax.trace(0.9)),
    "shared_private": lambda: mtl.shared_private(mtl.imtl_g(), {"w": True, "b": False}),
    "partition": lambda: mtl.partition({"w": mtl.imtl_g(), "b": mtl.mean()}, {"w": "w", "b": "b"}),
    "grouped": lambda: mtl.grouped(mtl.smoothed(mtl.imtl_g(), K), {"w": "w", "b": "b"}),
    "update_every": lambda: mtl.update_every(mtl.imtl_g(), K, 3),
    "with_metrics": lambda: mtl.with_metrics(mtl.gradvac(K), K),
    "fs_mtl": lambda: mtl.fs_mtl(mtl.pcgrad()),
    "db_mtl": lambda: mtl.db_mtl(K),
    "shared_private of a chain": lambda: mtl.shared_private(moving(), {"w": True, "b": False}),
    "partition of a chain": lambda: mtl.partition({"w": moving(), "b": mtl.mean()}, {"w": "w", "b": "b"}),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ENTRIES)
def test_the_method_is_found_wherever_it_is(name):
    tx = mtl.chain(ENTRIES[name](), optax.adam(0.1))
    params = zeros()

    @jax.jit
    def step(rows, state, mask):
        extra = {"clean_grads": tree(rows / 2)} if name == "fs_mtl" else {}
        return tx.update(tree(rows), state, params, losses=LOSSES, task_mask=mask, **extra)

    _, state = step(jnp.asarray(G[0]), tx.init(params), ~NOBODY)
    for rows, mask in ((jnp.asarray(G[1]).at[1, 3].set(jnp.inf), ~NOBODY), (jnp.asarray(G[1]), NOBODY)):
        updates, after = step(rows, state, mask)
        assert not flat(updates).any()
        before, now = without_infos(state), without_infos(after)
        for path, old in before.items():
            if not (name == "with_metrics" and ".metrics." in path):
                np.testing.assert_array_equal(old, now[path], err_msg=path)


def test_a_step_in_which_all_tasks_are_dropped_moves_nothing():
    tx = mtl.chain(mtl.skip_nonfinite_tasks(moving()), optax.adam(0.1))
    step, params = stepper(tx), zeros()
    _, state = step(jnp.asarray(G[0]), tx.init(params), params)
    for rows, mask in ((jnp.full_like(G[1], jnp.nan), ~NOBODY), (jnp.asarray(G[1]), NOBODY)):
        updates, after = step(rows, state, params, mask)
        assert not flat(updates).any()
        before, now = without_infos(state), without_infos(after)
        for path, old in before.items():
            if ".dropped" not in path:
                np.testing.assert_array_equal(old, now[path], err_msg=path)


@pytest.mark.usefixtures("unchecked")
def test_one_method_a_chain():
    for transforms in ((), (optax.adam(0.1),), (mtl.mean(), mtl.imtl_g())):
        with pytest.raises(ValueError, match=r"`transforms` must hold exactly one method"):
            mtl.chain(*transforms).init(zeros())
    with pytest.raises(ValueError, match=raises_naming("transforms")):
        mtl.chain(mtl.mean(), "adam")
    kept = mtl.chain(optax.GradientTransformation(mtl.mean().init, lambda grads, state, params: (grads, state)))
    with pytest.raises(ValueError, match=r"`transforms\[0\]` must take the task axis away"):
        kept.update(tree(jnp.asarray(G[0])), kept.init(zeros()), zeros())


@pytest.mark.parametrize("search", ["lbfgs", "backtracking"])
def test_line_searches_behind_a_loss_weighting(search):
    """Arguments of the method end there; those of the search are passed on."""

    def losses_fn(p):
        return {"a": (p[0] - 1) ** 2, "b": (p[1] + 1) ** 2}

    def value_fn(p):
        return sum(losses_fn(p).values()) / 2

    behind = {
        "lbfgs": optax.lbfgs(),
        "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20, store_grad=True)),
    }
    tx = mtl.chain(mtl.slaw(2), behind[search])

    @jax.jit
    def step(params, state):
        losses, grads = mtl.task_value_and_grad(losses_fn)(params)
        updates, state = tx.update(
            grads, state, params, losses=losses, value=value_fn(params), grad=grads.mean(0), value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state

    params = jnp.asarray([3.0, -2.0])
    state = tx.init(params)
    for _ in range(60):
        params, state = step(params, state)
    np.testing.assert_allclose(params, [1, -1], atol=0.02)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "make", [lambda: mtl.imtl_g(), lambda: mtl.chain(mtl.imtl_g(), optax.adam(0.1)), lambda: mtl.uw(K)]
)
def test_accumulated_is_one_big_batch(make):
    """Micro-batches of unequal sizes, tasks without labels in some or all of them, and a gradient with a NaN."""
    steps, tx = 3, make()
    total = mtl.accumulate(tx, K, steps)
    sizes = np.asarray([[4.0, 4.0, 4.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    present = np.asarray([[True, True, False], [False, True, False], [True, True, False]])
    losses = RNG.uniform(1, 2, size=(steps, K)).astype(np.float32)
    rows = G[:steps].copy()
    rows[1, 1, 2] = np.nan
    counted = present & np.isfinite(rows).all(axis=2)
    share = np.where(counted, sizes, 0) / np.maximum(np.where(counted, sizes, 0).sum(0), 1)
    mean, mean_loss = (share[:, :, None] * np.nan_to_num(rows)).sum(0), (share * losses).sum(0)
    update = jax.jit(lambda g, s, values, m, n: total.update(tree(g), s, zeros(), losses=values, task_mask=m, sizes=n))
    state = total.init(zeros())
    plain = tx.init(zeros())
    for _ in range(2):
        for t in range(steps):
            before = state
            updates, state = update(*map(jnp.asarray, (rows[t],)), state, losses[t], present[t], sizes[t])
            if t < steps - 1:
                assert not flat(updates).any()
                assert not bool(mtl.has_updated(state))
                same(before.inner, state.inner)
        assert bool(mtl.has_updated(state))
        wanted, plain = tx.update(
            tree(jnp.asarray(mean, jnp.float32)),
            plain,
            zeros(),
            losses=jnp.asarray(np.where(counted.any(0), mean_loss, 1)),
            task_mask=jnp.asarray(counted.any(0)),
        )
        np.testing.assert_allclose(flat(updates), flat(wanted), rtol=1e-5, atol=1e-6)
        for a, b in zip(jax.tree.leaves(state.inner), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sizes_have_the_names_of_the_tasks():
    """In sorted order, `depth` is the first row; it has one label in the first micro-batch and three in the second."""
    tx = mtl.accumulate(mtl.sum(), num_tasks=2, steps=2)
    sizes = [{"seg": 4, "depth": 1}, {"seg": 4, "depth": 3}]
    rows = [jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), jnp.asarray([[5.0, 0.0], [0.0, 3.0]])]
    state, losses = tx.init(jnp.zeros(2)), {"seg": 1.0, "depth": 1.0}
    for grads, size in zip(rows, sizes, strict=True):
        update, state = tx.update(grads, state, losses=losses, sizes=size)
    np.testing.assert_allclose(update, [(1 * 1 + 3 * 5) / 4, (1 + 3) / 2])
    with pytest.raises(ValueError, match="`sizes` must have the structure of the losses"):
        tx.update(grads, state, losses=losses, sizes=jnp.asarray([1.0, 3.0]))
    with pytest.raises(ValueError, match=r"`sizes` must have shape \(2,\)"):
        tx.update(grads, state, sizes=jnp.ones(3))


def test_accumulating_half_precision_in_float32():
    """In bfloat16, a thousand gradients of 1 would sum to 256."""
    tx = mtl.accumulate(mtl.mean(), 2, 1000)
    grads = jnp.ones((2, 1), jnp.bfloat16)
    state = jax.lax.fori_loop(0, 999, lambda _, s: tx.update(grads, s)[1], tx.init(jnp.zeros(1, jnp.bfloat16)))
    update, _ = tx.update(grads, state)
    assert (update.dtype, float(update[0])) == (jnp.bfloat16, 1.0)


def losses_fn(params, x):
    y = jnp.tanh(x @ params["w"].T + params["b"])
    return {"a": jnp.mean(y**2), "b": jnp.mean((y[:, 0] - 1) ** 2), "c": jnp.mean(jnp.abs(y.sum(1)) + 0.5)}


ROUTES = {
    "method": lambda: mtl.imtl_g(),
    "chain": lambda: mtl.chain(mtl.imtl_g(), optax.adam(0.1)),
    "optax.chain": lambda: optax.chain(mtl.imtl_g(), optax.adam(0.1)),
    "before": lambda: mtl.chain(mtl.per_task(optax.clip_by_global_norm(0.1), K), mtl.imtl_g(), optax.adam(0.1)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(mtl.cagrad)(c=lambda step: 0.5 / (1 + step)),
    "rule": lambda: mtl.trimmed_mean(),
    "buffer": lambda: mtl.db_mtl(K),
    "shared_private": lambda: mtl.shared_private(mtl.imtl_g(), {"w": True, "b": False}),
    "gram_over": lambda: mtl.gram_over(mtl.imtl_g(), {"w": True, "b": False}),
    "weighted heads": lambda: mtl.shared_private(mtl.imtl_g(), {"w": True, "b": False}, private="weighted"),
    "partition": lambda: mtl.partition({"w": mtl.imtl_g(), "b": mtl.uw(K)}, {"w": "w", "b": "b"}),
    "heads inside": lambda: mtl.shared_private(optax.chain(mtl.imtl_g(), optax.trace(0.5)), {"w": True, "b": False}),
    "grouped": lambda: mtl.grouped(mtl.imtl_g(), {"w": "w", "b": "b"}),
    "smoothed": lambda: mtl.smoothed(mtl.imtl_g(), K),
    "update_every": lambda: mtl.update_every(mtl.imtl_g(), K, 2),
    "with_metrics": lambda: mtl.with_metrics(mtl.gradnorm(K), K),
    "skip_nonfinite_tasks": lambda: mtl.skip_nonfinite_tasks(mtl.imtl_g()),
    "accumulate": lambda: mtl.accumulate(mtl.chain(mtl.imtl_g(), optax.adam(0.1)), K, 2),
}


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, None) for name in ROUTES),
        *((name, 2) for name in ("method", "chain", "shared_private", "grouped", "skip_nonfinite_tasks")),
    ],
)
def test_a_jacobian_is_taken_wherever_a_stack_is(name, rows):
    """With the same results, and no NaN on the way, no key drawn twice, no array moved to or from the host."""
    tx, params = ROUTES[name](), {"b": jnp.asarray([0.3]), "w": jnp.asarray([[0.2, -0.1, 0.4], [0.5, 0.3, -0.2]])}
    batches = list(jnp.asarray(RNG.normal(size=(2, 8, 3)), jnp.float32))
    mask = dict.fromkeys("abc", jnp.asarray(True))

    @jax.jit
    def both(states, x, mask):
        losses, grads = mtl.task_value_and_grad(losses_fn)(params, x)
        stored = tx.update(grads, states[0], params, losses=losses, task_mask=mask)
        return stored, tx.update(mtl.linearize(losses_fn, params, x, rows=rows), states[1], params, task_mask=mask)

    states = [tx.init(params)] * 2
    for x in batches:
        with jax.debug_nans(True), jax.debug_key_reuse(True):
            both(states, x, mask)  # constants move when the program is compiled
            with jax.transfer_guard("disallow"):
                (first, second), states = zip(*both(states, x, mask), strict=True)
        for a, b in zip(jax.tree.leaves((first, states[0])), jax.tree.leaves((second, states[1])), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)


WIDE = {"trunk": True, "heads": False}
LEAN = {
    "method": lambda: mtl.imtl_g(),
    "shared_private": lambda: mtl.shared_private(mtl.imtl_g(), WIDE),
    "weighted heads": lambda: mtl.shared_private(mtl.imtl_g(), WIDE, private="weighted"),
    "gram_over": lambda: mtl.gram_over(mtl.imtl_g(), WIDE),
    "partition": lambda: mtl.partition({True: mtl.imtl_g(), False: mtl.mean()}, WIDE),
    "update_every": lambda: mtl.update_every(mtl.imtl_g(), 16, 4),
    "with_metrics": lambda: mtl.with_metrics(mtl.imtl_g(), 16),
    "grouped": lambda: mtl.grouped(mtl.imtl_g(), WIDE),
    "skip_nonfinite_tasks": lambda: mtl.skip_nonfinite_tasks(mtl.imtl_g()),
    "chain": lambda: mtl.chain(mtl.smoothed(mtl.imtl_g(), 16), optax.sgd(0.1)),
}


@pytest.mark.sample(7)
@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("name", LEAN)
def test_a_jacobian_is_never_stored(name, rows):
    """16 tasks in the memory of a few gradients; compiled only."""
    width, tx = 256, LEAN[name]()
    params = {
        "trunk": jax.ShapeDtypeStruct((width, width), jnp.float32),
        "heads": jax.ShapeDtypeStruct((width, 16), jnp.float32),
    }

    def losses_fn(params, x):
        return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"] - 1) ** 2, axis=0)

    def step(params, state, x):
        return tx.update(mtl.linearize(losses_fn, params, x, rows=rows), state, params)

    args = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((8, width), jnp.float32)
    temporaries = jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 8 * 4 * width**2


@pytest.mark.sample(1)
@pytest.mark.parametrize("rows", [None, 2])
def test_a_broken_task_is_dropped_from_a_jacobian(rows):
    """Only its row is not finite: an overflow stays in its task, even when multiplied by cotangents of zero."""
    params, broken = {"t": jnp.asarray([0.3, -0.4]), "h": jnp.ones(3)}, jnp.asarray([1.0, 3e38, 2.0])

    def losses_fn(params, labels):
        return (jnp.sum(params["t"] ** 2) * jnp.asarray([1.0, 9.0, 3.0]) + params["h"]) * labels

    tx = mtl.skip_nonfinite_tasks(mtl.imtl_g())
    update, state = tx.update(mtl.linearize(losses_fn, params, broken, rows=rows), tx.init(params), params)
    kept = jnp.asarray([0, 2])
    losses, grads = mtl.task_value_and_grad(lambda p: losses_fn(p, broken)[kept])(params)
    wanted, _ = mtl.imtl_g().update(grads, mtl.imtl_g().init(params), params, losses=losses)
    assert int(state.dropped) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), update, wanted)


@pytest.mark.parametrize("make", [lambda: mtl.imtl_g(), lambda: mtl.chain(mtl.imtl_g()), lambda: mtl.trimmed_mean()])
def test_losses_beside_a_jacobian_are_refused(make):
    jacobian, tx = mtl.linearize(lambda w: jnp.sin(w), jnp.arange(3.0)), make()
    with pytest.raises(ValueError, match="`losses` must not be given"):
        tx.update(jacobian, tx.init(jnp.zeros(3)), losses=LOSSES)


@pytest.mark.parametrize("name", ["mask", "task_masks", "losess", "loss", "cross_gram"])
def test_misspelt_arguments_raise(name):
    for tx in (mtl.imtl_g(), mtl.trimmed_mean(), mtl.chain(mtl.imtl_g()), mtl.skip_nonfinite_tasks(mtl.mean())):
        with pytest.raises(ValueError, match=rf"`{name}` is no argument of update: write \w+="):
            tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()), **{name: jnp.ones(K)})


@pytest.mark.parametrize("names", [["a", "b"], None, "ab"])
def test_names_of_tasks_come_from_the_losses(names):
    tx = mtl.mean()
    with pytest.raises(ValueError, match="`task_names` must not be given"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)), task_names=names)


def test_a_hand_made_method_gets_the_same_protection():
    """Made from a formula, from `weigh` without declared arguments, or from an update alone."""

    def louder(*, gramian):
        return jnp.diagonal(gramian)

    def weigh(gramian, state, **unused):
        return jnp.diagonal(gramian() if callable(gramian) else gramian), state

    start = mtl.mean().init
    made = [mtl.from_kernel(louder), mtl.Method(start, weigh=weigh), mtl.skip_nonfinite_tasks(mtl.from_kernel(louder))]
    wanted = np.einsum("kp,k->p", G[0], (G[0] ** 2).sum(1))
    for tx in made:
        update, _ = tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()))
        np.testing.assert_allclose(flat(update), wanted, rtol=1e-5)
        broken, state = tx.update(tree(jnp.asarray(G[0]).at[1, 1].set(jnp.nan)), tx.init(zeros()))
        assert np.isfinite(flat(broken)).all()
        assert int(mtl.metrics(state)["skipped"]) == (tx is not made[2])


def test_a_replaced_update_is_not_bypassed():
    tx = mtl.imtl_g()
    doubled = tx._replace(
        update=lambda g, s, p=None, **extra: jax.tree.map(lambda u: 2 * u, tx.update(g, s, p, **extra))
    )
    assert doubled.weigh is None
    assert doubled.arguments == tx.arguments
    assert tx._replace(init=tx.init).weigh is tx.weigh
    with pytest.raises(ValueError, match=raises_naming("method")):
        mtl.smoothed(doubled, K)


def test_a_rule_that_is_undefined_for_few_tasks_may_return_anything():
    def spread(task_grads, *, present):
        return jax.tree.map(lambda leaf: leaf[0] / (jnp.sum(present) - 1), task_grads)

    tx = mtl.from_rule(spread, fewest=2)
    update, state = tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()), task_mask=jnp.asarray([False, True, False]))
    np.testing.assert_allclose(flat(update), G[0, 1], rtol=1e-6)
    assert int(mtl.metrics(state)["fallbacks"]) == 1


@jax.tree_util.register_pytree_node_class
class Weights:
    """Parameters whose class has no equality."""

    def __init__(self, w):
        self.w = w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def test_parameters_of_any_class_may_have_momentum():
    params, tx = Weights(jnp.ones(2)), mtl.chain(mtl.sum(), optax.sgd(0.5, momentum=0.9))
    updates, _ = tx.update(Weights(jnp.asarray([[1.0, 2.0], [3.0, 4.0]])), tx.init(params), params)
    np.testing.assert_allclose(updates.w, [-2, -3])


def test_what_accumulates_goes_around_the_chain():
    with pytest.raises(ValueError, match=r"`transforms` must not accumulate.*write accumulate\(chain\("):
        mtl.chain(mtl.accumulate(mtl.mean(), K, 4), optax.adam(0.1)).init(zeros())


def test_accumulating_without_a_method_raises():
    tx = mtl.accumulate(optax.sgd(1.0), K, 1)
    with pytest.raises(ValueError, match="`tx`"):
        tx.update(tree(G[0]), tx.init(zeros()), zeros())


def test_the_state_of_accumulate_can_be_donated_after_steps_outside_jit():
    tx, params = mtl.accumulate(mtl.mean(), K, 2), zeros()
    state = tx.init(params)
    for t in range(2):
        _, state = tx.update(tree(G[t]), state, params)
    update, _ = jax.jit(tx.update, donate_argnums=1)(tree(G[2]), state, params)
    assert not flat(update).any()
