"""Methods that a user steers: by scores, or by a preference among the losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from families import EVERY, gramian, stack, within_contract
from harness import P, raises_naming

import mtlgrad_jax as mtl
from mtlgrad_jax.solvers import linear_program
from mtlgrad_jax.solvers._solution import INFEASIBLE, NONFINITE, SOLVED

K = 3
G = jnp.asarray(stack("normal", K, P), jnp.float32)
LOSSES = jnp.asarray([1.0, 2.0, 3.0])


def updated(method, grads=G, losses=LOSSES, **extra):
    return method.update(grads, method.init(jnp.zeros(P)), losses=losses, **extra)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def named(values):
    return dict(zip("abc", values, strict=True))


def test_scores_of_a_step_take_precedence():
    scores = jnp.asarray([0.0, 30.0, 5.0])
    wanted, _ = updated(mtl.pivrg(scores))
    for method in (mtl.pivrg(), mtl.pivrg([1.0, 2.0, 9.0])):
        update, _ = updated(method, scores=scores)
        np.testing.assert_array_equal(update, wanted)
    by_name, _ = updated(mtl.pivrg(), losses=named(LOSSES), scores=named(scores))
    np.testing.assert_array_equal(by_name, wanted)
    with pytest.raises(ValueError, match=raises_naming("scores")):
        updated(mtl.pivrg())
    with pytest.raises(ValueError, match=raises_naming("scores")):
        updated(mtl.pivrg(), losses=named(LOSSES), scores=scores)


def test_equal_scores_are_fairgrad_and_a_worse_task_gains():
    equal, _ = updated(mtl.pivrg([7.0] * K))
    np.testing.assert_allclose(equal, updated(mtl.fairgrad(alpha=2.0))[0], rtol=1e-6)
    worse, _ = updated(mtl.pivrg([7.0, 90.0, 7.0]))
    assert G[1] @ worse > G[1] @ equal


def test_priorities_over_the_tasks_present():
    """Of orthogonal unit gradients the weights are p^(1/3); an absent task's score does not matter."""
    grads = jnp.eye(K, P)
    update, _ = updated(mtl.pivrg([1e6, 0.0, 20.0]), grads, task_mask=jnp.asarray([False, True, True]))
    np.testing.assert_allclose(update[:K] ** 3, [0, 2 / 3, 4 / 3], rtol=1e-5)
    update, _ = updated(mtl.pivrg([0.0, 0.0, 1e30]), grads)
    np.testing.assert_allclose(update[:K] ** 3, [3 / 4, 3 / 4, 3 / 2], rtol=1e-5)
    broken, state = updated(mtl.pivrg(), scores=jnp.asarray([jnp.nan, 0, 0]))
    assert not broken.any()
    assert int(state.info.skipped) == 1


