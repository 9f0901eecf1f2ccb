"""Methods that look at the Gramian."""

import itertools

import numpy as np
import scipy.optimize

from reference.common import alpha_fair, divide, min_norm, nnls, norms, stateful, stateless, unit, weighted


def cutoff(K):
    """Smallest singular value of K rows that counts, relative to the largest: Kε on their Gramian's eigenvalues."""
    return np.sqrt(K * np.finfo(float).eps)


@weighted
def mgda(G, L, normalization="none", apply_to="raw"):
    """Désidéri 2012: min ‖Gᵀw‖ over the simplex; Sener & Koltun 2018 divide the rows first (by n, L or L·n)."""
    by = {"none": np.ones(len(G)), "l2": norms(G), "loss": L, "loss+": L * norms(G)}[normalization]
    w = min_norm(divide(G, by))
    return w if apply_to == "raw" else divide(w[:, None], by)[:, 0]


@weighted
def capped_mgda(G, L, cap):
    """Hu, Ho & Yu 2026: min ‖Gᵀw‖ over the simplex with w_i <= c, by all splits into w_i = 0, w_i = c and free w_i.

    An extreme point of the solutions has affinely independent free rows, so least squares find it.
    """
    K, n = len(G), norms(G)
    best = np.full(K, 1 / K)
    if K * cap <= 1 + 1e-12:
        return best
    best_norm = np.inf
    for split in itertools.product((0, cap, None), repeat=K):
        free = sorted((i for i in range(K) if split[i] is None), key=n.__getitem__)
        w = np.array([0 if x is None else x for x in split], float)
        if not free or w.sum() > 1 + 1e-12:
            continue
        w[free[0]] = 1 - w.sum()
        if free[1:]:
            D = (G[free[1:]] - G[free[0]]).T
            size = np.where(norms(D.T) == 0, 1, norms(D.T))
            w[free[1:]] = np.linalg.lstsq(D / size, -w @ G)[0] / size
            w[free[0]] -= w[free[1:]].sum()
        if w.min() >= 0 and w.max() <= cap + 1e-12 and np.linalg.norm(w @ G) < best_norm:
            best, best_norm = w, np.linalg.norm(w @ G)
    return best


def project(G, i, order):
    """Yu et al. 2020, Algorithm 1, lines 4-9: remove from g_i its conflict with each g_j of `order` in turn."""
    d = G[i]
    for j in order:
        if d @ G[j] < 0:
            d = d - d @ G[j] / (G[j] @ G[j]) * G[j]
    return d


@stateless
def pcgrad(G, L, reduction="sum", order="fixed"):
    """Yu et al. 2020, with the other tasks in index order."""
    assert order == "fixed", "a random order is judged by pcgrad_outcomes"
    d = np.array([project(G, i, np.delete(np.arange(len(G)), i)) for i in range(len(G))])
    return getattr(d, reduction)(axis=0)


def pcgrad_outcomes(G, reduction="sum"):
    """The equally likely updates (N, P) of a random order: N = (K-1)!^K combinations, for small K."""
    tasks = range(len(G))
    rows = [[project(G, i, order) for order in itertools.permutations(set(tasks) - {i})] for i in tasks]
    return np.array([getattr(np.array(d), reduction)(axis=0) for d in itertools.product(*rows)])


@stateful
def gradvac(shape, beta=0.01, target=None, update="always", order="fixed"):
    """Wang et al. 2021, Algorithm 1, with the other tasks in index order: g'_i is given the cosine φ̂_ij with g_j."""
    assert order == "fixed"
    goal = np.full((shape[0], shape[0]), 0.0 if target is None else target)

    def step(G, L, p):
        d, n, tasks = G.copy(), norms(G), np.flatnonzero(p)
        for i, j in itertools.permutations(range(len(G)), 2):
            length, g = np.linalg.norm(d[i]), goal[tasks[i], tasks[j]]
            if length <= 1e-12 * n[i] or n[j] == 0:
                continue
            v, u = d[i] / length, G[j] / n[j]
            cos, sin = v @ u, np.linalg.norm(v - v @ u * u)
            if cos < g:
                d[i] = d[i] + length * (g * sin / np.sqrt(1 - g**2) - cos) * u
            if target is None and (update == "always" or cos < g):
                goal[tasks[i], tasks[j]] = (1 - beta) * g + beta * cos
        return d.sum(axis=0)

    return step


