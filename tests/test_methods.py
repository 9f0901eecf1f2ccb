"""Every method of the registry, against its reference, and for the properties that all share or that it promises."""

import certificates
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from families import EVERY as FAMILIES_AND_ILL_CONDITIONED
from families import FAMILIES, stack
from harness import REFERENCED, WEIGHED, P, flat, hyper, run, tree, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax._core.row import HOMOGENEOUS, NON_CONFLICTING, SCALE_FREE
from mtlgrad_jax.registry import ROWS
from mtlgrad_jax.registry import make as make_row
from mtlgrad_jax.solvers._solution import FAILED, INFEASIBLE, SOLVED

STEPS = 3

OPTIONS = [
    *((name, {}) for name in REFERENCED),
    ("mgda", {"normalization": "l2", "apply_to": "normalized"}),
    ("mgda", {"normalization": "loss", "apply_to": "normalized"}),
    ("mgda", {"normalization": "loss+", "apply_to": "normalized"}),
    ("mgda", {"normalization": "l2"}),
    ("mgda", {"normalization": "loss"}),
    ("mgda", {"normalization": "loss+"}),
    ("pcgrad", {"reduction": "mean"}),
    ("cagrad", {"c": 0.9, "rescale": "1+c^2"}),
    ("cagrad", {"c": 0.1, "rescale": "1+c"}),
    ("imgrad", {"c": 0.4, "rescale": "1+c^2"}),
    ("imgrad", {"c": 2.0}),
    ("imgrad", {"offset": 1.0}),
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
    ("stch", {"mu": 0.1, "weights": (0.2, 0.3, 0.5), "ideal": (0.1, 0.0, -1.0)}),
    ("tchebycheff", {"weights": (0.2, 0.3, 0.5), "ideal": (0.1, 0.0, -1.0)}),
    ("pbi", {"preference": (0.2, 0.3, 0.5), "theta": 1.0, "ideal": (0.1, 0.0, -1.0)}),
    ("cosmos", {"lam": 2.0, "preference": (0.2, 0.3, 0.5)}),
    ("imtl_l", {"init": -0.5}),
    ("imtl", {"sign": "descent", "init": 0.5}),
    ("dwa", {"temperature": 0.5, "window": 1}),
    ("famo", {"learning_rate": 0.5, "gamma": 0.1, "min_losses": (0.05, -1.0, 0.0)}),
    ("stch_mtl", {"warmup_steps": 0, "nadir_steps": 2, "mu": 0.1}),
    ("stch_mtl", {"warmup_steps": 0, "nadir_steps": 1, "mu": 0.3, "nadir": (1.0, 2.0, 0.5)}),
    ("go4align", {"num_groups": 1, "learning_rate": 0.3}),
    ("go4align", {"num_groups": 3}),
    ("ldc_mtl", {"penalty": 0.5}),
    ("softadapt", {"window": 3}),
    ("softadapt", {"window": 3, "beta": -2.0, "every": 2}),
    ("softadapt", {"variant": "normalized", "beta": 3.0}),
    ("softadapt", {"variant": "loss_weighted"}),
    ("relobralo", {"rho": 0.0, "alpha": 0.5}),
    ("relobralo", {"rho": 1.0, "alpha": 0.5, "temperature": 0.1}),
    ("ntk", {"scale": "mean"}),
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
    *(("sign_agreement", {"threshold": tau}) for tau in (0.0, 1 / 3, 0.6)),
    ("sign_agreement", {"threshold": 0.5, "rescale": True}),
    ("db_mtl", {"beta": 0.5, "sigma": 0.5}),
    ("excess_mtl", {"learning_rate": 1.0}),
    ("moco", {"beta": 1.0, "gamma": 1.0, "rho": 0.0}),
    *(("moco", {"normalize": kind}) for kind in ("l2", "loss", "loss+")),
    ("moco", {"beta": 0.5, "rho": 0.0, "projection": "softmax", "normalize": "unit_loss"}),
    ("conflict_free_momentum", {"b1": 0.0, "b2": 0.5, "eps": 0.1}),
    ("sam_gs", {"gamma": 0.0, "b1": 0.5, "b2": 0.9}),
    ("sam_gs", {"gamma": 1.1}),
    ("sam_gs", {"similarity": "paper_mean", "epsilon": "paper"}),
    ("sam_gs", {"gamma": 0.9, "reduction": "min"}),
    ("sam_gs", {"gamma": 0.0, "aligned": "sum"}),
    ("sam_gs", {"gamma": 0.95, "aligned": "sum"}),
    ("gcond", {"critical": -0.9, "main": -0.2, "weak": 0.3, "power": 1.0, "window": 0}),
    ("gcond", {"resolution": "zones"}),
    ("gcond", {"resolution": "zones", "window": 1, "stability": 0.3, "decay": 0.5}),
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


IN_FLOAT32 = ("normal", "correlated", "duplicate", "zero_row", "all_zero", "scales", "tiny", "huge")
ILL_POSED = {"rank_deficient", "rank_one", "duplicate", "opposite", "zero_row", "all_zero"}  # several optimal weights


# Cases that depend on rounding: an eigenvalue 1e-12 of the largest, far below float32's cut-off; a saddle left in big
# steps; gradients that cancel, times a thousand. And squares of gradients beyond float32.
BLURRED = {("aligned_mtl", "scales", np.float32), ("sdmgrad", "opposite", np.float64)}
BLURRED |= {("sam_gs", "opposite", np.float64), ("sam_gs", "huge", np.float32)}


def assert_reference(name, kwargs, family, num_tasks, dtype, tolerance):
    for error in deviations(name, kwargs, family, num_tasks, dtype, tolerance):
        assert (error <= tolerance).all(), (family, error)


def deviations(name, kwargs, family, num_tasks, dtype, tolerance):
    """The largest error of a coordinate in each update, relative to the update's length.

    Methods that are linear in the scale of all gradients count relative to the longest gradient too, since updates may
    cancel; those that are not, and do not ignore the scales either, relative to what rounds to the tolerance.
    """
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
        yield np.abs(updates[part] - wanted).max(axis=1) / np.maximum(scale, np.finfo(float).tiny)


@pytest.mark.nightly
@pytest.mark.parametrize("case", OPTIONS, ids=identity)
def test_reference_in_float64(case):
    name, kwargs = case
    for family in families_of(name, kwargs):
        assert_reference(name, kwargs, family, 3, np.float64, 2e-6)


def families_of(name, kwargs):
    """All families; only those with unique weights where weights are judged by gradients of other lengths."""
    unique = name == "mgda" and kwargs.get("normalization", "none") != "none" and "apply_to" not in kwargs
    return [family for family in FAMILIES if not (unique and family in ILL_POSED)]


@pytest.mark.parametrize("name", REFERENCED)
def test_reference_with_five_tasks(name):
    for family in FAMILIES:
        assert_reference(name, {}, family, 5, np.float64, 2e-6)


@pytest.mark.every_method
@pytest.mark.parametrize("name", REFERENCED)
def test_reference_in_float32(name):
    for family in IN_FLOAT32:
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


@pytest.mark.nightly
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


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["normal", "correlated", "non_stationary"])
def test_imgrad_turns_as_cagrad_with_another_radius(family):
    """The direction of d - g0 is that of CAGrad with the radius c φ / (3/2 - φ), the same for φ = 3/4."""
    G = stack(family, 3, P)
    g0, shortest = G.mean(axis=0), reference.min_norm(G) @ G
    cosine = shortest @ g0 / np.linalg.norm(shortest) / np.linalg.norm(g0)
    radius = 0.8 * cosine / (1.5 - cosine)
    (update,), _ = run("imgrad", G[None], dtype=np.float64)
    (other,), _ = run("cagrad", G[None], dtype=np.float64, c=radius)
    np.testing.assert_allclose((update - g0) / 0.8, (other - g0) / radius, atol=1e-9)
    assert np.linalg.norm(update - g0) == pytest.approx(0.8 * np.linalg.norm(g0))


