"""Parity with LibMTL and the official repositories: their formulas in numpy, from gradients, in float64.

The sources are LibMTL 4336804, rainx0r/metaworld-algorithms 30c9991 and the repositories named in the tests. Most of
these formulas use vectors; this library uses Gramians.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import stack
from peerlib import COMING_FROM, GRADDROP, against, size, update, updates, weigh, weights
from scipy import optimize

import mtlgrad_jax as mtl

torchjd = pytest.importorskip("torchjd", reason="the formulas go with the extra 'peers'")
torch = pytest.importorskip("torch", reason="the formulas go with the extra 'peers'")

COVERED = {
    "Aligned_MTL": "aligned_mtl",
    "CAGrad": "cagrad",
    "DB_MTL": "db_mtl",
    "DWA": "dwa",
    "EW": "sum",
    "ExcessMTL": "excess_mtl",
    "FAMO": "famo",
    "FairGrad": "fairgrad",
    "GLS": "gls",
    "GradDrop": "graddrop",
    "GradNorm": "gradnorm",
    "GradVac": "gradvac",
    "IMTL": "imtl",
    "MGDA": "mgda",
    "MoCo": "moco",
    "MoDo": "modo",
    "Nash_MTL": "nash_mtl",
    "PCGrad": "pcgrad",
    "RLW": "rlw",
    "SDMGrad": "sdmgrad",
    "STCH": "stch_mtl",
    "UPGrad": "upgrad",
    "UW": "uw",
}
"""LibMTL's weightings, and ours, which are compared here; RLW with TorchJD's, which is the same."""
agree = against("formulas", COVERED)

SHAPES = [(2, 5), (3, 7), (5, 8)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_family = pytest.mark.parametrize("family", ["normal", "correlated", "non_stationary"])

GOLDEN = np.asarray([[3.0, 1, 0], [-1, 2, 1], [0.5, -1, 4]])


def test_users_of_every_weighting_find_their_way():
    for name, ours in COVERED.items():
        assert f"\n| `{name}` | `{ours}` |" in COMING_FROM.read_text()


def norms(G):
    return np.linalg.norm(G, axis=1)


def units(G):
    return G / norms(G)[:, None]


def sequence(shape, steps=6, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=(steps, *shape))


def losses_of(K, steps=None, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 4.0, size=K if steps is None else (steps, K))


def simplex(y):
    """Projection onto the simplex: the shift at which the positive parts sum to one."""
    shift = optimize.brentq(lambda t: np.maximum(y - t, 0).sum() - 1, y.min() - 1, y.max(), xtol=1e-15)
    return np.maximum(y - shift, 0)


def min_norm(M):
    """The best of the equalising weights of all supports."""
    best, K = (np.inf, None), len(M)
    for support in itertools.chain(*(itertools.combinations(range(K), n) for n in range(1, K + 1))):
        w = np.zeros(K)
        w[list(support)] = np.linalg.lstsq(M[np.ix_(support, support)], np.ones(len(support)))[0]
        w /= w.sum()
        if w.min() >= 0 and w @ M @ w < best[0]:
            best = w @ M @ w, w
    return best[1]


MGDA_SCALES = {
    "none": lambda G, losses: np.ones(len(G)),
    "l2": lambda G, losses: norms(G),
    "loss": lambda G, losses: losses,
    "loss+": lambda G, losses: losses * norms(G),
}


@pytest.mark.parametrize("normalization", MGDA_SCALES)
@every_family
def test_mgda_normalizations(normalization, family):
    """The official code applies the weights to the losses, LibMTL to the normalised gradients."""
    G, losses = stack(family, 3, 7), losses_of(3)
    scaled = G / MGDA_SCALES[normalization](G, losses)[:, None]
    w = min_norm(scaled @ scaled.T)
    agree("mgda", update("mgda", G, losses, normalization=normalization), w @ G, atol=1e-9 * size(G))
    libmtl = update("mgda", G, losses, normalization=normalization, apply_to="normalized")
    agree("mgda", libmtl, w @ scaled, atol=1e-9 * size(scaled))


def test_mgda_of_log_losses():
    """The code of FAMO: gradients of log-losses, and weights of the losses that sum to one."""
    G, losses = stack("normal", 3, 7), losses_of(3)
    logs = G / losses[:, None]
    w = min_norm(logs @ logs.T)
    ours = weights("mgda", G, losses, normalization="loss", apply_to="normalized")
    agree("mgda", ours / ours.sum(), w / losses / (w / losses).sum(), rtol=1e-9, atol=1e-12)


CAGRAD = [("none", 1.0, (2, 5)), ("none", 1.0, (5, 8)), ("1+c^2", 1.16, (3, 7)), ("1+c", 1.4, (3, 7))]


@pytest.mark.parametrize(("rescale", "divisor", "shape"), CAGRAD, ids=str)
@every_family
def test_cagrad_and_its_rescaling(rescale, divisor, shape, family):
    """LibMTL and the official NYUv2 code divide by 1 + c^2, the official toy by 1 + c. SLSQP stops at 1e-12 of f."""
    G = stack(family, *shape)
    A, K = G @ G.T / size(G) ** 2, len(G)
    radius = 0.4 * np.sqrt(A.mean())

    def dual(w):
        return (A @ w).mean() + radius * np.sqrt(w @ A @ w)

    bounds, sums = [(0, 1)] * K, {"type": "eq", "fun": lambda w: w.sum() - 1}
    w = optimize.minimize(dual, np.full(K, 1 / K), bounds=bounds, constraints=sums, options={"ftol": 1e-12}).x
    d = G.mean(axis=0) + radius / np.sqrt(w @ A @ w) * w @ G
    kwargs = {} if rescale == "none" else {"rescale": rescale}
    agree("cagrad", update("cagrad", G, c=0.4, **kwargs), d / divisor, atol=2e-5 * size(G))


@pytest.mark.parametrize("offset", [1.5, 1.0])
@every_shape
@every_family
def test_imgrad_of_the_official_code_and_of_the_paper(offset, shape, family):
    """The dual of the NYUv2 script (zzpustc/IMGrad) and of (11), which is CAGrad's with two factors, by SLSQP."""
    G = stack(family, *shape)
    A, K, g0 = G @ G.T / size(G) ** 2, len(G), G.mean(axis=0)
    shortest = min_norm(A) @ G
    cos = shortest @ g0 / np.linalg.norm(shortest) / np.linalg.norm(g0)
    radius = 0.8 * np.sqrt(A.mean())

    def dual(w):
        return (offset - cos) * (A @ w).mean() + cos * radius * np.sqrt(w @ A @ w)

    bounds, sums = [(0, 1)] * K, {"type": "eq", "fun": lambda w: w.sum() - 1}
    w = optimize.minimize(dual, np.full(K, 1 / K), bounds=bounds, constraints=sums, options={"ftol": 1e-13}).x
    d = G.mean(axis=0) + radius / np.sqrt(w @ A @ w) * w @ G
    agree("imgrad", update("imgrad", G, rescale="1+c^2", offset=offset), d / 1.64, atol=5e-5 * size(G))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@every_shape
