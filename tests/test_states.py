"""States over long and extreme runs: finite, on the simplex, never negative, and donatable."""

import collections
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from families import stack
from harness import P, flat, make, tree, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax._core.random import Key
from mtlgrad_jax.registry import METHODS, ROWS
from mtlgrad_jax.registry import make as make_row
from mtlgrad_jax.solvers._solution import BIASED, FAILED, LAGGED, NONFINITE, SOLVED

K = 3
G, ONES, EVERYONE = jnp.asarray(stack("normal", K, P), jnp.float32), jnp.ones(K), jnp.ones(K, bool)
STATEFUL = [row.name for row in METHODS if row.state != "none"] + ["smoothed", "update_every", "with_metrics"]


def all_finite(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def results(state):
    infos = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "fallbacks"))
    return jnp.stack([node.result for node in infos if hasattr(node, "fallbacks")])


def scan(tx, state, grads, losses):
    """The last state, and for every step the update, whether it and the state are finite, and the result codes."""

    def step(state, now):
        update, state = tx.update(tree(now[0]), state, zeros(), losses=now[1])
        return state, (flat(update), all_finite((update, state)), results(state))

    return jax.lax.scan(step, state, (grads, losses))


WILD, CALM = 120, 3000
SIZES = np.asarray([0, 1e-18, 1e-9, 1, 1e9, 1e18])
LOSSES = np.asarray([0, 1e-30, 1e-3, 1, 1e3, 1e30])


def episodes():
    """Losses and lengths of gradients, (WILD, K) each; the first is calm."""
    rng, ones = np.random.default_rng(0), np.ones((WILD, K))
    turns = np.where(np.arange(WILD)[:, None] % 2, [[0, 1, 0]], [[1, 0, 1]])
    yield ones, ones
    yield np.where(np.arange(WILD)[:, None] == 0, [[1e-30, 1, 1]], [[1e9, 1, 1]]), ones
    yield np.where(turns, 1e30, 1e-30), np.where(turns, 1e18, 1e-18)
    yield np.where(turns, 1e-30, 1e30), np.where(turns, 1e18, 1e-18)
    yield np.where(turns, -1e30, 1e30), np.where(turns, 1e9, 1)
    yield 0 * ones, 0 * ones
    yield rng.choice(LOSSES, size=(WILD, K)), rng.choice(SIZES, size=(WILD, K))


FORGETFUL = {"conflict_free_momentum": {"b2": 0.9}}  # Adam's squares: by default, 1e36 takes 80,000 steps to decay


@pytest.mark.parametrize("name", STATEFUL)
def test_states_stay_finite_and_recover(name):
    """After any finite losses and gradients, moderate steps are solved again, with updates of the usual length."""
    tx = make(name, K, **FORGETFUL.get(name, {}))
    run = jax.jit(lambda *steps: scan(tx, tx.init(zeros()), *steps)[1])
    unit, calm = G / jnp.linalg.norm(G, axis=1, keepdims=True), jnp.asarray([1.0, 2.0, 4.0])
    last = []
    for losses, sizes in episodes():
        rows = jnp.concatenate([jnp.asarray(sizes, jnp.float32), jnp.broadcast_to(calm, (CALM, K))])
        given = jnp.concatenate([jnp.asarray(losses, jnp.float32), jnp.ones((CALM, K))])
        updates, finite, codes = run(rows[:, :, None] * unit, given)
        assert finite.all(), np.flatnonzero(~np.asarray(finite))
        assert np.isin(codes[-50:], (SOLVED, BIASED, LAGGED)).all()
        last.append(np.linalg.norm(updates[-1]))
    assert 0 < min(last) <= max(last) < 100 * last[0] < 1e4 * min(last), last


