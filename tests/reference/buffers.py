"""Methods that keep a gradient for every task."""

import itertools

import numpy as np

from reference.common import divide, norms, rest, simplex, stateful, unit
from reference.gramian import conflict_free


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
