"""Methods that look at two batches."""

import numpy as np

from reference.common import norms, rest, simplex, stateful


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
