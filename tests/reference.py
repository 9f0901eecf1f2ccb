"""Each method in float64 numpy, written from its paper and independent of the library.

Every entry of `REFERENCES` has the signature ``name(grads, losses, present, **hyper) -> updates`` with grads (T, K, P):
T successive steps, losses (T, K), present (T, K) bool, updates (T, P). A step sees only the rows of the present tasks;
a method with state keeps it per task, so the state of absent tasks does not change. No task present: a zero update.
Random methods whose draws no argument fixes have their law here instead: what may come out, with which probability.

G holds the task gradients as rows, L the losses, n the row norms, g0 the mean row, d the update, w the weights.
"""

import functools
import itertools

import numpy as np
import scipy.optimize

# ------------------------------------------------------------------------------------------------ driving the methods


def stateful(factory):
    """Run ``factory((K, P), **hyper) -> step(G, L, p)`` over T steps; p (K,) tells which tasks G and L belong to."""

    @functools.wraps(factory)
    def run(grads, losses, present, **hyper):
        step = factory(grads.shape[1:], **hyper)
        rows = zip(grads, losses, present, strict=True)
        return np.array([step(G[p], L[p], p) if p.any() else np.zeros(G.shape[1]) for G, L, p in rows])

    return run


def stateless(update):
    """Run ``update(G, L, **hyper) -> d``; per-task hyper-parameters are cut to the entries of the present tasks."""

    def factory(_, **hyper):
        return lambda G, L, p: update(G, L, **{k: np.asarray(h)[p] if np.ndim(h) else h for k, h in hyper.items()})

    run = stateful(functools.wraps(update)(factory))
    run.update = update
    return run


def weighted(weights):
    """Run ``weights(G, L, **hyper) -> w`` with d = Gᵀw; the function itself is available as ``.weights``."""
    run = stateless(functools.wraps(weights)(lambda G, L, **hyper: weights(G, L, **hyper) @ G))
    run.weights = weights
    return run


# ------------------------------------------------------------------------------------------------------------ algebra


def norms(G):
    """n_i = ‖g_i‖."""
    return np.linalg.norm(G, axis=1)


def divide(G, by):
    """Rows g_i / by_i, zero where by_i = 0."""
    return np.divide(G, by[:, None], out=np.zeros_like(G), where=by[:, None] != 0)


def unit(G):
    """Rows u_i = g_i / n_i, zero where n_i = 0."""
    return divide(G, norms(G))


def cutoff(K):
    """Smallest singular value of K rows that counts, relative to the largest: Kε on their Gramian's eigenvalues."""
    return np.sqrt(K * np.finfo(float).eps)


def simplex(v):
    """Argmin ‖w - v‖ over the simplex."""
    v = v - v.max()
    u = np.sort(v)[::-1]
    excess = (np.cumsum(u) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - excess[u > excess][-1], 0)


def nnls(A, b):
    """Argmin ‖Ax - b‖ over x >= 0: the best non-negative solution over all supports, or scipy's from 7 unknowns."""
    size = np.where(norms(A.T) == 0, 1, norms(A.T))
    R = np.linalg.qr(np.column_stack([A / size, b]), mode="r")
    A, b = R[:, :-1], R[:, -1]
    K = A.shape[1]
    if K > 6:
        return scipy.optimize.nnls(A, b, maxiter=100 * K)[0] / size
    best = np.zeros(K)
    for support in itertools.chain.from_iterable(itertools.combinations(range(K), k) for k in range(1, K + 1)):
        x = np.zeros(K)
        x[list(support)] = np.linalg.lstsq(A[:, support], b)[0]
        if x.min() >= 0 and np.linalg.norm(A @ x - b) < np.linalg.norm(A @ best - b):
            best = x
    return best / size


def min_norm(G):
    """Argmin ‖Gᵀw‖ over the simplex.

    For any s > 0, v = argmin ‖Gᵀv‖² + s²(1ᵀv - 1)² over v >= 0 is a multiple of it: with v = tw, w in the simplex,
    the objective is t²‖Gᵀw‖² + s²(t - 1)², which for every t is smallest at the required w.
    """
    s = norms(G).min()
    if s == 0:
        return np.eye(len(G))[norms(G).argmin()]
    v = nnls(np.vstack([G.T, np.full(len(G), s)]), np.append(np.zeros(G.shape[1]), s))
    return v / v.sum()


# ---------------------------------------------------------------------------------------------------------- baselines


@weighted
def mean(G, L):
    """w = 1/K."""
    return np.full(len(G), 1 / len(G))


@weighted
def sum(G, L):
    """w = 1."""
    return np.ones(len(G))


@weighted
def constant(G, L, weights):
    """w as given."""
    return weights


@stateless
def trimmed_mean(G, L, trim=1):
    """Yin et al. 2018, Definition 2: each coordinate's mean without its `trim` smallest and largest entries."""
    return (np.sort(G, axis=0)[trim:-trim] if trim and len(G) >= 2 * trim + 1 else G).mean(axis=0)


@stateless
def coordinate_median(G, L):
    """Yin et al. 2018, Definition 1."""
    return np.median(G, axis=0)