def best_in_ball(G, r):
    """The v >= 0 of d = g0 + Gᵀv = argmax_d min_i <g_i, d> over ‖d - g0‖ <= r, by its dual min_w <g_w, g0> + r‖g_w‖.

    If g_w != 0, the dual's optimality conditions are those of the min-norm point of the rows g_i + ηg0 with
    η = ‖g_w‖/r, and ‖g_w(η)‖/η falls with η, so that η is a root; d = g0 + r g_w/‖g_w‖. If 0 is a convex combination of
    the rows, g0 + g_w(η)/η tends to the point nearest g0 without conflict as η -> 0. If this point is within r of g0,
    it is optimal (with value 0, like all points of the ball without conflict), and there is no root.
    """
    g0, size = G.mean(axis=0), norms(G).max()

    def w(log_eta):
        return min_norm(G + np.exp(log_eta) * g0)

    def excess(log_eta):
        return np.linalg.norm(w(log_eta) @ G) / r - np.exp(log_eta)

    if r == 0:
        return np.zeros(len(G))
    if np.linalg.norm(min_norm(G) @ G) <= 1e-13 * size:
        v = nnls(G.T, -g0)
        if np.linalg.norm(v @ G) <= r * (1 + 1e-12):
            return v
    high = np.log(2 * size / r)
    low = high - 1
    while excess(low) < 0:
        low -= 1
    v = w(scipy.optimize.brentq(excess, low, high, xtol=1e-15, rtol=1e-15))
    return r * v / np.linalg.norm(v @ G)


@weighted
def cagrad(G, L, c=0.4, rescale="none"):
    """Liu et al. 2021: max_d min_i <g_i, d> subject to ‖d - g0‖ <= c‖g0‖."""
    v = best_in_ball(G, c * np.linalg.norm(G.mean(axis=0)))
    return (1 / len(G) + v) / {"none": 1, "1+c^2": 1 + c**2, "1+c": 1 + c}[rescale]


@weighted
def imgrad(G, L, c=0.8, rescale="none", offset=1.5):
    """Zhou et al. 2025: d = g0 + r g_w/‖g_w‖ with r = c‖g0‖ and w = argmin (o - φ)<g_w, g0> + φ r‖g_w‖.

    φ is the cosine of g0 with the min-norm point; φ and o - φ are at least 1e-8. Divided by o - φ, the objective is the
    dual of CAGrad with another radius.
    """
    g0 = G.mean(axis=0)
    r, shortest = c * np.linalg.norm(g0), min_norm(G) @ G
    length = np.linalg.norm(shortest) * np.linalg.norm(g0)
    stationary = np.linalg.norm(shortest) <= 1e-13 * norms(G).max()
    cos = 1e-8 if stationary else max(shortest @ g0 / length, 1e-8)
    share = cos / max(offset - cos, 1e-8)
    v = best_in_ball(G, share * r) / share
    return (1 / len(G) + v) / {"none": 1, "1+c^2": 1 + c**2, "1+c": 1 + c}[rescale]


