"""Loss weightings: their cost, their hazards, and what their papers say about them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import make, raises_naming

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import METHODS
from mtlgrad_jax.solvers._solution import FAILED, LAGGED, NONFINITE, SOLVED

K = 3
WEIGHTINGS = [row.name for row in METHODS if row.folder == "losses"]
POSITIVE = [name for name in WEIGHTINGS if any(own.above is not None for own in make(name, K).arguments)]


def weights_of(method, losses, state=None, **extra):
    """The weights for one step, and the next state."""
    return method.weigh(None, method.init(None) if state is None else state, losses=jnp.asarray(losses), **extra)


def over(method, all_losses, **extra):
    """The weights (T, K) for successive losses, and the last state."""
    state, found = method.init(None), []
    for t, losses in enumerate(all_losses):
        weights, state = weights_of(method, losses, state, **{key: value[t] for key, value in extra.items()})
        found.append(np.asarray(weights))
    return np.array(found), state


def losses_fn(params):
    hidden = jnp.tanh(jnp.matmul(jnp.ones((32, 64)), params["w"], precision="highest"))
    return jnp.stack([jnp.mean((hidden - target) ** 2) + 1 for target in (1.0, 0.0, -1.0)])


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_step_costs_one_plain_step(name):
    """Without a stored stack: one forward and one backward pass, whose update is that of the stored route."""
    method, params = make(name, K), {"w": jnp.linspace(-1, 1, 64 * 64).reshape(64, 64)}
    state = method.init(params)
    step = mtl.balanced_value_and_grad(losses_fn, method)
    plain = jax.value_and_grad(lambda params: losses_fn(params).sum())
    flops = [
        jax.jit(f).lower(*given).compile().cost_analysis()["flops"]
        for f, given in ((step, (params, state)), (plain, (params,)))
    ]
    assert flops[0] < 1.05 * flops[1]
    _, gradient, _ = jax.jit(step)(params, state)
    losses, stack = mtl.task_value_and_grad(losses_fn)(params)
    stored, _ = method.update(stack, state, params, losses=losses)
    np.testing.assert_allclose(gradient["w"], stored["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [0.0, -1.0])
@pytest.mark.parametrize("name", POSITIVE)
def test_a_loss_outside_the_domain(name, loss):
    """The step is skipped and counted, or only the task is."""
    method, losses, grads = make(name, K), jnp.asarray([1.0, loss, 2.0]), jnp.eye(K)
    update, state = method.update(grads, method.init(jnp.zeros(K)), losses=losses)
    assert not update.any()
    assert (int(state.info.result), int(state.info.skipped)) == (NONFINITE, 1)
    wrapped = mtl.skip_nonfinite_tasks(method)
    update, state = wrapped.update(grads, wrapped.init(jnp.zeros(K)), losses=losses)
    assert (np.asarray(update) != 0).tolist() == [True, False, True]
    assert int(state.dropped) == 1


@pytest.mark.parametrize("sizes", [(1e-30, 1.0, 1e30), (1e-30, 1e-30, 1e-28), (1e30, 1e28, 1e30)])
def test_gls_takes_the_product_in_logarithms(sizes):
    wanted = np.exp(np.log(sizes).mean()) / 3 / np.array(sizes)
    np.testing.assert_allclose(weights_of(mtl.gls(), sizes)[0], wanted, rtol=3e-5)


def test_stch_for_every_smoothing():
    """Small smoothing: Tchebycheff; large: the weights themselves; nothing overflows."""
    losses, weights = [0.5, 2.0, 1.0], [0.2, 0.5, 0.3]
    for size in (1e-20, 1.0, 1e20):
        sharp, _ = weights_of(mtl.stch(1e-3 * size, weights), size * np.array(losses))
        np.testing.assert_allclose(sharp, weights_of(mtl.tchebycheff(weights), losses)[0], atol=1e-6)
        blunt, _ = weights_of(mtl.stch(1e9 * size, weights), size * np.array(losses))
        np.testing.assert_allclose(blunt, np.array(weights) / 3, rtol=1e-6)
    assert np.isfinite(weights_of(mtl.stch(1e-30), [1e30, 1.0, -1e30])[0]).all()


def test_the_recipe_of_stch_is_a_fixed_scalarization_where_its_smoothing_is_one():
    """The weights of the second phase are proportional to the inverse nadir, whatever the losses."""
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.1, 3.0, size=(6, K))
    found, _ = over(mtl.stch_mtl(K, warmup_steps=1, nadir_steps=2), losses)
    np.testing.assert_allclose(found[:3], 1 / losses[:3], rtol=1e-5)
    nadir = losses[1:3].mean(axis=0)
    second = found[3:] * nadir
    np.testing.assert_allclose(second / second[:, :1], 1, rtol=1e-5)
    np.testing.assert_allclose((found * losses).sum(axis=1), K, rtol=1e-5)


def test_pbi_on_its_ray_has_no_penalty():
    for size in (1e-30, 1.0, 1e30):
        weights, _ = weights_of(mtl.pbi([1.0, 2.0, 2.0], theta=5.0), size * np.array([1.0, 2.0, 2.0]))
        np.testing.assert_allclose(weights, np.array([1, 2, 2]) / 3, rtol=1e-6)


def test_cosmos_without_losses_is_linear():
    np.testing.assert_allclose(weights_of(mtl.cosmos(2.0, [0.2, 0.3, 0.5]), np.zeros(K))[0], [0.2, 0.3, 0.5])


@pytest.mark.parametrize("factory", [mtl.pbi, lambda preference=None: mtl.cosmos(1.0, preference)])
def test_a_preference_of_the_step_replaces_that_of_the_factory(factory):
    losses, preference = [0.5, 2.0, 1.0], [0.2, 0.3, 0.5]
    of_step, _ = weights_of(factory([3.0, 2.0, 1.0]), losses, preference=jnp.asarray(preference))
    np.testing.assert_array_equal(of_step, weights_of(factory(preference), losses)[0])


def test_imtl_l_is_twice_uw_with_the_opposite_sign():
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.1, 3.0, size=(20, K))
    ours, _ = over(mtl.imtl_l(K, optax.sgd(0.05)), losses)
    theirs, _ = over(mtl.uw(K, optax.sgd(0.1)), losses)
    np.testing.assert_allclose(ours, 2 * theirs, rtol=1e-5)


def test_imtl_l_brings_the_losses_to_one_value():
    found, _ = over(mtl.imtl_l(K, optax.sgd(0.3)), np.broadcast_to([0.1, 1.0, 5.0], (200, K)))
    np.testing.assert_allclose(found[-1] * [0.1, 1.0, 5.0], 1, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------------- epochs


def test_dwa_needs_to_know_where_epochs_end():
    method = mtl.dwa(K)
    with pytest.raises(ValueError, match=raises_naming("epoch_end")):
        weights_of(method, np.ones(K))
    with pytest.raises(ValueError, match="`epoch_end` must be True or False"):
        weights_of(method, np.ones(K), epoch_end=1.0)


def epochs_of_dwa(losses, ends, present=None):
    """The definition, task by task: means over the epochs in which a task was present."""
    means, sums, found = [[] for _ in range(K)], [[] for _ in range(K)], []
    present = np.ones_like(losses, bool) if present is None else present
    for row, end, p in zip(losses, ends, present, strict=True):
        rates = np.array([m[-1] / m[-2] if len(m) > 1 else 1.0 for m in means])
        weights = np.where(p, np.exp(rates / 2), 0)
        found.append(p.sum() * weights / max(weights.sum(), 1e-30))
        for i in np.flatnonzero(p):
            sums[i].append(row[i])
        if end:
            for i in range(K):
                means[i] += [np.mean(sums[i])] if sums[i] else []
                sums[i] = []
    return np.array(found)


def test_epochs_of_dwa():
    """Epochs of unequal length, and tasks that are absent where an epoch ends, or for a whole one."""
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.1, 3.0, size=(14, K))
    ends = np.isin(np.arange(14), (2, 3, 7, 9, 12))
    present = rng.uniform(size=(14, K)) < 0.7
    present[4:8, 1] = False
    for p in (None, present):
        masks = {} if p is None else {"task_mask": p}
        found, state = over(mtl.dwa(K), losses, epoch_end=ends, **masks)
        np.testing.assert_allclose(found, epochs_of_dwa(losses, ends, p), rtol=1e-5)
        assert int(state.info.fallbacks) == int(state.info.skipped) == 0
    assert (found[:3] == present[:3]).all()


def test_the_end_of_an_epoch_within_accumulated_steps_counts():
    tx = mtl.accumulate(mtl.dwa(K), num_tasks=K, steps=2)
    grads, state = jnp.eye(K), tx.init(jnp.zeros(K))
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.1, 3.0, size=(8, K))
    for t, row in enumerate(losses):
        update, state = tx.update(grads, state, losses=jnp.asarray(row), epoch_end=jnp.asarray(t in (0, 2, 4)))
    wanted = epochs_of_dwa(losses.reshape(4, 2, K).mean(axis=1), [True, True, True, False])
    np.testing.assert_allclose(update, wanted[-1], rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- famo


def test_famo_learns_from_the_last_batch_at_the_new_parameters():
    """Without `new_losses`, the step says that the losses of another batch stood in."""
    method = mtl.famo(K, learning_rate=0.1)
    _, state = weights_of(method, np.ones(K))
    fell = [0.5, 1.0, 1.0]
    told, after = weights_of(method, np.ones(K), state, new_losses=jnp.asarray(fell))
    assert int(after.info.result) == SOLVED
    assert told[0] < told[1] == told[2]  # the task that fell gets less weight
    lagged, after = weights_of(method, fell, state)
    assert int(after.info.result) == LAGGED
    np.testing.assert_allclose(after.method.logits.value[0], -0.1, rtol=1e-5)
    assert lagged[0] > lagged[1]  # 1/loss outweighs it
    with pytest.raises(ValueError, match="write new_losses"):
        method.update(jnp.eye(K), state, losses=jnp.ones(K), new_loss=jnp.ones(K))


def test_famo_takes_bounds_by_name():
    losses = {"b": jnp.asarray(2.0), "a": jnp.asarray(-1.0)}
    method = mtl.famo(2, min_losses={"a": -2.0, "b": 0.0})
    weights, state = method.weigh(None, method.init(None), losses=losses)
    np.testing.assert_allclose(weights, [2 / 3, 1 / 3], rtol=1e-6)
    below = {**losses, "a": jnp.asarray(-2.0)}
    _, state = method.weigh(None, method.init(None), losses=below)
    assert int(state.info.result) == NONFINITE


def test_famo_balances_the_rates_of_two_losses():
    """Losses that fall at the rates w_1 and 4 w_2 of their logarithms: the weights make the rates equal."""
    method = mtl.famo(2, learning_rate=0.05, gamma=0.0)

    def step(carry, _):
        logs, state = carry
        weights, state = method.weigh(None, state, losses=jnp.exp(logs))
        z = weights * jnp.exp(logs)
        z = z / z.sum()
        return (logs - 1e-3 * z * jnp.asarray([1.0, 4.0]), state), z

    _, z = jax.lax.scan(step, (jnp.zeros(2), method.init(None)), length=4000)
    np.testing.assert_allclose(z[-1], [0.8, 0.2], atol=0.02)


# ------------------------------------------------------------------------------------------------------------- the rest


def draws(distribution, present, count=20_000):
    def draw(seed):
        method = mtl.rlw(distribution, key=seed)
        return method.weigh(None, method.init(None), losses=jnp.ones(len(present)), task_mask=jnp.asarray(present))[0]

    return np.asarray(jax.jit(jax.vmap(draw))(np.arange(count)), float)


@pytest.mark.sample(5)
@pytest.mark.parametrize("present", [(True,) * 4, (True, False, True, True), (False, False, True, False)])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli"])
def test_the_laws_of_rlw(distribution, present):
    """Each draw on the simplex of the tasks present; moments as numpy draws them from the definition."""
    mine, n = draws(distribution, present), sum(present)
    np.testing.assert_allclose(mine.sum(axis=1), 1, rtol=1e-5)
    assert mine.min() >= 0
    assert not mine[:, ~np.array(present)].any()
    rng = np.random.default_rng(1)
    if distribution in ("normal", "uniform"):
        numbers = rng.normal(size=(20_000, n)) if distribution == "normal" else rng.uniform(size=(20_000, n))
        theirs = np.exp(numbers) / np.exp(numbers).sum(axis=1, keepdims=True)
    elif distribution == "dirichlet":
        theirs = rng.dirichlet(np.ones(n), size=20_000)
    elif distribution == "bernoulli":
        sets = rng.integers(2, size=(80_000, n))
        theirs = sets[sets.any(axis=1)][:20_000]
        theirs = theirs / theirs.sum(axis=1, keepdims=True)
    else:
        theirs = np.eye(n)[rng.integers(n, size=20_000)]
    mine = mine[:, np.array(present)]
    for power in (1, 2, 4):
        np.testing.assert_allclose((mine**power).mean(axis=0), (theirs**power).mean(axis=0), atol=0.015)
    np.testing.assert_allclose(np.cov(mine.T), np.cov(theirs.T), atol=0.01)


def test_groups_of_go4align_are_the_best_ones():
    """Two clusters far apart, and ties."""
    losses = np.array([1.0, 100.0, 1.1, 90.0, 1.0])
    weights = np.asarray(weights_of(mtl.go4align(5, num_groups=2, learning_rate=0.0), losses)[0])
    scaled = losses.sum() / losses / 5
    np.testing.assert_allclose(weights[[0, 2, 4]], scaled[[0, 2, 4]].mean(), rtol=1e-5)
    np.testing.assert_allclose(weights[[1, 3]], scaled[[1, 3]].mean(), rtol=1e-5)
    equal, _ = weights_of(mtl.go4align(5, num_groups=1), losses)
    assert np.ptp(equal) <= 1e-6 * equal.max()
    own, _ = weights_of(mtl.go4align(5, num_groups=5, learning_rate=0.0), losses)
    np.testing.assert_allclose(own, scaled, rtol=1e-5)


def test_ldc_mtl_draws_the_weighted_losses_together():
    """At the optimum of the penalty alone, for fixed losses."""
    method, losses = mtl.ldc_mtl(K, penalty=10.0, optimizer=optax.adam(0.02)), jnp.asarray([1.0, 2.0, 1.5])
    state, _ = jax.lax.scan(lambda s, _: weights_of(method, losses, s)[::-1], method.init(None), length=600)
    scaled = jax.nn.sigmoid(state.method.logits.value) * losses
    assert np.ptp(scaled) < 0.02 * scaled.max()


def test_weights_of_ldc_mtl_depend_on_the_order_and_may_be_negative():
    """Each loss is compared with its neighbours; one above both is weighed up, one below both down, by 2 lambda."""
    scale = 1 / (1 + np.exp(-1.0))
    for losses, signs in (([1.0, 3, 1], [-1, 2, -1]), ([3.0, 1, 2], [1, -2, 1]), ([1.0, 2, 3], [-1, 0, 1])):
        weights, _ = weights_of(mtl.ldc_mtl(K, penalty=1.0), losses)
        np.testing.assert_allclose(weights, 1 / K + scale * np.array(signs), rtol=1e-5)


@pytest.mark.parametrize("mu", [1e-2, 1.0])
@pytest.mark.parametrize("size", [1e4, 1e10, 1e30])
def test_stch_gives_the_worst_task_its_weight_in_a_scan(mu, size):
    """Where differences of losses are much longer than the smoothing, only one task counts, with its weight 1/K."""
    losses = (size * np.random.default_rng(0).uniform(0.5, 1.5, (200, K))).astype(np.float32)
    tx = mtl.stch(mu)

    def step(state, row):
        update, state = tx.update(jnp.eye(K), state, losses=row)
        return state, (update, state.info.result)

    _, (weights, results) = jax.jit(lambda rows: jax.lax.scan(step, tx.init(jnp.zeros(K)), rows))(losses)
    assert not results.any()
    apart = np.diff(np.sort(losses)[:, -2:])[:, 0] > 50 * K * mu
    assert apart.sum() > 190
    np.testing.assert_allclose(weights[apart], (losses == losses.max(1, keepdims=True))[apart] / K, atol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_preferences_of_any_length(size):
    """Only the direction counts for `pbi`; for `cosmos` it counts in the bonus, beside weights as long as itself."""
    losses, preference = [1.0, 2.0, 1.0], np.array([1.0, 1.0, 2.0])
    found, _ = weights_of(mtl.pbi(size * preference), losses)
    np.testing.assert_allclose(found, weights_of(mtl.pbi(preference), losses)[0], rtol=1e-5)
    bonus = weights_of(mtl.cosmos(1.0, preference), losses)[0] - preference
    np.testing.assert_allclose(
        weights_of(mtl.cosmos(size, size * preference), losses)[0], size * (preference + bonus), rtol=1e-5
    )


@pytest.mark.parametrize("factory", [mtl.pbi, lambda: mtl.cosmos(1.0)], ids=["pbi", "cosmos"])
def test_a_negative_preference_of_a_step_is_bad_data(factory):
    weights, state = weights_of(factory(), [1.0, 2.0, 3.0], preference=jnp.asarray([-1.0, 2.0, 1.0]))
    assert not weights.any()
    assert int(state.info.result) == NONFINITE


@pytest.mark.parametrize("factory", [mtl.pbi, lambda: mtl.cosmos(1.0)], ids=["pbi", "cosmos"])
def test_a_preference_for_no_task_present_has_no_direction(factory):
    mask = jnp.asarray([False, True, True])
    weights, state = weights_of(factory(), [1.0, 2.0, 3.0], preference=jnp.asarray([1.0, 0.0, 0.0]), task_mask=mask)
    np.testing.assert_allclose(weights, [0, 0.5, 0.5])
    assert int(state.info.result) == FAILED