@stateless
def sign_agreement(G, L, threshold=1.0, rescale=False):
    """Parascandolo et al. 2020: the mean where |mean_i sign g_ij| >= τ; the official code may divide by its share."""
    agreed = np.abs(np.sign(G).sum(axis=0)) >= np.round(threshold * len(G), 9)
    layers = [slice(0, 1), slice(1, None)]  # the leaves of the harness
    share = np.concatenate([np.full(agreed[leaf].size, agreed[leaf].mean()) for leaf in layers])
    return np.where(agreed, G.mean(axis=0), 0) / np.where(rescale & agreed, share, 1)


def graddrop_law(G, leak=0.0):
    """Chen et al. 2020, lines 10-15: each coordinate's two values (P,), and the probability of the first."""
    leak = np.broadcast_to(leak, len(G))[:, None]
    size = np.abs(G).sum(axis=0)
    purity = (1 + np.divide(G.sum(axis=0), size, out=np.zeros_like(size), where=size > 0)) / 2
    up, down = (((leak + (1 - leak) * kept) * G).sum(axis=0) for kept in (G > 0, G < 0))
    return up, down, purity


# ---------------------------------------------------------------------------------------------- weights from gradients


@weighted
def ntk(G, L, traces, scale="sum"):
    """Wang et al. 2020: w = Σ t / t."""
    return getattr(np, scale)(traces) / traces


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
def imgrad(G, L, c=0.8, rescale="none"):
    """Zhou et al. 2025: d = g0 + r g_w/‖g_w‖ with r = c‖g0‖ and w = argmin (3/2 - φ)<g_w, g0> + φ r‖g_w‖.

    φ is the cosine of g0 with the min-norm point, here at least 1e-8. Divided by 3/2 - φ, the objective is the dual of
    CAGrad with another radius.
    """
    g0 = G.mean(axis=0)
    r, shortest = c * np.linalg.norm(g0), min_norm(G) @ G
    length = np.linalg.norm(shortest) * np.linalg.norm(g0)
    stationary = np.linalg.norm(shortest) <= 1e-13 * norms(G).max()
    cos = 1e-8 if stationary else max(shortest @ g0 / length, 1e-8)
    share = cos / (1.5 - cos)
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
def pivrg(G, L, scores, bound=2.0, min_temperature=10.0):
    """Official code: GGᵀw = (p/w)^(1/2), p = K softmax(s/T), T = max((max s - min s)/log b, T0)."""
    p = np.exp((scores - scores.max()) / max(np.ptp(scores) / np.log(bound), min_temperature))
    return alpha_fair(G, len(G) * p / p.sum(), 2.0)


def vertices(A, b):
    """All vertices of {w in the simplex, Aw >= b}, up to rounding."""
    K = A.shape[1]
    rows, floors = np.vstack([np.eye(K), A]), np.append(np.zeros(K), b)
    found = []
    for active in itertools.combinations(range(len(rows)), K - 1):
        basis = np.vstack([rows[list(active)], np.ones(K)])
        if np.linalg.cond(basis / norms(basis).clip(1e-300)[:, None]) < 1e10:
            w = np.linalg.solve(basis, np.append(floors[list(active)], 1))
            if w.min() >= -1e-11 and np.all(A @ w - b >= -1e-11 * (abs(A) @ abs(w) + abs(b))):
                found.append(w)
    return np.array(found).reshape(-1, K)


@weighted
def epo(G, L, preference=None, tolerance=1e-4, relaxed=False):
    """Official code of Mahapatra & Rajan 2020, with its two linear programs solved by enumerating all vertices.

    Raises if several vertices with different Gᵀw are optimal.
    """
    K, n = len(G), norms(G)
    r = np.ones(K) if preference is None else preference
    share = r * L / (r * L).sum()
    mu = share @ np.log(K * share)
    a = r * (np.log(K * share) - mu)
    M, size = G @ G.T, np.where(n > 0, n, 1)
    c, blur = M @ a, 1e-12 * n * (n @ abs(a))
    up, worst = c > blur, r * L >= (1 - 1e-14) * (r * L).max()
    if mu > tolerance:
        objective = c
        floors = np.where(worst, 0, np.where(up, -np.inf, np.minimum(c, 0))) if up.any() else np.zeros(K)
        A, b = divide(M, size)[floors > -np.inf], (floors / size)[floors > -np.inf]
    else:
        objective, A, b = M.sum(axis=0), divide(M, size), np.zeros(K)
        if not relaxed:
            A, b = np.vstack([A, c / size.max()]), np.append(b, min(0, c.max()) / size.max())
    corners = vertices(A, b)
    if not len(corners):
        return r / r.sum()
    values = corners @ objective
    best = corners[values >= values.max() - 1e-10 * abs(objective).max()]
    if np.ptp(best @ G, axis=0).max() > 1e-7 * n.max():
        raise ValueError("Several optimal directions.")
    return best[0]


