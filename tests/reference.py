"""Each method again in float64 numpy, straight from its paper; nothing here knows the library.

Every entry of `REFERENCES` has the signature ``name(grads, losses, present, **hyper) -> updates`` with grads (T, K, P):
T successive steps, losses (T, K), present (T, K) bool, updates (T, P). A step sees the rows of the present tasks only;
a method with state keeps it per task, so absent tasks leave theirs untouched. No task present: a zero update.

G holds the task gradients as rows, L the losses, n the row norms, g0 the mean row, d the update, w the weights.
"""

import functools
import itertools

import numpy as np
import scipy.optimize

# ------------------------------------------------------------------------------------------------ driving the methods


def stateful(factory):
    """Drive ``factory((K, P), **hyper) -> step(G, L, p)`` over T steps; p (K,) says whose rows G and L are."""

    @functools.wraps(factory)
    def run(grads, losses, present, **hyper):
        step = factory(grads.shape[1:], **hyper)
        rows = zip(grads, losses, present, strict=True)
        return np.array([step(G[p], L[p], p) if p.any() else np.zeros(G.shape[1]) for G, L, p in rows])

    return run


def stateless(update):
    """Drive ``update(G, L, **hyper) -> d``; of a hyper-parameter per task it gets the entries of the present ones."""

    def factory(_, **hyper):
        return lambda G, L, p: update(G, L, **{k: np.asarray(h)[p] if np.ndim(h) else h for k, h in hyper.items()})

    run = stateful(functools.wraps(update)(factory))
    run.update = update
    return run


def weighted(weights):
    """Drive ``weights(G, L, **hyper) -> w`` with d = Gᵀw; the function itself stays reachable as ``.weights``."""
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


def nnls(A, b):
    """Argmin ‖Ax - b‖ over x >= 0: the best non-negative solution over all supports, from 7 unknowns on scipy's."""
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
    the objective is t²‖Gᵀw‖² + s²(t - 1)², which for every t is least at the w sought.
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


# ---------------------------------------------------------------------------------------------- weights from gradients


@weighted
def mgda(G, L, normalization="none", apply_to="raw"):
    """Désidéri 2012: min ‖Gᵀw‖ over the simplex; Sener & Koltun 2018 divide the rows first (by n, L or L·n)."""
    by = {"none": np.ones(len(G)), "l2": norms(G), "loss": L, "loss+": L * norms(G)}[normalization]
    w = min_norm(divide(G, by))
    return w if apply_to == "raw" else divide(w[:, None], by)[:, 0]


def project(G, i, order):
    """Yu et al. 2020, Algorithm 1, lines 4-9: g_i freed of its conflict with each g_j of `order` in turn."""
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


@weighted
def cagrad(G, L, c=0.4, rescale="none"):
    """Liu et al. 2021: max_d min_i <g_i, d> subject to ‖d - g0‖ <= r = c‖g0‖, by its dual min_w <g_w, g0> + r‖g_w‖.

    Where g_w != 0 the dual's optimality conditions are those of the min-norm point of the rows g_i + ηg0 with
    η = ‖g_w‖/r, and ‖g_w(η)‖/η falls with η, so that η is a root; d = g0 + r g_w/‖g_w‖. As η -> 0, g0 + g_w(η)/η
    tends, if 0 is a convex combination of the rows, to the point nearest g0 with no conflict. If that one is within r
    of g0 it is optimal (value 0, as all points of the ball without conflict are), and there is no root.
    """
    K, g0, size = len(G), G.mean(axis=0), norms(G).max()
    r = c * np.linalg.norm(g0)

    def w(log_eta):
        return min_norm(G + np.exp(log_eta) * g0)

    def excess(log_eta):
        return np.linalg.norm(w(log_eta) @ G) / r - np.exp(log_eta)

    def step():
        if r == 0:
            return np.zeros(K)
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

    return (1 / K + step()) / {"none": 1, "1+c^2": 1 + c**2, "1+c": 1 + c}[rescale]


@weighted
def fairgrad(G, L, alpha=2.0):
    """Ban & Ji 2024: GGᵀw = w^(-1/α), w > 0; rows of zeros take no part. Raises where 0 is a convex combination.

    Newton's method in log z, z_i = n_i w_i, on the cosines C: (Cz)_i = b_i z_i^(-1/α), b_i = n_i^(1/α - 1). Its step is
    one of descent for the convex φ(z) = zᵀCz/2 - Σ b_i ψ(z_i), ψ' = z^(-1/α). No solution where vᵀG = 0 for a v >= 0,
    v != 0: it would have <g_i, d> > 0 for all i, but Σ v_i <g_i, d> = 0.
    """
    n = norms(G)
    if not n.all():
        w = np.zeros(len(G))
        w[n > 0] = fairgrad.weights(G[n > 0], None, alpha) if n.any() else 0
        return w
    U, size = divide(G, n), n.max()
    if np.linalg.norm(min_norm(U) @ U) < 1e-13:
        raise ValueError("Pareto-stationary rows: no alpha-fair point.")
    C, b, p = U @ U.T, (n / size) ** (1 / alpha - 1), 1 - 1 / alpha

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


@weighted
def upgrad(G, L, preference=None, regularization=0.0):
    """Quinton & Rey 2024: w = Σ_i π(p_i e_i), π(u) = argmin vᵀMv over v >= u; with r > 0, M becomes M/tr(M) + rI."""
    K, factor = len(G), G.T
    if regularization and G.any():
        factor = np.vstack([G.T / np.linalg.norm(G), np.sqrt(regularization) * np.eye(K)])
    U = np.diag(np.full(K, 1 / K) if preference is None else preference)
    return np.sum([u + nnls(factor, -factor @ u) for u in U], axis=0)


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


def smoothed(weights, present, decay):
    """Zhou et al. 2022 (CR-MOGM) on weights (T, K): λ_i <- decay λ_i + (1-decay) w_i, from task i's first weight on."""
    state, used = np.full(weights.shape[1], np.nan), []
    for w, p in zip(weights, present, strict=True):
        state[p] = np.where(np.isnan(state[p]), w[p], decay * state[p] + (1 - decay) * w[p])
        used.append(np.where(p, state, 0))
    return np.array(used)


REFERENCES = {
    "mean": mean,
    "sum": sum,
    "constant": constant,
    "mgda": mgda,
    "pcgrad": pcgrad,
    "cagrad": cagrad,
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
    "upgrad": upgrad,
    "trimmed_mean": trimmed_mean,
    "uw": uw,
    "gradnorm": gradnorm,
    "db_mtl": db_mtl,
}
