"""Weights from losses."""

import itertools

import numpy as np

from reference.common import Adam, stateful, weighing, weighted


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


@weighted
def ntk(G, L, traces, scale="sum"):
    """Wang et al. 2020: w = Σ t / t."""
    return getattr(np, scale)(traces) / traces


@weighted
def bmtl(G, L, temperature=1.0, normalize=True):
    """Liang & Zhang 2020: Σ exp(L/T) has the derivatives w = exp(L/T)/T; normalised, Σ w = K."""
    w = np.exp(L / temperature) / temperature
    return w * len(w) / w.sum() if normalize else w


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