def alpha_fair(G, priority, alpha):
    """GGᵀw = (q/w)^(1/α), w > 0, q the priorities; zero rows take no part. Raises if 0 is a convex combination.

    Newton's method in log z, z_i = n_i w_i, on the cosines C: (Cz)_i = b_i z_i^(-1/α), b_i = q_i^(1/α) n_i^(1/α - 1).
    Its step is a descent step for the convex φ(z) = zᵀCz/2 - Σ b_i ψ(z_i), ψ' = z^(-1/α). There is no solution if
    vᵀG = 0 for some v >= 0, v != 0: it would have <g_i, d> > 0 for all i, but Σ v_i <g_i, d> = 0.
    """
    n = norms(G)
    if not n.all():
        w = np.zeros(len(G))
        w[n > 0] = alpha_fair(G[n > 0], priority[n > 0], alpha) if n.any() else 0
        return w
    U, size = divide(G, n), n.max()
    if np.linalg.norm(min_norm(U) @ U) < 1e-13:
        raise ValueError("Pareto-stationary rows: no alpha-fair point.")
    C, b, p = U @ U.T, priority ** (1 / alpha) * (n / size) ** (1 / alpha - 1), 1 - 1 / alpha

    def phi(u):
        z = np.exp(u)
        return np.sum((U.T @ z) ** 2) / 2 - b @ (u if p == 0 else np.exp(p * u) / p)

    u = alpha / (1 + alpha) * np.log(b)
    for _ in range(1000):
        z, wanted = np.exp(u), b * np.exp(-u / alpha)
        residual = U @ (U.T @ z) - wanted
        if np.max(abs(residual) / (abs(C) @ z + wanted)) < 1e-15:
            break
        du = np.linalg.solve(C * z + np.diag(wanted / alpha), -residual)
        du *= min(1, 2 / abs(du).max())
        while abs(du).max() > 1e-5 and phi(u + du) > phi(u) + 1e-4 * residual @ (z * du):
            du /= 2
        u = u + du
    assert np.max(abs(residual) / (abs(C) @ z + wanted)) < 1e-13
    return np.exp(u) / n * size ** ((1 - alpha) / (1 + alpha))


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


@weighted
def bmtl(G, L, temperature=1.0, normalize=True):
    """Liang & Zhang 2020: Σ exp(L/T) has the derivatives w = exp(L/T)/T; normalised, Σ w = K."""
    w = np.exp(L / temperature) / temperature
    return w * len(w) / w.sum() if normalize else w


@weighted
def emtl(G, L, strength):
    """Yuan & Zhang 2023, reconstructed: w = max(∂(Σ L + λ Var r)/∂L, 0) with r = L/n over the n > 0, held constant."""
    w, n, moves = np.ones(len(G)), norms(G), norms(G) > 0
    if moves.any():
        r = L[moves] / n[moves]
        w[moves] = np.maximum(1 + 2 * strength / len(r) * (r - r.mean()) / n[moves], 0)
    return w


# ------------------------------------------------------------------------------------------------- methods with state


class Adam:
    """Kingma & Ba 2015, Algorithm 1, over K scalars, each with its own count."""

    def __init__(self, num_tasks, learning_rate, b1=0.9, b2=0.999, eps=1e-8):
        self.m, self.v, self.t = np.zeros((3, num_tasks))
        self.learning_rate, self.b1, self.b2, self.eps = learning_rate, b1, b2, eps

    def __call__(self, grad, p):
        self.t[p] += 1
        self.m[p] += (1 - self.b1) * (grad - self.m[p])
        self.v[p] += (1 - self.b2) * (grad**2 - self.v[p])
        m, v = self.m[p] / (1 - self.b1 ** self.t[p]), self.v[p] / (1 - self.b2 ** self.t[p])
        return -self.learning_rate * m / (np.sqrt(v) + self.eps)


@stateful
def uw(shape, init=0.0, learning_rate=0.025):
    """Kendall et al. 2018: w = e^(-s)/2, then a step of s on Σ e^(-s) L/2 + s/2."""
    s, adam = np.zeros(shape[0]) + init, Adam(shape[0], learning_rate)

    def step(G, L, p):
        w = np.exp(-s[p]) / 2
        s[p] += adam(1 / 2 - w * L, p)
        return w @ G

    return step


@stateful
def slaw(shape, beta=0.99):
    """Crawshaw & Kosecka 2021: w_i ∝ 1/s_i, Σ w = K, s_i² = Σ_t c_t (l_t - Σ c l)² over task i's steps so far.

    c_t = 1/k after k steps, and from step 1/(1 - β) on the old c times β and 1 - β. On its first step a task has w = 1.
    """
    history, averages = [[] for _ in range(shape[0])], [np.zeros(0) for _ in range(shape[0])]

    def step(G, L, p):
        s, tasks = np.zeros(len(G)), np.flatnonzero(p)
        for i, loss in zip(tasks, L, strict=True):
            history[i].append(loss)
            k = len(history[i])
            a = 1 / k if k <= (round(1 / (1 - beta)) if beta < 1 else k) else 1 - beta
            averages[i] = np.append((1 - a) * averages[i], a)
        for j, i in enumerate(tasks):
            c, losses = averages[i], np.array(history[i])
            s[j] = np.sqrt(c @ (losses - c @ losses) ** 2)
            s[j] = max(s[j], np.finfo(float).eps * np.sqrt(c @ losses**2))
        w, old = np.ones(len(G)), np.array([len(history[i]) > 1 for i in tasks])
        if old.any():
            w[old] = old.sum() / s[old] / np.sum(1 / s[old])
        return w @ G

    return step