@pytest.mark.parametrize("kind", ["kernel", "rule"])
def test_a_state_that_would_not_be_finite_is_kept_and_counted(kind):
    """The step uses the mean; values for absent tasks do not matter."""

    def kernel(*, losses, state):
        return jnp.full(K, 2.0), {"log": state["log"] + jnp.log(losses), "count": state["count"] + 1}

    def rule(task_grads, *, losses, present, state):
        weights, state = kernel(losses=losses, state=state)
        return mtl.stacks.combine(jnp.where(present, weights, 0), task_grads), state

    def start(num_tasks):
        return {"log": jnp.zeros(num_tasks), "count": jnp.zeros(())}

    if kind == "rule":
        tx = mtl.from_rule(rule, lambda params, num_tasks: start(num_tasks), num_tasks=K)
    else:
        tx = mtl.from_kernel(kernel, start, num_tasks=K)
    step = jax.jit(lambda state, losses, present: tx.update(tree(G), state, losses=losses, task_mask=present))
    state, all_losses = tx.init(zeros()), [ONES, 2 * ONES.at[1].set(0), 2 * ONES]
    updates = []
    for losses in all_losses:
        update, state = step(state, losses, EVERYONE)
        updates.append(flat(update))
        assert int(state.info.fallbacks) == (len(updates) > 1)
        assert int(state.info.result) == (FAILED if len(updates) == 2 else SOLVED)
    np.testing.assert_allclose(updates, np.sum([2 * G, G / K, 2 * G], axis=1), rtol=1e-5)
    np.testing.assert_allclose(state.method["log"], np.log(2 * ONES), rtol=1e-6)
    assert state.method["count"] == 2
    _, state = step(state, ONES.at[1].set(0), EVERYONE.at[1].set(False))
    assert int(state.info.result) == SOLVED
    assert state.method["count"] == 3


@pytest.mark.parametrize("loss", [0.0, 1e-30, -1.0])
def test_uw_comes_back(loss):
    """Losses of zero, or losses that drive the weight without bound, for 2600 steps, then 13,000 steps of loss one."""
    tx = mtl.uw(num_tasks=K)

    @jax.jit
    def weights(losses):
        _, (updates, finite, _) = scan(tx, tx.init(zeros()), jnp.broadcast_to(jnp.eye(K, P), (15600, K, P)), losses)
        return updates[:, :K], finite

    away = jnp.full((2600, K), loss).at[:, 0].set(1.0)
    found, finite = weights(jnp.concatenate([away, jnp.ones((13000, K))]))
    assert finite.all()
    assert (found[2599, 1:] > 1e18).all()
    np.testing.assert_allclose(found[:, 0], 0.5)
    assert ((found[-1] > 0.25) & (found[-1] < 2)).all()


def test_gradnorm_at_losses_far_apart():
    """A loss 1e39 times its first value dominates the rates: its weight falls to zero, and the sum stays K."""
    tx = mtl.gradnorm(num_tasks=2, learning_rate=0.1)
    losses = jnp.asarray([[1e-30, 1], *[[1e9, 1]] * 20])
    grads = jnp.broadcast_to(jnp.eye(2, P), (21, 2, P))
    state, (updates, finite, _) = scan(tx, tx.init(zeros()), grads, losses)
    assert finite.all()
    np.testing.assert_allclose(updates[:, :2].sum(axis=1), 2, rtol=1e-6)
    assert updates[-1, 0] > 1.5  # a slow task gets more weight
    assert np.isfinite(state.method.weights.value).all()


def test_rotograd_scale_at_norms_far_apart():
    """A gradient 1e33 times its first norm has all the weight in the common length."""
    tx = mtl.rotograd_scale(num_tasks=2)
    rows = jnp.asarray([[[1e-18], [1.0]], [[1e15], [1.0]]]) * jnp.eye(2, P)
    _, (updates, _, codes) = scan(tx, tx.init(zeros()), rows, jnp.ones((2, 2)))
    assert (codes == SOLVED).all()
    np.testing.assert_allclose(updates[1, :2], [1e15, 1e15], rtol=1e-6)


