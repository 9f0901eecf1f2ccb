"""Every method of the registry, against its reference, and for the properties that all share or that it promises."""

import certificates
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from families import EVERY as FAMILIES_AND_ILL_CONDITIONED
from families import FAMILIES, stack
from harness import EVERY, P, hyper, run, tree, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax._core.row import HOMOGENEOUS, NON_CONFLICTING, SCALE_FREE
from mtlgrad_jax.registry import ROWS
from mtlgrad_jax.registry import make as make_row
from mtlgrad_jax.solvers._solution import FAILED, INFEASIBLE, SOLVED

STEPS = 3

OPTIONS = [
    *((name, {}) for name in EVERY),
    ("mgda", {"normalization": "l2", "apply_to": "normalized"}),
    ("mgda", {"normalization": "loss", "apply_to": "normalized"}),
    ("mgda", {"normalization": "loss+", "apply_to": "normalized"}),
    ("mgda", {"normalization": "l2"}),
    ("mgda", {"normalization": "loss"}),
    ("mgda", {"normalization": "loss+"}),
    ("pcgrad", {"reduction": "mean"}),
    ("cagrad", {"c": 0.9, "rescale": "1+c^2"}),
    ("cagrad", {"c": 0.1, "rescale": "1+c"}),
    ("fairgrad", {"alpha": 0.5}),
    ("fairgrad", {"alpha": 10.0}),
    ("upgrad", {"regularization": 1e-4}),
    ("dualproj", {"regularization": 1e-4}),
    ("capped_mgda", {"cap": 0.4}),
    ("capped_mgda", {"cap": 1.0}),
    ("gradvac", {"beta": 0.5}),
    ("gradvac", {"target": 0.3}),
    ("gradvac", {"target": -0.2}),
    ("gradvac", {"beta": 0.5, "update": "on_conflict"}),
    ("conicgrad", {"c": 0.0}),
    ("conicgrad", {"c": 0.9}),
    ("conicgrad", {"c": 0.99}),
    ("imtl_g", {"sign": "descent"}),
    ("aligned_mtl", {"scale": "median"}),
    ("aligned_mtl", {"scale": "rmse"}),
    *(("conflict_free", {"length": kind}) for kind in ("min", "max", "harmonic", "arithmetic", "geometric")),
    ("krum", {"squared": False}),
    ("krum", {"num_selected": 2}),
    ("dibs", {"num_steps": 5, "radius": 2.0, "learning_rate": 0.2}),
    ("rotograd_scale", {"burn_in": 1}),
    ("pcd", {"primary": 1, "progress": 0.0}),
    ("pcd", {"primary": 2, "progress": 0.5, "decay": 0.5}),
    ("avgnorm", {"scale": "mean_norm"}),
    ("avgnorm", {"scale": "one"}),
    ("modo", {"learning_rate": 1.0, "regularization": 0.0}),
    ("sdmgrad", {"lam": 0.0, "learning_rate": 0.5, "momentum": 0.0, "num_steps": 5}),
    ("uw", {"init": -0.5}),
    ("slaw", {"beta": 0.5}),
    ("slaw", {"beta": 1.0}),
    ("bmtl", {"temperature": 0.1}),
    ("bmtl", {"temperature": 2.0, "normalize": False}),
    ("gradnorm", {"alpha": 0.12, "learning_rate": 0.1}),
    ("epo", {"preference": (0.2, 1.0, 3.0)}),
    ("epo", {"tolerance": 10.0}),
    ("epo", {"tolerance": 10.0, "relaxed": True, "preference": (0.2, 1.0, 3.0)}),
    ("pmtl", {"index": 1}),
    ("pmtl", {"index": 2, "initial_steps": 2}),
    ("pmtl", {"preferences": ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 3.0, 4.0)), "index": 2}),
    ("ferero", {"preference": (0.2, 1.0, 3.0)}),
    ("ferero", {"learning_rate": 0.01, "strength": 3.0, "normalize": False}),
    ("pivrg", {"scores": (0.0, 0.0, 0.0)}),
    ("pivrg", {"scores": (-3.0, 150.0, 40.0), "bound": 5.0, "min_temperature": 1.0}),
    ("emtl", {"strength": 0.0}),
    ("emtl", {"strength": 30.0}),
    ("trimmed_mean", {"trim": 0}),
    ("db_mtl", {"beta": 0.5, "sigma": 0.5}),
    ("sam_gs", {"gamma": 0.0, "b1": 0.5, "b2": 0.9}),
    ("sam_gs", {"gamma": 1.1}),
    ("sam_gs", {"similarity": "paper_mean", "epsilon": "paper"}),
    ("sam_gs", {"gamma": 0.9, "reduction": "min"}),
    ("sam_gs", {"gamma": 0.0, "aligned": "sum"}),
    ("sam_gs", {"gamma": 0.95, "aligned": "sum"}),
]