@stateless
def conicgrad(G, L, c=0.5):
    """Hassanpour et al. 2025: ‖g0‖ argmax_d min_i <g_i, d> over ‖d‖ <= 1, <u, d> >= c‖d‖, u = g0/‖g0‖; g0 if d = 0.

    If d != 0, then ‖d‖ = 1 and <u, d> >= c. With a multiplier μ for this, d(μ) = p/‖p‖ maximises min_i <g_i + μu, d>
    over the ball, where p is the min-norm point of the rows g_i + μu. <u, d(μ)> rises with μ: either d(0) is in the
    cone, or μ is where <u, d> = c. By weak duality d = 0 if the value ‖p‖ - μc is not positive for some μ.
    """
    g0, size, s = G.mean(axis=0), norms(G).max(), np.sqrt(1 - c**2)
    if np.linalg.norm(g0) <= 1e-13 * size or np.linalg.norm(min_norm(G) @ G) <= 1e-13 * size:
        return g0
    u = g0 / np.linalg.norm(g0)

    def point(mu):
        rows = G + mu * u
        return min_norm(rows) @ rows

    def excess(log_mu):
        p = point(np.exp(log_mu))
        return p @ u / np.linalg.norm(p) - c if np.linalg.norm(p) > 1e-13 * size else 0

    mu, p = 0, point(0)
    if p @ u < c * np.linalg.norm(p):
        high = np.log(size * (1 + 2 / s))
        low = high - 1
        while excess(low) > 0:
            low -= 1
        mu = np.exp(scipy.optimize.brentq(excess, low, high, xtol=1e-15, rtol=1e-15))
        p = point(mu)
    value = np.linalg.norm(p) - mu * c
    return np.linalg.norm(g0) * p / np.linalg.norm(p) if value > 1e-13 * size else g0


@weighted
def fairgrad(G, L, alpha=2.0):
    """Ban & Ji 2024: GGᵀw = w^(-1/α), w > 0; zero rows take no part. Raises if 0 is a convex combination."""
    return alpha_fair(G, np.ones(len(G)), alpha)


@weighted
def nash_mtl(G, L):
    """Navon et al. 2022, Claim 3.1: GGᵀw = 1/w."""
    return fairgrad.weights(G, L, alpha=1.0)


@stateless
def imtl_g(G, L, sign="paper"):
    """Liu et al. 2021: Σ w_i = 1 and <d, u_i> equal for all i, on rows n_i > 0; the mean if these d have Σ w_i = 0."""
    n, U = norms(G)[norms(G) > 0], unit(G)[norms(G) > 0]
    if np.linalg.norm(U.sum(axis=0)) <= 1e-12 * len(U):  # w_i ∝ 1/n_i: all projections are zero
        return np.zeros(G.shape[1])
    inverse = np.linalg.pinv(U, rcond=cutoff(len(U)))
    v = inverse.T @ inverse.sum(axis=1) * (n.min() / n)
    total = v.sum() if sign == "paper" else abs(v.sum())
    return G.mean(axis=0) if abs(total) <= 1e-9 * abs(v).sum() else v / total @ G[norms(G) > 0]