LOUD = jnp.asarray([[[1e-15, -1e-16], [-1e14, 1e15]], [[1e10, 0], [0, 1]], *[[[1, 0.5], [-0.5, 1]]] * 4])
WRAP = {
    "smoothed": lambda m: mtl.smoothed(m, num_tasks=2),
    "update_every": lambda m: mtl.update_every(m, num_tasks=2, k=3),
    "metrics(smoothed)": lambda m: mtl.with_metrics(mtl.smoothed(m, num_tasks=2), num_tasks=2),
    "non_conflicting(update_every)": lambda m: mtl.non_conflicting(mtl.update_every(m, num_tasks=2, k=3)),
}
INSIDE = ("avgnorm", "pcgrad", "gradvac", "conflict_free", "rotograd_scale", "emtl", "fairgrad")
MEETINGS = [("stacked", "smoothed", name) for name in INSIDE] + [("stacked", wrapper, "avgnorm") for wrapper in WRAP][
    1:
]
MEETINGS += [("matrix-free", wrapper, "avgnorm") for wrapper in ("smoothed", "non_conflicting(update_every)")]


@pytest.mark.parametrize(("route", "wrapper", "name"), MEETINGS)
def test_weights_that_meet_gradients_of_another_scale(route, wrapper, name):
    """With averaged or reused weights from another scale, an update is finite, or zero and counted."""
    if route == "matrix-free":
        method = WRAP[wrapper](make(name, 2))
        update = mtl.balanced_value_and_grad(lambda w, G, losses: G @ w + losses, method)
        start, call = method.init(None), lambda G, s: update(jnp.zeros(2), s, G, jnp.ones(2))[1:]
    else:
        tx = WRAP[wrapper](make(name, 2))
        start, call = tx.init(jnp.zeros(2)), lambda G, s: tx.update(G, s, losses=jnp.ones(2))

    def step(state, grads):
        update, state = call(grads, state)
        return state, (update, results(state))

    _, (updates, codes) = jax.jit(lambda: jax.lax.scan(step, start, LOUD))()
    assert np.isfinite(updates).all()
    for update, code in zip(updates, codes, strict=True):
        assert update.any() or (code == NONFINITE).all()
    assert (codes[2:] == SOLVED).all()


def test_a_sum_that_only_the_gradients_dtype_overflows():
    """Under x64 the Gramian of float32 gradients is finite up to their largest number."""
    with jax.enable_x64(True):
        tx, grads = mtl.avgnorm(), jnp.full((2, 1), 3e38, jnp.float32)
        update, state = tx.update(grads, tx.init(grads[0]))
        assert int(state.info.result) == NONFINITE
        assert not update.any()


def test_weights_may_be_zero():
    """conflict_free gives zero weights if unit gradients cancel; these are averaged and reused like any others."""
    apart, opposite = jnp.eye(2), jnp.asarray([[1.0, 0], [-1, 0]])
    tx = mtl.smoothed(mtl.conflict_free(), num_tasks=2, decay=0.9)
    _, state = tx.update(apart, tx.init(jnp.zeros(2)))
    first = state.weights
    assert (first > 0.5).all()
    _, state = tx.update(opposite, state)
    np.testing.assert_allclose(state.weights, 0.9 * first, rtol=1e-6)
    tx = mtl.update_every(mtl.conflict_free(), num_tasks=2, k=2)
    state, steps = tx.init(jnp.zeros(2)), []
    for grads in (opposite, apart, apart):
        update, state = tx.update(grads, state)
        steps.append(bool(update.any()))
    assert steps == [False, False, True]