def weighing(factory):
    """Like `stateful`, for ``factory((K, P), **hyper) -> weigh(L, p)`` that returns the weights w, with d = Gᵀw."""

    def make(shape, **hyper):
        weigh = factory(shape, **hyper)
        return lambda G, L, p: weigh(L, p) @ G

    return stateful(functools.wraps(factory)(make))


@weighing
def softadapt(shape, beta=0.1, variant="original", window=2, every=1):
    """Heydari et al. 2019: w_i ∝ a_i exp(β s_i) with s_i the derivative of the polynomial through the last losses.

    A task with a shorter history has weight 1/K. Every `every` steps; between, the weights of the last time.
    """
    history, kept, steps = [[] for _ in range(shape[0])], np.ones(shape[0]), itertools.count(1)

    def weigh(L, p):
        tasks = np.flatnonzero(p)
        for i, loss in zip(tasks, L, strict=True):
            history[i].append(loss)
        old = np.array([i for i in tasks if len(history[i]) >= window], int)
        if next(steps) % every == 0:
            kept[tasks] = 1
            if len(old):
                recent = np.array([history[i][-window:] for i in old])
                lines = [np.polynomial.Polynomial.fit(range(window), row, window - 1) for row in recent]
                s = np.array([line.deriv()(0) for line in lines])
                if variant == "normalized":
                    s = s / (np.abs(s).sum() or 1)
                e = np.exp(beta * s - (beta * s).max()) * (recent.mean(axis=1) if variant == "loss_weighted" else 1)
                kept[old] = len(old) * e / e.sum()
        return kept[p] / kept[p].sum()

    return weigh


@weighing
def relobralo(shape, temperature=1.0, alpha=0.999, rho=1.0):
    """Bischof & Kraus 2021 for ρ = 0 or 1 in every step: λ = α (ρ λ + (1-ρ) b(0)) + (1-α) b(t-1).

    b(t') = K softmax(L / (T L(t'))); λ = 1 in a task's first step, α = 0 in its second; Σ λ = K.
    """
    assert rho in (0, 1)
    losses, kept = [[] for _ in range(shape[0])], np.ones(shape[0])

    def balance(L, before):
        e = np.exp((L / before - (L / before).max()) / temperature)
        return len(L) * e / e.sum()

    def weigh(L, p):
        tasks = np.flatnonzero(p)
        old = np.array([i for i in tasks if losses[i]], int)
        if len(old):
            now = np.array([L[list(tasks).index(i)] for i in old])
            first, last = (np.array([losses[i][t] for i in old]) for t in (0, -1))
            a = np.array([alpha if len(losses[i]) > 1 else 0 for i in old])
            past = kept[old] * len(old) / kept[old].sum() if rho else balance(now, first)
            mixed = a * past + (1 - a) * balance(now, last)
            kept[old] = len(old) * mixed / mixed.sum()
        for i, loss in zip(tasks, L, strict=True):
            losses[i].append(loss)
        return kept[p]

    return weigh


@stateful
def gradnorm(shape, alpha=1.5, learning_rate=0.025):
    """Chen et al. 2018, Algorithm 1: d from the old a, then a step on Σ |a_i n_i - mean(a n) r_i^α|, Σ a kept."""
    a, first, adam = np.ones(shape[0]), np.full(shape[0], np.nan), Adam(shape[0], learning_rate)

    def step(G, L, p):
        old, n = a[p], norms(G)
        first[p] = np.where(np.isnan(first[p]), L, first[p])
        r = L / first[p] / np.mean(L / first[p])
        new = np.maximum(old + adam(np.sign(old * n - np.mean(old * n) * r**alpha) * n, p), 0)
        a[p] = new * old.sum() / new.sum()
        return old @ G

    return step


@stateful
def db_mtl(shape, beta=0.9, sigma=0.0):
    """Lin et al. 2023: q_i <- b q_i + (1-b) g_i/l_i with b = β/k^σ, k = 1, 2, ...; d = max_j ‖q_j‖ Σ_i q_i/‖q_i‖."""
    q, k = np.zeros(shape), np.zeros(shape[0])

    def step(G, L, p):
        k[p] += 1
        b = beta / k[p, None] ** sigma
        q[p] = b * q[p] + (1 - b) * divide(G, L)
        return norms(q[p]).max() * divide(q[p], norms(q[p])).sum(axis=0)

    return step


