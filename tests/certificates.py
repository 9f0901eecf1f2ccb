"""Optimality certificates: check in float64, by duality, whether weights w are optimal for a Gramian M.

Each certificate returns a scale-free residual, 0 for an exact solution; a gap is never less than the true error.
n_i = sqrt(M_ii) are the row norms. M must be the Gramian in float64, whatever the precision of w, without the rows and
columns of absent tasks. If a certificate takes a `rounding`, w need only be optimal for some M' whose entries differ
from M's by that much, relative to n_i n_j: if gradients cancel, rounding M loses the optimum for M itself.
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
    """‖Gᵀw‖² = wᵀMw, clipped at 0."""
    return max(w @ M @ w, 0)


def min_norm_gap(M, w, cap=1):
    """Bound on (f(w) - min f)/(tr(M)/K), f(w) = wᵀMw on the simplex under the cap; at least w's violation of these.

    ‖d*‖ >= min_v <Gᵀv, d>/‖d‖ for every d, so min f >= max(0, min_v vᵀMw)²/f(w); the best v assigns caps in order.
    """
    M, w, n = _cast(M, w)
    f, cap = _quadratic(M, w), max(cap, 1 / len(M))
    v = np.clip(1 - cap * np.arange(len(M)), 0, cap)
    gap = f - _ratio(max(v @ np.sort(M @ w), 0) ** 2, f)
    return float(np.max([_ratio(gap, np.mean(n**2)), -w.min(), abs(w.sum() - 1), w.max() - cap]))


def dual_cone_residual(M, u, v, rounding=0):
    """KKT of min vᵀMv over v >= u: v >= u, Mv >= 0, (v - u)ᵀMv = 0.

    Relative to max|u|, to n_i s and to s², where s = max(n) Σ|u| bounds the length of the projected vector.
    """
    M, u, v, n = _cast(M, u, v)
    s, size = n.max() * abs(u).sum(), n @ abs(v)
    slack = M @ v
    off = np.maximum(abs(slack) - rounding * n * size, 0)
    primal = _ratio((u - v).max(), abs(u).max())
    dual = _ratio(np.where(slack < 0, off, 0), n * s).max()
    complementarity = _ratio((abs(v - u) * off).sum(), s**2)
    return float(np.max([primal, dual, complementarity, 0]))


def cagrad_gap(M, c, weights, rounding=0, enough=0):
    """How far d = Gᵀweights is from the optimum of max_d min_i <g_i, d> over ‖d - g0‖ <= r = c‖g0‖, without rescaling.

    The larger of: the gap to the dual value F(w) = <g_w, g0> + r‖g_w‖, relative to tr(M)/K; the excess of ‖d - g0‖
    over r, relative to sqrt(tr(M)/K). F(w) is an upper bound for every w on the simplex. The least is taken over: the w
    with d - g0 a multiple of g_w; the vertices, one of which is optimal for c = 0; the min-norm point, which is optimal
    if the optimal g_w is 0, so that d does not determine w; and, if the gap is still above `enough`, scipy's
    improvement of the best of these.

    For the M' of `rounding`, ‖g_w‖² and ‖g0‖² are smaller by `rounding` times (Σ n_i w_i)², and <g_i, d> by `rounding`
    times n_i Σ n_j t_j, t = r w/‖g_w‖.
    """
    M, weights, n = _cast(M, weights)
    K, scale, F = len(M), np.trace(M) / len(M), _factor(M)

    def length(w, sign=-1):
        return np.sqrt(max(np.linalg.norm(F @ w) ** 2 + sign * rounding * (n @ w) ** 2, 0))

    mean = np.full(K, 1 / K)
    g0, r = M @ mean, c * length(mean)  # <g_i, g0>
    step = weights - mean

    def dual(w):
        return w @ g0 + r * length(w)

    multiples = [np.maximum(step, 0), _nnls(F, F @ step)]

    def gap(w):
        blur = rounding * n.max() * _ratio(r * (n @ w), length(w, 1))
        return _ratio(dual(w) - blur - (M @ weights).min(), scale)

    best = min([*np.eye(K), min_norm_point(M), *(v / v.sum() for v in multiples if v.any())], key=gap)
    if gap(best) > enough:
        found = scipy.optimize.minimize(
            lambda w: _ratio(w @ g0 + r * np.linalg.norm(F @ w), scale),
            best,
            jac=lambda w: _ratio(g0 + r * _ratio(M @ w, np.linalg.norm(F @ w)), scale),
            method="SLSQP",
            bounds=[(0, 1)] * K,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-14},
        ).x.clip(0)
        best = min(best, found / found.sum(), key=gap)
    wide = np.longdouble(M)  # in float64, rounding would hide the excess of a long step between opposite rows
    excess = _ratio(np.sqrt(_quadratic(wide, step)) - c * np.sqrt(_quadratic(wide, mean)), np.sqrt(scale))
    return float(np.max([gap(best), excess, 0]))


def conic_gap(M, c, weights, rounding=0, enough=0):
    """How far d = Gᵀweights is from the optimum of max_u min_i <g_i, u> over ‖u‖ <= 1, <g0, u> >= c‖g0‖‖u‖, d ∝ u.

    (H² - max(V, 0)²)/(tr(M)/K), V the value of d's direction and H an upper bound; at least the amount by which the
    cosine falls short of c. The support function h of the feasible set gives H = h(g_w) for any w on the simplex: those
    for which d is the direction of g_w + m g0, the vertices and the min-norm point; then, if the gap is still above
    `enough`, the min-norm points of g_i + m g0 for many m, the best of which is refined.
    """
    M, weights, n = _cast(M, weights)
    K, scale, F = len(M), np.trace(M) / len(M), _factor(M)
    mean = np.full(K, 1 / K)
    length = np.linalg.norm(F @ mean)
    if length <= 100 * np.finfo(float).eps * np.sqrt(scale):
        return 0.0 if np.allclose(weights, mean) else np.inf
    towards, d, size = F.T @ (F @ mean) / length, F @ weights, n @ abs(weights)
    least = np.sqrt(max(d @ d - rounding * size**2, np.finfo(float).eps * d @ d))  # length of d
    reached = (F.T @ d + rounding * n * size).min() / least

    def support(w):
        v, along = np.linalg.norm(F @ w), w @ towards
        across = np.linalg.norm(F @ (w - along / length * mean))
        return v if along >= c * v else max(c * along + np.sqrt(1 - c**2) * across, 0)

    def gap(w):
        return _ratio(support(w) ** 2 - max(reached, 0) ** 2, scale)

    tried = [weights.clip(0), (weights - weights.min()).clip(0)]
    best = min([*np.eye(K), min_norm_point(M), *(w / w.sum() for w in tried if w.any())], key=support)
    first = 1e-4 * min(1, n[n > 0].min() / length)
    logs = np.linspace(np.log(first), np.log(1e4), 97)

    def shifted(log_m):
        moved = F + np.exp(log_m) * np.outer(F @ mean, np.ones(K))
        return min_norm_point(moved.T @ moved)

    nearest = None
    for log_m in sorted(logs, key=abs):
        if gap(best) > enough:
            w = shifted(log_m)
            if support(w) < support(best):
                best, nearest = w, log_m
    if gap(best) > enough and nearest is not None:
        step = logs[1] - logs[0]
        between = {"bounds": (nearest - step, nearest + step), "options": {"xatol": 1e-12}}
        log_m = scipy.optimize.minimize_scalar(lambda log_m: support(shifted(log_m)), **between).x
        best = min(best, shifted(log_m), key=support)
    return float(np.max([gap(best), c - d @ (F @ mean) / (length * least), 0]))


def geometric_median_gap(M, w, rounding=0):
    """Bound on (f(x) - min f)/(K sqrt(tr(M)/K)), f(x) = Σ ‖g_i - x‖, x = Gᵀw; at least w's violation of the simplex.

    For any s_i with ‖s_i‖ <= 1: f(y) >= Σ <s_i, g_i - y>, and the best y is in the hull. s_i is the direction to g_i
    from a point z; those of rows at z are chosen to cancel the others, as far as their lengths allow. z is x, its
    improvement by Newton's method, or a row. For the M' of `rounding`, squared distances differ by `rounding` times
    squared lengths.
    """
    M, w, n = _cast(M, w)
    G = _factor(M).T

    def around(z):
        apart = G - z
        r = np.linalg.norm(apart, axis=1)
        return r, _ratio(apart, r[:, None])

    def bound(z):
        r, s = around(z)
        near = r <= 1e-7 * n.max()
        rest = s[~near].sum(axis=0)
        s[near] = -_ratio(rest, max(near.sum(), np.linalg.norm(rest)))
        return (s * G).sum() - (G @ s.sum(axis=0)).max()

    x = (w / w.sum()) @ G
    points, value = [x, *G], around(x)[0].sum()
    for _ in range(20):
        r, u = around(points[0])
        inverse = 1 / np.maximum(r, 1e-9 * (n.max() or 1))
        curvature = inverse.sum() * np.eye(len(M)) - (u * inverse[:, None]).T @ u
        points.insert(0, points[0] + np.linalg.lstsq(curvature, u.sum(axis=0))[0])
        if around(points[0])[0].sum() > value + n.sum():
            break
    r = around(x)[0]
    blur = (np.sqrt(r**2 + rounding * (n**2 + (n @ w) ** 2)) - r).sum()
    gap = value - max(bound(z) for z in points) - blur
    return float(np.max([_ratio(gap, len(M) * np.sqrt(np.mean(n**2))), -w.min(), abs(w.sum() - 1)]))


def progress_residual(M, primary, progress, w):
    """KKT of min ‖d - g_p‖² over <g_j, d> >= progress_j ‖g_j‖², j != p, of which Gᵀw is a positive multiple.

    Relative to n_j and to s = Σ n_i |w_i| / w_p, the length d would have without cancellation: a bound on the change of
    M, relative to n_i n_j, that makes w optimal.
    """
    M, w, n = _cast(M, w)
    y = w / w[primary]
    others = (np.arange(len(M)) != primary) & (n > 0)
    asked = np.where(others, progress * n**2, 0)
    s = n @ abs(y)
    slack, y, n = (M @ y - asked)[others], y[others], n[others]
    primal, dual = (-slack / (n * s)).max(initial=0), _ratio(-y * n, s).max(initial=0)
    return float(max(primal, dual, _ratio((abs(y) * abs(slack)).sum(), s**2)))


def progress_multipliers(M, primary):
    """The weights of the projection of g_p onto the dual cone of the others, with that of g_p equal to 1."""
    M, _ = _cast(M)
    F = _factor(M)
    F[:, primary], own = 0, F[:, primary].copy()
    return _nnls(F, -own) + np.eye(len(M))[primary]


def progress_distance(M, primary, progress):
    """The largest required length divided by that of the shortest d with <g_j, d> >= progress_j ‖g_j‖², j != p.

    0 if there is no such d, by Farkas' lemma: the distance of the hull of g_j/(progress_j ‖g_j‖²) from 0.
    """
    M, n = _cast(M)
    rows = (np.arange(len(M)) != primary) & (n > 0) & (progress > 0)
    if not rows.any():
        return np.inf
    asked = (progress * n)[rows]
    scaled = (M / np.outer(n, n).clip(np.finfo(float).tiny))[np.ix_(rows, rows)] / np.outer(asked, asked)
    return float(np.sqrt(min_norm_value(scaled)) * asked.max())


def alpha_fair_residual(M, w, alpha, priority=1.0):
    """Max_i |(Mw)_i - u_i| / ((|M|w)_i + u_i), u_i = (q_i/w_i)^(1/α), over the nonzero rows; infinite unless w > 0."""
    M, w, n = _cast(M, w)
    M, w, q = M[np.ix_(n > 0, n > 0)], w[n > 0], np.broadcast_to(priority, n.shape)[n > 0]
    if not (np.isfinite(w).all() and (w > 0).all()):
        return np.inf
    wanted = (q / w) ** (1 / alpha)
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