@pytest.mark.parametrize("size", [1e-18, 0.2, 1e18])
def test_the_first_excess_of_many_coordinates_is_finite(size):
    """Its value is the 1-norm of the gradient, 200 for 0.2: the exponential of that overflows."""
    tx = mtl.excess_mtl(num_tasks=2, learning_rate=1.0)
    grads = jnp.full((2, 1000), size).at[1].multiply(2)
    first, state = tx.update(grads, tx.init(grads[0]))
    np.testing.assert_allclose(first, 3 * grads[0], rtol=1e-6)
    np.testing.assert_allclose(state.method.first_excess, grads.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(state.method.weights, [1, 1])
    _, state = tx.update(grads.at[1].multiply(0.1), state)
    excess = np.asarray([1 / np.sqrt(2), 0.01 / np.sqrt(1.01)])
    np.testing.assert_allclose(state.method.weights, 2 * np.exp(excess) / np.exp(excess).sum(), rtol=1e-5)


def test_a_task_without_gradient_waits():
    """Until its first excess it has its share of the weights, and no other task's ratio is infinite."""
    tx = mtl.excess_mtl(num_tasks=3, learning_rate=1.0)
    state = tx.init(jnp.zeros(2))
    for row in ([0.0, 0.0], [0.0, 0.0], [1.0, 1.0]):
        _, state = tx.update(jnp.asarray([[1.0, 0], [0, 0.1], row]), state)
        assert float(state.method.weights[2]) == pytest.approx(1, rel=1e-6)
    _, state = tx.update(jnp.asarray([[1.0, 0], [0, 0.1], [0, 0]]), state)
    assert float(state.method.weights[2]) < 0.9


def test_an_excess_beyond_all_bounds():
    """A ratio of 1e36 leaves the other task almost no weight, but enough to come back."""
    tx = mtl.excess_mtl(num_tasks=2, learning_rate=1.0)
    step, state = jax.jit(lambda G, s: tx.update(G, s)), tx.init(jnp.zeros(2))
    for G in ([[1e-18, 0], [0, 1]], [[1e18, 0], [0, 1]]):
        update, state = step(jnp.asarray(G), state)
    assert all_finite((update, state))
    np.testing.assert_allclose(state.method.weights, [2, np.finfo(np.float32).eps ** 2])
    for _ in range(4000):
        update, state = step(jnp.asarray([[1e-18, 0], [0, 1]]), state)
    np.testing.assert_allclose(state.method.weights, [0, 2], atol=1e-6)


@pytest.mark.sample(3)
@pytest.mark.parametrize("normalize", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("projection", ["simplex", "softmax"])
def test_moco_stays_on_the_simplex(projection, normalize):
    """At any scale of the gradients and under any masks."""
    tx = mtl.moco(num_tasks=K, gamma=1.0, projection=projection, normalize=normalize)
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.integers(-18, 19, size=(500, K, 1)) * rng.integers(0, 2, size=(500, K, 1))
    grads = (rng.normal(size=(500, K, P)) * sizes).astype(np.float32)
    present = rng.uniform(size=(500, K)) < 0.6
    losses = rng.choice([1.0, 1e3, 1e6], size=(500, K)).astype(np.float32)

    def step(state, now):
        update, state = tx.update(now[0], state, losses=now[1], task_mask=now[2])
        return state, (state.method.weights, all_finite((update, state)), state.info.result)

    run = jax.jit(lambda *now: jax.lax.scan(step, tx.init(jnp.zeros(P)), now)[1])
    weights, finite, codes = run(grads, losses, present)
    assert finite.all()
    assert (codes[present.any(axis=1)] == SOLVED).all()
    assert weights.min() >= 0
    assert np.abs(weights.sum(axis=1) - 1).max() < 4 * K * np.finfo(np.float32).eps


def test_conflict_free_momentum_waits_for_every_task():
    """Zero, and Adam's average does not move, until all have been present; then one task in each step is enough."""
    tx = mtl.conflict_free_momentum(num_tasks=K)
    state = tx.init(zeros())
    for t, task in enumerate((0, 0, 2, 0, 1, 2, 1)):
        mask = jnp.arange(K) == task
        update, state = tx.update(tree(jnp.where(mask[:, None], G, jnp.nan)), state, task_mask=mask)
        assert flat(update).any() == (t >= 4)
        assert int(state.method.steps) == max(t - 3, 0)
        assert flat(state.method.root).any() == (t >= 4)
        assert int(state.info.result) == SOLVED
    np.testing.assert_array_equal(state.method.seen, [3, 2, 2])


@pytest.mark.parametrize("length", [1e-18, 1.0, 1e18])
def test_conflict_free_momentum_does_not_depend_on_the_scale(length):
    """But for eps: squares of such gradients would underflow or overflow."""
    tx = mtl.conflict_free_momentum(num_tasks=K, eps=0.0)
    rows = G / jnp.linalg.norm(G, axis=1, keepdims=True)
    updates = []
    for scale in (1.0, length):
        state = tx.init(zeros())
        for grads in (rows, rows[:, ::-1], rows):
            update, state = tx.update(tree(scale * grads), state)
        assert int(state.info.result) == SOLVED
        updates.append(flat(update))
    np.testing.assert_allclose(*updates, rtol=1e-4)


BUFFERED = [row.name for row in METHODS if "buffer_dtype" in inspect.signature(row.factory).parameters]


def test_methods_with_buffers_have_a_dtype_for_them():
    assert {row.name for row in METHODS if row.folder == "buffers"} == set(BUFFERED)


@pytest.mark.parametrize("name", BUFFERED)
def test_the_state_holds_as_many_parameters_as_documented(name):
    """In the dtype asked for, by default the parameters'; leaves that are not floating keep theirs."""
    params = {"w": jnp.zeros((5, 200), jnp.bfloat16), "count": jnp.zeros(1000, jnp.int32)}
    # How many have the buffers' dtype, and how many at least float32.
    words = {"The state holds K times the parameters.": (K, 0), "The state holds K + 2 times the parameters.": (K, 2)}
    [(own, wide)] = [numbers for text, numbers in words.items() if text in ROWS[name].factory.__doc__]
    for given, dtype in ((None, jnp.bfloat16), (jnp.float32, jnp.float32), ("float16", jnp.float16)):
        sizes, wanted = collections.Counter(), collections.Counter()
        for leaf in jax.tree.leaves(make(name, K, buffer_dtype=given).init(params)):
            sizes[leaf.dtype] += leaf.size if leaf.size >= 1000 else 0
        for counted, number in ((dtype, own), (jnp.float32, wide), (jnp.int32, own + wide)):
            wanted[jnp.dtype(counted)] += 1000 * number
        assert +sizes == +wanted


@pytest.mark.parametrize("name", sorted(set(BUFFERED) - {"gcond"}))  # gcond keeps the gradients as they are
def test_wide_buffers_of_narrow_gradients_are_more_accurate(name):
    """After 300 steps, beside float32 throughout on the same bfloat16 gradients."""
    slow = {
        "sam_gs": {"b1": 0.99},
        "db_mtl": {"beta": 0.99},
        "moco": {"beta": 0.01},
        "conflict_free_momentum": {"b1": 0.99},
    }
    rows = jnp.asarray(np.random.default_rng(0).normal(1, 0.3, size=(300, K, P)), jnp.bfloat16)

    def buffers(dtype, **own):
        tx = make(name, K, **slow.get(name, {}), **own)

        def step(state, grads):
            return tx.update(grads, state, losses=ONES)[::-1]

        state, updates = jax.jit(lambda rows: jax.lax.scan(step, tx.init(jnp.zeros(P, dtype)), rows))(
            rows.astype(dtype)
        )
        assert updates.dtype == dtype
        return np.concatenate([np.asarray(leaf, float) for leaf in jax.tree.leaves(state) if leaf.shape == (K, P)])

    exact = buffers(jnp.float32)
    narrow, wide = (np.abs(buffers(jnp.bfloat16, buffer_dtype=d) / exact - 1).max() for d in (None, "float32"))
    assert wide < 1e-5
    assert narrow > 0.01


STEPS = 20_000


@pytest.mark.parametrize(
    ("name", "whole"), [("modo", 1), ("sdmgrad", 1), ("gradnorm", 3), ("moco", 1), ("excess_mtl", 3)]
)
def test_weights_keep_their_sum_under_masks(name, whole):
    """Always, up to rounding: no weight is negative, and those of absent tasks keep every bit."""
    tx = make(name, K, **({"num_steps": 2} if name == "sdmgrad" else {}))

    def step(state, now):
        present, losses, grads = now
        _, after = tx.update(grads, state, losses=losses, task_mask=present)
        old, new = (getattr(now.method.weights, "value", now.method.weights) for now in (state, after))
        return after, (new.sum(), new.min(), jnp.any(~present & (new != old)))

    rng = np.random.default_rng(0)
    present = rng.uniform(size=(STEPS, K)) < 0.5
    losses = rng.uniform(0.1, 3, size=(STEPS, K)).astype(np.float32)
    grads = (rng.normal(size=(STEPS, K, 2)) * [[0.1], [1], [10]]).astype(np.float32)
    grads[:100] = [[0.0, 0], [10, 0], [0, 10]]  # the first task takes it all,
    present[:110, 0] = np.arange(110) < 50  # and is absent
    _, (total, least, moved) = jax.jit(lambda *now: jax.lax.scan(step, tx.init(jnp.zeros(2)), now))(
        present, losses, grads
    )
    assert np.abs(total - whole).max() < 4 * K * whole * np.finfo(np.float32).eps
    assert least.min() >= 0
    assert not moved.any()


COUNTING = [*STATEFUL, "skip_nonfinite_tasks"]


@pytest.mark.parametrize("name", COUNTING)
def test_counts_do_not_wrap(name):
    """After 2^31 steps, no count is negative and steps work as before."""
    tx = make(name, K)
    most = jnp.iinfo(jnp.int32).max
    state = jax.tree.map(lambda leaf: jnp.full_like(leaf, most) if leaf.dtype == jnp.int32 else leaf, tx.init(zeros()))
    assert any(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(state))
    for grads in (G, G.at[1].set(jnp.nan)):
        update, state = tx.update(tree(grads), state, zeros(), losses=ONES)
        assert all_finite((update, state))
        assert flat(update).any() == jnp.isfinite(grads).all() or name == "skip_nonfinite_tasks"
        assert all((leaf >= 0).all() for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32)


NESTED = {
    "key and metrics": lambda: mtl.with_metrics(mtl.smoothed(mtl.pcgrad(), K), K),
    "buffers": lambda: mtl.skip_nonfinite_tasks(mtl.db_mtl(num_tasks=K)),
    "inner optimizers": lambda: mtl.partition({"one": mtl.uw(K), "two": mtl.gradnorm(K)}, {"b": "one", "w": "two"}),
    "accumulated": lambda: mtl.accumulate(mtl.chain(mtl.gradnorm(K), optax.adam(1e-3)), num_tasks=K, steps=2),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", [*STATEFUL, *NESTED])
def test_resumed_training_is_bit_identical(name, tmp_path):
    """Six steps, and six with the optimizer's state stored by orbax and by flax after the third."""
    tx = NESTED[name]() if name in NESTED else mtl.chain(make(name, K), optax.adam(1e-3))
    step = jax.jit(lambda grads, state, losses: tx.update(tree(grads), state, zeros(), losses=losses))
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(6, K, P)).astype(np.float32)
    losses = rng.uniform(0.5, 2.0, size=(6, K)).astype(np.float32)

    def go_on(state, steps):
        updates = []
        for t in steps:
            update, state = step(grads[t], state, losses[t])
            updates.append(flat(update))
        return np.stack(updates), state

    _, middle = go_on(tx.init(zeros()), range(3))
    wanted, last = go_on(middle, range(3, 6))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", middle)
        checkpointer.wait_until_finished()
        stored = {"orbax": checkpointer.restore(tmp_path / "state", tx.init(zeros()))}
    stored["flax"] = flax.serialization.from_bytes(tx.init(zeros()), flax.serialization.to_bytes(middle))
    for state in stored.values():
        updates, end = go_on(state, range(3, 6))
        np.testing.assert_array_equal(updates, wanted)
        jax.tree.map(np.testing.assert_array_equal, end, last)


DONATED = {
    "uw": lambda inner: mtl.uw(K, inner),
    "update_every": lambda inner: mtl.update_every(mtl.uw(K, inner), K, 2),
    "per_task": lambda inner: optax.chain(mtl.per_task(inner, K), mtl.mean()),
    "partition": lambda inner: mtl.partition({True: optax.chain(mtl.mean(), inner)}, lambda path: True),
    "skip_nonfinite_tasks": lambda inner: mtl.skip_nonfinite_tasks(optax.chain(mtl.mean(), inner)),
}


@pytest.mark.parametrize("name", DONATED)
def test_a_state_shares_no_array(name):
    """For optimizers that keep their initial parameters: state and parameters are donated together."""
    tx, params = DONATED[name](optax.contrib.prodigy()), jax.tree.map(lambda leaf: leaf + 1, zeros())

    def step(params, state):
        update, state = tx.update(tree(G), state, params, losses=ONES)
        return optax.apply_updates(params, update), state

    assert all_finite(jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params)))
    method = mtl.uw(K, optax.contrib.prodigy())
    jax.jit(lambda s: method.weigh(None, s, losses=ONES), donate_argnums=0)(method.init(None))