THREE = [[1.0, 2.0, 3.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("method", [mtl.epo, lambda r=None: mtl.ferero(K, r)], ids=["epo", "ferero"])
def test_a_preference_of_a_step_takes_precedence(method):
    wanted, _ = updated(method(THREE[0]))
    for made in (method(), method(THREE[1])):
        np.testing.assert_array_equal(updated(made, preference=jnp.asarray(THREE[0]))[0], wanted)
    by_name, _ = updated(method(named(THREE[0])), losses=named(LOSSES))
    np.testing.assert_array_equal(by_name, wanted)
    by_name, _ = updated(method(), losses=named(LOSSES), preference=named(THREE[0]))
    np.testing.assert_array_equal(by_name, wanted)
    np.testing.assert_array_equal(updated(method())[0], updated(method(THREE[2]))[0])
    with pytest.raises(ValueError, match=raises_naming("preference")):
        updated(method(THREE[0]), losses=named(LOSSES))
    broken, state = updated(method(), preference=jnp.asarray([1.0, 0.0, 1.0]))
    assert not broken.any()
    assert int(state.info.result) == NONFINITE


def test_a_preference_of_a_step_replaces_the_reference_vector():
    wanted, _ = updated(mtl.pmtl(THREE, index=1))
    other = [THREE[0], [9.0, 0.0, 0.0], THREE[2]]
    update, _ = updated(mtl.pmtl(other, index=1), preference=jnp.asarray(THREE[1]))
    np.testing.assert_array_equal(update, wanted)
    by_name = mtl.pmtl([named(vector) for vector in THREE], index=1)
    np.testing.assert_array_equal(updated(by_name, losses=named(LOSSES))[0], wanted)
    with pytest.raises(ValueError, match="preferences"):
        updated(mtl.pmtl(THREE, index=1), losses=named(LOSSES))


def test_reference_vectors_that_say_nothing():
    """Equal ones, and those without an entry for a task present, leave the min-norm point of the gradients."""
    wanted, _ = updated(mtl.mgda())
    for vectors in ([THREE[0]], [THREE[0], [2.0, 4.0, 6.0], [0.1, 0.2, 0.3]]):
        np.testing.assert_allclose(updated(mtl.pmtl(vectors, index=0))[0], wanted, rtol=1e-5)
    pair = jnp.asarray([False, True, True])
    wanted, _ = updated(mtl.mgda(), task_mask=pair)
    for index in (0, 1):
        vectors = [[1.0, 0.0, 0.0], [0.0, 2.0, 3.0]]
        np.testing.assert_allclose(updated(mtl.pmtl(vectors, index), task_mask=pair)[0], wanted, rtol=1e-5)


def test_initial_steps_end_in_the_sector():
    tx = mtl.pmtl([[1.0, 0.0], [0.0, 1.0]], index=0, initial_steps=5)
    grads, state = jnp.eye(2), tx.init(jnp.zeros(2))
    outside, inside = jnp.asarray([1.0, 3.0]), jnp.asarray([3.0, 1.0])
    update, state = tx.update(grads, state, losses=outside)
    np.testing.assert_allclose(update, [-1, 1])  # towards a larger first loss
    assert int(state.method.initial) == 4
    for losses in (inside, outside):
        update, state = tx.update(grads, state, losses=losses)
        assert (grads @ update >= 0).all()
        assert int(state.method.initial) == 0


@pytest.mark.parametrize(
    ("grads", "losses"),
    [
        ([[-2.3, -0.2, -1.2], [-0.7, -0.5, -0.3], [0.4, 1.0, -0.1]], [0.8, 2.2, 2.1]),
        ([[-0.1, -1.5, 1.4], [1.1, -0.3, 2.1], [-0.3, -1.1, -0.2]], [1.1, 2.2, 2.2]),
    ],
)
def test_epo_without_a_feasible_direction(grads, losses):
    """No w has M w >= 0 and w.c >= min(0, max c), by HiGHS: the preference is the fallback, and is counted."""
    grads, losses, r = np.asarray(grads), np.asarray(losses), np.asarray([1.0, 2.0, 3.0])
    M, share = grads @ grads.T, r * losses / (r @ losses)
    c = M @ (r * (np.log(3 * share) - share @ np.log(3 * share)))
    bounds = [0, 0, 0, -min(0, c.max())]
    assert scipy.optimize.linprog(np.zeros(3), -np.vstack([M, c]), bounds, np.ones((1, 3)), [1.0]).status == 2
    with jax.enable_x64(True):
        update, state = updated(mtl.epo(r, tolerance=10.0), jnp.asarray(grads @ np.eye(3, P)), jnp.asarray(losses))
    assert int(state.info.result) == INFEASIBLE
    assert int(state.info.fallbacks) == 1
    np.testing.assert_allclose(update[:3], r / r.sum() @ grads)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (4, 3), (6, 5), (11, 10), (41, 40)])
def test_linear_programs(rows, columns, dtype):
    """Against HiGHS: the same programs are infeasible; the others reach its optimum without violating anything."""
    eps, rng, statuses = np.finfo(dtype).eps, np.random.default_rng(0), []
    for _ in range(60 if columns < 20 else 10):
        c, p = rng.normal(size=columns), rng.uniform(0.1, 1, columns)
        A, b = rng.normal(size=(rows, columns)), rng.normal(size=rows) * 0.3 - 0.2
        b[rng.random(rows) < 0.3] = -np.inf
        c, p, A, b = (array.astype(dtype) for array in (c, p, A, b))
        solved = linear_program(c, A, b, p, np.ones(columns, bool))
        kept = np.isfinite(b)
        wanted = scipy.optimize.linprog(-c, -A[kept], -b[kept], p[None], [1.0])
        statuses.append(wanted.status)
        assert int(solved.result) == (SOLVED if wanted.status == 0 else INFEASIBLE)
        if wanted.status == 0:
            x = np.asarray(solved.value, float)
            scale = abs(x).max()
            assert x.min() >= 0
            assert abs(p @ x - 1) <= 16 * eps
            assert c @ x >= -wanted.fun - max(64 * eps, 1e-8) * abs(c).max() * scale
            assert (A @ x - b).min() >= -64 * eps * scale
    assert 0 in statuses


EPO_FAMILIES = sorted(set(EVERY) - {"huge"})  # whose float32 Gramian is not finite at many columns


