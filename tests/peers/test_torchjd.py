"""Parity with TorchJD, weighting by weighting, in float64.

If both sides use closed forms or exact solvers, they agree to rounding; wider tolerances are due to the peer's solver
and are explained.
"""

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from families import stack
from peerlib import COMING_FROM, GRADDROP, against, size, update, updates, weigh, weights

from mtlgrad_jax.registry import ROWS

torchjd = pytest.importorskip("torchjd", reason="parity needs the extra 'peers'")
torch = pytest.importorskip("torch", reason="parity needs the extra 'peers'")

from torchjd import aggregation as agg  # noqa: E402
from torchjd.linalg import QuadprogProjector  # noqa: E402

SHAPES = [(2, 5), (3, 7), (5, 7), (8, 20)]
FAMILIES = ["normal", "correlated", "non_stationary", "scales"]
CASES = [(family, shape) for family in FAMILIES for shape in SHAPES]
every_case = pytest.mark.parametrize(("family", "shape"), CASES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensor(array):
    return torch.tensor(np.asarray(array, float), dtype=torch.float64)


def theirs(weighting, G):
    """Weights of a TorchJD weighting on the Gramian of G."""
    return weighting(tensor(np.asarray(G) @ np.asarray(G).T)).numpy()


def sequence(shape, steps=6, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=(steps, *shape))


@pytest.fixture
def fixed_order(monkeypatch):
    """TorchJD visits the tasks in the order 0 to K-1."""
    monkeypatch.setattr(torch, "randperm", torch.arange)


BASES = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator", "Weighting"}
COVERED = {
    "AlignedMTL": "aligned_mtl",
    "CAGrad": "cagrad",
    "ConFIG": "conflict_free",
    "Constant": "constant",
    "CRMOGM": "smoothed",
    "DualProj": "dualproj",
    "ExcessMTL": "excess_mtl",
    "FairGrad": "fairgrad",
    "GradDrop": "graddrop",
    "GradVac": "gradvac",
    "IMTLG": "imtl_g",
    "Krum": "krum",
    "Mean": "mean",
    "MGDA": "mgda",
    "MoDo": "modo",
    "NashMTL": "nash_mtl",
    "PCD": "pcd",
    "PCGrad": "pcgrad",
    "Random": "rlw",
    "SDMGrad": "sdmgrad",
    "Sum": "sum",
    "TrimmedMean": "trimmed_mean",
    "UPGrad": "upgrad",
}
"""Their aggregators and weightings, and ours, which the tests here compare."""
agree = against("TorchJD", COVERED)


def test_every_aggregator_has_a_counterpart():
    """A new release of TorchJD fails here until its new methods are compared."""
    assert {name.removesuffix("Weighting") for name in set(agg.__all__) - BASES} == set(COVERED)
    for name, ours in COVERED.items():
        assert ours in ROWS
        assert f"\n| `{name}` | `{ours}` |" in COMING_FROM.read_text()


@every_shape
def test_baselines(shape):
    G, c = stack("normal", *shape), np.arange(1.0, shape[0] + 1)
    agree("mean", updates("mean", [G])[0], agg.Mean()(tensor(G)), atol=1e-14)
    agree("sum", update("sum", G), agg.Sum()(tensor(G)), atol=1e-14)
    agree("constant", update("constant", G, weights=tuple(c)), agg.Constant(tensor(c))(tensor(G)), atol=1e-13)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
@pytest.mark.parametrize("preferred", [False, True])
@pytest.mark.parametrize(
    ("family", "shape"), [*CASES, ("rank_deficient", (5, 7)), ("opposite", (5, 3)), ("normal", (5, 3))], ids=str
)
def test_projections_on_the_dual_cone(name, preferred, family, shape):
    """With TorchJD's regularisation the quadratic programs are strongly convex, and both sides solve them exactly."""
    G, p = stack(family, *shape), np.arange(1.0, shape[0] + 1) if preferred else None
    kwargs = {} if p is None else {"preference": tuple(p)}
    peer = (agg.UPGradWeighting if name == "upgrad" else agg.DualProjWeighting)(None if p is None else tensor(p))
    wanted = theirs(peer, G)
    ours = weights(name, G, regularization=1e-4, **kwargs)
    agree(name, ours, wanted, rtol=1e-9, atol=1e-9 * wanted.max())


@pytest.mark.parametrize(("name", "peer"), [("upgrad", agg.UPGrad), ("dualproj", agg.DualProj)])
@every_case
def test_projections_without_regularization(name, peer, family, shape):
    """TorchJD still adds 1e-17 of the trace, which has an effect of 1e-13 on rows 1e6 apart."""
    G = stack(family, *shape)
    wanted = peer(projector=QuadprogProjector(norm_eps=0.0, reg_eps=1e-17))(tensor(G)).numpy()
    agree(name, update(name, G), wanted, atol=1e-6 * size(G))


@every_case
def test_mgda_within_their_duality_gap(family, shape):
    """Their Frank-Wolfe steps bound their distance to the optimum: f - f* <= 2 (w^T M w - min_i (M w)_i)."""
    G = stack(family, *shape)
    M, w = G @ G.T, weights("mgda", G)
    v = theirs(agg.MGDAWeighting(epsilon=1e-12, max_iters=1500), G)
    gap = 2 * (v @ M @ v - (M @ v).min())
    assert w @ M @ w <= v @ M @ v * (1 + 1e-12)
    assert v @ M @ v - w @ M @ w <= gap + 1e-12 * size(G) ** 2
    assert gap <= 0.02 * size(G) ** 2
    agree("mgda", w @ G, v @ G, rtol=0, atol=np.sqrt(gap) + 1e-12 * size(G))
    if len(G) == 2:
        np.testing.assert_allclose(w, v, atol=1e-12)


@pytest.mark.parametrize("c", [0.4, 1.5])
@every_case
def test_cagrad(c, family, shape):
    """Clarabel stops at relative gaps of 1e-8, so 1e-4 in d; ours is at least as good for the worst-off task."""
    G = stack(family, *shape)
    ours, wanted = update("cagrad", G, c=c), agg.CAGrad(c=c, norm_eps=1e-12)(tensor(G)).numpy()
    radius = c * np.linalg.norm(G.mean(axis=0))
    assert np.linalg.norm(ours - G.mean(axis=0)) <= radius * (1 + 1e-9)
    assert (G @ ours).min() >= (G @ wanted).min() - 1e-7 * size(G) ** 2
    agree("cagrad", ours, wanted, atol=2e-4 * (1 + c) * size(G))


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("family", ["normal", "correlated"])
def test_nash_mtl(family, shape):
    """TorchJD stops at residuals of 1e-3 on weights of order sqrt(K); only the direction is comparable."""
    G = stack(family, *shape)
    ours, wanted = update("nash_mtl", G), agg.NashMTL(n_tasks=len(G), max_norm=0.0)(tensor(G)).numpy()
    agree("nash_mtl", ours / np.linalg.norm(ours), wanted / np.linalg.norm(wanted), atol=5e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("family", ["normal", "correlated", "non_stationary"])
@every_shape
def test_fairgrad(alpha, family, shape):
    """Scipy's least squares stops at relative changes of 1e-8 in a flat valley."""
    G = stack(family, *shape)
    M, w, v = G @ G.T, weights("fairgrad", G, alpha=alpha), theirs(agg.FairGradWeighting(alpha=alpha), G)
    assert abs(M @ w * w ** (1 / alpha) - 1).max() < 1e-9
    assert abs(M @ v * v ** (1 / alpha) - 1).max() < 1e-2
    agree("fairgrad", w, v, rtol=1e-2)


@every_case
def test_pcgrad_in_fixed_order(fixed_order, family, shape):
    G = stack(family, *shape)
    agree("pcgrad", weights("pcgrad", G, order="fixed"), theirs(agg.PCGradWeighting(), G), rtol=1e-9, atol=1e-12)


def test_pcgrad_draws_from_the_same_outcomes():
    """Three tasks in conflict: two orders for each of them make eight sums."""
    G = np.asarray([[1.0, 0.3, 0], [-0.7, 1, 0], [-0.4, -0.8, 0.9]])
    torch.manual_seed(0)
    peer = {tuple(theirs(agg.PCGradWeighting(), G).round(9)) for _ in range(200)}
    ours = {tuple(w.round(9)) for w in weigh("pcgrad", [G @ G.T] * 200)[0]}
    assert len(peer) == 8
    assert ours == peer


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 1.0])
@every_shape
def test_gradvac(fixed_order, beta, shape):
    """TorchJD's cosines have 1e-8 in the denominator, which is negligible for gradients of norm 1e3."""
    grads = 1e3 * sequence(shape)
    peer = agg.GradVacWeighting(beta=beta, eps=0.0)
    wanted = [theirs(peer, G) for G in grads]
    gramians = grads @ grads.transpose(0, 2, 1)
    ours, _ = weigh("gradvac", gramians, num_tasks=shape[0], beta=beta, order="fixed")
    agree("gradvac", ours, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", ["normal", "correlated", "non_stationary"])
@every_shape
def test_imtl_g(family, shape):
    G = stack(family, *shape)
    wanted = theirs(agg.IMTLGWeighting(), G)
    agree("imtl_g", weights("imtl_g", G), wanted, rtol=1e-7, atol=1e-9 * abs(wanted).max())


def test_imtl_g_of_rank_deficient_gradients():
    """Six gradients of rank three that have equal cosines with one direction, the sum of an orthonormal basis."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 3)))[0].T
    G = np.vstack([basis, basis]) * np.asarray([1.0, 2, 3, 1, 2, 3])[:, None]
    agree("imtl_g", update("imtl_g", G), agg.IMTLG()(tensor(G)), atol=1e-9)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize(("family", "shape"), [*CASES, ("rank_deficient", (5, 7)), ("duplicate", (8, 20))], ids=str)
def test_aligned_mtl(scale, family, shape):
    """TorchJD weights the tasks by 1/K.

    In the `scales` family, eigenvalues span 12 orders of magnitude: the smallest is exact to K eps 1e12 on both sides.
    """
    G = stack(family, *shape)
    wanted = theirs(agg.AlignedMTLWeighting(scale_mode=scale), G)
    ours = weights("aligned_mtl", G, scale=scale) / len(G)
    tolerance = 3e-3 if family == "scales" else 1e-9
    agree("aligned_mtl", ours, wanted, atol=tolerance * abs(wanted).max())


@pytest.mark.parametrize("preferred", [False, True])
@pytest.mark.parametrize(
    ("family", "shape"), [*CASES, ("normal", (5, 3)), ("duplicate", (5, 7)), ("zero_row", (5, 7))], ids=str
)
def test_config(preferred, family, shape):
    G, p = stack(family, *shape), np.arange(1.0, shape[0] + 1)
    wanted = agg.ConFIG(tensor(p) if preferred else None)(tensor(G)).numpy()
    ours = update("conflict_free", G, **({"weights": tuple(p)} if preferred else {}))
    agree("conflict_free", ours, wanted, atol=1e-9 * size(G) * len(G))


@pytest.mark.parametrize(("byzantine", "selected"), [(0, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(6, 7), (8, 20), (6, 3)], ids=str)
def test_krum(byzantine, selected, family, shape):
    """With f + 3 gradients only the nearest other counts, and the nearest pair ties, so K is at least f + 4."""
    G = stack(family, *shape)
    peer = agg.KrumWeighting(n_byzantine=byzantine, n_selected=selected)
    ours = weights("krum", G, num_byzantine=byzantine, num_selected=selected, squared=False)
    agree("krum", ours, theirs(peer, G), atol=1e-15)


@pytest.mark.parametrize("trim", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5, 7), (8, 20), (6, 3)], ids=str)
def test_trimmed_mean(trim, shape):
    G = stack("normal", *shape)
    agree("trimmed_mean", update("trimmed_mean", G, trim=trim), agg.TrimmedMean(trim)(tensor(G)), atol=1e-14)


def test_random_weights_of_the_same_draws(monkeypatch):
    """RLW of LibMTL is the same: a softmax of standard normal numbers."""
    import jax
    import jax.numpy as jnp

    import mtlgrad_jax as mtl

    G, rng = stack("normal", 3, 7), np.random.default_rng(0)
    with jax.enable_x64(True):
        tx = mtl.rlw()
        for draws in rng.normal(size=(5, 3)):
            monkeypatch.setattr(torch, "randn", lambda *shape, draws=draws, **_: tensor(draws))
            monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype, draws=draws: jnp.asarray(draws, dtype))
            ours, _ = tx.update(jnp.asarray(G), tx.init(jnp.zeros(7)))
            agree("rlw", ours, agg.Random()(tensor(G)), rtol=1e-12)


@pytest.mark.parametrize("leak", [None, [0.0, 0.3, 1.0]], ids=["without leak", "leak"])
def test_graddrop_of_the_same_draws(monkeypatch, leak):
    """With one set of uniform numbers on both sides; TorchJD divides by zero in an empty column, without effect."""
    import jax
    import jax.numpy as jnp

    import mtlgrad_jax as mtl

    G, rng = stack("normal", 3, 200), np.random.default_rng(0)
    G[:, :2], G[:, 2:9] = 0, np.abs(G[:, 2:9])
    tx = mtl.graddrop() if leak is None else mtl.graddrop(leak=leak)
    peer = agg.GradDrop(leak=None if leak is None else tensor(leak))
    with jax.enable_x64(True):
        for _ in range(5):
            draws = rng.uniform(size=200)
            monkeypatch.setattr(torch, "rand", lambda *shape, draws=draws, **_: tensor(draws))
            monkeypatch.setattr(GRADDROP, "uniform", lambda key, shape, dtype, draws=draws: jnp.asarray(draws, dtype))
            ours, _ = tx.update(jnp.asarray(G), tx.init(jnp.zeros(200)))
            agree("graddrop", ours, peer(tensor(G)), rtol=1e-12, atol=1e-14)


def test_graddrop_in_law():
    """The means of many draws on both sides, and the sum of the gradients, which is their expectation."""
    import jax
    import jax.numpy as jnp

    import mtlgrad_jax as mtl

    G, draws = stack("normal", 3, 20), 4000
    tx, wanted = mtl.graddrop(key=1), G.sum(axis=0)
    grads = jnp.asarray(G, jnp.float32)
    step = jax.jit(lambda: jax.lax.scan(lambda s, _: tx.update(grads, s)[::-1], tx.init(grads[0]), length=draws)[1])
    torch.manual_seed(0)
    peer = agg.GradDrop()
    means = (
        np.asarray(step(), float).mean(axis=0),
        torch.stack([peer(tensor(G)) for _ in range(draws)]).mean(dim=0).numpy(),
    )
    deviation = np.sqrt(np.maximum(G, 0).sum(axis=0) * np.maximum(-G, 0).sum(axis=0) / draws)
    for mean in means:
        assert (np.abs(mean - wanted) <= 4.5 * deviation + 1e-5).all()


@pytest.mark.parametrize("rate", [0.01, 1.0])
@every_shape
def test_excess_mtl(rate, shape):
    """With one warm-up step, which only sets the first excess. TorchJD's weights sum to 1; its 1e-7s are negligible."""
    grads = 1e3 * sequence(shape, steps=10) * np.linspace(1, 0.1, 10)[:, None, None]
    peer = agg.ExcessMTL(robust_step_size=rate, n_warmup_steps=1)
    wanted = [len(G) * peer(tensor(G)).numpy() for G in grads]
    ours = updates("excess_mtl", grads, num_tasks=shape[0], learning_rate=rate)
    agree("excess_mtl", ours, wanted, rtol=1e-8, atol=1e-8 * size(grads))


def test_excess_mtl_decides_in_its_first_step_without_warm_up():
    """TorchJD exponentiates the first excess itself, here 200 and 400; the official code only stores it."""
    G = np.full((2, 1000), 0.2) * [[1.0], [2.0]]
    wanted = agg.ExcessMTLWeighting()(tensor(G)).numpy()
    np.testing.assert_allclose(wanted, [0, 1], atol=1e-12)
    np.testing.assert_allclose(updates("excess_mtl", [G], num_tasks=2, learning_rate=1.0)[0], G.sum(axis=0))


@pytest.mark.parametrize("progress", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("primary", [0, -1])
@pytest.mark.parametrize("shape", [(2, 5), (3, 7), (5, 7), (5, 3)], ids=str)
def test_pcd(progress, primary, shape):
    """TorchJD's primary task is always the first. Includes infeasible problems, as most with K = 5 and P = 3 are."""
    K = shape[0]
    primary %= K
    order = [primary, *(i for i in range(K) if i != primary)]
    peer = agg.PCDWeighting(tau=progress, beta=0.9, eps=0.0)
    grads = sequence(shape, steps=8) * np.logspace(-1, 1, K)[:, None]
    wanted = np.zeros((len(grads), K))
    wanted[:, order] = [theirs(peer, G[order]) for G in grads]
    gramians = grads @ grads.transpose(0, 2, 1)
    ours, _ = weigh("pcd", gramians, num_tasks=K, primary=primary, progress=progress, decay=0.9)
    agree("pcd", ours, wanted, rtol=1e-7, atol=1e-7)


def test_pcd_with_a_share_for_each_task():
    G = stack("normal", 3, 7)
    wanted = theirs(agg.PCDWeighting(tau=tensor([0.1, 0.6]), eps=0.0), G)
    agree("pcd", weights("pcd", G, num_tasks=3, progress=(0.9, 0.1, 0.6)), wanted, rtol=1e-9, atol=1e-12)


def cross_gramians(shape, scale=1.0):
    first, second = scale * sequence(shape, seed=1), scale * sequence(shape, seed=2)
    return first @ (0.5 * first + 0.5 * second).transpose(0, 2, 1)


@pytest.mark.parametrize(("rate", "regularization"), [(0.1, 0.1), (0.02, 0.0)])
@every_shape
def test_modo(rate, regularization, shape):
    cross, peer = cross_gramians(shape), agg.MoDoWeighting(gamma=rate, rho=regularization)
    wanted = [peer(tensor(A)).numpy() for A in cross]
    kwargs = {"learning_rate": rate, "regularization": regularization}
    ours, _ = weigh("modo", cross, cross_gramian=cross, num_tasks=shape[0], **kwargs)
    agree("modo", ours, wanted, atol=1e-12)


@pytest.mark.parametrize("kwargs", [{}, {"lam": 0.6, "learning_rate": 0.5, "momentum": 0.0, "num_steps": 5}])
@pytest.mark.parametrize("preferred", [False, True])
@every_shape
def test_sdmgrad(kwargs, preferred, shape):
    """TorchJD adds 1e-8 to the squared scale, here 1e6; steps of 10 amplify rounding before they are projected."""
    cross, p = cross_gramians(shape, scale=1e3), np.arange(1.0, shape[0] + 1) / shape[0]
    names = {"lam": "lambda_", "learning_rate": "lr", "momentum": "momentum", "num_steps": "n_iter"}
    peer = agg.SDMGradWeighting(
        **{names[key]: value for key, value in kwargs.items()}, pref_vector=tensor(p) if preferred else None
    )
    wanted = [peer(tensor(A)).numpy() for A in cross]
    own = {**kwargs, "preference": tuple(p)} if preferred else kwargs
    ours, _ = weigh("sdmgrad", cross, cross_gramian=cross, num_tasks=shape[0], **own)
    agree("sdmgrad", ours, wanted, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_smoothed(decay):
    import jax
    import jax.numpy as jnp

    import mtlgrad_jax as mtl

    grads = sequence((3, 7))
    peer = agg.CRMOGMWeighting(agg.UPGradWeighting(), alpha=decay)
    wanted = [theirs(peer, G) for G in grads]
    with jax.enable_x64(True):
        method = mtl.smoothed(mtl.upgrad(regularization=1e-4), num_tasks=3, decay=decay)
        state, ours = method.init(None), []
        for G in grads:
            w, state = method.weigh(jnp.asarray(G @ G.T), state)
            ours.append(w)
    agree("smoothed", ours, wanted, rtol=1e-9, atol=1e-10)


J = [[-4.0, 1, 1], [6, 1, 1]]
ROUTES = [
    ("upgrad", {"regularization": 1e-4}, agg.UPGrad),
    ("dualproj", {"regularization": 1e-4}, agg.DualProj),
    ("aligned_mtl", {"weights": (0.5, 0.5)}, agg.AlignedMTL),
    ("imtl_g", {}, agg.IMTLG),
    ("conflict_free", {}, agg.ConFIG),
    ("pcgrad", {}, agg.PCGrad),
    ("gradvac", {"num_tasks": 2}, agg.GradVac),
    ("mgda", {}, agg.MGDA),
    ("pcd", {"num_tasks": 2}, agg.PCD),
]


@pytest.mark.parametrize(("name", "kwargs", "peer"), ROUTES, ids=lambda part: str(part)[:20])
def test_stacked_route(name, kwargs, peer):
    """From stacked gradients to the update; the tolerance of 1e-7 allows for TorchJD's epsilons of 1e-8."""
    agree(name, updates(name, [J], **kwargs)[0], peer()(tensor(J)), atol=1e-7)


def test_gradvac_on_stacks_over_time(fixed_order):
    grads, peer = 1e3 * sequence((3, 7)), agg.GradVac(beta=0.3, eps=0.0)
    ours = updates("gradvac", grads, num_tasks=3, beta=0.3, order="fixed")
    agree("gradvac", ours, [peer(tensor(G)) for G in grads], atol=1e-7 * size(grads))


integers = hnp.arrays(np.int8, (3, 4), elements=hypothesis.strategies.integers(-3, 3)).filter(np.any)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(integers)
def test_any_small_integers(G):
    """Duplicates, opposites, zero rows and low ranks, all exact in their Gramian."""
    G = G.astype(float)
    for name, peer in (("upgrad", agg.UPGradWeighting()), ("dualproj", agg.DualProjWeighting())):
        agree(name, weights(name, G, regularization=1e-4), theirs(peer, G), rtol=1e-8, atol=1e-8)
    units = G / np.maximum(np.linalg.norm(G, axis=1, keepdims=True), 1e-9)
    if abs(units.sum(axis=0)).max() > 1e-9:  # where they cancel the direction is undefined
        agree("conflict_free", update("conflict_free", G), agg.ConFIG()(tensor(G)), size(G), atol=1e-8)
    for scale in ("min", "median", "rmse"):
        wanted = agg.AlignedMTL(tensor([1, 1, 1]), scale)(tensor(G))
        agree("aligned_mtl", update("aligned_mtl", G, scale=scale), wanted, size(G), atol=1e-8)