DRAWING = [row.name for row in ROWS.values() if "key" in inspect.signature(row.factory).parameters]


@pytest.mark.parametrize("name", DRAWING)
def test_runs_side_by_side_draw_on_their_own(name):
    """As documented: made inside vmap, with a key for each run."""
    keys = jax.random.split(jax.random.key(0), 5)
    states = jax.vmap(lambda key: make_row(ROWS[name], K, key=key).init(zeros()))(keys)
    drawn = [node.data for node in jax.tree.leaves(states, is_leaf=is_key) if is_key(node)]
    assert drawn
    assert all(len(np.unique(np.asarray(data), axis=0)) == 5 for data in drawn)


def is_key(node):
    return isinstance(node, Key)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[1.0, 0.0], [-0.5, np.sqrt(0.75)]], [0.75, 1.5 * np.sqrt(0.75)]),
        ([[2.0, 0.0], [-1.0, 0.1]], [2.0, 0.1]),
        ([[1.0, 0.0], [0.1, 1.0]], [1.1, 1.0]),
    ],
    ids=["main", "critical", "none"],
)
def test_gcond_of_two_tasks(rows, wanted):
    """At -1/2 both are projected on the normal of the other; below -0.8 only the shorter one is."""
    tx = mtl.gcond(num_tasks=2)
    update, _ = tx.update(jnp.asarray(rows), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(update, wanted, atol=1e-6)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_gcond_lets_no_task_win_forever(window):
    """Steady gradients have equal scores: the longer one wins, but after a number of wins the other has a turn."""
    rows, tx = jnp.asarray([[2.0, 0.0], [-1.0, 0.1]]), mtl.gcond(num_tasks=2, window=window)
    state, winners = tx.init(jnp.zeros(2)), []
    for _ in range(8):
        _, state = tx.update(rows, state)
        winners.append(int(jnp.argmax(state.method.wins)))
    turns = {0: [0] * 8, 1: [0, 1] * 4, 3: [0, 0, 0, 1] * 2}
    assert winners == turns[window]


def test_gcond_survives_vanishing_and_zero_gradients():
    """Opposite gradients leave nothing of the loser, and a task without a gradient so far has no average."""
    rows = jnp.asarray([[1e18, 0.0, 0.0], [-1e-18, 0.0, 0.0], [0.0, 0.0, 0.0]])
    tx = mtl.gcond(num_tasks=3)
    state = tx.init(jnp.zeros(3))
    for _ in range(5):
        update, state = tx.update(rows, state)
        assert all_finite((update, state))
        assert float(jnp.abs(update[0])) in (0.0, pytest.approx(1e18))
    assert state.method.norm[2] == 0


def test_squares_decay_for_parameters_of_16_bits():
    """One step a hundred times as long is forgotten in float32 and in bfloat16 alike."""
    tx, rows = mtl.conflict_free_momentum(num_tasks=2), jnp.asarray([[1.0, 0.0], [0.5, 2.0]])

    def walk(dtype):
        def step(state, t):
            update, state = tx.update((jnp.where(t == 0, 100, 1) * rows).astype(dtype), state)
            return state, update

        return jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(8000)))(tx.init(jnp.zeros(2, dtype)))[1]

    wide, narrow = (walk(dtype)[-1].astype(float) for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_allclose(narrow, wide, rtol=0.02)


@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_sam_gs_with_wide_buffers_rounds_only_its_result(size):
    rng = np.random.default_rng(0)
    grads = jnp.asarray(size * rng.normal(size=(2, 1000)), jnp.float16)
    tx = mtl.sam_gs(2, gamma=0.0, buffer_dtype=jnp.float32)
    found, wanted = (tx.update(g, tx.init(jnp.zeros(1000, g.dtype)))[0] for g in (grads, grads.astype(jnp.float32)))
    assert found.dtype == jnp.float16
    limits = jnp.finfo(jnp.float16)
    np.testing.assert_allclose(found, wanted, rtol=float(limits.eps), atol=float(limits.smallest_subnormal))