@stateful
def gcond(
    shape, critical=-0.8, main=-0.5, weak=0.0, power=2.0, stability=0.8, window=3, decay=0.95, resolution="smooth"
):
    """Alves Limarenko & Studenikina 2025, official code, `_project`, `_run_arbitrator` and `_get_effective_alpha`."""
    previous, average, wins = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0], int)

    def cos(a, b):
        size = np.linalg.norm(a) * np.linalg.norm(b)
        return a @ b / size if size > 0 else 0.0

    def angle(c):
        if c >= main:
            return np.pi / 2 * (1 - np.clip((c - main) / (weak - main), 0, 1)) if weak > main else 0.0
        return np.pi / 2 * (1 + ((c - main) / (critical - main)) ** power) if c > critical else np.pi

    def step(G, L, p):
        R, n, tasks = G.copy(), norms(G), np.flatnonzero(p)
        average[p] = np.where(average[p] > 0, decay * average[p] + (1 - decay) * n, n)

        def second_wins(i, j):
            tired = [window > 0 and wins[tasks[k]] >= window for k in (i, j)]
            if tired[0] != tired[1]:
                return tired[0]
            length = np.linalg.norm(R[[i, j]], axis=1)
            strength = length / average[tasks[[i, j]]]
            steady = np.array([max(cos(R[k], previous[tasks[k]]), 0) for k in (i, j)])
            score = stability * steady + (1 - stability) * strength / strength.sum()
            longer = length[1] > (1 + 1e-12) * length[0]
            return score[1] > score[0] if abs(score[1] - score[0]) > 1e-12 else longer

        for _ in range(2 * np.count_nonzero(n)):
            alive = np.flatnonzero(norms(R) > 0.01 * n)
            pairs = [(cos(R[i], R[j]), i, j) for i, j in itertools.combinations(alive, 2)]
            lowest = min(pairs, default=(np.inf,))[0]
            if lowest >= weak - 1e-12:
                break
            c, i, j = next(pair for pair in pairs if pair[0] <= lowest + 1e-12)
            a, b = (j, i) if second_wins(i, j) else (i, j)
            onto = R[a] @ R[b] / np.array([R[b] @ R[b], R[a] @ R[a]])
            if resolution == "smooth":
                width = np.sin([angle(c), min(angle(c), np.pi / 2)])
            else:
                width = np.array([0 if c < main else 1, 1])
            if resolution == "smooth" or c < main:
                won = wins[tasks[a]] + 1
                wins[p] = 0
                wins[tasks[a]] = won
            R[a], R[b] = R[a] - width[0] * onto[0] * R[b], R[b] - width[1] * onto[1] * R[a]
            if resolution == "zones" and c < critical:
                R[b] = 0
        previous[p] = G
        return R.sum(axis=0)

    return step


@stateful
def excess_mtl(shape, learning_rate=1e-2):
    """He et al. 2024: e_i = Σ g²/√S, S += g²; w_i ∝ w_i exp(η e_i/e_i⁰) with Σ w = K, after task i's first e_i > 0."""
    S, first, w = np.zeros(shape), np.zeros(shape[0]), np.ones(shape[0])

    def step(G, L, p):
        S[p] += G**2
        e = np.divide(G**2, np.sqrt(S[p]), out=np.zeros(G.shape), where=S[p] > 0).sum(axis=1)
        moving, tasks = first[p] > 0, np.flatnonzero(p)
        gain = learning_rate * e[moving] / first[p][moving]
        old, first[p] = w[tasks[moving]], np.where(moving, first[p], e)
        if moving.any():
            new = old * np.exp(gain - gain.max())
            w[tasks[moving]] = new * old.sum() / new.sum()
        return w[p] / w[p].sum() * len(G) @ G

    return step


@stateful
def moco(shape, beta=0.1, gamma=0.1, rho=0.1, projection="simplex", normalize="none"):
    """Fernando et al. 2023: y <- y - β(y - g), λ <- Π(λ - γ(YYᵀλ + ρλ)), d = Yᵀλ."""
    y, kept = np.zeros(shape), np.full(shape[0], 1 / shape[0])

    def step(G, L, p):
        y[p] += beta * ((unit(G) * L[:, None] if normalize == "unit_loss" else G) - y[p])
        Y = unit(y[p]) if normalize in ("l2", "loss+") else y[p]
        Y = divide(Y, L) if normalize in ("loss", "loss+") else Y
        w, total = rest(kept, p)
        v = w - gamma * (Y @ (w @ Y) + rho * w)
        w = simplex(v) if projection == "simplex" else np.exp(v - v.max()) / np.exp(v - v.max()).sum()
        kept[p] = w * total
        return w @ Y

    return step


@stateful
def conflict_free_momentum(shape, b1=0.9, b2=0.999, eps=1e-8):
    """Liu et al. 2025 (M-ConFIG), for any number of momenta per step: Adam on ConFIG of all m̂."""
    m, t, fake, s, steps = np.zeros(shape), np.zeros((shape[0], 1)), 0.0, 0.0, 0

    def step(G, L, p):
        nonlocal fake, s, steps
        m[p], t[p] = b1 * m[p] + (1 - b1) * G, t[p] + 1
        if not t.all():
            return np.zeros(shape[1])
        steps += 1
        config = conflict_free.update(m / (1 - b1**t), None)
        old, fake = fake, config * (1 - b1**steps)
        s = b2 * s + (1 - b2) * ((fake - b1 * old) / (1 - b1)) ** 2
        size = np.sqrt(s / (1 - b2**steps)) + eps
        return np.divide(config, size, out=np.zeros(shape[1]), where=size > 0)

    return step


