"""Is this an optimum? Answered from the Gramian M and the weights w alone, in float64, by duality.

Each certificate returns a scale-free residual, 0 for an exact solution; a gap is never less than the true error.
n_i = sqrt(M_ii) are the row norms. M is to be the Gramian in float64 whatever precision w was found in, without the
rows and columns of absent tasks.
"""

import numpy as np
import scipy.optimize


def _cast(M, *vectors):
    """Float64 copies, with the symmetrised M first and the row norms last."""
    M = np.asarray(M, float)
    M = (M + M.T) / 2
    return M, *(np.asarray(v, float) for v in vectors), np.sqrt(np.maximum(np.diag(M), 0))


def _ratio(a, b):
    """a/b, and 0/0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((a == 0) & (b == 0), 0, np.divide(a, b))


def _quadratic(M, w):
    """‖Gᵀw‖² = wᵀMw, kept from rounding below 0."""
    return max(w @ M @ w, 0)


def min_norm_gap(M, w):
    """Bound on (f(w) - min f)/(tr(M)/K), f(w) = wᵀMw on the simplex; at least w's violation of the simplex.

    ‖d*‖ >= min_i <g_i, d>/‖d‖ for every d, so min f >= max(0, min_i (Mw)_i)²/f(w).
    """
    M, w, n = _cast(M, w)
    f = _quadratic(M, w)
    gap = f - _ratio(max((M @ w).min(), 0) ** 2, f)
    return float(np.max([_ratio(gap, np.mean(n**2)), -w.min(), abs(w.sum() - 1)]))


def dual_cone_residual(M, u, v):
    """KKT of min vᵀMv over v >= u: v >= u, Mv >= 0, (v - u)ᵀMv = 0.

    Relative to max|u|, to n_i s and to s², where s = max(n) Σ|u| bounds the length of what is projected.
    """
    M, u, v, n = _cast(M, u, v)
    s, y = n.max() * abs(u).sum(), M @ v
    primal = _ratio((u - v).max(), abs(u).max())
    dual = _ratio(-y, n * s).max()
    complementarity = _ratio((abs(v - u) * abs(y)).sum(), s**2)
    return float(np.max([primal, dual, complementarity, 0]))


def cagrad_gap(M, c, weights):
    """How far d = Gᵀweights is from the optimum of max_d min_i <g_i, d> over ‖d - g0‖ <= r = c‖g0‖, without rescaling.

    The larger of: the gap to the dual value F(w) = <g_w, g0> + r‖g_w‖, relative to tr(M)/K; the excess of ‖d - g0‖
    over r, relative to sqrt(tr(M)/K). F(w) is an upper bound for every w on the simplex; the least of these is taken:
    the w that d - g0 is a multiple of; the vertices, one of which is optimal for c = 0; the min-norm point, which is
    optimal where the optimal g_w is 0, so that d does not tell w; and what scipy makes of the best of them.
    """
    M, weights, _ = _cast(M, weights)
    K, scale, F = len(M), np.trace(M) / len(M), _factor(M)
    g0, r = M.mean(axis=1), c * np.linalg.norm(F.mean(axis=1))  # <g_i, g0>
    step = weights - 1 / K

    def dual(w):
        return w @ g0 + r * np.linalg.norm(F @ w)

    multiples = [np.maximum(step, 0), _nnls(F, F @ step)]
    best = min([*np.eye(K), min_norm_point(M), *(v / v.sum() for v in multiples if v.any())], key=dual)
    found = scipy.optimize.minimize(
        lambda w: _ratio(dual(w), scale),
        best,
        jac=lambda w: _ratio(g0 + r * _ratio(M @ w, np.linalg.norm(F @ w)), scale),
        method="SLSQP",
        bounds=[(0, 1)] * K,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14},
    ).x.clip(0)
    gap = _ratio(min(dual(best), dual(found / found.sum())) - (M @ weights).min(), scale)
    excess = _ratio(np.linalg.norm(F @ step) - r, np.sqrt(scale))
    return float(np.max([gap, excess, 0]))


def alpha_fair_residual(M, w, alpha):
    """Max_i |(Mw)_i - w_i^(-1/α)| / ((|M|w)_i + w_i^(-1/α)) over the rows that are not zero; infinite unless w > 0."""
    M, w, n = _cast(M, w)
    M, w = M[np.ix_(n > 0, n > 0)], w[n > 0]
    if not (np.isfinite(w).all() and (w > 0).all()):
        return np.inf
    wanted = w ** (-1 / alpha)
    return float(np.max(abs(M @ w - wanted) / (abs(M) @ w + wanted), initial=0))


def conflict(M, w, size=None):
    """Max_i -<g_i, d>/(n_i · size), 0 without conflict: the worst first-order harm to a task, relative to its row norm.

    `size` is Σ n_j |w_j| by default, the length d would have without cancellation; n.max() is the other usual choice.
    """
    M, w, n = _cast(M, w)
    size = n @ abs(w) if size is None else size
    return float(np.max(_ratio(-(M @ w), n * size), initial=0))


# ------------------------------------------------------------------------------ optima, through a factor of M = FᵀF


def _factor(M):
    """F with FᵀF = M up to rounding relative to n_i n_j: from the eigenvalues of the cosines."""
    n = np.sqrt(np.maximum(np.diag(M), 0))
    values, vectors = np.linalg.eigh(_ratio(M, np.outer(n, n)))
    values = np.where(values > len(M) * np.finfo(float).eps * values.max(), values, 0)
    return np.sqrt(values)[:, None] * vectors.T * n


def _nnls(F, b):
    """Argmin ‖Fv - b‖ over v >= 0."""
    n = np.linalg.norm(F, axis=0)
    n = np.where(n == 0, 1, n)
    return scipy.optimize.nnls(F / n, b, maxiter=100 * len(n))[0] / n


def min_norm_point(M):
    """Argmin wᵀMw over the simplex: the multiple of sum 1 of argmin vᵀMv + s²(1ᵀv - 1)² over v >= 0, for any s > 0."""
    M, n = _cast(M)
    if not n.all():
        return np.eye(len(M))[n.argmin()]
    F = np.vstack([_factor(M), np.full(len(M), n.min())])
    v = _nnls(F, np.append(np.zeros(len(M)), n.min()))
    return v / v.sum()


def min_norm_value(M):
    """Min wᵀMw over the simplex."""
    M, _ = _cast(M)
    return _quadratic(M, min_norm_point(M))


def dual_cone_value(M, u):
    """Min vᵀMv over v >= u."""
    M, u, _ = _cast(M, u)
    F = _factor(M)
    return _quadratic(M, u + _nnls(F, -F @ u))
