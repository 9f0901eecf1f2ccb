"""Parity with LibMTL and the official repositories: their formulas in numpy, from gradients, in float64.

The sources are LibMTL 4336804 and the repositories named in the tests. Most of these formulas use vectors; this library
uses Gramians.
"""

import itertools

import numpy as np
import pytest
from families import stack
from peerlib import size, update, updates, weigh, weights
from scipy import optimize

torchjd = pytest.importorskip("torchjd", reason="the formulas go with the extra 'peers'")
torch = pytest.importorskip("torch", reason="the formulas go with the extra 'peers'")

SHAPES = [(2, 5), (3, 7), (5, 8)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_family = pytest.mark.parametrize("family", ["normal", "correlated", "non_stationary"])

GOLDEN = np.asarray([[3.0, 1, 0], [-1, 2, 1], [0.5, -1, 4]])


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
    np.testing.assert_allclose(update("mgda", G, losses, normalization=normalization), w @ G, atol=1e-9 * size(G))
    libmtl = update("mgda", G, losses, normalization=normalization, apply_to="normalized")
    np.testing.assert_allclose(libmtl, w @ scaled, atol=1e-9 * size(scaled))


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
    np.testing.assert_allclose(update("cagrad", G, c=0.4, **kwargs), d / divisor, atol=2e-5 * size(G))


@every_shape
@every_family
def test_imgrad_of_the_official_code(shape, family):
    """The dual of the NYUv2 script (zzpustc/IMGrad), which is CAGrad's with two factors, by SLSQP."""
    G = stack(family, *shape)
    A, K, g0 = G @ G.T / size(G) ** 2, len(G), G.mean(axis=0)
    shortest = min_norm(A) @ G
    cos = shortest @ g0 / np.linalg.norm(shortest) / np.linalg.norm(g0)
    radius = 0.8 * np.sqrt(A.mean())

    def dual(w):
        return (1.5 - cos) * (A @ w).mean() + cos * radius * np.sqrt(w @ A @ w)

    bounds, sums = [(0, 1)] * K, {"type": "eq", "fun": lambda w: w.sum() - 1}
    w = optimize.minimize(dual, np.full(K, 1 / K), bounds=bounds, constraints=sums, options={"ftol": 1e-13}).x
    d = G.mean(axis=0) + radius / np.sqrt(w @ A @ w) * w @ G
    np.testing.assert_allclose(update("imgrad", G, rescale="1+c^2"), d / 1.64, atol=5e-5 * size(G))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@every_shape
def test_pcgrad_in_the_official_order(reduction, shape):
    """Its shuffle has no effect, so the order is 0 to K-1; tum-pbs/ConFIG does the same. metaworld takes the mean."""
    G = stack("normal", *shape)
    rows = G.copy()
    for i, j in itertools.permutations(range(len(G)), 2):
        rows[i] -= min(rows[i] @ G[j], 0) / (G[j] @ G[j]) * G[j]
    ours = update("pcgrad", G, order="fixed", reduction=reduction)
    np.testing.assert_allclose(ours, getattr(rows, reduction)(axis=0), atol=1e-12)


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
    np.testing.assert_allclose(ours, wanted, atol=1e-9 * size(wanted))


@every_shape
def test_gradvac_with_a_fixed_target(shape):
    """The variant of chenllliang/Gradient-Vaccine: cosines of at least 0.5."""
    grads = sequence(shape)
    ours = updates("gradvac", grads, num_tasks=shape[0], target=0.5, order="fixed")
    np.testing.assert_allclose(ours, vaccinate(grads, 0.5, 0.0), atol=1e-9)


@every_family
@every_shape
def test_imtl_g_in_closed_form(family, shape):
    """The weights of all but the first from differences of gradients and of unit gradients (LibMTL, Nash-MTL code)."""
    G = stack(family, *shape)
    D, U = G[0] - G[1:], units(G)[0] - units(G)[1:]
    rest = G[0] @ U.T @ np.linalg.inv(D @ U.T)
    np.testing.assert_allclose(weights("imtl_g", G), [1 - rest.sum(), *rest], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@every_family
@every_shape
def test_aligned_mtl_of_the_official_code(scale, family, shape):
    """By the singular values of G; the official code sums the aligned gradients; torch's median is the lower one."""
    G = stack(family, *shape)
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    length = {"min": s[-1], "median": np.sort(s)[(len(s) - 1) // 2], "rmse": np.sqrt((s**2).mean())}[scale]
    np.testing.assert_allclose(update("aligned_mtl", G, scale=scale), (length * U @ Vt).sum(axis=0), atol=1e-9)


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
    np.testing.assert_allclose(ours, CONFIG_LENGTHS[length](G, u) * u, atol=1e-10)


def test_config_of_two_tasks():
    """Its shortcut for two tasks: the sum of each unit gradient's part orthogonal to the other."""
    G = stack("normal", 2, 5)
    (a, b), cosine = units(G), units(G)[0] @ units(G)[1]
    u = sum(v / np.linalg.norm(v) for v in (a - cosine * b, b - cosine * a))
    u /= np.linalg.norm(u)
    np.testing.assert_allclose(update("conflict_free", G), (G @ u).sum() * u, atol=1e-12)


@every_family
@every_shape
def test_nash_mtl_fixed_point(family, shape):
    """The official constraint alpha_i (A alpha)_i >= 1 holds with equality."""
    G = stack(family, *shape)
    alpha = weights("nash_mtl", G)
    np.testing.assert_allclose(alpha * (G @ G.T @ alpha), 1, rtol=1e-9)


def test_nash_mtl_of_two_tasks():
    G = stack("normal", 2, 5)
    cosine = units(G)[0] @ units(G)[1]
    np.testing.assert_allclose(weights("nash_mtl", G), 1 / (norms(G) * np.sqrt(1 + cosine)), rtol=1e-12)


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
    np.testing.assert_allclose(w, solved.x, rtol=1e-6)


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

    np.testing.assert_allclose(update("dualproj", G), project(G.mean(axis=0)), atol=1e-9)
    np.testing.assert_allclose(update("upgrad", G), np.mean([project(g) for g in G], axis=0), atol=1e-9)


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
    np.testing.assert_allclose(weigh("modo", cross, cross_gramian=cross, **kwargs)[0], wanted, atol=1e-12)


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
    np.testing.assert_allclose(ours, wanted, atol=1e-9)


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
    np.testing.assert_allclose(ours, wanted, atol=1e-10)


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
    np.testing.assert_allclose(updates("moco", grads, losses, num_tasks=shape[0], **kwargs), wanted, atol=1e-10)


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
    np.testing.assert_allclose(ours, wanted, atol=1e-7)


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
    np.testing.assert_allclose(ours, wanted, atol=1e-7)


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
    np.testing.assert_allclose(ours[-1], e / e.sum(), rtol=1e-9)


def test_softadapt_of_the_first_package_and_of_relative_balancing():
    """The first version divided by the sum of sizes; rbischof/relative_balancing takes K softmax of differences."""
    losses = losses_of(3, steps=2)
    s = losses[1] - losses[0]
    for variant, exponents in (("normalized", 0.1 * s / np.abs(s).sum()), ("original", 0.1 * s)):
        ours, _ = weigh("softadapt", [np.eye(3)] * 2, losses, num_tasks=3, variant=variant)
        np.testing.assert_allclose(ours[1], np.exp(exponents) / np.exp(exponents).sum(), rtol=1e-9)


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
    np.testing.assert_allclose(ours, wanted, rtol=1e-9)


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
        np.testing.assert_allclose(weights("ntk", np.eye(3), traces=tuple(t), **kwargs), wanted, rtol=1e-12)


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
    np.testing.assert_allclose(weights("dibs", G, num_steps=num_steps, learning_rate=rate), wanted, rtol=1e-10)


def test_rotograd_scale():
    """The common length depends on the norms relative to the first ones, which are measured again at the burn-in."""
    grads = sequence((3, 7), steps=8) * np.logspace(0, 1, 8)[:, None, None]
    wanted = []
    for t, G in enumerate(grads):
        first = norms(grads[0 if t < 5 else 5])
        a = norms(G) / first / (norms(G) / first).sum()
        wanted.append(a @ norms(G) / norms(G))
    ours, _ = weigh("rotograd_scale", grads @ grads.transpose(0, 2, 1), num_tasks=3, burn_in=5)
    np.testing.assert_allclose(ours, wanted, rtol=1e-10)


INVERSE_NORMS = {
    "slw": ({}, lambda G: len(G) / (1 / norms(G)).sum()),
    "avgnorm": ({}, lambda G: np.linalg.norm(G.sum(axis=0))),
    "avgnorm of the mean norm": ({"scale": "mean_norm"}, lambda G: norms(G).mean()),
    "avgnorm of one": ({"scale": "one"}, lambda G: 1.0),
    "ngdiff": ({"signs": (1.0, -1.0, 1.0)}, lambda G: np.asarray([1, -1, 1])),
}


@pytest.mark.parametrize("case", INVERSE_NORMS)
def test_inverse_norms(case):
    G, (kwargs, length) = stack("normal", 3, 7), INVERSE_NORMS[case]
    np.testing.assert_allclose(weights(case.split()[0], G, **kwargs), length(G) / norms(G), rtol=1e-12)


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