def identity(case):
    name, kwargs = case
    return "-".join([name, *(f"{key}={value}" for key, value in kwargs.items())])


def steps_of(family, num_tasks, seed=0):
    """Three steps of a family, positive losses, and masks that leave tasks out."""
    rng = np.random.default_rng(seed)
    grads = np.stack([stack(family, num_tasks, P) * scale for scale in (1.0, 0.5, 2.0)])
    losses = rng.uniform(0.1, 3.0, size=(STEPS, num_tasks))
    present = np.ones((STEPS, num_tasks), bool)
    present[1, 0] = False
    present[2, num_tasks - 1] = False
    return grads, losses, present


ILL_POSED = {"rank_deficient", "rank_one", "duplicate", "opposite", "zero_row", "all_zero"}  # several optimal weights


# Cases that depend on rounding: an eigenvalue 1e-12 of the largest, far below float32's cut-off; a saddle left in big
# steps; gradients that cancel, times a thousand. And squares of gradients beyond float32.
BLURRED = {("aligned_mtl", "scales", np.float32), ("sdmgrad", "opposite", np.float64)}
BLURRED |= {("sam_gs", "opposite", np.float64), ("sam_gs", "huge", np.float32)}


def assert_reference(name, kwargs, family, num_tasks, dtype, tolerance):
    if (name, family, dtype) in BLURRED:
        return
    grads, losses, present = steps_of(family, num_tasks)
    updates, state = run(name, grads, losses, present, dtype=dtype, **kwargs)
    assert np.isfinite(updates).all()
    assert int(state.info.skipped) == 0
    grads = np.asarray(grads, dtype).astype(float)
    arguments = hyper(name, num_tasks, **kwargs)
    size = np.linalg.norm(grads, axis=2).max(axis=1)
    slices = [slice(t, t + 1) for t in range(STEPS)] if ROWS[name].state == "none" else [slice(0, STEPS)]
    for part in slices:
        try:
            wanted = reference.REFERENCES[name](grads[part], losses[part], present[part], **arguments)
        except ValueError:  # no alpha-fair point at Pareto-stationary points; several medians, or optima of a program
            assert name in ("fairgrad", "nash_mtl", "pivrg", "geometric_median", "epo")
            continue
        promises = ROWS[name].promises
        rounding = 10 * np.finfo(dtype).eps / tolerance * size[part]
        least = size[part] if HOMOGENEOUS in promises else 1e-9 if SCALE_FREE in promises else rounding  # d may cancel
        scale = np.linalg.norm(wanted, axis=1) + least
        error = np.abs(updates[part] - wanted).max(axis=1)
        assert (error <= tolerance * scale).all(), (family, error / scale)


