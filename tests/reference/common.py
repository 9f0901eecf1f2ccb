"""What the references share: how they run, algebra, programs."""

import functools
import itertools

import numpy as np
import scipy.optimize

REFERENCES = {}
"""Every reference by the name of its method; the decorators put it there."""


def listed(run):
    REFERENCES[run.__name__] = run
    return run


def stateful(factory):
    """Run ``factory((K, P), **hyper) -> step(G, L, p)`` over T steps; p (K,) tells which tasks G and L belong to."""

    @functools.wraps(factory)
    def run(grads, losses, present, **hyper):
        step = factory(grads.shape[1:], **hyper)
        rows = zip(grads, losses, present, strict=True)
        return np.array([step(G[p], L[p], p) if p.any() else np.zeros(G.shape[1]) for G, L, p in rows])

    return listed(run)


def stateless(update):
    """Run ``update(G, L, **hyper) -> d``; per-task hyper-parameters are cut to the entries of the present tasks."""

    def factory(_, **hyper):
        return lambda G, L, p: update(G, L, **{k: np.asarray(h)[p] if np.ndim(h) else h for k, h in hyper.items()})

    run = stateful(functools.wraps(update)(factory))
    run.update = update
    return listed(run)


def weighted(weights):
    """Run ``weights(G, L, **hyper) -> w`` with d = Gᵀw; the function itself is available as ``.weights``."""
    run = stateless(functools.wraps(weights)(lambda G, L, **hyper: weights(G, L, **hyper) @ G))
    run.weights = weights
    return listed(run)


def norms(G):
    """n_i = ‖g_i‖."""
    return np.linalg.norm(G, axis=1)


def divide(G, by):
    """Rows g_i / by_i, zero where by_i = 0."""
    return np.divide(G, by[:, None], out=np.zeros_like(G), where=by[:, None] != 0)


def unit(G):
    """Rows u_i = g_i / n_i, zero where n_i = 0."""
    return divide(G, norms(G))


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


def weighing(factory):
    """Like `stateful`, for ``factory((K, P), **hyper) -> weigh(L, p)`` that returns the weights w, with d = Gᵀw."""

    def make(shape, **hyper):
        weigh = factory(shape, **hyper)
        return lambda G, L, p: weigh(L, p) @ G

    return stateful(functools.wraps(factory)(make))


def rest(w, p):
    """The weights of the present tasks on their simplex, with their ratios kept, and their sum; equal if that is 0.

    A sum of 0 is replaced by a number too small to change any other sum, so that ratios are kept.
    """
    total = w[p].sum()
    return (w[p] / total, total) if total else (np.full(p.sum(), 1 / p.sum()), 1e-100)