@stateful
def sam_gs(shape, gamma=0.7, b1=0.9, b2=0.99, similarity="pairs", reduction="mean", epsilon="code", aligned="momentum"):
    """Borsani et al. 2025: equal lengths n̄ where Ψ < γ, else Σ g_i ⊙ |m̂_i| / √ĥ; ψ_ij = 2 n_i n_j / (n_i² + n_j²)."""
    m, t, h, steps = np.zeros(shape), np.zeros((shape[0], 1)), 0.0, 0

    def step(G, L, p):
        nonlocal h, steps
        n, pairs = norms(G), np.triu_indices(len(G), 1)
        squares = n[:, None] ** 2 + n**2
        psi = np.where(squares > 0, 2 * n[:, None] * n / np.where(squares > 0, squares, 1), 1)
        mean = 1 if len(G) == 1 else psi.mean() if similarity == "paper_mean" else psi[pairs].mean()
        m[p] = b1 * m[p] + (1 - b1) * G
        h = b2 * h + (1 - b2) * (1 - mean) ** 2 + 1e-8
        t[p], steps = t[p] + 1, steps + 1
        if (psi.min() if reduction == "min" else mean) < gamma:
            return n.mean() * unit(G).sum(axis=0)
        if aligned == "sum" and (G @ G.T)[pairs].sum() > 0:
            return G.sum(axis=0)
        root = np.sqrt(h / (1 - b2**steps)) + (1e-8 if epsilon == "paper" else 0)
        return (G * np.abs(m[p] / (1 - b1 ** t[p]))).sum(axis=0) / root

    return step


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


def rest(w, p):
    """The weights of the present tasks on their simplex, with their ratios kept, and their sum; equal if that is 0.

    A sum of 0 is replaced by a number too small to change any other sum, so that ratios are kept.
    """
    total = w[p].sum()
    return (w[p] / total, total) if total else (np.full(p.sum(), 1 / p.sum()), 1e-100)


@stateful
def modo(shape, learning_rate=0.1, regularization=0.1):
    """Chen et al. 2023 on one batch: λ <- Π(λ - γ(GGᵀλ + ρλ)) in the simplex, d = Gᵀλ; absent tasks keep their λ."""
    kept = np.full(shape[0], 1 / shape[0])

    def step(G, L, p):
        w, total = rest(kept, p)
        w = simplex(w - learning_rate * (G @ (w @ G) + regularization * w))
        kept[p] = w * total
        return w @ G

    return step


@stateful
def sdmgrad(shape, lam=0.3, learning_rate=10.0, momentum=0.5, num_steps=20, preference=None):
    """Xiao et al. 2023 on one batch: SGD on ‖Gᵀ(w + λp)‖²/2 in the simplex, mean n scaled to 1; absent tasks keep w."""
    kept = np.full(shape[0], 1 / shape[0])

    def step(G, L, p):
        U = G / norms(G).mean() if G.any() else G
        target = lam * (np.full(len(G), 1 / len(G)) if preference is None else preference[p])
        (w, total), velocity = rest(kept, p), 0
        for _ in range(num_steps):
            velocity = momentum * velocity + U @ ((w + target) @ U)
            w = simplex(w - learning_rate * velocity)
        kept[p] = w * total
        return (w + target) / (1 + lam) @ G

    return step


@stateful
def ferero(shape, preference=None, learning_rate=0.1, strength=0.5, normalize=True):
    """Chen et al. 2024 on one batch: λ = λ_f + Bᵀλ_h with B an orthonormal basis of the complement of r, h = Bl.

    λ_f <- Π(λ_f - γ GGᵀw), λ_h <- λ_h - γ (B GGᵀw - c h), w <- λ/‖λ‖₁. Absent tasks keep their λ_f and Bᵀλ_h; of the
    others' Bᵀλ_h the part along r is dropped.
    """
    kept, nu = np.full(shape[0], 1 / shape[0]), np.zeros(shape[0])
    ray = np.ones(shape[0]) if preference is None else np.asarray(preference)

    def step(G, L, p):
        B = np.linalg.qr(np.column_stack([ray[p], np.eye(len(G))]))[0][:, 1:].T
        (f, total), h = rest(kept, p), B @ nu[p]
        w = f + B.T @ h
        slope = G @ (w / (abs(w).sum() if normalize else 1) @ G)
        f, h = simplex(f - learning_rate * slope), h - learning_rate * (B @ slope - strength * B @ L)
        kept[p], nu[p] = f * total, B.T @ h
        w = f + B.T @ h
        return w / (abs(w).sum() if normalize else 1) @ G

    return step


@stateful
def pmtl(shape, preferences, index, initial_steps=0):
    """Lin et al. 2019: d = min-norm point of the hull of the g_i and of (u_j - u_k)ᵀG for (u_j - u_k)ᵀl > 0.

    While initial steps are left and there are such j, only of the latter. u at unit length, of the tasks present.
    """
    left = initial_steps

    def step(G, L, p):
        nonlocal left
        u = divide(np.asarray(preferences, float)[:, p], norms(np.asarray(preferences, float)[:, p]))
        apart = u[norms(u) > 0] - u[index]
        rows = apart[apart @ L > 1e-14 * np.linalg.norm(L)] if u[index].any() else apart[:0]
        only = left > 0 and len(rows) > 0
        left = left - 1 if only else 0
        V = rows @ G if only else np.vstack([G, rows @ G])
        return min_norm(V) @ V

    return step