@pytest.mark.nightly
@pytest.mark.parametrize("case", OPTIONS, ids=identity)
def test_reference_in_float64(case):
    name, kwargs = case
    unique = name == "mgda" and kwargs.get("normalization", "none") != "none" and "apply_to" not in kwargs
    for family in FAMILIES:
        if not (unique and family in ILL_POSED):
            assert_reference(name, kwargs, family, 3, np.float64, 2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_reference_with_five_tasks(name):
    for family in FAMILIES:
        assert_reference(name, {}, family, 5, np.float64, 2e-6)


@pytest.mark.every_method
@pytest.mark.parametrize("name", EVERY)
def test_reference_in_float32(name):
    for family in ("normal", "correlated", "duplicate", "zero_row", "all_zero", "scales", "tiny", "huge"):
        assert_reference(name, {}, family, 3, np.float32, 5e-4 if family == "scales" else 5e-5)


J = np.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # the matrix whose values TorchJD pins; here from closed forms
A = np.asarray([[3.0, 1.0, 0.0], [-1.0, 2.0, 1.0], [0.5, -1.0, 4.0]])
GOLDEN = [
    ("mean", {}, J, [1, 1, 1]),
    ("sum", {}, J, [2, 2, 2]),
    ("constant", {"weights": [1.0, 2.0]}, J, [8, 3, 3]),
    ("mgda", {}, J, [0, 1, 1]),
    ("pcgrad", {}, J, [0.5847953, 3.8011696, 3.8011696]),
    ("upgrad", {}, J, [0.2923977, 1.9005848, 1.9005848]),
    ("upgrad", {"regularization": 1e-4}, J, [0.292902, 1.900352, 1.900352]),
    ("cagrad", {"c": 0.4}, J, [0.3468027, 1.1632993, 1.1632993]),
    ("cagrad", {"c": 1.0}, J, [0, 2, 2]),
    ("cagrad", {"c": 2.0}, J, [0, 3.3452079, 3.3452079]),
    ("cagrad", {"c": 0.2, "rescale": "1+c^2"}, A, [0.68142866, 0.96652772, 1.75918691]),
    ("cagrad", {"c": 0.4, "rescale": "1+c^2"}, A, [0.72673247, 1.20235176, 1.70457813]),
    ("cagrad", {"c": 0.5, "rescale": "1+c^2"}, A, [0.72481299, 1.26195766, 1.63729429]),
    ("nash_mtl", {}, J, [0.0765843, 0.9985326, 0.9985326]),
    ("nash_mtl", {}, A, [0.69573102, 0.92919458, 1.28551771]),
    ("fairgrad", {"alpha": 0.5}, J, [0.1810426, 1.2682209, 1.2682209]),
    ("fairgrad", {"alpha": 2.0}, J, [0.0312737, 0.7908172, 0.7908172]),
    ("fairgrad", {"alpha": 2.0}, A, [0.4527697, 0.71807464, 0.82070248]),
    ("sam_gs", {"num_tasks": 3}, A, [128.451099, 62.2793206, 264.687112]),
    ("sam_gs", {"num_tasks": 3, "gamma": 0.94}, A, [2.15098938, 2.90332943, 4.46373206]),
    ("sam_gs", {"num_tasks": 3, "gamma": 0.94, "similarity": "paper_mean"}, A, [192.6474617, 93.4048299, 396.9705272]),
    ("imtl_g", {}, np.asarray([[1.0, 0], [-2, 0]]), [0, 0]),  # weights 2/3 and 1/3 by the paper's closed form
    ("conflict_free", {}, np.asarray([[1.0, 0], [-2, 0]]), [0, 0]),
    ("trimmed_mean", {}, np.asarray([[1e11, 3], [1, -1e11], [-1e10, 1e10], [2, 2]]), [1.5, 2.5]),
]


@pytest.mark.every_method
@pytest.mark.parametrize(("name", "kwargs", "G", "wanted"), GOLDEN, ids=lambda part: str(part)[:30])
def test_published_values(name, kwargs, G, wanted):
    """Values of TorchJD's tests and of the official formulas, recomputed independently, to the digits printed."""
    with jax.enable_x64(True):
        tx = ROWS[name].factory(**kwargs)
        update, _ = tx.update(jnp.asarray(G), tx.init(jnp.zeros(G.shape[1])))
        np.testing.assert_allclose(update, wanted, atol=1.1e-6 if "regularization" in kwargs else 6e-8)


def test_identities_of_the_papers():
    """Identities from the papers: the bisector for two tasks, |d|^2 = K, |d - g0| = c |g0|."""
    G = stack("normal", 3, P)
    nash, _ = run("nash_mtl", G[None])
    assert np.linalg.norm(nash[0]) ** 2 == pytest.approx(3, rel=1e-5)
    bisector = (G[:2] / np.linalg.norm(G[:2], axis=1, keepdims=True)).sum(axis=0)
    for name in ("nash_mtl", "fairgrad"):
        (update,), _ = run(name, G[None, :2], **({"alpha": 1.0} if name == "fairgrad" else {}))
        cosine = update @ bisector / np.linalg.norm(update) / np.linalg.norm(bisector)
        assert cosine == pytest.approx(1, abs=1e-6)
    (update,), _ = run("cagrad", G[None], c=0.3)
    g0 = G.mean(axis=0)
    assert np.linalg.norm(update - g0) == pytest.approx(0.3 * np.linalg.norm(g0), rel=1e-4)


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
@pytest.mark.parametrize("exponent", [-57, 57])
def test_normalised_mgda_is_scale_equivariant(normalization, exponent):
    G, losses = stack("normal", 3, P), np.asarray([[0.01, 20.0, 400.0]])
    plain, _ = run("mgda", G[None], losses, normalization=normalization)
    scaled, _ = run("mgda", G[None] * 2.0**exponent, losses, normalization=normalization)
    np.testing.assert_allclose(scaled, plain * 2.0**exponent, rtol=1e-5)


OPPOSITE, TORN = [[1.0, 0], [-2, 0]], [[0.0, 1], [1, 0], [-1, 0]]
STAND_INS = [
    ("conicgrad", OPPOSITE, [-0.5, 0]),
    ("pcd", TORN, [0, 1]),
]


@pytest.mark.parametrize(("name", "G", "wanted"), STAND_INS)
def test_what_stands_in_for_a_method_is_counted(name, G, wanted):
    """For two opposite tasks, no direction descends both, has equal projections, or makes progress on both."""
    tx = make_row(ROWS[name], len(G))
    update, state = tx.update(jnp.asarray(G), tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(update, wanted, atol=1e-6)
    assert int(state.info.fallbacks) == 1
    assert int(state.info.result) in (FAILED, INFEASIBLE)
    _, state = tx.update(jnp.asarray([[1.0, 0.1], [0.1, 1], [1, 1]])[: len(G)], state)
    assert int(state.info.fallbacks) == 1
    assert int(state.info.result) == SOLVED


def test_the_primary_task_has_a_name():
    grads, losses = jnp.asarray(stack("normal", 3, P)), {"a": 1.0, "b": 1.0, "c": 1.0}
    by_name = mtl.pcd(num_tasks=3, primary={"a": False, "b": True, "c": False}, progress=0.5)
    by_index = mtl.pcd(num_tasks=3, primary=1, progress=0.5)
    named, _ = by_name.update(grads, by_name.init(jnp.zeros(P)), losses=losses)
    np.testing.assert_array_equal(named, by_index.update(grads, by_index.init(jnp.zeros(P)))[0])
    with pytest.raises(ValueError, match="`primary` must have the structure of the losses"):
        by_name.update(grads, by_name.init(jnp.zeros(P)), losses={"x": 1.0, "y": 1.0, "z": 1.0})


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if NON_CONFLICTING in row.promises])
def test_no_task_ascends_in_float32(name):
    """As stated in the README, on the gradients themselves."""
    K = 3
    method = make_row(ROWS[name], K)
    weigh = jax.jit(lambda G: method.weigh(mtl.stacks.gramian(G), method.init(None), losses=jnp.arange(1.0, K + 1)))
    stacks = [stack(family, K, 3, draw) for family in FAMILIES_AND_ILL_CONDITIONED for draw in range(5)]
    stacks += [
        np.array([[1e-10, 1e-10, 0], [-1e10, 0.5e10, 0], [0, 0, 1]]),
        np.array([[-1.3875822, 1.3013483, 0], [0.0013755399, -0.0013077732, 0], [1.0455624, 2.2462142, 0]]),
    ]
    for G in stacks:
        G = G.astype(np.float32)
        weights, state = weigh(G)
        assert np.isfinite(weights).all()
        conflict = certificates.conflict(G.astype(float) @ G.T.astype(float), weights)
        assert not state.info.fallbacks, G
        assert conflict <= (K + 16) * np.finfo(np.float32).eps, G