def test_pcgrad_in_the_official_order(reduction, shape):
    """Its shuffle has no effect, so the order is 0 to K-1, as in tum-pbs/ConFIG. rainx0r/mtrl takes the mean."""
    G = stack("normal", *shape)
    rows = G.copy()
    for i, j in itertools.permutations(range(len(G)), 2):
        rows[i] -= min(rows[i] @ G[j], 0) / (G[j] @ G[j]) * G[j]
    ours = update("pcgrad", G, order="fixed", reduction=reduction)
    agree("pcgrad", ours, getattr(rows, reduction)(axis=0), atol=1e-12)


def test_pcgrad_of_two_tasks_and_its_weights():
    """LibMTL lets a task meet itself, in random order; of two tasks neither is turned around, so nothing differs."""
    G = 1e3 * np.asarray([[-4.0, 1, 1], [6, 1, 1]])
    for orders in itertools.product(([0, 1], [1, 0]), repeat=2):
        rows, reported = G.copy(), np.ones(2)
        for i, order in enumerate(orders):
            for j in order:
                product = min(rows[i] @ G[j], 0) / (G[j] @ G[j] + 1e-8)
                rows[i] -= product * G[j]
                reported[j] -= product
        agree("pcgrad", update("pcgrad", G), rows.sum(axis=0), rtol=1e-9)
        agree("pcgrad", weights("pcgrad", G), reported, rtol=1e-9)


def vaccinate(grads, target, beta, on_conflict=False):
    """GradVac on vectors in fixed order, as in LibMTL or, on conflict only, SamsungLabs/MTL."""
    K = grads.shape[1]
    target, sums = np.full((K, K), target), []
    for G in grads:
        rows = G.copy()
        for i, j in itertools.permutations(range(K), 2):
            cosine, goal = rows[i] @ G[j] / np.linalg.norm(rows[i]) / np.linalg.norm(G[j]), target[i, j]
            if cosine < goal:
                sines = np.sqrt(1 - cosine**2), np.sqrt(1 - goal**2)
                pull = (goal * sines[0] - cosine * sines[1]) / (np.linalg.norm(G[j]) * sines[1])
                rows[i] += np.linalg.norm(rows[i]) * pull * G[j]
            if cosine < goal or not on_conflict:
                target[i, j] += beta * (cosine - goal)
        sums.append(rows.sum(axis=0))
    return np.stack(sums)


@pytest.mark.parametrize("update_rule", ["always", "on_conflict"])
@every_shape
def test_gradvac(update_rule, shape):
    grads = sequence(shape) + 0.3
    ours = updates("gradvac", grads, num_tasks=shape[0], beta=0.5, order="fixed", update=update_rule)
    wanted = vaccinate(grads, 0.0, 0.5, on_conflict=update_rule == "on_conflict")
    agree("gradvac", ours, wanted, atol=1e-9 * size(wanted))


@every_shape
def test_gradvac_with_a_fixed_target(shape):
    """The variant of chenllliang/Gradient-Vaccine: cosines of at least 0.5."""
    grads = sequence(shape)
    ours = updates("gradvac", grads, num_tasks=shape[0], target=0.5, order="fixed")
    agree("gradvac", ours, vaccinate(grads, 0.5, 0.0), atol=1e-9)


def test_gradvac_for_every_layer():
    """LibMTL's granularities beside the whole model, layers and matrices, have target cosines of their own."""
    grads = sequence((3, 7)) + 0.3
    parts = {"b": slice(0, 2), "w": slice(2, 7)}
    wanted = {name: vaccinate(grads[:, :, part], 0.0, 0.5) for name, part in parts.items()}
    with jax.enable_x64(True):
        tx = mtl.grouped(mtl.gradvac(num_tasks=3, beta=0.5, order="fixed"), lambda path: jax.tree_util.keystr(path))
        state, step = (
            tx.init({name: jnp.zeros(part.stop - part.start) for name, part in parts.items()}),
            jax.jit(tx.update),
        )
        for t, G in enumerate(grads):
            ours, state = step({name: jnp.asarray(G[:, part]) for name, part in parts.items()}, state)
            for name in parts:
                agree("gradvac", ours[name], wanted[name][t], atol=1e-9)


