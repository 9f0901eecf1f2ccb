"""Methods that look at losses and Gramian."""

import itertools

import numpy as np

from reference.common import Adam, alpha_fair, divide, min_norm, norms, stateful, weighted
from reference.gramian import imtl_g


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


@weighted
def emtl(G, L, strength):
    """Yuan & Zhang 2023, reconstructed: w = max(∂(Σ L + λ Var r)/∂L, 0) with r = L/n over the n > 0, held constant."""
    w, n, moves = np.ones(len(G)), norms(G), norms(G) > 0
    if moves.any():
        r = L[moves] / n[moves]
        w[moves] = np.maximum(1 + 2 * strength / len(r) * (r - r.mean()) / n[moves], 0)
    return w


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


@stateful
def imtl(shape, sign="paper", init=0.0, learning_rate=0.025):
    """Liu et al. 2021: IMTL-G on the gradients e^s g_i of the losses e^s L - s, then a step of s."""
    s, adam = np.zeros(shape[0]) + init, Adam(shape[0], learning_rate)

    def step(G, L, p):
        scale = np.exp(s[p])
        s[p] += adam(scale * L - 1, p)
        return imtl_g.update(scale[:, None] * G, L, sign=sign)

    return step