def weights_over(name, losses, present=None, dtype=np.float64, **kwargs):
    """Weights (T, K) of a method for losses (T, K): its updates for the unit vectors as gradients."""
    grads = np.broadcast_to(np.eye(losses.shape[1], P), (*losses.shape, P))
    updates, state = run(name, grads, losses, present, dtype=dtype, **kwargs)
    return updates[:, : losses.shape[1]], state


@pytest.mark.parametrize("beta", [0.99, 0.9, 0.5, 1.0])
def test_slaw_has_the_official_deviations(beta):
    """Means of l and l^2, over the first 1/(1 - beta) steps and then exponential, and s^2 their E[l^2] - E[l]^2."""
    losses = np.random.default_rng(0).uniform(0.1, 3.0, size=(250, 3)) * [1.0, 10.0, 0.1]
    weights, _ = weights_over("slaw", losses, beta=beta)
    horizon, mean, square = round(1 / (1 - beta)) if beta < 1 else np.inf, np.zeros(3), np.zeros(3)
    for k, (loss, w) in enumerate(zip(losses, weights, strict=True), 1):
        if k <= horizon:
            mean, square = (mean * (k - 1) + loss) / k, (square * (k - 1) + loss**2) / k
        else:
            mean, square = beta * mean + (1 - beta) * loss, beta * square + (1 - beta) * loss**2
        inverse = 1 / np.sqrt(square - mean**2) if k > 1 else np.ones(3)
        np.testing.assert_allclose(w, 3 * inverse / inverse.sum(), rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_slaw_sees_small_deviations_of_any_loss_in_float32(scale):
    """E[l^2] - E[l]^2 would have no correct digit here, and would overflow at large scales."""
    noise = np.random.default_rng(0).normal(size=(150, 3)) * [1.0, 2.0, 4.0]
    losses = (scale * (1e4 + noise)).astype(np.float32).astype(float)
    weights, _ = weights_over("slaw", losses, dtype=np.float32)
    grads, present = np.broadcast_to(np.eye(3), (150, 3, 3)), np.ones((150, 3), bool)
    np.testing.assert_allclose(weights, reference.slaw(grads, losses, present), rtol=2e-3)


def test_slaw_where_deviations_say_nothing():
    """A task has weight one in its first step, a constant loss almost all the weight, a zero loss none."""
    losses = np.asarray([[1.0, 2.0, 5.0], [2.0, 4.0, 5.0], [2.0, 4.0, 5.0]])
    present = np.asarray([[1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
    weights, _ = weights_over("slaw", losses, present)
    np.testing.assert_allclose(weights, [[1, 1, 0], [4 / 3, 2 / 3, 1], [0, 0, 3]], atol=1e-12)
    constant, _ = weights_over("slaw", np.asarray([[1.0, -2.0, 4.0]] * 3))
    np.testing.assert_allclose(constant, [[1, 1, 1], *2 * [[12 / 7, 6 / 7, 3 / 7]]], rtol=1e-12)
    zero, _ = weights_over("slaw", np.asarray([[0.0, 1.0, 4.0], [0.0, 2.0, 2.0]]))
    np.testing.assert_allclose(zero, [[1, 1, 1], [0, 2, 1]], rtol=1e-12)
    nothing, state = weights_over("slaw", np.zeros((2, 3)))
    np.testing.assert_array_equal(nothing, [[1, 1, 1], [0, 0, 0]])
    assert int(state.info.skipped) == int(state.info.fallbacks) == 0


def test_bmtl_at_any_loss():
    """Normalised weights cannot overflow; if the derivatives overflow, the mean is used and counted."""
    losses = np.asarray([[1e4, 1e4 + 1, -1e4]])
    weights, _ = weights_over("bmtl", losses, dtype=np.float32)
    np.testing.assert_allclose(weights, [3 * np.asarray([1, np.e, 0]) / (1 + np.e)], rtol=1e-6)
    (weights,), state = weights_over("bmtl", losses, dtype=np.float32, normalize=False)
    np.testing.assert_allclose(weights, np.full(3, 1 / 3), rtol=1e-6)
    assert int(state.info.fallbacks) == 1
    assert int(state.info.result) == FAILED
    equal, _ = weights_over("bmtl", losses[:, :2], temperature=1e12)
    np.testing.assert_allclose(equal, [[1, 1]], rtol=1e-9)


def test_targets_with_absent_tasks_stay():
    """In rows and columns: neither moves in a step in which the task is absent."""
    tx = mtl.gradvac(num_tasks=3, beta=0.5)
    grads = tree(jnp.asarray(stack("correlated", 3, P), jnp.float32))
    _, first = tx.update(grads, tx.init(zeros()))
    _, second = tx.update(grads, first, task_mask=jnp.asarray([True, False, True]))
    changed = np.asarray(first.method.target != second.method.target)
    assert not changed[1].any()
    assert not changed[:, 1].any()
    assert changed[0, 2]


def test_emtl_descends_the_objective_it_reconstructs():
    """By automatic differentiation in the losses with norms held constant; the largest r has weight at least one."""
    with jax.enable_x64(True):
        G, losses = stack("normal", 3, P), jnp.asarray([1.0, 1.3, 0.8])
        norms = np.linalg.norm(G, axis=1)
        for strength in (0.1, 1.0, 100.0):
            objective = jax.grad(lambda loss, lam=strength: loss.sum() + lam * jnp.var(loss / norms))
            weights, _ = mtl.emtl(strength).weigh(jnp.asarray(G @ G.T), mtl.emtl(strength).init(None), losses=losses)
            np.testing.assert_allclose(weights, np.maximum(objective(losses), 0), rtol=1e-10)
            assert weights[np.argmax(losses / norms)] >= 1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("num_tasks", [1, 2])
def test_reference_where_a_parameter_is_as_long_as_there_are_tasks(name, num_tasks):
    """Two tasks and a parameter of leading size two: the task axis must not be confused with the parameter's axis."""
    for family in ("normal", "opposite"):
        if ROWS[name].fewest <= num_tasks:
            assert_reference(name, {}, family, num_tasks, np.float64, 2e-6)
