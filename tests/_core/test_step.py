"""A step of every method: under JAX's transformations, with absent tasks, and with a NaN or inf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import ALL, EAGER, LOSSES, STEPS, G, K, arguments, step_of
from harness import EVERY, PARAMS, UNSTACKED, flat, functions, tree, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import ROWS, needs
from mtlgrad_jax.solvers._solution import MAX_STEPS, Solution


@pytest.fixture(scope="module")
def compiled():
    """The transformation and compiled step of each method, made once."""
    made = {}

    def get(name):
        if name not in made:
            tx = EAGER[name]()
            made[name] = tx, step_of(tx, **functions(name.split("(")[0]))
        return made[name]

    return get


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", ALL)
def test_jit_equals_eager_and_compiles_once(name, compiled):
    tx, step = compiled(name)
    present = jnp.ones(K, bool)
    jitted, plain = tx.init(zeros()), tx.init(zeros())
    for t in range(2):
        grads, losses, _ = arguments(t)
        with jax.no_tracing(t > 0):
            one, jitted = step(grads, jitted, losses, present)
        other, plain = tx.update(grads, plain, zeros(), losses=losses, task_mask=present)
        np.testing.assert_allclose(flat(one), flat(other), rtol=1e-4, atol=1e-5)
    assert {key: leaf.shape for key, leaf in one.items()} == PARAMS


@pytest.mark.parametrize("name", ALL)
def test_two_runs_at_once_under_vmap_scan_and_cond(name, compiled):
    """One program for two orders of the data, with one step left out, against the steps one after the other."""
    tx, step = compiled(name)
    flags, present = [True, False, True], jnp.ones(K, bool)
    orders = np.asarray([range(STEPS), range(STEPS)[::-1]])
    grads, losses = (jnp.asarray(values, jnp.float32)[orders] for values in (G, LOSSES))

    @jax.jit
    @jax.vmap
    def train(grads, losses):
        def body(state, now):
            flag, grads, losses = now
            update, state = jax.lax.cond(
                flag,
                lambda: tx.update(tree(grads), state, zeros(), losses=losses, task_mask=present),
                lambda: (zeros(), state),
            )
            return state, flat(update)

        return jax.lax.scan(body, tx.init(zeros()), (jnp.asarray(flags), grads, losses))[1]

    together = train(grads, losses)
    assert np.isfinite(together).all()
    for i, order in enumerate(orders):
        state = tx.init(zeros())
        for j, t in enumerate(order):
            update = zeros()
            if flags[j]:
                update, state = step(tree(grads[i, j]), state, losses[i, j], present)
            rounding = 1e-4 if t < 2 else 2e-3  # fairgrad weighs opposite gradients by 2e3
            np.testing.assert_allclose(together[i, j], flat(update), rtol=1e-3, atol=rounding)


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", EAGER)
def test_under_the_flags_for_debugging(name, compiled):
    """JAX raises if an update or a state holds a NaN, even of an absent task, or a key is drawn from twice.

    Outside jit it also raises if a NaN occurs on the way, and inside if an array moves between host and device.
    """
    tx, step = compiled(name)
    state = tx.init(zeros())
    for t, mask in enumerate(([True, True, True], [False, True, True], [False, False, False])):
        grads, losses, present = *arguments(t)[:2], jnp.asarray(mask)
        grads = jax.tree.map(lambda leaf: leaf[0], grads) if name.split("(")[0] in UNSTACKED else grads
        with jax.debug_nans(True), jax.debug_key_reuse(True):
            step.__wrapped__(grads, state, losses, present)
            step(grads, state, losses, present)  # constants move when the program is compiled
            with jax.transfer_guard("disallow"):
                _, state = step(grads, state, losses, present)


@pytest.mark.parametrize("name", ALL)
def test_no_state_shares_its_arrays(name, compiled):
    """With itself or with another state, so that it can be donated."""
    tx, step = compiled(name)
    grads, losses, _ = arguments()
    state = tx.init(zeros())
    first, _ = step(grads, state, losses, jnp.ones(K, bool))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
    assert len(buffers) == len(set(buffers))
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    second, _ = step(grads, tx.init(zeros()), losses, jnp.ones(K, bool))
    np.testing.assert_array_equal(flat(first), flat(second))


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name, compiled):
    tx, step = compiled(name)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arguments()[0])
    params = zeros(jnp.bfloat16)
    losses = arguments()[1]
    update, state = tx.update(half, tx.init(params), params, losses=losses)
    again, _ = tx.update(half, state, params, losses=losses)
    assert {leaf.dtype for leaf in jax.tree.leaves((update, again))} == {jnp.dtype(jnp.bfloat16)}
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    wanted, _ = step(whole, tx.init(zeros()), losses, jnp.ones(K, bool))
    np.testing.assert_allclose(flat(update).astype(np.float32), flat(wanted), rtol=0.02, atol=0.02)


def test_methods_without_weights_have_none_in_the_metrics(compiled):
    tx, step = compiled("with_metrics(trimmed_mean)")
    grads, losses, _ = arguments()
    _, state = step(grads, tx.init(zeros()), losses, jnp.ones(K, bool))
    assert "weights" not in mtl.metrics(state)


@pytest.mark.parametrize("name", ALL)
def test_no_task_present_changes_nothing(name, compiled):
    tx, step = compiled(name)
    grads, losses, _ = arguments()
    _, before = step(grads, tx.init(zeros()), losses, jnp.ones(K, bool))
    update, after = step(grads, before, losses, jnp.zeros(K, bool))
    assert not flat(update).any()
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        where = jax.tree_util.keystr(path)
        time = where.endswith(".step") and ".method" not in where  # of update_every; db_mtl's steps are per task
        if not (time or any(f".{field}" in where for field in ("info", "key", "metrics", "dropped"))):
            np.testing.assert_array_equal(old, new, err_msg=where)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_gradient_is_a_counted_zero_update(name, broken, compiled):
    tx, step = compiled(name)
    grads, losses, _ = arguments()
    present = jnp.ones(K, bool)
    _, before = step(grads, tx.init(zeros()), losses, present)
    bad = {**grads, "w": grads["w"].at[K - 1, 0, 1].set(broken)}  # the largest loss, so that it counts everywhere
    update, after = step(bad, before, losses, present)
    assert np.isfinite(flat(update)).all()
    following, _ = step(*[arguments(1)[0], after, arguments(1)[1], present])
    if name.startswith("skip_nonfinite_tasks"):
        assert int(after.dropped) == 1
        alone, _ = step(grads, before, losses, jnp.asarray([True, True, False]))
        np.testing.assert_array_equal(flat(update), flat(alone))
        return
    found = mtl.metrics(after)
    assert sum(int(value) for key, value in found.items() if key.endswith("skipped")) >= 1
    assert not flat(update).any()
    expected, _ = step(arguments(1)[0], before, arguments(1)[1], present)
    np.testing.assert_array_equal(flat(following), flat(expected))


@pytest.mark.parametrize("name", [name for name in EVERY if "losses" in needs(ROWS[name])])
def test_a_broken_loss_is_a_counted_zero_update(name, compiled):
    tx, step = compiled(name)
    grads, losses, _ = arguments()
    start = tx.init(zeros())
    update, state = step(grads, start, losses.at[2].set(jnp.nan), jnp.ones(K, bool))
    assert not flat(update).any()
    assert int(state.info.skipped) == 1
    np.testing.assert_array_equal(*map(flat, [step(grads, s, losses, jnp.ones(K, bool))[0] for s in (start, state)]))


POSITIVE = {
    "db_mtl": lambda: mtl.db_mtl(num_tasks=K, beta=0.5),
    "emtl": lambda: mtl.emtl(strength=2.0),
    "mgda-loss": lambda: mtl.mgda(normalization="loss"),
    "mgda-loss+": lambda: mtl.mgda(normalization="loss+", apply_to="normalized"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_losses_that_must_be_positive(name, bad):
    """If losses are divisors, a step with a loss <= 0 is skipped and leaves no trace."""
    tx = POSITIVE[name]()
    step = step_of(tx)
    grads, losses, _ = arguments()
    start, present = tx.init(zeros()), jnp.ones(K, bool)
    for spoiled in (losses.at[1].set(bad), jnp.full(K, bad)):
        update, state = step(grads, start, spoiled, present)
        assert not flat(update).any()
        assert int(state.info.skipped) == 1
        np.testing.assert_array_equal(*(flat(step(grads, s, losses, present)[0]) for s in (start, state)))
    masked, state = step(grads, start, losses.at[1].set(bad), present.at[1].set(False))
    assert np.isfinite(flat(masked)).all()
    assert int(state.info.skipped) == 0


def test_losses_that_nobody_needs_may_be_anything():
    tx = mtl.mean()
    grads = arguments()[0]
    update, _ = tx.update(grads, tx.init(zeros()), losses=jnp.full(K, jnp.nan))
    np.testing.assert_allclose(flat(update), G[0].mean(axis=0), rtol=1e-5)


def test_a_method_whose_weights_fail_falls_back_to_the_mean_and_counts():
    def divided(*, gramian):
        return 1 / jnp.zeros(K)

    tx = mtl.from_kernel(divided)
    update, state = tx.update(arguments()[0], tx.init(zeros()))
    np.testing.assert_allclose(flat(update), G[0].mean(axis=0), rtol=1e-5)
    assert int(state.info.fallbacks) == 1
    assert "not be finite" in mtl.RESULTS[int(state.info.result)]


def test_what_stands_in_has_no_residual_and_a_skipped_step_no_stand_in():
    def failing(*, gramian):
        return Solution(jnp.full(K, jnp.nan), jnp.asarray(jnp.nan), jnp.asarray(7), jnp.asarray(MAX_STEPS))

    _, failed = mtl.from_kernel(failing).update(arguments()[0], mtl.from_kernel(failing).init(zeros()))
    tx, few = mtl.krum(0), jnp.asarray([True, False, True])
    grads, state = arguments()[0], tx.init(zeros())
    _, too_few = tx.update(grads, state, task_mask=few)
    _, skipped = tx.update(jax.tree.map(lambda leaf: leaf / 0, grads), state, task_mask=few)
    assert [float(state.info.residual) for state in (failed, too_few, skipped)] == [0, 0, 0]
    assert [int(state.info.fallbacks) for state in (failed, too_few, skipped)] == [1, 1, 0]
    assert [int(state.info.skipped) for state in (failed, too_few, skipped)] == [0, 0, 1]


def test_too_few_tasks_fall_back_to_the_mean_and_say_so():
    tx = mtl.trimmed_mean(trim=1)
    grads, _, _ = arguments()
    update, state = tx.update(grads, tx.init(zeros()), task_mask=jnp.asarray([True, False, True]))
    np.testing.assert_allclose(flat(update), G[0][[0, 2]].mean(axis=0), rtol=1e-5)
    assert mtl.RESULTS[int(state.info.result)].startswith("Fewer tasks")
    assert int(state.info.fallbacks) == 1


def test_absent_tasks_keep_what_a_state_holds_of_them():
    """Along every axis that has an entry for every task, and along no other, even of the same length."""

    def start(num_tasks):
        shapes = {"pairs": (num_tasks, num_tasks), "window": (K, num_tasks), "square": (K, K), "number": ()}
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}

    def kernel(*, present, state):
        return present / 1.0, jax.tree.map(lambda leaf: leaf + 1, state)

    tx = mtl.from_kernel(kernel, start, num_tasks=K)
    present = np.asarray([True, False, True])
    _, state = tx.weigh(jnp.eye(K), tx.init(None), task_mask=jnp.asarray(present))
    np.testing.assert_array_equal(state.method["pairs"], np.outer(present, present))
    np.testing.assert_array_equal(state.method["window"], np.broadcast_to(present, (K, K)))
    np.testing.assert_array_equal(state.method["square"], np.ones((K, K)))
    assert state.method["number"] == 1