@pytest.mark.sample(1)
@pytest.mark.parametrize("num_tasks", [2, 3, 5])
@pytest.mark.parametrize("offset", [1.5, 1.0])
def test_imgrad_stays_in_its_ball(offset, num_tasks):
    """At stationary points the min-norm point is rounding alone, and its cosine could be anything."""
    for family in ("opposite", "zero_row", "strongly_stationary", "nearly_opposite", "all_zero", "scales", "duplicate"):
        G = stack(family, num_tasks, P).astype(np.float32).astype(float)
        (update,), state = run("imgrad", G[None], offset=offset)
        g0 = G.mean(axis=0)
        assert int(state.info.result) == SOLVED
        assert np.linalg.norm(update - g0) <= 0.8 * np.linalg.norm(g0) + 1e-6 * np.linalg.norm(G)
        assert update @ g0 >= 0


@pytest.mark.sample(1)
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


@pytest.mark.parametrize("name", [name for name in WEIGHED if NON_CONFLICTING in ROWS[name].promises])
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


FALLING = np.asarray([[1, 2, 3, 4, 5], [150, 100, 50, 10, 0.1], [1500, 1000, 500, 100, 1], [10, 20, 30, 40, 50]])
SOFTADAPT = [
    (3, "original", [9.9343e-01, 6.5666e-03, 3.8908e-22]),
    (4, "original", [2.8850e-01, 1.9070e-03, 1.1299e-22, 7.0959e-01]),
    (3, "loss_weighted", [8.7978e-01, 1.2022e-01, 7.1234e-20]),
    (4, "loss_weighted", [3.8861e-02, 5.3104e-03, 3.1465e-21, 9.5583e-01]),
]