def impartial(G):
    """The weights of all but the first from differences of gradients and of unit gradients (LibMTL, Nash-MTL code)."""
    D, U = G[0] - G[1:], units(G)[0] - units(G)[1:]
    rest = G[0] @ U.T @ np.linalg.inv(D @ U.T)
    return np.asarray([1 - rest.sum(), *rest])


@every_family
@every_shape
def test_imtl_g_in_closed_form(family, shape):
    """Its direction, up to the sign, is that of ConFIG."""
    G = stack(family, *shape)
    agree("imtl_g", weights("imtl_g", G), impartial(G), rtol=1e-8, atol=1e-9)
    ours, config = update("imtl_g", G), update("conflict_free", G)
    assert abs(ours @ config) == pytest.approx(np.linalg.norm(ours) * np.linalg.norm(config), rel=1e-9)


@every_shape
def test_imtl(shape):
    """LibMTL: the closed form on e^s g, and s descends the sum of e^s l - s whatever the weights, here with Adam."""
    grads, losses = sequence(shape), losses_of(shape[0], steps=6)
    s = torch.zeros(shape[0], dtype=torch.float64, requires_grad=True)
    adam, wanted = torch.optim.Adam([s], lr=0.025), []
    for G, loss in zip(grads, losses, strict=True):
        scales = np.exp(s.detach().numpy())
        wanted.append(impartial(scales[:, None] * G) * scales)
        adam.zero_grad()
        (torch.exp(s) * torch.tensor(loss) - s).sum().backward()
        adam.step()
    ours, _ = weigh("imtl", grads @ grads.transpose(0, 2, 1), losses, num_tasks=shape[0])
    agree("imtl", ours, wanted, rtol=1e-6, atol=1e-9)
    for G, w in zip(grads, ours, strict=True):  # the scales change the length, and the heads
        impartial_sum = impartial(G) @ G
        cosine = w @ G @ impartial_sum / np.linalg.norm(w @ G) / np.linalg.norm(impartial_sum)
        assert abs(cosine) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@every_family
@every_shape
def test_aligned_mtl_of_the_official_code(scale, family, shape):
    """By the singular values of G; the official code sums the aligned gradients; torch's median is the lower one."""
    G = stack(family, *shape)
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    length = {"min": s[-1], "median": np.sort(s)[(len(s) - 1) // 2], "rmse": np.sqrt((s**2).mean())}[scale]
    agree("aligned_mtl", update("aligned_mtl", G, scale=scale), (length * U @ Vt).sum(axis=0), atol=1e-9)


CONFIG_LENGTHS = {
    "projection": lambda G, u: (G @ u).sum(),
    "min": lambda G, u: norms(G).min() * (units(G) @ u).sum(),
    "max": lambda G, u: norms(G).max() * (units(G) @ u).sum(),
    "harmonic": lambda G, u: len(G) / (1 / norms(G)).sum() * (units(G) @ u).sum(),
    "arithmetic": lambda G, u: norms(G).mean() * (units(G) @ u).sum(),
    "geometric": lambda G, u: norms(G).prod() ** (1 / len(G)) * (units(G) @ u).sum(),
}


@pytest.mark.parametrize("length", CONFIG_LENGTHS)
@pytest.mark.parametrize("p", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0)])
def test_config_by_least_squares(length, p):
    """tum-pbs/ConFIG solves for the direction by lstsq."""
    G = stack("normal", 3, 7)
    u = np.linalg.lstsq(units(G), np.asarray(p))[0]
    u /= np.linalg.norm(u)
    ours = update("conflict_free", G, length=length, weights=p)
    agree("conflict_free", ours, CONFIG_LENGTHS[length](G, u) * u, atol=1e-10)


def test_config_of_two_tasks():
    """Its shortcut for two tasks: the sum of each unit gradient's part orthogonal to the other."""
    G = stack("normal", 2, 5)
    (a, b), cosine = units(G), units(G)[0] @ units(G)[1]
    u = sum(v / np.linalg.norm(v) for v in (a - cosine * b, b - cosine * a))
    u /= np.linalg.norm(u)
    agree("conflict_free", update("conflict_free", G), (G @ u).sum() * u, atol=1e-12)


@every_family
@every_shape
def test_nash_mtl_fixed_point(family, shape):
    """The official constraint alpha_i (A alpha)_i >= 1 holds with equality."""
    G = stack(family, *shape)
    alpha = weights("nash_mtl", G)
    np.testing.assert_allclose(alpha * (G @ G.T @ alpha), 1, rtol=1e-9)


def test_nash_mtl_of_libmtl_in_two_lengths():
    """It divides the Gramian by its Frobenius norm, so its weights are ours times the root of that, then clips d."""
    G = stack("normal", 3, 7)
    A = G @ G.T / np.linalg.norm(G @ G.T)
    alpha = weights("nash_mtl", G) * np.sqrt(np.linalg.norm(G @ G.T))
    np.testing.assert_allclose(alpha * (A @ alpha), 1, rtol=1e-9)
    clipped = alpha @ G / max(np.linalg.norm(alpha @ G), 1)
    agree("nash_mtl", update("nash_mtl", G) / np.sqrt(3), clipped, rtol=1e-9)


def test_nash_mtl_of_two_tasks():
    G = stack("normal", 2, 5)
    cosine = units(G)[0] @ units(G)[1]
    agree("nash_mtl", weights("nash_mtl", G), 1 / (norms(G) * np.sqrt(1 + cosine)), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 10.0])
