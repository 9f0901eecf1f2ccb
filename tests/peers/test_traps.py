"""Known traps: cases in which a peer, or a copy of its formula, fails and this library does not.

Every test first asserts that the peer fails. B1 to B7 and section numbers refer to the project's notes on peers and
methods.
"""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peerlib import update, updates, weigh, weights
from scipy import optimize

torchjd = pytest.importorskip("torchjd", reason="the traps are shown on the extra 'peers'")
torch = pytest.importorskip("torch", reason="the traps are shown on the extra 'peers'")

from torchjd import aggregation as agg  # noqa: E402
from torchjd import scalarization  # noqa: E402
from torchjd.linalg import QuadprogProjector  # noqa: E402

import mtlgrad_jax as mtl  # noqa: E402
from mtlgrad_jax.solvers._solution import BIASED, SOLVED  # noqa: E402

J = np.asarray([[-4.0, 1, 1], [6, 1, 1]])
CONFLICTING = np.asarray([[1.0, 0.3, 0], [-0.7, 1, 0], [-0.4, -0.8, 0.9]])
PLAIN = np.asarray([[3.0, 1, 0], [-1, 2, 1], [0.5, -1, 4]])


def tensor(array):
    return torch.tensor(np.asarray(array, float), dtype=torch.float64)


def theirs(weighting, G):
    return weighting(tensor(np.asarray(G) @ np.asarray(G).T)).numpy()


def norms(G):
    return np.linalg.norm(G, axis=1)


def units(G):
    return G / norms(G)[:, None]


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.fixture
def fixed_order(monkeypatch):
    monkeypatch.setattr(torch, "randperm", torch.arange)


# --- absolute epsilons


@pytest.mark.parametrize(("name", "peer"), [("upgrad", agg.UPGrad()), ("dualproj", agg.DualProj())])
def test_torchjd_projections_are_the_conflicting_mean_at_small_scale(name, peer):
    """B1: a Gramian of trace below 1e-4 is taken for zero."""
    small = 1e-3 * J
    np.testing.assert_allclose(peer(tensor(small)), small.mean(axis=0))
    assert (small @ small.mean(axis=0)).min() < 0
    np.testing.assert_allclose(update(name, small), 1e-3 * update(name, J), rtol=1e-9)
    assert (small @ update(name, small)).min() > -1e-18


def test_torchjd_cagrad_stops_training_at_small_scale():
    """B1: weights are all zero below a norm of 0.01."""
    assert not theirs(agg.CAGradWeighting(c=0.4), 1e-3 * J).any()
    np.testing.assert_allclose(weights("cagrad", 1e-3 * J, c=0.4), weights("cagrad", J, c=0.4), rtol=1e-9)


def test_torchjd_cagrad_stops_where_all_tasks_could_descend():
    """B1: the same for gradients that almost cancel, at any scale; float64 hides 2e-6 of the mean's length here."""
    G = np.asarray([[1.0, 1e-5], [-1, 1e-5]])
    assert not theirs(agg.CAGradWeighting(c=0.5), G).any()
    np.testing.assert_allclose(update("cagrad", G, c=0.5), [0, 1.5e-5], rtol=1e-5, atol=1e-12)


SCALED = {
    "gradvac": (lambda: agg.GradVacWeighting(beta=0.5), {"num_tasks": 3, "beta": 0.5, "order": "fixed"}, 1e-6),
    "imtl_g": (agg.IMTLGWeighting, {}, 1e13),
    "pcd": (lambda: agg.PCDWeighting(tau=0.5), {"num_tasks": 3, "progress": 0.5}, 1e-6),
    "sdmgrad": (agg.SDMGradWeighting, {"num_tasks": 3}, 1e-6),
}


@pytest.mark.parametrize("name", SCALED)
def test_torchjd_weights_change_with_the_scale_of_all_gradients(name, fixed_order):
    """Section 10.1. Epsilons of 1e-8 in cosines and norms; weights of IMTL-G whose sum is below 1e-12 become zero."""
    peer, kwargs, scale = SCALED[name]
    assert abs(theirs(peer(), scale * PLAIN) - theirs(peer(), PLAIN)).max() > 0.1
    np.testing.assert_allclose(weights(name, scale * PLAIN, **kwargs), weights(name, PLAIN, **kwargs), rtol=1e-7)


def test_libmtl_pcgrad_keeps_conflicts_of_small_gradients():
    """It adds 1e-8 to the squared norms that it divides by."""
    small = 1e-6 * J
    products = small @ small.T
    libmtl = sum(small[i] - products[0, 1] * small[j] / (products[j, j] + 1e-8) for i, j in ((0, 1), (1, 0)))
    assert (small @ libmtl).min() < 0
    assert (small @ update("pcgrad", small)).min() > 0


def test_libmtl_cagrad_leaves_its_ball_at_small_scale():
    """Its radius is c times the root of |g0|^2 + 1e-8, whatever the weights."""
    c, G = 0.4, 1e-6 * PLAIN
    g0 = G.mean(axis=0)
    assert c * np.sqrt((G @ G.T).mean() + 1e-8) + 1e-8 > 20 * c * np.linalg.norm(g0)
    ours = update("cagrad", G, c=c)
    assert np.linalg.norm(ours - g0) == pytest.approx(c * np.linalg.norm(g0), rel=1e-9)