# -------------------------------------------------------------------------------------------- scalarizations of losses


@weighted
def gls(G, L):
    """Chennupati et al. 2019: w = dS/dL for S = (Π L)^(1/K)."""
    return np.exp(np.log(L).mean()) / (len(L) * L)


@weighted
def scale_invariant(G, L):
    """Navon et al. 2022: w = dS/dL for S = Σ log L."""
    return 1 / L


def softmax(x):
    """exp(x) / Σ exp(x)."""
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


@weighted
def stch(G, L, mu, weights=None, ideal=0.0):
    """Lin et al. 2024: w = dS/dL for S = μ log Σ exp(λ(L - z)/μ)."""
    lam = np.full(len(L), 1 / len(L)) if weights is None else weights
    return lam * softmax(lam * (L - ideal) / mu)


@weighted
def tchebycheff(G, L, weights=None, ideal=0.0):
    """Miettinen 1999: w = dS/dL for S = max λ(L - z)."""
    lam = np.full(len(L), 1 / len(L)) if weights is None else weights
    return lam * (np.arange(len(L)) == np.argmax(lam * (L - ideal)))


@weighted
def pbi(G, L, preference=None, theta=5.0, ideal=0.0):
    """Zhang & Li 2007: w = dS/dL for S = d1 + ϑ d2; a distance d2 of 0 has no derivative and counts as 0."""
    u = np.ones(len(L)) if preference is None else preference
    u = u / np.linalg.norm(u)
    across = (L - ideal) - ((L - ideal) @ u) * u
    d2 = np.linalg.norm(across)
    return u + (theta * across / d2 if d2 > 1e-14 * np.linalg.norm(L - ideal) else 0)


@weighted
def cosmos(G, L, lam, preference=None):
    """Ruchte & Grabocka 2021: w = dS/dL for S = r·L - λ cos(r, L)."""
    r = np.full(len(L), 1 / len(L)) if preference is None else preference
    n, cosine = np.linalg.norm(L), r @ L / np.linalg.norm(r) / np.linalg.norm(L)
    return r - lam / n * (r / np.linalg.norm(r) - cosine * L / n)


@stateful
def imtl_l(shape, init=0.0, learning_rate=0.025):
    """Liu et al. 2021: w = e^s, then a step of s on Σ e^s L - s."""
    s, adam = np.zeros(shape[0]) + init, Adam(shape[0], learning_rate)

    def step(G, L, p):
        w = np.exp(s[p])
        s[p] += adam(w * L - 1, p)
        return w @ G

    return step


@stateful
def imtl(shape, sign="paper", init=0.0, learning_rate=0.025):
    """Liu et al. 2021: IMTL-G on the gradients e^s g_i of the losses e^s L - s, then a step of s."""
    s, adam = np.zeros(shape[0]) + init, Adam(shape[0], learning_rate)

    def step(G, L, p):
        scale = np.exp(s[p])
        s[p] += adam(scale * L - 1, p)
        return imtl_g.update(scale[:, None] * G, L, sign=sign)

    return step


@stateful
def dwa(shape, temperature=2.0, window=1):
    """Liu et al. 2019: w = K softmax(r/T), r the ratio of the means of a task's last two runs of `window` losses."""
    history = [[] for _ in range(shape[0])]

    def step(G, L, p):
        ratios = []
        for i in np.flatnonzero(p):
            done = len(history[i]) // window * window
            means = np.mean(np.reshape(history[i][:done], (-1, window)), axis=1)
            ratios.append(means[-1] / means[-2] if len(means) > 1 else 1.0)
        for i, loss in zip(np.flatnonzero(p), L, strict=True):
            history[i].append(loss)
        return len(L) * softmax(np.array(ratios) / temperature) @ G

    return step


@stateful
def famo(shape, learning_rate=0.025, gamma=1e-3, min_losses=None):
    """Liu et al. 2023, Algorithm 2, with the losses of the next batch: w ∝ z/(L - b), Σ w = 1, z = softmax(ξ).

    Before that, a step of ξ with gradient J_zᵀδ + γξ for the tasks present in this step and the one before, where
    δ = log((L_before - b)/(L_now - b)) and J_zᵀδ = z(δ - z·δ).
    """
    K = shape[0]
    b = np.zeros(K) if min_losses is None else min_losses
    xi, adam, before, seen = np.zeros(K), Adam(K, learning_rate), np.ones(K), np.zeros(K, bool)

    def step(G, L, p):
        now, both = np.ones(K), p & seen
        now[p] = L
        if both.any():
            z, delta = softmax(xi[both]), np.log((before - b)[both] / (now - b)[both])
            xi[both] += adam(z * (delta - z @ delta) + gamma * xi[both], both)
        before[:], seen[:] = now, p
        w = softmax(xi[p]) / (L - b[p])
        return w / w.sum() @ G

    return step