@stateless
def aligned_mtl(G, L, scale="min", weights=None):
    """Senushkin et al. 2023: d = Ĝᵀp; Ĝ is G = VΣWᵀ with all singular values replaced by one of them, or their rms."""
    V, sigma, W = np.linalg.svd(G, full_matrices=False)
    rank = np.sum(sigma > cutoff(len(G)) * sigma[0])
    if rank == 0:
        return np.zeros(G.shape[1])
    sigma = sigma[:rank][::-1]
    s = {"min": sigma[0], "median": sigma[(rank - 1) // 2], "rmse": np.sqrt(np.mean(sigma**2))}[scale]
    return s * (np.ones(len(G)) if weights is None else weights) @ V[:, :rank] @ W[:rank]


@stateless
def conflict_free(G, L, length="projection", weights=None):
    """Liu et al. 2025 (ConFIG): d ∝ v = U⁺p on n_i > 0, ‖d‖ = Σ <g_i, v>/‖v‖ or t Σ cos(g_i, v)."""
    n, U = norms(G)[norms(G) > 0], unit(G)[norms(G) > 0]
    p = np.ones(len(n)) if weights is None else weights[norms(G) > 0]
    if np.linalg.norm(p @ U) <= 1e-12 * np.linalg.norm(p):
        return np.zeros(G.shape[1])
    v = np.linalg.pinv(U, rcond=cutoff(len(U))) @ p
    v = v / np.linalg.norm(v)
    means = {
        "projection": n,
        "min": n.min(),
        "max": n.max(),
        "harmonic": 1 / np.mean(1 / n),
        "arithmetic": n.mean(),
        "geometric": np.exp(np.log(n).mean()),
    }
    return np.sum(means[length] * (U @ v)) * v


@weighted
def upgrad(G, L, preference=None, regularization=0.0):
    """Quinton & Rey 2024: w = Σ_i π(p_i e_i), π(u) = argmin vᵀMv over v >= u; with r > 0, M becomes M/tr(M) + rI."""
    K, factor = len(G), G.T
    if regularization and G.any():
        factor = np.vstack([G.T / np.linalg.norm(G), np.sqrt(regularization) * np.eye(K)])
    U = np.diag(np.full(K, 1 / K) if preference is None else preference)
    return np.sum([u + nnls(factor, -factor @ u) for u in U], axis=0)


@weighted
def dualproj(G, L, preference=None, regularization=0.0):
    """Lopez-Paz & Ranzato 2017 (GEM), in Quinton & Rey's form: argmin ‖Gᵀv‖² + r‖G‖²‖v‖² over v >= p."""
    K, p = len(G), np.full(len(G), 1 / len(G)) if preference is None else preference
    factor = np.vstack([G.T, np.sqrt(regularization) * np.linalg.norm(G) * np.eye(K)]) if regularization else G.T
    return p + nnls(factor, -factor @ p)


@weighted
def krum(G, L, num_byzantine, num_selected=1, squared=True):
    """Blanchard et al. 2017: the mean of the rows nearest to their K - f - 2 nearest; ties (9 digits) to the first."""
    K, f = len(G), num_byzantine
    if max(f + 3, num_selected) > K:
        return np.full(K, 1 / K)
    distances = np.sort([norms(G - g) for g in G], axis=1)[:, 1 : K - f - 1]
    scores = [float(f"{score:.9g}") for score in np.sum(distances ** (2 if squared else 1), axis=1)]
    w = np.zeros(K)
    w[np.argsort(scores, kind="stable")[:num_selected]] = 1 / num_selected
    return w


@stateless
def geometric_median(G, L):
    """Argmin_x Σ ‖g_i - x‖ (RFA, Pillutla et al. 2022). Raises for rows on a line with two different middle ones.

    Row k is the median if the sum of the unit vectors to it from the others is no longer than its multiplicity. If no
    row is, Newton's method with exact line search starts below the best row, so that no iterate meets a row again.
    """
    center = G.mean(axis=0)
    size = norms(G - center).max()
    if size <= 1e-13 * norms(G).max():
        return center
    X = (G - center) / size
    _, sigma, W = np.linalg.svd(X, full_matrices=False)
    if np.all(sigma[1:] <= 1e-12 * sigma[0]):
        line = np.sort(X @ W[0])
        low, high = line[(len(G) - 1) // 2], line[len(G) // 2]
        if high - low > 1e-12:
            raise ValueError("An even number of rows on a line: no unique geometric median.")
        return center + size * low * W[0]

    def gradient(x):
        return unit(x - X).sum(axis=0)

    def descend(x, dx, longest):
        def slope(t):
            return gradient(x + t * dx) @ dx

        return x + (longest if slope(longest) <= 0 else scipy.optimize.brentq(slope, 0, longest, xtol=1e-15)) * dx

    for x in X:
        if np.linalg.norm(gradient(x)) <= np.sum(norms(X - x) <= 1e-14) + 1e-12:
            return center + size * x
    x = X[np.argmin([norms(X - x).sum() for x in X])]
    x = descend(x, -gradient(x), 4)
    for _ in range(200):
        r, U = norms(x - X), unit(x - X)
        dx = np.linalg.solve(np.sum(1 / r) * np.eye(len(x)) - (U.T / r) @ U, -gradient(x))
        if np.linalg.norm(dx) <= 1e-14:
            break
        x = descend(x, dx, 1)
    assert np.linalg.norm(dx) <= 1e-11
    return center + size * x


@stateless
def dibs(G, L, num_steps=1, radius=1.0, learning_rate=0.01):
    """DiBS-MTL 2025: δ <- δ - η Σ ‖δ - t_i‖ u_i with t_i = -r u_i, from 0, until ‖δ‖ > r; d = -δ."""
    delta, U = np.zeros(G.shape[1]), unit(G)
    for _ in range(num_steps):
        delta = delta - learning_rate * norms(delta + radius * U) @ U
        if np.linalg.norm(delta) > radius:
            break
    return -delta


@weighted
def ngdiff(G, L, signs):
    """Jin et al. 2025: w_i = ±1/n_i."""
    return divide(signs[:, None], norms(G))[:, 0]


@stateless
def avgnorm(G, L, scale="sum_norm"):
    """Guo et al. 2025: d = S Σ u_i, S = ‖Σ g_i‖ (the paper's), mean n or 1."""
    S = {"sum_norm": np.linalg.norm(G.sum(axis=0)), "mean_norm": norms(G).mean(), "one": 1}[scale]
    return S * unit(G).sum(axis=0)


@stateless
def slw(G, L):
    """Crawshaw & Kosecka 2021: w_i = K (1/n_i) / Σ_j 1/n_j over n > 0."""
    n = norms(G)[norms(G) > 0]
    return len(G) / np.sum(1 / n) * unit(G).sum(axis=0) if len(n) else G.mean(axis=0)


@stateful
def rotograd_scale(shape, burn_in=20):
    """Javaloy & Valera 2022: w_i = S/n_i, S = Σ a_i n_i, a ∝ n/n⁰, n⁰ from the first n > 0 and again from `burn_in`."""
    first, count = np.zeros(shape[0]), np.zeros(shape[0])

    def step(G, L, p):
        n = norms(G)
        first[p] = np.where((first[p] == 0) | (count[p] == burn_in), n, first[p])
        count[p] += 1
        a = divide(n[:, None], first[p])[:, 0]
        return (a @ n / a.sum() if a.any() else 0) * unit(G).sum(axis=0)

    return step


@stateful
def pcd(shape, primary=0, progress=0.02, decay=0.999):
    """TMLR 2026: d ∝ argmin ‖d - s_p g_p‖ with <g_j, d> >= τ s_j n_j² for j != p, ‖d‖ = n_p; s² = 1/EMA(n²), unbiased.

    d - s_p g_p = x is the least x with Ax >= b (rows of n = 1). Lawson & Hanson 1974, chapter 23: with the residual r
    of min ‖(A, b)ᵀy - (0, 1)‖ over y >= 0, x = -r_{1..P}/r_{P+1}, and where r = 0, y proves there is none: d = g_p.
    Without task p: the mean, and nothing is averaged.
    """
    square, count, tau = np.zeros(shape[0]), np.zeros(shape[0]), np.zeros(shape[0]) + progress

    def step(G, L, p):
        if not p[primary]:
            return G.mean(axis=0)
        n = norms(G)
        count[p] += 1
        square[p] = decay * square[p] + (1 - decay) * n**2
        k = np.sum(p[:primary])
        if n[k] == 0:
            return G[k]
        s = np.sqrt(divide(1 - decay ** count[p, None], square[p])[:, 0])
        others, g = (np.arange(len(G)) != k) & (n > 0), s[k] * G[k]
        size = np.max(s * n)
        A = unit(G[others])
        b = (tau[p] * s * n)[others] - A @ g
        E, last = np.vstack([A.T, b / size]), np.eye(G.shape[1] + 1)[-1]
        y = nnls(E, last)
        if np.linalg.norm(E @ y - last) <= 1e-10:
            return G[k]
        active = y > 1e-12 * y.max(initial=0)
        d = g + np.linalg.lstsq(A[active], b[active])[0]
        return n[k] * d / np.linalg.norm(d) if np.linalg.norm(d) > 1e-12 * size else np.zeros(len(d))

    return step