@pytest.mark.parametrize(("num_tasks", "variant", "wanted"), SOFTADAPT)
def test_softadapt_has_the_values_of_the_official_documentation(num_tasks, variant, wanted):
    weights, _ = weights_over("softadapt", FALLING[:num_tasks].T, window=5, variant=variant)
    np.testing.assert_allclose(weights[:4], 1 / num_tasks)
    np.testing.assert_allclose(weights[4], wanted, rtol=6e-5)


def walk_of_losses(steps, num_tasks=3, seed=0):
    """Losses that vary over a few orders of magnitude, and masks."""
    rng = np.random.default_rng(seed)
    losses = np.exp(0.3 * rng.normal(size=(steps, num_tasks)).cumsum(axis=0))
    return losses, rng.uniform(size=(steps, num_tasks)) < 0.7


@pytest.mark.sample(2)
@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
@pytest.mark.parametrize(("window", "every"), [(2, 1), (4, 3), (6, 1)])
def test_softadapt_over_many_steps(window, every, variant):
    losses, present = walk_of_losses(60)
    own = {"window": window, "every": every, "variant": variant, "beta": 0.7}
    weights, _ = weights_over("softadapt", losses, present, **own)
    wanted = reference.softadapt(np.broadcast_to(np.eye(3), (60, 3, 3)), losses, present, **own)
    np.testing.assert_allclose(weights, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.sample(1)
@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
def test_softadapt_where_slopes_say_nothing_or_too_much(variant):
    """Constant losses have equal weights, or their shares; slopes up to float32's largest number, and scales apart."""
    constant, state = weights_over("softadapt", np.asarray([[1.0, 2.0, 5.0]] * 3), variant=variant)
    np.testing.assert_allclose(constant[2], [1 / 8, 2 / 8, 5 / 8] if variant == "loss_weighted" else 1 / 3)
    wild = np.asarray([[1, 1, 1], [3e38, 1e-30, 1], [1e-30, 3e38, 1], [3e38, 3e38, 1], [1e-30, 1e-30, 1e-30]])
    for beta in (0.1, -0.1, 0.0, 1e30):
        weights, state = weights_over("softadapt", wild, dtype=np.float32, variant=variant, beta=beta)
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
        assert int(state.info.fallbacks) == int(state.info.skipped) == 0
    if variant == "original":
        weights, _ = weights_over("softadapt", wild, dtype=np.float32)
        np.testing.assert_array_equal(weights[1:4], [[1, 0, 0], [0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_relobralo_over_many_steps(rho):
    losses, present = walk_of_losses(80)
    own = {"rho": rho, "alpha": 0.9, "temperature": 0.5}
    weights, _ = weights_over("relobralo", losses, present, **own)
    wanted = reference.relobralo(np.broadcast_to(np.eye(3), (80, 3, 3)), losses, present, **own)
    np.testing.assert_allclose(weights, wanted, rtol=1e-9, atol=1e-12)


def test_relobralo_looks_back_as_often_as_it_should():
    """With alpha = 1 a look-back shows: the weights become those relative to the first losses, or stay."""
    steps, rho = 4000, 0.7
    losses = np.random.default_rng(0).uniform(0.2, 5.0, size=(steps, 3))
    weights, _ = weights_over("relobralo", losses, rho=rho, alpha=1.0)
    ratios = np.exp(losses / losses[0])
    back = 3 * ratios / ratios.sum(axis=1, keepdims=True)
    looked = np.abs(weights - back).max(axis=1)[2:] < 1e-12
    stayed = np.abs(np.diff(weights, axis=0)).max(axis=1)[1:] < 1e-12
    assert (looked ^ stayed).all()
    spread = np.sqrt(rho * (1 - rho) / steps)
    assert looked.mean() == pytest.approx(1 - rho, abs=4 * spread)
    assert (looked[1:] & looked[:-1]).mean() == pytest.approx((1 - rho) ** 2, abs=4 * spread)
    other, _ = weights_over("relobralo", losses, rho=rho, alpha=1.0, key=1)
    assert (other != weights).any()


def test_relobralo_at_ratios_beyond_the_dtype():
    """A loss 1e68 times its last value takes all the weight, and two such losses share it."""
    losses = np.asarray([[1e-30, 1e-30, 1], [1e38, 1, 1], [1e38, 1e38, 1], [1e-30, 1e-30, 1e-30]])
    weights, state = weights_over("relobralo", losses, dtype=np.float32, rho=0.0, alpha=1.0)
    np.testing.assert_allclose(weights[1:3], [[3, 0, 0], [1.5, 1.5, 0]], atol=1e-6)
    assert np.isfinite(weights).all()
    assert int(state.info.fallbacks) == int(state.info.skipped) == 0


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


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", REFERENCED)
@pytest.mark.parametrize("num_tasks", [1, 2])
def test_reference_where_a_parameter_is_as_long_as_there_are_tasks(name, num_tasks):
    """Two tasks and a parameter of leading size two: the task axis must not be confused with the parameter's axis."""
    for family in ("normal", "opposite"):
        if ROWS[name].fewest <= num_tasks:
            assert_reference(name, {}, family, num_tasks, np.float64, 2e-6)


def test_where_signs_agree_no_task_ascends_in_any_coordinate():
    """Without rounding: the mean of numbers of one sign has that sign."""
    tx = mtl.sign_agreement()
    update = jax.jit(lambda G: tx.update(G, tx.init(G[0]))[0])
    for family in FAMILIES_AND_ILL_CONDITIONED:
        G = jnp.asarray(stack(family, 3, P), jnp.float32)
        assert (G * update(G) >= 0).all(), family


@pytest.mark.parametrize("num_tasks", [3, 5, 7, 10])
def test_agreement_is_counted_without_rounding(num_tasks):
    """A threshold of m/K, however it is rounded, keeps what m more tasks want than not."""
    signs = np.where(np.tri(num_tasks + 1, num_tasks, -1), 1.0, -1.0).T  # column j has j positive entries
    for m in range(num_tasks + 1):
        for threshold in (m / num_tasks, jnp.float32(m / num_tasks), round(m / num_tasks, 7)):
            tx = mtl.sign_agreement(threshold)
            update, _ = tx.update(jnp.asarray(signs), tx.init(jnp.zeros(num_tasks + 1)))
            np.testing.assert_array_equal(update != 0, (np.abs(signs.sum(axis=0)) >= m) & (signs.sum(axis=0) != 0))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 21])
def test_median_over_any_number_of_tasks_present(num_tasks):
    rng = np.random.default_rng(num_tasks)
    tx = mtl.coordinate_median()
    step = jax.jit(lambda G, present: tx.update(G, tx.init(G[0]), task_mask=present)[0])
    for count in range(1, num_tasks + 1):
        G = rng.integers(-2, 3, size=(num_tasks, P)).astype(np.float32) * 10.0 ** rng.integers(-18, 18)
        present = rng.permutation(num_tasks) < count
        spoiled = np.where(present[:, None], G, np.nan)
        np.testing.assert_allclose(step(spoiled, present), np.median(G[present], axis=0), rtol=1e-6)


LEAKS = [0.0, 0.3, 1.0, [0.0, 0.2, 1.0]]


@pytest.mark.sample(3)
@pytest.mark.parametrize("leak", LEAKS, ids=str)
@pytest.mark.parametrize("present", [[True, True, True], [True, False, True]], ids=["all", "two"])
def test_graddrop_in_law(leak, present):
    """Every draw is the positive or the negative part, each as often as its share, coordinate by coordinate."""
    draws, present = 4000, np.asarray(present)
    G = stack("normal", 3, P)
    G[:, 0], G[:, 1], G[:, 2] = 0, np.abs(G[:, 1]), -np.abs(G[:, 2])
    tx = mtl.graddrop(leak=leak, key=1)
    grads = tree(jnp.asarray(np.where(present[:, None], G, np.nan), jnp.float32))

    @jax.jit
    def drawn():
        def step(state, _):
            update, state = tx.update(grads, state, task_mask=jnp.asarray(present))
            return state, flat(update)

        return jax.lax.scan(step, tx.init(zeros()), length=draws)[1]

    updates = np.asarray(drawn(), float)
    up, down, share = reference.graddrop_law(G[present], np.asarray(leak)[present] if np.ndim(leak) else leak)
    ups, downs = (np.abs(updates - value) < 1e-5 for value in (up, down))
    assert (ups | downs).all()
    assert not updates[:, 0].any()
    np.testing.assert_allclose(updates[:, 1:3], np.tile(np.where([1, 0], up[1:3], down[1:3]), (draws, 1)), rtol=1e-5)
    decided = np.abs(up - down) > 1e-4
    deviation = np.sqrt(share * (1 - share) / draws)
    assert (np.abs(ups.mean(axis=0) - share) <= 4.5 * deviation + 1e-9)[decided].all()
    expected = share * up + (1 - share) * down
    assert (np.abs(updates.mean(axis=0) - expected) <= 4.5 * deviation * np.abs(up - down) + 1e-5).all()
    if np.ndim(leak) == 0:
        np.testing.assert_allclose(expected, G[present].sum(axis=0), atol=1e-12)
    free = [j for j in range(3, P) if decided[j] and 0.05 < share[j] < 0.95]
    if len(free) > 1:
        correlations = np.corrcoef(ups[:, free].T) - np.eye(len(free))
        assert np.abs(correlations).max() < 4.5 / np.sqrt(draws)


@pytest.mark.parametrize("num_tasks", [2, 17, 40])
def test_graddrop_of_many_tasks(num_tasks):
    """More rows than one fused loop reads, at the ends of float32's range."""
    G = stack("normal", num_tasks, P)
    up, down, _ = reference.graddrop_law(G)
    tx = mtl.graddrop()
    step = jax.jit(lambda G: tx.update(G, tx.init(G[0]))[0])
    for scale in (2.0**-60, 1.0, 2.0**60):
        update = np.asarray(step(jnp.asarray(scale * G, jnp.float32)), float) / scale
        assert (np.minimum(np.abs(update - up), np.abs(update - down)) < 1e-5 * num_tasks).all()


def test_leaks_have_names():
    grads, losses = jnp.asarray(stack("normal", 3, P), jnp.float32), {"a": 1.0, "b": 1.0, "c": 1.0}
    named, by_order = (mtl.graddrop(leak=leak) for leak in ({"b": 0.5, "a": 0.0, "c": 1.0}, [0.0, 0.5, 1.0]))
    one, _ = named.update(grads, named.init(jnp.zeros(P)), losses=losses)
    np.testing.assert_array_equal(one, by_order.update(grads, by_order.init(jnp.zeros(P)))[0])
    for tx, given in ((by_order, losses), (mtl.graddrop(leak=[0.0, 1.0]), None)):
        with pytest.raises(ValueError, match="`leak` must have"):
            tx.update(grads, tx.init(jnp.zeros(P)), losses=given)


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
@pytest.mark.parametrize(("length", "loss"), [(1e-15, 1e-28), (1e15, 1e-28), (1e-15, 1e28)])
def test_mgda_depends_on_ratios_of_losses_and_lengths(normalization, length, loss):
    tx, G, losses = mtl.mgda(normalization), jnp.diag(jnp.asarray([1.0, 3.0])), jnp.asarray([1.0, 2.0])
    wanted, _ = tx.weigh(G @ G, tx.init(None), losses=losses)
    grads = length * G
    found, state = tx.weigh(grads @ grads, tx.init(None), losses=loss * losses)
    assert int(state.info.result) == SOLVED
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("radius", [1e-20, 1e20])
def test_dibs_is_proportional_to_its_radius(radius):
    G = jnp.asarray([[1.0, 0.2], [-0.5, 2.0]])
    found, wanted = (
        tx.weigh(G @ G.T, tx.init(None))[0] for tx in (mtl.dibs(num_steps=3, radius=r) for r in (radius, 1.0))
    )
    np.testing.assert_allclose(found, radius * wanted, rtol=1e-5)