@every_family
@every_shape
def test_fairgrad_residual(alpha, family, shape):
    """OptMN-Lab/fairgrad solves A x = (1 / x)^(1 / alpha) by least squares."""
    G = stack(family, *shape)
    A, w = G @ G.T, weights("fairgrad", G, alpha=alpha)
    start = w * np.random.default_rng(0).uniform(0.8, 1.25, size=len(w))
    solved = optimize.least_squares(
        lambda x: A @ x - x ** (-1 / alpha), start, bounds=(0, np.inf), x_scale=w, ftol=1e-15, xtol=1e-15, gtol=1e-15
    )
    assert solved.cost < 1e-18 * size(G) ** 2
    agree("fairgrad", w, solved.x, rtol=1e-6)


FAIR = {
    0.5: [0.47655795, 0.54619225, 0.36762829],
    1.0: [0.33152238, 0.40846739, 0.21926258],
    2.0: [0.23194486, 0.30724684, 0.12836391],
    10.0: [0.13946314, 0.20467236, 0.05555901],
}


@pytest.mark.parametrize("alpha", FAIR)
def test_fairgrad_published_weights(alpha):
    np.testing.assert_allclose(weights("fairgrad", GOLDEN, alpha=alpha), FAIR[alpha], atol=6e-9)


@every_family
@every_shape
def test_dual_cone_projections_by_nnls(family, shape):
    """Moreau's theorem: the projection adds the projection of the negative onto the cone of all gradients."""
    G = stack(family, *shape)

    def project(g):
        return g + optimize.nnls(G.T, -g)[0] @ G

    agree("dualproj", update("dualproj", G), project(G.mean(axis=0)), atol=1e-9)
    agree("upgrad", update("upgrad", G), np.mean([project(g) for g in G], axis=0), atol=1e-9)


def test_upgrad_with_regularization():
    """LibMTL, as TorchJD: 1e-4 on the diagonal of the Gramian divided by its trace."""
    G = stack("opposite", 3, 7)
    root = np.linalg.cholesky(G @ G.T / np.trace(G @ G.T) + 1e-4 * np.eye(3)).T
    wanted = sum(u + optimize.nnls(root, -root @ u)[0] for u in np.eye(3) / 3)
    agree("upgrad", weights("upgrad", G, regularization=1e-4), wanted, rtol=1e-9, atol=1e-12)


@every_family
@every_shape
def test_capped_mgda(family, shape):
    G, K = stack(family, *shape), shape[0]
    A = G @ G.T / size(G) ** 2
    sums = {"type": "eq", "fun": lambda w: w.sum() - 1}
    cap = 1.3 / K
    peer = optimize.minimize(
        lambda w: w @ A @ w,
        np.full(K, 1 / K),
        jac=lambda w: 2 * A @ w,
        bounds=[(0, cap)] * K,
        constraints=sums,
        options={"ftol": 1e-14},
    ).x
    np.testing.assert_allclose(weights("capped_mgda", G, cap=cap), peer, atol=1e-5)


CONIC = {
    0.5: [0.655152, 1.474091, 1.146515],
    0.9: [0.658167, 1.411249, 1.221417],
    0.99: [0.638856, 0.867830, 1.659940],
}


@pytest.mark.parametrize("c", CONIC)
def test_conicgrad_values(c):
    np.testing.assert_allclose(update("conicgrad", GOLDEN, c=c), CONIC[c], atol=6e-7)


@pytest.mark.parametrize("c", [0.0, 0.7, 0.95])
def test_conicgrad_against_its_primal(c):
    """The best worst-case direction of norm one within the cone, by SLSQP over d and its worst product."""
    G = stack("non_stationary", 3, 4)
    g0 = G.mean(axis=0)
    limits = [
        {"type": "ineq", "fun": lambda x: G @ x[1:] - x[0]},
        {"type": "ineq", "fun": lambda x: 1 - x[1:] @ x[1:]},
        {"type": "ineq", "fun": lambda x: g0 @ x[1:] - c * np.linalg.norm(g0) * np.sqrt(x[1:] @ x[1:] + 1e-30)},
    ]
    start = np.concatenate([[(G @ g0).min()], g0]) / np.linalg.norm(g0)
    best = optimize.minimize(lambda x: -x[0], start, constraints=limits, options={"ftol": 1e-14, "maxiter": 500}).x
    np.testing.assert_allclose(update("conicgrad", G, c=c), np.linalg.norm(g0) * best[1:], atol=1e-5)


@every_family
@every_shape
def test_geometric_median(family, shape):
    """Weiszfeld's iteration; if it ends at a gradient, its pull must be at least that of the others."""
    G = stack(family, *shape)
    x = G.mean(axis=0)
    for _ in range(20000):
        pull = 1 / np.maximum(norms(G - x), 1e-12)
        x = pull @ G / pull.sum()
    ours = update("geometric_median", G)
    np.testing.assert_allclose(norms(G - ours).sum(), norms(G - x).sum(), rtol=1e-9)
    assert norms(G - ours).sum() <= norms(G - x).sum() * (1 + 1e-12)


@pytest.mark.parametrize(("rate", "regularization"), [(0.1, 0.1), (1e-3, 0.1)])
@every_shape
def test_modo(rate, regularization, shape):
    """Official rate and LibMTL's; the weights move before the step."""
    first, second = sequence(shape, seed=1), sequence(shape, seed=2)
    w, wanted = np.full(shape[0], 1 / shape[0]), []
    for G1, G2 in zip(first, second, strict=True):
        w = simplex(w - rate * (G1 @ (G2.T @ w) + regularization * w))
        wanted.append(w)
    cross = first @ second.transpose(0, 2, 1)
    kwargs = {"num_tasks": shape[0], "learning_rate": rate, "regularization": regularization}
    agree("modo", weigh("modo", cross, cross_gramian=cross, **kwargs)[0], wanted, atol=1e-12)