@stateful
def stch_mtl(shape, warmup_steps, nadir_steps, mu=1.0, nadir=None):
    """Lin et al. 2024, official recipe: Σ log L, then Kμ log Σ exp(log(L/nadir)/μ), nadir a mean of earlier losses."""
    history = [[] for _ in range(shape[0])]

    def step(G, L, p):
        tasks = np.flatnonzero(p)
        late = np.array([len(history[i]) >= warmup_steps + (nadir is None) * nadir_steps for i in tasks])
        measured = [np.mean(history[i][warmup_steps : warmup_steps + nadir_steps] or 1) for i in tasks]
        scale = np.array(measured) if nadir is None else nadir[p]
        w = np.ones(len(L))
        if late.any():
            w[late] = late.sum() * softmax(np.log(L / scale)[late] / mu)
        for i, loss in zip(tasks, L, strict=True):
            history[i].append(loss)
        return w / L @ G

    return step


def partitions(items, parts):
    """All partitions of a list into at most `parts` sets."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:], parts):
        for k in range(len(rest)):
            yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1 :]]
        if len(rest) < parts:
            yield [[items[0]], *rest]


@stateful
def go4align(shape, num_groups, learning_rate=1e-4):
    """Shen et al. 2024: q ∝ q e^(-ηL), Σ q kept; γ = q/Σq ΣL/L; w the means of γ over the best groups of them."""
    q = np.full(shape[0], 1 / shape[0])

    def step(G, L, p):
        total, new = q[p].sum(), q[p] * np.exp(-learning_rate * L)
        q[p] = total * new / new.sum()
        gamma = new / new.sum() * L.sum() / L

        def spread(groups):
            return np.sum([np.sum((gamma[g] - gamma[g].mean()) ** 2) for g in groups])

        w = np.empty(len(L))
        for group in min(partitions(list(range(len(L))), num_groups), key=spread):
            w[group] = gamma[group].mean()
        return w @ G

    return step


@stateful
def ldc_mtl(shape, penalty=0.01, learning_rate=1e-3):
    """Xiao et al. 2025, code for CelebA: w = dS/dL, S = σ·L/Σσ + λ Σ|σ_i L_i - σ_(i+1) L_(i+1)|, then a step of σ."""
    a, adam = np.ones(shape[0]), Adam(shape[0], learning_rate)

    def step(G, L, p):
        s = 1 / (1 + np.exp(-a[p]))
        signs = np.concatenate([[0], np.sign((s * L)[:-1] - (s * L)[1:]), [0]])
        slope = 1 / s.sum() + penalty * (signs[1:] - signs[:-1])
        a[p] += adam(slope * L * s * (1 - s), p)
        return slope * s @ G

    return step


def smoothed(weights, present, decay, init=np.nan):
    """Zhou et al. 2022 (CR-MOGM) on weights (T, K): λ_i <- decay λ_i + (1-decay) w_i, from task i's first weight on."""
    state, used = np.zeros(weights.shape[1]) + init, []
    for w, p in zip(weights, present, strict=True):
        state[p] = np.where(np.isnan(state[p]), w[p], decay * state[p] + (1 - decay) * w[p])
        used.append(np.where(p, state, 0))
    return np.array(used)


REFERENCES = {
    "mean": mean,
    "sum": sum,
    "constant": constant,
    "mgda": mgda,
    "capped_mgda": capped_mgda,
    "pcgrad": pcgrad,
    "gradvac": gradvac,
    "cagrad": cagrad,
    "imgrad": imgrad,
    "conicgrad": conicgrad,
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
    "pivrg": pivrg,
    "epo": epo,
    "ferero": ferero,
    "pmtl": pmtl,
    "imtl_g": imtl_g,
    "aligned_mtl": aligned_mtl,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "conflict_free": conflict_free,
    "krum": krum,
    "geometric_median": geometric_median,
    "dibs": dibs,
    "rotograd_scale": rotograd_scale,
    "pcd": pcd,
    "ngdiff": ngdiff,
    "avgnorm": avgnorm,
    "slw": slw,
    "modo": modo,
    "sdmgrad": sdmgrad,
    "trimmed_mean": trimmed_mean,
    "coordinate_median": coordinate_median,
    "sign_agreement": sign_agreement,
    "uw": uw,
    "slaw": slaw,
    "bmtl": bmtl,
    "gls": gls,
    "scale_invariant": scale_invariant,
    "stch": stch,
    "tchebycheff": tchebycheff,
    "pbi": pbi,
    "cosmos": cosmos,
    "imtl_l": imtl_l,
    "imtl": imtl,
    "dwa": dwa,
    "famo": famo,
    "stch_mtl": stch_mtl,
    "go4align": go4align,
    "ldc_mtl": ldc_mtl,
    "softadapt": softadapt,
    "relobralo": relobralo,
    "ntk": ntk,
    "gradnorm": gradnorm,
    "emtl": emtl,
    "db_mtl": db_mtl,
    "sam_gs": sam_gs,
    "excess_mtl": excess_mtl,
    "gcond": gcond,
    "moco": moco,
    "conflict_free_momentum": conflict_free_momentum,
}