FLOORS = {
    "ngdiff": ({"signs": (1.0, 1.0, 1.0)}, lambda n: 1 / (n + 1e-8)),
    "slw": ({}, lambda n: 1 / np.maximum(n, 1e-5)),
    "db_mtl": ({"num_tasks": 3, "beta": 0.0}, lambda n: 1 / (n + 1e-8)),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_under_norms_leave_small_gradients_as_long_as_they_are(name):
    """Sections 7, 8 and 3.2: what should be the sum of unit gradients turns to the plain sum."""
    (kwargs, inverse), small = FLOORS[name], 1e-10 * PLAIN
    assert cosine(inverse(norms(small)) @ small, units(PLAIN).sum(axis=0)) < 0.99
    ours = update(name, small, np.ones(3), **kwargs)
    assert cosine(ours, units(PLAIN).sum(axis=0)) == pytest.approx(1, abs=1e-12)


def test_weiszfeld_with_a_floor_is_the_mean_at_small_scale():
    """Section 1.10: RFA floors distances at 1e-6, so an outlier moves its median arbitrarily far."""
    G = 1e-9 * np.asarray([[1.0, 0], [-1, 0], [0, 1], [0, -1], [100, 0]])
    x = G.mean(axis=0)
    for _ in range(10):
        pull = 1 / np.maximum(norms(G - x), 1e-6)
        x = pull @ G / pull.sum()
    np.testing.assert_allclose(x, [20e-9, 0], atol=1e-20)
    np.testing.assert_allclose(update("geometric_median", G), [1e-9 / np.sqrt(3), 0], rtol=1e-6, atol=1e-15)


def test_default_dtype_eps_drops_true_components_in_aligned_mtl():
    """Section 1.7: LibMTL and the official code cut off eigenvalues at the eps of float32 in any dtype."""
    G = np.asarray([[1.0, 0], [0, 1e-4]])
    kept = np.linalg.eigvalsh(G @ G.T) > 2 * np.finfo(np.float32).eps
    assert kept.sum() == 1
    np.testing.assert_allclose(update("aligned_mtl", G), [1e-4, 1e-4], rtol=1e-9)


def derivatives(objective, losses, dtype=torch.float64):
    values = torch.tensor(np.asarray(losses, float), dtype=dtype, requires_grad=True)
    return torch.autograd.grad(objective(values), values)[0].numpy()


def loss_weights(name, losses, **kwargs):
    return weights(name, np.eye(len(losses)), losses, **kwargs)


def test_torchjd_famo_ignores_small_losses():
    """Section 2.11: 1e-8 is added to every loss, so that all smaller ones count alike."""
    losses = 1e-10 * np.asarray([1.0, 3])
    np.testing.assert_allclose(derivatives(scalarization.FAMO(2).double(), losses), 0.5, atol=0.01)
    np.testing.assert_allclose(loss_weights("famo", losses, num_tasks=2), [0.75, 0.25], rtol=1e-9)


def test_torchjd_pbi_loses_its_penalty_at_small_losses():
    """Section 2.8: 1e-12 is added to the squared distance from the ray."""
    preference, losses = (0.2, 0.3, 0.5), np.asarray([1.0, 1, 2])
    peer = scalarization.PBI(5.0, tensor(preference))
    assert abs(derivatives(peer, 1e-8 * losses) - derivatives(peer, losses)).max() > 2
    ours = [loss_weights("pbi", scale * losses, preference=preference, theta=5.0) for scale in (1e-8, 1.0)]
    np.testing.assert_allclose(ours[0], ours[1], rtol=1e-6)


def test_libmtl_gls_is_nan_where_the_product_underflows():
    """Section 2.5: in float32, at losses of 1e-12."""
    losses = np.full(4, 1e-12)
    assert np.isnan(derivatives(lambda values: torch.pow(values.prod(), 1 / 4), losses, torch.float32)).all()
    ours, _ = mtl.gls().weigh(None, mtl.gls().init(None), losses=jnp.asarray(losses, jnp.float32))
    np.testing.assert_allclose(ours, 0.25, rtol=1e-5)


def test_torchjd_gls_raises_where_a_step_is_skipped():
    """Section 2.5: one negative loss, as a likelihood may have, ends the training."""
    losses = np.asarray([1.0, -1.0])
    with pytest.raises(ValueError, match="negative"):
        scalarization.GeometricMean()(tensor(losses))
    ours, state = weigh("gls", [np.eye(2)], [losses])
    np.testing.assert_array_equal(ours, 0)
    assert int(state.info.skipped) == 1


def test_libmtl_gls_reports_the_weights_of_other_tasks():
    """Section 2.5: its reported weights l / (K prod(l)) are larger for larger losses, those it applies are smaller."""
    losses = np.asarray([1.0, 4])
    np.testing.assert_allclose(losses / (2 * losses.prod()), [0.125, 0.5])
    np.testing.assert_allclose(derivatives(lambda values: torch.pow(values.prod(), 1 / 2), losses), [1, 0.25])
    np.testing.assert_allclose(loss_weights("gls", losses), [1, 0.25], rtol=1e-12)


# --- regularisation and iteration limits


def test_torchjd_regularization_makes_upgrad_conflict():
    """B2: 1e-4 of the trace outweighs a gradient a hundred times smaller."""
    G = np.asarray([[100.0, 0], [-1, 0.05]])
    assert (G @ agg.UPGrad()(tensor(G)).numpy()).min() < -20
    assert (G @ update("upgrad", G)).min() >= -1e-12
    exact = agg.UPGrad(projector=QuadprogProjector(norm_eps=0.0, reg_eps=1e-17))(tensor(G))
    np.testing.assert_allclose(update("upgrad", G), exact, rtol=1e-5)


def test_torchjd_mgda_stops_short():
    """Section 1.1: a hundred Frank-Wolfe steps end at 25 times the optimum 1e-4, with d up to 5 times too long."""
    G = np.asarray([[1.0, 0.01, 0], [-1, 0.01, 0], [0, 0.01, 1]])
    optimum = 1e-4
    assert np.sum(agg.MGDA()(tensor(G)).numpy() ** 2) > 20 * optimum
    assert np.sum(update("mgda", G) ** 2) == pytest.approx(optimum, rel=1e-9)


def test_official_two_point_rule_does_not_reach_a_vertex():
    """Section 1.1: where one gradient is the min-norm point its weight is 0.999, and d keeps 0.001 of the other."""
    G = np.asarray([[1.0, 0], [1000, 1]])
    official = np.asarray([0.999, 0.001])
    assert np.linalg.norm(official @ G) > 1.9
    np.testing.assert_allclose(update("mgda", G), [1, 0], atol=1e-12)


def test_official_frank_wolfe_goes_round_for_ever():
    """Section 1.1: it counts no iterations, and its two-point rule moves the optimum by 0.001 as rounding decides."""
    G = np.asarray([[-2.0, 3, 1], [1, 3, 2]])
    M, w, seen = G @ G.T, np.asarray([0.5, 0.5]), []
    while w.tolist() not in seen:
        seen.append(w.tolist())
        products = (M * w).sum(axis=1)
        t = products.argmin()
        a, b, c = (w * products).sum(), products[t], M[t, t]
        keep = 0.999 if b >= a else 0.001 if b >= c else (c - b) / (a + c - 2 * b)
        w = keep * w + (1 - keep) * np.eye(2)[t]
    assert abs(w - seen[-1]).sum() > 1e-5  # where it would stop
    ours, state = weigh("mgda", [M])
    np.testing.assert_allclose(ours[0], 0.5, rtol=1e-12)
    assert int(state.info.result) == SOLVED


def test_official_mgda_finds_no_pair_of_large_gradients():
    """Section 1.1: its search for the best pair begins at a cost of 1e8, and any worse pair leaves it without one."""
    G = 1e4 * np.asarray([[2.0, 1, 0], [1, 2, 0], [1, 1, 1]])
    M = G @ G.T
    costs = [min(M[i, i], M[j, j], M[i, j]) for i, j in itertools.combinations(range(3), 2)]
    assert min(costs) >= 1e8
    np.testing.assert_allclose(weights("mgda", G), weights("mgda", 1e-4 * G), atol=1e-9)


@pytest.mark.parametrize("scale", [(1e-3, 1, 1e3), (1e-4, 1e-4, 1e-4)], ids=str)
def test_torchjd_fairgrad_stops_short_of_its_equation(scale):
    """Scipy's least squares, from 1/K: residuals of 94% of the right-hand side, without a warning."""
    G = PLAIN * np.asarray(scale)[:, None]
    M, v, w = G @ G.T, theirs(agg.FairGradWeighting(alpha=2.0), G), weights("fairgrad", G, alpha=2.0)
    assert abs((M @ v) * np.sqrt(v) - 1).max() > 0.9
    assert abs((M @ w) * np.sqrt(w) - 1).max() < 1e-10


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_mtrl_fairgrad_stops_short_of_its_equation(scale):
    """Section 4: 20 steps of 0.1 on the squared residual, slopes clipped to norm 1, from 1/K whatever the scale."""
    G = scale * PLAIN
    M, v, velocity, tried = G @ G.T, np.full(3, 1 / 3), 0, []
    for _ in range(20):
        residual = M @ v - (v + 1e-8) ** -0.5
        tried.append((residual @ residual, tuple(v)))
        slope = 2 * M @ residual + residual * (v + 1e-8) ** -1.5
        velocity = 0.5 * velocity + slope / max(np.linalg.norm(slope), 1)
        v = np.maximum(v - 0.1 * velocity, 1e-8)
    v, w = np.asarray(min(tried)[1]), weights("fairgrad", G, alpha=2.0)
    assert abs((M @ v) * np.sqrt(v) - 1).max() > 0.5
    assert abs((M @ w) * np.sqrt(w) - 1).max() < 1e-10


def cagrad_by_slsqp(A, c):
    """As in the official code of NYUv2 and its copies."""
    radius, sums = c * np.sqrt(A.mean() + 1e-8) + 1e-8, {"type": "eq", "fun": lambda w: w.sum() - 1}

    def dual(w):
        return w @ A.mean(axis=1) + radius * np.sqrt(w @ A @ w + 1e-8)

    return optimize.minimize(dual, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints=sums).x


def cagrad_by_softmax(A, c):
    """As in the official MTRL code: the best of 21 weights on the way of steps of 25."""
    A = A / np.sqrt(np.diagonal(A) + 1e-4).mean() ** 2
    radius, z, velocity, tried = c * np.sqrt(A.mean() + 1e-4), np.zeros(3), 0, []
    for _ in range(21):
        w = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        norm = np.sqrt(w @ A @ w + 1e-4)
        tried.append((w @ A.mean(axis=1) + radius * norm, tuple(w)))
        slope = A.mean(axis=1) + radius * A @ w / norm
        velocity = 0.5 * velocity + w * (slope - w @ slope)
        z = z - 25 * velocity
    return np.asarray(min(tried)[1])


@pytest.mark.parametrize(("solve", "scales"), [(cagrad_by_slsqp, (1e-2,) * 3), (cagrad_by_softmax, (1e-2, 1, 1e2))])
def test_official_cagrad_solvers_stop_short(solve, scales):
    """Section 6: the changes of a small dual are below SLSQP's tolerance, and a softmax is slow to reach a corner."""
    c, G = 0.4, PLAIN * np.asarray(scales)[:, None]
    g0, gw = G.mean(axis=0), solve(G @ G.T, c) @ G
    peer, ours = g0 + c * np.linalg.norm(g0) * gw / np.linalg.norm(gw), update("cagrad", G, c=c)
    assert np.linalg.norm(ours - g0) <= c * np.linalg.norm(g0) * (1 + 1e-9)
    assert (G @ peer).min() < 0.8 * (G @ ours).min()


def test_official_cagrad_takes_its_side_from_rounding_where_gradients_cancel():
    """Section 6: with weights 1e-8 off the optimal ones on one side one task ascends, on the other side another."""
    G = np.asarray([[1.0, 0], [-1, 0], [0, 1]])
    g0 = G.mean(axis=0)
    for error in (1e-8, -1e-8):
        gw = np.asarray([0.5 + error, 0.5 - error, 0]) @ G
        peer = g0 + 0.4 * np.linalg.norm(g0) / (np.linalg.norm(gw) + 1e-8) * gw
        assert (G @ peer).min() < -0.08
    np.testing.assert_allclose(update("cagrad", G, c=0.4), g0, atol=1e-12)


def test_official_nash_mtl_does_not_stop_at_its_solution():
    """Section 5: its rule compares A over its norm with weights that are not scaled."""
    M = PLAIN @ PLAIN.T
    (alpha,), state = weigh("nash_mtl", [M])
    assert np.linalg.norm(M / np.linalg.norm(M) @ alpha - 1 / (alpha + 1e-10)) > 1  # it stops below 1e-3
    np.testing.assert_allclose(alpha * (M @ alpha), 1, rtol=1e-12)
    assert float(state.info.residual) < 1e-12


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_torchjd_nash_mtl_is_not_blind_to_the_tasks_scales():
    """A property of Nash-MTL; at scales 1e4 apart the peer's direction raises the first loss, ours does not change."""
    G = PLAIN * np.asarray([1e-2, 1, 1e2])[:, None]
    peer = agg.NashMTL(n_tasks=3)(tensor(G)).numpy()
    assert (G @ peer).min() < 0
    np.testing.assert_allclose(update("nash_mtl", G), update("nash_mtl", PLAIN), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
def test_torchjd_nash_mtl_falls_back_silently_on_a_zero_row():
    """The peer's solver raises, and it returns the clipped sum; ours is the bargaining solution of the other tasks."""
    G = PLAIN * np.asarray([1.0, 0, 1])[:, None]
    peer = agg.NashMTL(n_tasks=3)(tensor(G)).numpy()
    np.testing.assert_allclose(peer, G.sum(axis=0) / np.linalg.norm(G.sum(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(update("nash_mtl", G), update("nash_mtl", G[[0, 2]]), rtol=1e-9)


def test_torchjd_fairgrad_gives_a_task_without_gradient_a_huge_weight():
    """It does no harm in d, but LibMTL multiplies the losses, and so the heads, by these weights."""
    G = np.asarray([[1.0, 0], [0, 0]])
    assert theirs(agg.FairGradWeighting(alpha=2.0), G)[1] > 1000
    np.testing.assert_allclose(weights("fairgrad", G, alpha=2.0), [1, 0])


# --- conflicts and signs


def test_pcgrad_with_self_projection_differs():
    """Section 1.3: LibMTL and the Nash-MTL code let a task meet itself once others have turned it around."""
    G = np.asarray([[1.0, 0.0], [-1, 1], [-1, -0.7]])

    def project(include_self):
        rows = G.copy()
        for i, j in itertools.product(range(3), range(3)):
            if i != j or include_self:
                rows[i] -= min(rows[i] @ G[j], 0) / (G[j] @ G[j]) * G[j]
        return rows.sum(axis=0)

    G = G[[1, 2, 0]]
    assert abs(project(True) - project(False)).max() > 0.01
    np.testing.assert_allclose(update("pcgrad", G, order="fixed"), project(False), atol=1e-12)


def test_pcgrad_may_be_sum_or_mean():
    """B7: TorchJD and LibMTL add, metaworld averages."""
    np.testing.assert_allclose(update("pcgrad", J), agg.PCGrad()(tensor(J)), rtol=1e-12)
    np.testing.assert_allclose(update("pcgrad", J, reduction="mean"), agg.PCGrad()(tensor(J)) / 2, rtol=1e-12)


def test_gradvac_moved_on_conflict_only_resolves_less_than_pcgrad():
    """Section 1.4: in Samsung's code targets can only fall, so conflicts as bad as usual are let through."""
    grads = np.repeat(J[None], 30, axis=0)
    samsung = updates("gradvac", grads, num_tasks=2, beta=0.5, update="on_conflict")[-1]
    pcgrad = update("pcgrad", J)
    np.testing.assert_allclose(samsung, J.sum(axis=0), rtol=1e-6)
    assert np.linalg.norm(pcgrad) > 1.5 * np.linalg.norm(samsung)
    np.testing.assert_allclose(updates("gradvac", grads, num_tasks=2, beta=0.0)[-1], pcgrad, rtol=1e-12)


def test_gradvac_that_averages_before_comparing_corrects_half():
    """Section 1.4: chenllliang's target has moved towards the very cosine it is compared with."""
    cosine, beta = units(J)[0] @ units(J)[1], 0.5
    early = beta * cosine
    assert cosine < early < 0
    first = updates("gradvac", J[None], num_tasks=2, beta=beta)[0]
    np.testing.assert_allclose(first, update("pcgrad", J), rtol=1e-12)
    np.testing.assert_array_less(update("gradvac", J, num_tasks=2, target=early)[1:], first[1:])


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_conicgrad_by_the_inverse_of_an_indefinite_matrix_ascends(num_tasks):
    """Section 3b: (c^2 |g0|^2 I - g0 g0^T)^(-1) turns the mean gradient around for every c below 1."""
    c, G = 0.9, PLAIN[:num_tasks]
    g0 = G.mean(axis=0)
    assert cosine(np.linalg.solve(c**2 * g0 @ g0 * np.eye(3) - np.outer(g0, g0), g0), g0) == pytest.approx(-1)
    ours = update("conicgrad", G, c=c)
    assert cosine(ours, g0) >= c - 1e-12
    assert (G @ ours).min() > 0


ASCENT = np.asarray([[1.0, 0, 0], [0, 1, 0], [0.08, 0.08, 0.01]])


def test_imtl_g_ascends_on_every_task():
    """Section 1.5: equal projections whose weights add up to one can all be negative."""
    for d in (agg.IMTLG()(tensor(ASCENT)).numpy(), update("imtl_g", ASCENT)):
        assert (ASCENT @ d < 0).all()
    descent = update("imtl_g", ASCENT, sign="descent")
    assert (ASCENT @ descent > 0).all()
    np.testing.assert_allclose(descent, -update("imtl_g", ASCENT), rtol=1e-12)


def imtl_g_of_libmtl(G, ridge=0.0):
    with np.errstate(invalid="ignore", divide="ignore"):
        U = G / norms(G)[:, None]
    D, U = G[0] - G[1:], U[0] - U[1:]
    rest = G[0] @ U.T @ np.linalg.inv(D @ U.T + ridge * np.eye(len(D)))
    return np.asarray([1 - rest.sum(), *rest]) @ G


def test_libmtl_imtl_g_is_nan_with_a_zero_row():
    """Section 1.5. Ours leaves the task out."""
    G = PLAIN * np.asarray([1.0, 0, 1])[:, None]
    assert np.isnan(imtl_g_of_libmtl(G)).all()
    np.testing.assert_allclose(update("imtl_g", G), update("imtl_g", G[[0, 2]]), rtol=1e-9)


def test_libmtl_imtl_g_raises_on_equal_gradients():
    """Section 1.5: its matrix of differences has no inverse; the Nash-MTL code then adds 1e-8, which is not small."""
    G = 1e-8 * PLAIN[[0, 0, 1]]
    with pytest.raises(np.linalg.LinAlgError):
        imtl_g_of_libmtl(G)
    projections = units(G) @ imtl_g_of_libmtl(G, ridge=1e-8)
    assert np.ptp(projections) > 0.2 * projections.max()
    projections = units(G) @ update("imtl_g", G)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-9)


def test_torchjd_imtl_g_of_dependent_gradients_depends_on_their_scales():
    """Section 1.5: the pseudoinverse of the Gramian weighs long rows more, that of the cosines does not."""
    G = np.asarray([[1.0, 0], [0, 1], [-0.6, 0.8]])
    scaled = G * np.asarray([[1.0], [1], [10]])

    def direction(d):
        return d / np.linalg.norm(d)

    peers = [direction(agg.IMTLG()(tensor(rows)).numpy()) for rows in (G, scaled)]
    ours = [direction(update("imtl_g", rows, sign="descent")) for rows in (G, scaled)]
    assert abs(peers[0] - peers[1]).max() > 0.1
    np.testing.assert_allclose(ours[0], ours[1], rtol=1e-9)


def test_official_config_lengths_are_nan_with_a_zero_row():
    """Section 1.9: the direction ignores the task, but all length models except the default divide by its norm."""
    G = PLAIN * np.asarray([1.0, 0, 1])[:, None]
    with np.errstate(invalid="ignore"):
        assert np.isnan(G / norms(G)[:, None]).any()
    for length in ("min", "max", "harmonic", "arithmetic", "geometric"):
        wanted = update("conflict_free", G[[0, 2]], length=length)
        np.testing.assert_allclose(update("conflict_free", G, length=length), wanted, rtol=1e-9)


def test_torchjd_imtl_g_moves_where_unit_gradients_cancel():
    """Sections 1.5 and 1.9: at 120 degrees only the zero direction is impartial, as in the paper's closed form.

    TorchJD's IMTL-G is a least-squares compromise of very different projections; its ConFIG is zero, like ours.
    """
    angles = 2 * np.pi * np.arange(3) / 3
    G = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert np.linalg.norm(agg.ConFIG()(tensor(G)).numpy()) < 1e-6
    scaled = G * [[1.0], [2], [5]]
    peer = agg.IMTLG()(tensor(scaled)).numpy()
    assert np.ptp(units(scaled) @ peer) > 1
    np.testing.assert_allclose(weights("imtl_g", scaled), np.asarray([10, 5, 2]) / 17, rtol=1e-9)
    for name in ("conflict_free", "imtl_g"):
        np.testing.assert_allclose(update(name, scaled), 0, atol=1e-12)


def test_config_by_least_squares_of_full_rank_leaves_the_span():
    """Section 1.9: by a factorisation that assumes full rank, as torch's solver on GPUs, rounding makes up a direction.

    With a pair of parallel gradients, the direction is the sum of two unit gradients.
    """
    worst = 1.0
    for draw in range(30):
        a, b = units(np.random.default_rng(draw).normal(size=(2, 7)))
        G = np.stack([a, 3 * a, 2 * b])
        narrow = (G / norms(G)[:, None]).astype(np.float32)
        Q, R = np.linalg.qr(narrow.T)
        with contextlib.suppress(np.linalg.LinAlgError):  # some factors are singular to the bit
            worst = min(worst, cosine(Q @ np.linalg.solve(R.T, np.ones(3, np.float32)), a + b))
        assert cosine(update("conflict_free", G), a + b) > 1 - 1e-12
    assert worst < 0.95


# --- definitions that differ


def test_libmtl_mgda_of_features_sums_over_the_batch():
    """Section 1.2: gradients at features may cancel within the batch; the official code flattens them."""
    Z = np.asarray([[[1.0, 0], [-1, 0]], [[0, 1], [0, 1]]])  # task, batch, feature
    np.testing.assert_array_equal(norms(Z.sum(axis=1)), [0, 2])
    ours, _ = mtl.mgda().update(jnp.asarray(Z), mtl.mgda().init(jnp.zeros((2, 2))))
    np.testing.assert_allclose(ours, Z.mean(axis=0), atol=1e-6)


def test_cagrad_has_the_same_c_for_different_steps():
    """B6: LibMTL divides by 1 + c^2, TorchJD by nothing."""
    peer = agg.CAGrad(c=0.5)(tensor(PLAIN)).numpy()
    np.testing.assert_allclose(update("cagrad", PLAIN, c=0.5), peer, rtol=1e-4)
    np.testing.assert_allclose(update("cagrad", PLAIN, c=0.5, rescale="1+c^2"), peer / 1.25, rtol=1e-4)


def test_krum_with_plain_distances_selects_another_gradient():
    """B3: the paper sums squares."""
    G = np.asarray([[-3.0, -1], [-3, 3], [3, -3], [2, 1], [-1, 2], [3, 2]])
    squares = np.sum((G[:, None] - G[None]) ** 2, axis=-1)
    by_paper = np.sort(squares, axis=1)[:, 1:4].sum(axis=1).argmin()
    peer = theirs(agg.KrumWeighting(n_byzantine=1, n_selected=1), G)
    assert peer.argmax() != by_paper
    assert weights("krum", G, num_byzantine=1).argmax() == by_paper
    np.testing.assert_allclose(weights("krum", G, num_byzantine=1, squared=False), peer)


def test_krum_of_equal_gradients_has_no_root_of_rounding():
    """B4, until TorchJD 0.18: the unclamped squared distance of two equal gradients may come out below zero."""
    G = PLAIN[[0, 0, 1, 2]]
    M = G @ G.T
    M[0, 1] = M[1, 0] = np.nextafter(M[0, 0], np.inf)
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.sqrt(M[0, 0] + M[1, 1] - 2 * M[0, 1]))
    np.testing.assert_array_equal(weigh("krum", [M], num_byzantine=0, squared=False)[0][0], [1, 0, 0, 0])


def test_aligned_mtl_takes_the_lower_median():
    """Section 1.7: of an even number of eigenvalues torch's median is the lower one, numpy's the average of two."""
    G = np.diag([1.0, 2, 3, 4])
    np.testing.assert_allclose(theirs(agg.AlignedMTLWeighting(scale_mode="median"), G), 2 / np.diagonal(G) / 4)
    np.testing.assert_allclose(weights("aligned_mtl", G, scale="median"), 2 / np.diagonal(G), rtol=1e-12)
    assert np.sqrt(np.median(np.diagonal(G) ** 2)) > 2.5


def test_aligned_mtl_of_torchjd_is_that_of_the_paper_over_the_number_of_tasks():
    """Section 1.7: 1/K in place of the sum."""
    peer = agg.AlignedMTL()(tensor(PLAIN)).numpy()
    np.testing.assert_allclose(update("aligned_mtl", PLAIN), 3 * peer, rtol=1e-9)


def test_official_aligned_mtl_has_no_smallest_eigenvalue_at_zero():
    """Section 1.7: at rank zero it indexes an empty array of eigenvalues."""
    kept = np.zeros(3)[np.zeros(3) > 0]
    with pytest.raises(IndexError):
        kept[-1]
    np.testing.assert_array_equal(update("aligned_mtl", np.zeros((3, 4))), 0)


def test_libmtl_mgda_weights_multiply_normalised_gradients():
    """Section 1.1: the same weights on raw gradients, as in the official code, give another direction."""
    raw, normalized = (update("mgda", J, normalization="l2", apply_to=to) for to in ("raw", "normalized"))
    cosine = raw @ normalized / np.linalg.norm(raw) / np.linalg.norm(normalized)
    assert cosine < 0.99
    np.testing.assert_allclose(normalized, 0.5 * units(J).sum(axis=0), atol=1e-12)
    np.testing.assert_allclose(raw, J.mean(axis=0), atol=1e-12)


def test_dibs_by_default_is_the_sum_of_unit_gradients():
    """Section 1.12: one step of the bargaining, all targets being equally far from zero."""
    np.testing.assert_allclose(update("dibs", PLAIN, learning_rate=1.0), units(PLAIN).sum(axis=0), rtol=1e-12)
    several = update("dibs", PLAIN, learning_rate=0.1, num_steps=5)
    direction = units(PLAIN).sum(axis=0)
    assert several @ direction < (1 - 1e-5) * np.linalg.norm(several) * np.linalg.norm(direction)


def test_gradnorm_weights_stay_positive():
    """Section 3.1: a step on the raw weights, as in metaworld's code, makes them negative and turns a task around."""
    rate, losses = 1.5, [1.0, 1, 1]
    assert 1 - rate < 0  # Adam's first step is as long as its rate; the longest gradient goes down
    gramians = [PLAIN @ PLAIN.T] * 5
    ours, _ = weigh("gradnorm", gramians, [losses] * 5, num_tasks=3, alpha=1.5, learning_rate=rate)
    assert ours.min() >= 0
    np.testing.assert_allclose(ours.sum(axis=1), 3)


def test_samsung_gradnorm_weights_do_not_keep_their_sum():
    """Section 3.1: it learns from normalised weights, but multiplies the losses by the others."""
    raw = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam, d = torch.optim.Adam([raw], lr=0.1), torch.tensor(norms(PLAIN))
    for _ in range(20):
        weighted = 3 * raw / raw.sum() * d
        adam.zero_grad()
        (weighted - weighted.mean().detach()).abs().sum().backward()
        adam.step()
    assert abs(raw.detach().sum() - 3) > 0.1
    ours, _ = weigh("gradnorm", [PLAIN @ PLAIN.T] * 20, np.ones((20, 3)), num_tasks=3, alpha=2.0, learning_rate=0.1)
    np.testing.assert_allclose(ours.sum(axis=1), 3)


def test_dwa_of_the_nash_mtl_code_takes_losses_for_ratios():
    """Section 2.3: its two windows of 25 steps begin with ones, so until step 50 it divides losses by ones.

    These losses are constant. SamsungLabs/MTL does the same; both also divide the sum of the weighted losses by K.
    """
    losses, costs, peers = np.asarray([10.0, 0.1]), np.ones((50, 2)), []
    for t in range(60):
        costs = np.vstack([costs[1:], losses])
        e = np.exp(costs[25:].mean(axis=0) / costs[:25].mean(axis=0) / 2)
        peers.append(2 * e / e.sum() if t > 25 else np.ones(2))
    assert peers[26].max() > 1.8
    np.testing.assert_allclose(peers[50], 1)
    ours, _ = weigh("dwa", [np.eye(2)] * 60, [losses] * 60, num_tasks=2, window=25)
    np.testing.assert_allclose(ours, 1)


def test_torchjd_excess_mtl_drops_a_task_in_the_first_step_for_good():
    """Section 3.3: it exponentiates the first excess, the 1-norm of a gradient; a weight that underflows stays zero."""
    first = np.full((2, 10_000), 0.2) * [[1.0], [2.0]]
    later = first * [[100.0], [1e-3]]
    peer = agg.ExcessMTLWeighting()
    for G in (first, later, later):
        np.testing.assert_array_equal(peer(tensor(G)).numpy(), [0, 1])
    ours = updates("excess_mtl", [first, later, later], num_tasks=2, learning_rate=1.0)
    np.testing.assert_allclose(ours[0], first.sum(axis=0))
    np.testing.assert_allclose(ours[2], 2 * later[0], rtol=1e-6)


def test_libmtl_moco_stays_near_equal_weights():
    """Section 3.4: a softmax of weights in [0, 1] forgets them; the projection goes to the first task, the shorter."""
    G, w = np.asarray([[0.1, 0], [0.8, 0.6]]), np.full(2, 0.5)
    for _ in range(200):
        w = w - 0.1 * G @ G.T @ w
        w = np.exp(w) / np.exp(w).sum()
    assert abs(w - 0.5).max() < 0.03
    own = {"num_tasks": 2, "beta": 1.0, "rho": 0.0}
    np.testing.assert_allclose(updates("moco", [G] * 200, projection="softmax", **own)[-1], w @ G, rtol=1e-9)
    np.testing.assert_allclose(updates("moco", [G] * 200, **own)[-1], G[0], atol=1e-12)


def test_samsung_graddrop_has_one_sign_and_the_opposite_leak():
    """Section 4.1: it draws once for a whole representation, and a leak of 0 drops nothing."""
    G, U = np.asarray([[2.0, 1], [-4, 1]]), np.linspace(0.05, 0.95, 10)[:, None]
    total = G.sum(axis=1)
    kept = np.where(total > 0, U < 0.5, U > 0.5)  # the totals are 3 and -3
    for leak, found in ((0.0, [[-2, 2]]), (1.0, [[-4, 1], [2, 1]])):
        np.testing.assert_array_equal(np.unique((leak * kept + 1 - leak) @ G, axis=0), found)
    for leak, found in ((1.0, [[-2, 2]]), (0.0, [[-4, 2], [2, 2]])):
        drawn = updates("graddrop", [G] * 40, leak=leak)
        np.testing.assert_allclose(np.unique(drawn.round(9), axis=0), found)


def test_uw_settles_where_variances_are_the_losses():
    """Section 2.1: not if the model's optimizer learns the log-variances too and decays them, as in TorchJD, LibMTL."""
    losses, s = np.asarray([0.5, 1, 2]), np.zeros(3)
    for _ in range(1000):
        s -= 0.1 * ((1 - np.exp(-s) * losses) / 2 + 0.1 * s)
    assert abs(np.exp(s) / losses - 1).max() > 0.1
    ours, _ = weigh("uw", [np.eye(3)] * 300, [losses] * 300, num_tasks=3)
    np.testing.assert_allclose(ours[-1], 0.5 / losses, rtol=1e-5)


def test_psmgd_code_logs_averages_and_steps_without_them():
    """Section 3.8: its 0.9 is the share of the new weights, while CR-MOGM's is the share of the old ones."""
    old, new = np.asarray([0.6, 0.4]), np.asarray([0.4, 0.6])  # MGDA's, of J and of its rows exchanged
    swapped = J[::-1]
    wanted = (0.9 * old + 0.1 * new) @ swapped
    for peer in (new, 0.1 * old + 0.9 * new):
        assert abs(peer @ swapped - wanted).max() > 1
    with jax.enable_x64(True):
        method = mtl.smoothed(mtl.mgda(), num_tasks=2, decay=0.9)
        _, state = method.update(jnp.asarray(J), method.init(jnp.zeros(3)))
        ours, _ = method.update(jnp.asarray(swapped), state)
    np.testing.assert_allclose(ours, wanted, rtol=1e-12)


# --- double sampling


def test_one_batch_biases_the_gramian_and_two_do_not():
    """Sections 3.5 and 3.6: noise adds its variance to the diagonal of a batch's Gramian; official SDMGrad's three
    batches are one buffer. Ours says when that happens.
    """
    rng = np.random.default_rng(0)
    first, second = (PLAIN + rng.normal(size=(4000, 3, 3)) for _ in range(2))
    one = np.mean(first @ first.transpose(0, 2, 1), axis=0) - PLAIN @ PLAIN.T
    two = np.mean(first @ second.transpose(0, 2, 1), axis=0) - PLAIN @ PLAIN.T
    assert np.diagonal(one).min() > 2.5
    assert abs(two).max() < 0.5
    for method in (mtl.modo(num_tasks=3), mtl.sdmgrad(num_tasks=3)):
        _, state = method.update(jnp.asarray(PLAIN), method.init(jnp.zeros(3)))
        assert int(state.info.result) == BIASED
        cross = mtl.stacks.cross_gramian(jnp.asarray(first[0]), jnp.asarray(second[0]))
        _, state = method.update(jnp.asarray(PLAIN), method.init(jnp.zeros(3)), cross_gramian=cross)
        assert int(state.info.result) != BIASED


def test_official_sdmgrad_is_nan_on_a_negative_diagonal():
    """Section 3.6: a cross-Gramian may have one; the square root of the diagonal plus 1e-4 is then NaN."""
    cross = np.asarray([[2.0, 0.3], [0.1, -0.5]])
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.sqrt(np.diagonal(cross) + 1e-4).mean())
    ours, state = weigh("sdmgrad", [cross], cross_gramian=[cross], num_tasks=2)
    np.testing.assert_allclose(ours[0], agg.SDMGradWeighting()(tensor(cross)), atol=1e-7)
    assert int(state.info.fallbacks) == 0


def test_official_sdmgrad_jumps_between_corners():
    """Section 3.6: steps of 10 on a Gramian of mean norm 1. Small steps without pull end in MGDA's weights."""
    np.testing.assert_array_equal(theirs(agg.SDMGradWeighting(lambda_=0.0, lr=10.0), J), [0, 1])
    ours = weights("sdmgrad", J, num_tasks=2, lam=0.0, learning_rate=0.1, num_steps=300)
    np.testing.assert_allclose(ours, [0.6, 0.4], rtol=1e-9)


def test_modo_of_the_sum_of_two_batches_takes_steps_twice_as_long():
    """Section 3.5: the official code sums both batches; ours steps along the gradient it is given, their mean."""
    with jax.enable_x64(True):
        method, cross = mtl.modo(num_tasks=2), jnp.asarray(J @ J.T)
        mean, _ = method.update(jnp.asarray(J + 0.5), method.init(jnp.zeros(3)), cross_gramian=cross)
        total, _ = method.update(jnp.asarray(J + (J + 1)), method.init(jnp.zeros(3)), cross_gramian=cross)
    np.testing.assert_allclose(total, 2 * np.asarray(mean))


# --- infeasible or degenerate


ZERO_ROWS = {
    "ngdiff": ({"signs": (1.0, 1.0, 1.0)}, lambda G: 1),
    "dibs": ({"learning_rate": 1.0}, lambda G: 1),
    "avgnorm": ({}, lambda G: np.linalg.norm(G.sum(axis=0))),
    "rotograd_scale": ({"num_tasks": 3}, lambda G: norms(G).mean()),
    "slw": ({}, lambda G: 3 / (1 / norms(G)).sum()),
}


@pytest.mark.parametrize("name", ZERO_ROWS)
def test_a_zero_row_leaves_no_sum_of_unit_gradients(name):
    """Part III, section 0: no norm to divide by. Ours gives the other rows their common length."""
    (kwargs, length), G = ZERO_ROWS[name], PLAIN * [[1.0], [1], [0]]
    with np.errstate(invalid="ignore"):
        assert np.isnan(units(G).sum(axis=0)).all()
    np.testing.assert_allclose(update(name, G, **kwargs), length(G[:2]) * units(G[:2]).sum(axis=0), rtol=1e-12)


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj", "pcgrad", "cagrad", "nash_mtl", "fairgrad", "imtl_g"])
@pytest.mark.parametrize("G", [np.zeros((3, 3)), PLAIN * [[1.0], [0], [1]], PLAIN[[0, 0, 1]]], ids=["0", "row", "same"])
def test_degenerate_gradients_stay_finite(name, G):
    assert np.isfinite(update(name, G)).all()


def test_torchjd_pcgrad_divides_by_nothing_and_so_do_we():
    """A zero row never conflicts strictly."""
    G = J * [[1.0], [0]]
    np.testing.assert_allclose(update("pcgrad", G), agg.PCGrad()(tensor(G)))