@pytest.mark.parametrize("rate", [5.0, 10.0])
@every_shape
def test_sdmgrad(rate, shape):
    """LibMTL's learning rate of 5 and the official 10, without the 1e-8 that LibMTL adds to the scale."""
    first, second = sequence(shape, seed=1), sequence(shape, seed=2)
    cross = first @ (first + second).transpose(0, 2, 1)
    w, wanted = np.full(shape[0], 1 / shape[0]), []
    for A in cross:
        A = A / np.sqrt(np.maximum(np.diagonal(A), 0)).mean() ** 2
        velocity = 0
        for _ in range(20):
            velocity = 0.5 * velocity + A @ w + 0.3 * A.mean(axis=1)
            w = simplex(w - rate * velocity)
        wanted.append((w + 0.3 / shape[0]) / 1.3)
    ours, _ = weigh("sdmgrad", cross, cross_gramian=cross, num_tasks=shape[0], learning_rate=rate)
    agree("sdmgrad", ours, wanted, atol=1e-9)


@pytest.mark.parametrize(("beta", "sigma"), [(0.9, 0.0), (0.9, 0.5), (0.0, 0.0)])
@every_shape
def test_db_mtl(beta, sigma, shape):
    """LibMTL, which is the authors' code, without its 1e-8s."""
    grads, losses = sequence(shape), losses_of(shape[0], steps=6)
    momentum, wanted = np.zeros(shape), []
    for k, (G, loss) in enumerate(zip(grads, losses, strict=True), start=1):
        log_grads = G / loss[:, None]
        momentum = log_grads + beta / k**sigma * (momentum - log_grads)
        wanted.append((norms(momentum).max() * units(momentum)).sum(axis=0))
    ours = updates("db_mtl", grads, losses, num_tasks=shape[0], beta=beta, sigma=sigma)
    agree("db_mtl", ours, wanted, atol=1e-10)


@every_shape
def test_moco(shape):
    """LibMTL without the decay of its rates: gradients of length l_i, and a softmax for a projection."""
    grads, losses = sequence(shape), losses_of(shape[0], steps=6)
    y, w, wanted = np.zeros(shape), np.full(shape[0], 1 / shape[0]), []
    for G, loss in zip(grads, losses, strict=True):
        y = y - 0.5 * (y - units(G) * loss[:, None])
        w = w - 0.1 * (y @ y.T + 0.2 * np.eye(len(w))) @ w
        w = np.exp(w) / np.exp(w).sum()
        wanted.append(w @ y)
    kwargs = {"beta": 0.5, "gamma": 0.1, "rho": 0.2, "projection": "softmax", "normalize": "unit_loss"}
    agree("moco", updates("moco", grads, losses, num_tasks=shape[0], **kwargs), wanted, atol=1e-10)


def test_moco_with_decaying_rates():
    """LibMTL's defaults: both rates over the root of the step."""
    grads, losses = sequence((3, 7)), losses_of(3, steps=6)
    y, w = np.zeros((3, 7)), np.full(3, 1 / 3)
    with jax.enable_x64(True):
        static = {"num_tasks": 3, "rho": 0.0, "projection": "softmax", "normalize": "unit_loss"}
        tx = optax.inject_hyperparams(mtl.moco, static_args=tuple(static))(
            beta=lambda t: 0.5 / jnp.sqrt(t + 1.0), gamma=lambda t: 0.1 / jnp.sqrt(t + 1.0), **static
        )
        state, step = tx.init(jnp.zeros(7)), jax.jit(tx.update)
        for k, (G, loss) in enumerate(zip(grads, losses, strict=True), 1):
            y = y - 0.5 / np.sqrt(k) * (y - units(G) * loss[:, None])
            w = w - 0.1 / np.sqrt(k) * y @ y.T @ w
            w = np.exp(w) / np.exp(w).sum()
            ours, state = step(jnp.asarray(G), state, losses=jnp.asarray(loss))
            agree("moco", ours, w @ y, atol=1e-6)


@every_shape
def test_excess_mtl(shape):
    """LibMTL, as the official code: the first step only sets the excess. Its 1e-7 is negligible here."""
    grads = 1e3 * sequence(shape)
    squares, first, w, wanted = 0, None, np.ones(shape[0]), []
    for G in grads:
        squares = squares + G**2
        excess = (G**2 / np.sqrt(squares + 1e-7)).sum(axis=1)
        if first is None:
            first = excess
        else:
            w = w * np.exp(0.01 * excess / first)
            w = len(w) * w / w.sum()
        wanted.append(w @ G)
    agree("excess_mtl", updates("excess_mtl", grads, num_tasks=shape[0]), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_graddrop_at_a_representation(monkeypatch, leak):
    """LibMTL multiplies gradients at an activation by its sign; for a batch of one, we do so before and after."""
    rng = np.random.default_rng(0)
    G, h, U = rng.normal(size=(3, 50)), rng.normal(size=50), rng.uniform(size=50)
    signed = G * np.sign(h)
    P = 0.5 * (1 + signed.sum(axis=0) / (np.abs(signed).sum(axis=0) + 1e-7))
    kept = np.where(signed > 0, P > U, P < U)
    wanted = (G * (leak + (1 - leak) * kept)).sum(axis=0)
    monkeypatch.setattr(GRADDROP, "uniform", lambda key, shape, dtype: jnp.asarray(U, dtype))
    with jax.enable_x64(True):
        tx = mtl.graddrop(leak)
        ours, _ = tx.update(jnp.asarray(signed), tx.init(jnp.zeros(50)))
    agree("graddrop", np.asarray(ours) * np.sign(h), wanted, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.12, 1.5])