@pytest.mark.sample(2)
@pytest.mark.parametrize(("num_tasks", "columns"), [(2, 5), (3, 3), (5, 3), (8, 6), (16, 8), (12, 40)])
def test_epo_balances_on_every_family(num_tasks, columns, dtype):
    """The certificate: a feasible w, judged relative to the terms of each row, and HiGHS's optimum, in float64."""
    method = mtl.epo()
    weigh = jax.jit(lambda M, losses: method.weigh(M, method.init(None), losses=losses))
    losses = np.random.default_rng(0).uniform(0.1, 3, num_tasks).astype(dtype)
    for family in EPO_FAMILIES:
        M = gramian(stack(family, num_tasks, columns), dtype)
        if not within_contract(M):
            continue
        w, state = weigh(M, losses)
        assert int(state.info.result) == SOLVED, family
        w, M, tolerance = np.asarray(w, float), M.astype(float), 64 * np.finfo(dtype).eps * num_tasks
        n, share = np.sqrt(np.diag(M)), losses / losses.sum(dtype=float)
        a = np.log(num_tasks * share) - share @ np.log(num_tasks * share)
        c, blur = M @ a, tolerance * n * (n @ abs(a))
        floors = np.where(losses == losses.max(), 0, np.where(c > blur, -np.inf, np.minimum(c, 0)))
        floors = floors if (c > blur).any() else np.zeros(num_tasks)
        kept, size = np.isfinite(floors), np.where(n > 0, n, 1)
        short = (floors - M @ w)[kept] - tolerance * (abs(M) @ w + abs(c) + n * (n @ w))[kept]
        assert (short <= 0).all(), family
        assert abs(w.sum() - 1) <= tolerance
        assert w.min() >= 0
        A, b = (M / size[:, None] / size.max())[kept], (floors / size / size.max())[kept]
        scale = abs(c).max() or 1
        best = scipy.optimize.linprog(-c / scale, -A, -b, np.ones((1, num_tasks)), [1.0])
        if best.status == 0 and (abs(c) > 10 * blur).all():
            assert c @ w / scale >= -best.fun - max(tolerance, 1e-6), family


def concave(x):
    """Two losses with a concave front, after Lin et al. 2019 and Fonseca 1995."""
    at = 1 / np.sqrt(len(x))
    return jnp.stack([1 - jnp.exp(-jnp.sum((x - at) ** 2)), 1 - jnp.exp(-jnp.sum((x + at) ** 2))])


def trained(method, steps, learning_rate):
    """Losses after some steps, the distance from the Pareto set, and the losses of all steps."""

    def step(carry, _):
        x, state = carry
        losses, grads = mtl.task_value_and_grad(concave)(x)
        update, state = method.update(grads, state, x, losses=losses)
        return (x - learning_rate * update, state), None

    start = jax.random.uniform(jax.random.key(0), (20,), minval=-0.5, maxval=0.5)
    (x, _), _ = jax.lax.scan(step, (start, method.init(start)), length=steps)
    return concave(x), jnp.std(x)  # Pareto-optimal points have equal coordinates


RATIOS = np.asarray([[1.0, 1.0], [1.0, 2.0], [4.0, 1.0], [1.0, 5.0]])


def test_epo_reaches_the_inverse_of_its_preference():
    run = jax.jit(jax.vmap(lambda r: trained(mtl.epo(r, tolerance=1e-6), 4000, 0.03)))
    losses, distance = run(jnp.asarray(RATIOS))
    np.testing.assert_allclose(losses[:, 0] / losses[:, 1], RATIOS[:, 1] / RATIOS[:, 0], rtol=1e-2)
    assert distance.max() < 1e-4


def test_ferero_reaches_the_ray_of_its_preference():
    run = jax.jit(jax.vmap(lambda r: trained(mtl.ferero(2, r), 1000, 0.3)))
    losses, distance = run(jnp.asarray(RATIOS))
    across = losses[:, 0] * RATIOS[:, 1] - losses[:, 1] * RATIOS[:, 0]
    assert abs(across).max() < 1e-4
    assert distance.max() < 1e-4


def test_pmtl_reaches_the_sector_of_its_vector():
    angles = np.linspace(0, np.pi / 2, 7)[1:-1]
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    run = jax.jit(jax.vmap(lambda k: trained(mtl.pmtl(jnp.asarray(vectors), k, initial_steps=20), 200, 1.0)))
    losses, distance = run(jnp.arange(5))
    np.testing.assert_array_equal(np.argmax(losses @ vectors.T, axis=1), np.arange(5))
    assert distance.max() < 1e-4


def fronts():
    preference = [[1.0, 2.0, 3.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    return {
        "pivrg": (mtl.pivrg, [[0.0, 0.0, 0.0], [50.0, 0.0, 10.0], [-5.0, 0.0, 30.0]]),
        "epo": (mtl.epo, preference),
        "ferero": (lambda r: mtl.ferero(K, r), preference),
        "pmtl, index": (lambda k: mtl.pmtl(preference, k), [0, 1, 2]),
        "pmtl, vectors": (lambda u: mtl.pmtl([u, u[::-1]], 0), preference),
        "epo, named": (lambda r: ByName(mtl.epo, r), preference),
        "ferero, named": (lambda r: ByName(partial(mtl.ferero, K), r), preference),
    }


class ByName:
    """A method made with named preferences, updated with named losses."""

    def __init__(self, factory, values):
        self.method = factory(named(values))
        self.init = self.method.init

    def update(self, grads, state, losses):
        return self.method.update(grads, state, losses=named(losses))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", fronts())
def test_many_preferences_at_once(name):
    """A factory inside vmap: what trains several points of a front together does this."""
    factory, values = fronts()[name]
    together = jax.jit(jax.vmap(lambda value: updated(factory(value))[0]))(jnp.asarray(values))
    alone = [updated(factory(value))[0] for value in map(jnp.asarray, values)]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.round(together, 4), axis=0)) > 1