def test_gradnorm_by_autograd(alpha):
    """Algorithm 1 with torch's autograd and Adam on the raw weights; LibMTL has a softmax in between."""
    grads, losses = sequence((3, 7), steps=12), losses_of(3, steps=12)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam, wanted = torch.optim.Adam([w], lr=0.025), []
    for G, loss in zip(grads, losses, strict=True):
        wanted.append(w.detach().numpy().copy())
        weighted = w * torch.tensor(norms(G))
        rate = torch.tensor(loss / losses[0])
        target = (weighted.mean() * (rate / rate.mean()) ** alpha).detach()
        adam.zero_grad()
        (weighted - target).abs().sum().backward()
        adam.step()
        w.data *= 3 / w.data.sum()
    gramians = grads @ grads.transpose(0, 2, 1)
    ours, _ = weigh("gradnorm", gramians, losses, num_tasks=3, alpha=alpha)
    agree("gradnorm", ours, wanted, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.12, 1.5])
def test_gradnorm_of_softmax_weights(alpha):
    """LibMTL learns p in the weights K softmax(p): at equal weights, its derivatives are ours less their mean.

    It does not learn in the first epoch, whose mean losses are its first ones. At rate zero weights stay equal, and
    Adam's average of the derivatives shows them.
    """
    grads, losses = sequence((3, 7)), losses_of(3, steps=6)
    p, average = torch.ones(3, dtype=torch.float64, requires_grad=True), np.zeros(3)
    for G, loss in zip(grads, losses, strict=True):
        weighted = 3 * torch.softmax(p, dim=0) * torch.tensor(norms(G))
        rate = torch.tensor(loss / losses[0])
        target = (weighted.mean() * (rate / rate.mean()) ** alpha).detach()
        (slope,) = torch.autograd.grad((weighted - target).abs().sum(), p)
        average = 0.9 * average + 0.1 * slope.numpy()
    gramians = grads @ grads.transpose(0, 2, 1)
    _, state = weigh("gradnorm", gramians, losses, num_tasks=3, alpha=alpha, learning_rate=0.0)
    ours = np.asarray(state.method.weights.optimizer[0].mu)
    np.testing.assert_allclose(ours - ours.mean(), average, atol=1e-12)


@pytest.mark.parametrize("init", [0.0, -0.5])
def test_uw_by_autograd(init):
    """The weighted sum of losses and half the log-variances (from 0, in LibMTL from -0.5), with torch's Adam."""
    grads, losses = sequence((3, 7), steps=12), losses_of(3, steps=12)
    s = torch.full((3,), init, dtype=torch.float64, requires_grad=True)
    adam, wanted = torch.optim.Adam([s], lr=0.025), []
    for loss in losses:
        wanted.append((torch.exp(-s) / 2).detach().numpy())
        adam.zero_grad()
        (torch.exp(-s) * torch.tensor(loss) / 2 + s / 2).sum().backward()
        adam.step()
    ours, _ = weigh("uw", grads @ grads.transpose(0, 2, 1), losses, num_tasks=3, init=init)
    agree("uw", ours, wanted, atol=1e-7)


def derivatives(objective, losses):
    """The derivatives of a torch function of K losses."""
    values = torch.tensor(losses, requires_grad=True)
    return torch.autograd.grad(objective(values), values)[0].numpy()


def test_equal_weights_and_the_geometric_mean():
    """LibMTL's EW adds the losses; its GLS takes the root of their product."""
    G, losses = stack("normal", 3, 7), losses_of(3)
    agree("sum", update("sum", G), G.sum(axis=0), rtol=1e-12)
    wanted = derivatives(lambda values: torch.pow(values.prod(), 1 / 3), losses)
    agree("gls", weights("gls", G, losses), wanted, rtol=1e-12)


def test_dwa_by_epochs():
    """LibMTL: a softmax of the ratios of mean losses over the last two epochs, here of three steps; at first equal."""
    losses = losses_of(3, steps=12)
    means, wanted = losses.reshape(4, 3, 3).mean(axis=1), np.ones((4, 3))
    for epoch in (2, 3):
        e = np.exp(means[epoch - 1] / means[epoch - 2] / 2)
        wanted[epoch] = 3 * e / e.sum()
    ours, _ = weigh("dwa", [np.eye(3)] * 12, losses, num_tasks=3, window=3)
    agree("dwa", ours, np.repeat(wanted, 3, axis=0), rtol=1e-12)


@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_the_recipe_of_stch(mu):
    """LibMTL, with epochs of two steps: log-losses in two, and in one that measures the nadir; then the maximum."""
    losses, wanted = losses_of(3, steps=12), []
    nadir = torch.tensor(losses[4:6].mean(axis=0))

    def second(values):
        logs = torch.log(values / nadir + 1e-20)
        return 3 * mu * torch.log(torch.exp((logs - logs.max().detach()) / mu).sum())

    for t, loss in enumerate(losses):
        wanted.append(derivatives(second if t >= 6 else lambda values: torch.log(values + 1e-20).sum(), loss))
    ours, _ = weigh("stch_mtl", [np.eye(3)] * 12, losses, num_tasks=3, warmup_steps=4, nadir_steps=2, mu=mu)
    agree("stch_mtl", ours, wanted, rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_famo_on_the_same_batch(gamma):
    """LibMTL: losses before and after each step, on its batch. Its 1e-8 is negligible for these losses."""
    before, after = losses_of(3, steps=8), losses_of(3, steps=8, seed=1)
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam, wanted = torch.optim.Adam([xi], lr=0.1, weight_decay=gamma), []
    for old, new in zip(before, after, strict=True):
        z = torch.softmax(xi, dim=-1)
        total = (z / torch.tensor(old)).sum().detach()
        wanted.append(derivatives(lambda values, z=z, total=total: (values.log() * z.detach() / total).sum(), old))
        (xi.grad,) = torch.autograd.grad(z, xi, torch.tensor(np.log(old + 1e-8) - np.log(new + 1e-8)))
        adam.step()
    told = np.concatenate([np.ones((1, 3)), after[:-1]])
    own = {"num_tasks": 3, "learning_rate": 0.1, "gamma": gamma}
    ours, state = weigh("famo", [np.eye(3)] * 8, before, new_losses=told, **own)
    agree("famo", ours, wanted, rtol=1e-6)
    if not gamma:  # a softmax does not change with the sum of its arguments
        assert abs(np.asarray(state.method.logits.optimizer[0].mu).sum()) < 1e-15


SLOPES = {2: [-1, 1], 3: [-3 / 2, 2, -1 / 2], 4: [-11 / 6, 3, -3 / 2, 1 / 3], 5: [-25 / 12, 4, -3, 4 / 3, -1 / 4]}
"""Forward differences in dr-aheydari/SoftAdapt, by number of losses."""


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
@pytest.mark.parametrize("window", [2, 3, 4, 5])
def test_softadapt_of_the_official_package(window, variant):
    """It divides by the signed sum of the slopes: our beta times the sum of their sizes over that sum."""
    losses, beta = losses_of(3, steps=window), 0.1
    s = SLOPES[window] @ losses
    own = beta * np.abs(s).sum() / s.sum() if variant == "normalized" else beta
    e = np.exp(beta * (s / s.sum() if variant == "normalized" else s))
    e = e * losses.mean(axis=0) if variant == "loss_weighted" else e
    ours, _ = weigh("softadapt", [np.eye(3)] * window, losses, num_tasks=3, beta=own, variant=variant, window=window)
    agree("softadapt", ours[-1], e / e.sum(), rtol=1e-9)


def test_softadapt_of_the_first_package_and_of_relative_balancing():
    """The first version divided by the sum of sizes; rbischof/relative_balancing takes K softmax of differences."""
    losses = losses_of(3, steps=2)
    s = losses[1] - losses[0]
    for variant, exponents in (("normalized", 0.1 * s / np.abs(s).sum()), ("original", 0.1 * s)):
        ours, _ = weigh("softadapt", [np.eye(3)] * 2, losses, num_tasks=3, variant=variant)
        agree("softadapt", ours[1], np.exp(exponents) / np.exp(exponents).sum(), rtol=1e-9)


def relative(losses, before, temperature):
    e = np.exp(losses / (before * temperature + 1e-12))
    return len(losses) * e / e.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_relobralo_of_the_official_code(temperature):
    """Without look-back: alpha is 1, 0, and then its value, and the first weights and losses are one."""
    all_losses, lam, last, wanted = losses_of(3, steps=8), np.ones(3), np.ones(3), []
    for losses, alpha in zip(all_losses, [1, 0, *[0.9] * 6], strict=True):
        lam = alpha * lam + (1 - alpha) * relative(losses, last, temperature)
        last = losses
        wanted.append(lam)
    own = {"num_tasks": 3, "alpha": 0.9, "rho": 1.0, "temperature": temperature}
    ours, _ = weigh("relobralo", [np.eye(3)] * 8, all_losses, **own)
    agree("relobralo", ours, wanted, rtol=1e-9)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_relobralo_of_physicsnemo_and_paddlescience(rho):
    """They keep the memory in the second step. Look-backs forget that at once; otherwise it fades with alpha."""
    all_losses, alpha = losses_of(3, steps=8), 0.9
    lam, theirs = np.ones(3), [np.ones(3)]
    for last, losses in itertools.pairwise(all_losses):
        past = rho * lam + (1 - rho) * relative(losses, all_losses[0], 1)
        lam = alpha * past + (1 - alpha) * relative(losses, last, 1)
        theirs.append(lam)
    ours, _ = weigh("relobralo", [np.eye(3)] * 8, all_losses, num_tasks=3, alpha=alpha, rho=rho)
    second = relative(all_losses[1], all_losses[0], 1)
    np.testing.assert_allclose(ours[1], second, rtol=1e-9)
    forgetful, _ = weigh("relobralo", [np.eye(3)] * 8, all_losses, num_tasks=3, alpha=0.0)
    ratios = [relative(*pair[::-1], 1) for pair in itertools.pairwise(all_losses)]  # PhysicsNeMo's SoftAdapt
    np.testing.assert_allclose(forgetful, [np.ones(3), *ratios], rtol=1e-9)
    for t in range(1, 8):
        np.testing.assert_allclose(theirs[t] - ours[t], rho * alpha**t * (1 - second), atol=1e-9)


def test_ntk_of_the_official_code_and_of_jaxpi():
    t = losses_of(3)
    for kwargs, wanted in (({}, t.sum() / t), ({"scale": "mean"}, t.mean() / t)):
        agree("ntk", weights("ntk", np.eye(3), traces=tuple(t), **kwargs), wanted, rtol=1e-12)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_pcgrad_of_metaworld_algorithms(order):
    """rainx0r/metaworld-algorithms shuffles the tasks, lets each meet all, itself included, and takes the mean.

    Here no task meets itself with a conflict. Its 1e-8 is negligible.
    """
    rows = 1e3 * np.asarray([[1.0, 0.3, 0], [-0.7, 1, 0], [-0.4, -0.8, 0.9]])[list(order)]
    projected = rows.copy()
    for i, j in itertools.product(range(3), range(3)):
        projected[i] -= min(projected[i] @ rows[j] / (rows[j] @ rows[j] + 1e-8), 0) * rows[j]
    with jax.enable_x64(True):
        tx, params = mtl.pcgrad(order="fixed", reduction="mean"), {"actor": jnp.zeros((2, 1)), "scale": jnp.zeros(())}
        grads = {"actor": jnp.asarray(rows[:, :2, None]), "scale": jnp.asarray(rows[:, 2])}
        ours, _ = tx.update(grads, tx.init(params), params)
    agree("pcgrad", np.append(ours["actor"], ours["scale"]), projected.mean(axis=0), rtol=1e-9)


def test_one_order_for_all_tasks_has_the_same_mean():
    """metaworld-algorithms shuffles once, so it has six of our eight equally likely sums, and their expectation."""
    G = np.asarray([[1.0, 0.3, 0], [-0.7, 1, 0], [-0.4, -0.8, 0.9]])

    def project(order):
        rows = G.copy()
        for i, j in itertools.product(range(3), order):
            rows[i] -= min(rows[i] @ G[j], 0) / (G[j] @ G[j]) * G[j] if i != j else 0
        return rows.sum(axis=0)

    theirs = {tuple(project(order).round(9)) for order in itertools.permutations(range(3))}
    ours = {tuple((w @ G).round(9)) for w in weigh("pcgrad", [G @ G.T] * 200)[0]}
    assert (len(theirs), len(ours)) == (6, 8)
    assert theirs < ours
    np.testing.assert_allclose(np.mean(list(theirs), axis=0), np.mean(list(ours), axis=0), atol=1e-8)


@pytest.mark.parametrize("constant", [True, False])
def test_gradnorm_of_metaworld_algorithms(constant):
    """It takes its step with the weights after their update, and Adam's epsilon is 1e-5, negligible here.

    It also differentiates the targets, which Algorithm 1 of the paper holds constant.
    """
    grads, losses = 1e3 * sequence((3, 7), steps=12), losses_of(3, steps=12)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam, theirs = torch.optim.Adam([w], lr=0.025, eps=1e-5), []
    for G, loss in zip(grads, losses, strict=True):
        weighted = w * torch.tensor(norms(G))
        rate = torch.tensor(loss / (losses[0] + 1e-12))
        target = weighted.mean() * (rate / (rate.mean() + 1e-12)) ** 1.5
        adam.zero_grad()
        (weighted - (target.detach() if constant else target)).abs().sum().backward()
        adam.step()
        w.data *= 3 / w.data.sum()
        theirs.append(w.detach().numpy().copy())
    gramians = grads @ grads.transpose(0, 2, 1)
    ours, _ = weigh("gradnorm", gramians, losses, num_tasks=3, alpha=1.5)
    if constant:
        agree("gradnorm", ours[1:], theirs[:-1], rtol=0, atol=1e-7)
    else:
        assert np.abs(ours[1:] - theirs[:-1]).max() > 0.01


@pytest.mark.parametrize(("num_steps", "rate"), [(1, 0.01), (5, 0.01), (5, 0.4)])
@every_shape
def test_dibs(num_steps, rate, shape):
    """suryakmurthy/dibs-mtl sums rate * distance / norm; the step that leaves the ball is the last."""
    G = stack("normal", *shape)
    u, delta, wanted = units(G), np.zeros(shape[1]), np.zeros(shape[0])
    for _ in range(num_steps):
        distances = norms(delta + u)
        wanted += rate * distances / norms(G)
        delta = delta - rate * distances @ u
        if np.linalg.norm(delta) > 1:
            break
    agree("dibs", weights("dibs", G, num_steps=num_steps, learning_rate=rate), wanted, rtol=1e-10)


def test_rotograd_scale():
    """The common length depends on the norms relative to the first ones, which are measured again at the burn-in."""
    grads = sequence((3, 7), steps=8) * np.logspace(0, 1, 8)[:, None, None]
    wanted = []
    for t, G in enumerate(grads):
        first = norms(grads[0 if t < 5 else 5])
        a = norms(G) / first / (norms(G) / first).sum()
        wanted.append(a @ norms(G) / norms(G))
    ours, _ = weigh("rotograd_scale", grads @ grads.transpose(0, 2, 1), num_tasks=3, burn_in=5)
    agree("rotograd_scale", ours, wanted, rtol=1e-10)


INVERSE_NORMS = {
    "slw": ({}, lambda G: len(G) / (1 / norms(G)).sum()),
    "avgnorm": ({}, lambda G: np.linalg.norm(G.sum(axis=0))),
    "avgnorm of the mean norm": ({"scale": "mean_norm"}, lambda G: norms(G).mean()),
    "avgnorm of one": ({"scale": "one"}, lambda G: 1.0),
    "ngdiff": ({"signs": (1.0, -1.0, 1.0)}, lambda G: np.asarray([1, -1, 1])),
}


@pytest.mark.parametrize("case", INVERSE_NORMS)
def test_inverse_norms(case):
    name, G, (kwargs, length) = case.split()[0], stack("normal", 3, 7), INVERSE_NORMS[case]
    agree(name, weights(name, G, **kwargs), length(G) / norms(G), rtol=1e-12)


BISECTING = {
    "nash_mtl": {},
    "fairgrad": {"alpha": 1.0},
    "imtl_g": {},
    "conflict_free": {},
    "avgnorm": {},
    "slw": {},
    "dibs": {},
    "rotograd_scale": {"num_tasks": 2},
    "ngdiff": {"signs": (1.0, 1.0)},
}


@pytest.mark.parametrize("name", BISECTING)
def test_two_tasks_share_the_bisector(name):
    G = stack("normal", 2, 5)
    ours, bisector = update(name, G, **BISECTING[name]), units(G).sum(axis=0)
    assert ours @ bisector == pytest.approx(np.linalg.norm(ours) * np.linalg.norm(bisector), rel=1e-12)
