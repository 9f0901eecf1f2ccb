"""Families of task gradients G (K, P) with a difficult property that holds by construction.

G is stationary if vᵀG = 0 for some v >= 0, v != 0: no direction improves all tasks. It is strongly stationary if some
v > 0 satisfies this, weakly if only v with zeros do. ``FAMILIES[name](K, P, rng)`` samples a family; `stack` seeds by
name and shape, so a new family does not change the matrices of others. Tall and wide stacks differ only in shape: with
K >> P nearly every family is stationary. Any K, P >= 1 is allowed; a shape that cannot have the property gives zero
rows.
"""

import zlib

import numpy as np


def unit(P, rng):
    """A uniformly random direction."""
    u = rng.normal(size=P)
    return u / np.linalg.norm(u)


def normal(K, P, rng):
    """Independent standard normal entries."""
    return rng.normal(size=(K, P))


def correlated(K, P, rng):
    """One shared row, three times the size of each task's own: pairwise cosines near 0.9."""
    return rng.normal(size=(K, P)) + 3 * rng.normal(size=P)


def rank_deficient(K, P, rng):
    """Rank max(1, min(K, P) // 2), as a product of factors of that inner size."""
    rank = max(1, min(K, P) // 2)
    return rng.normal(size=(K, rank)) @ rng.normal(size=(rank, P)) / np.sqrt(rank)


def rank_one(K, P, rng):
    """Multiples of one row, of both signs."""
    return np.outer(rng.normal(size=K), rng.normal(size=P))


def duplicate(K, P, rng):
    """Rows in equal pairs, bit by bit."""
    return rng.normal(size=(K, P))[np.arange(K) // 2]


def opposite(K, P, rng):
    """Rows in opposite pairs, bit by bit: stationary for K >= 2, by v = (1, 1) on a pair."""
    sign = np.where(np.arange(K) % 2, -1, 1)
    return sign[:, None] * duplicate(K, P, rng)


def zero_row(K, P, rng):
    """One row of zeros among normal ones: stationary, by v = its unit vector."""
    return rng.normal(size=(K, P)) * (np.arange(K) != K // 2)[:, None]


def all_zero(K, P, rng):
    """G = 0."""
    return np.zeros((K, P))


def scales(K, P, rng):
    """Rows up to 1e6 apart, in random order."""
    return rng.normal(size=(K, P)) * rng.permutation(np.logspace(-3, 3, K))[:, None]


def balanced(N, rng):
    """The rows of N, the last replaced such that vᵀN = 0 for a random v > 0; a single row becomes zero."""
    v = rng.uniform(0.5, 1.5, size=len(N))
    return np.vstack([N[:-1], -(v[:-1] @ N[:-1]) / v[-1]])


def strongly_stationary(K, P, rng):
    """Normal rows and one that balances them: vᵀG = Σ_{i<K} v_i g_i - v_K (Σ_{i<K} v_i g_i)/v_K = 0 with v > 0."""
    return balanced(rng.normal(size=(K, P)), rng)


def weakly_stationary(K, P, rng):
    """Half of the rows balanced and orthogonal to a direction u along which all others are positive (K >= 2).

    The v of the first half serves. If vᵀG = 0 with v >= 0, then 0 = vᵀGu = Σ v_i <g_i, u> over the others: v = 0 there.
    """
    N, u, half = rng.normal(size=(K, P)), unit(P, rng), (K + 1) // 2
    N -= np.outer(N @ u, u)
    return np.vstack([balanced(N[:half], rng), N[half:] + np.outer(rng.uniform(0.5, 1.5, size=K - half), u)])


def non_stationary(K, P, rng):
    """All rows in the half-space <g, u> >= 0.1, so vᵀGu > 0 for every v >= 0, v != 0; conflicts remain."""
    G, u = rng.normal(size=(K, P)), unit(P, rng)
    return G + np.outer(0.1 + abs(G @ u) - G @ u, u)


def near_stationary(K, P, rng):
    """A balanced G plus 1e-3 u in every row: ‖vᵀG‖ = 1e-3 for its v of sum 1, yet rank K if P >= K."""
    return strongly_stationary(K, P, rng) + 1e-3 * unit(P, rng)


def conditioned(condition):
    """Singular values from 1 to 1/sqrt(condition), evenly in the logarithm: M has this condition number if P >= K."""

    def family(K, P, rng):
        rank = min(K, P)
        left, right = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (K, P))
        return left * np.logspace(0, -np.log10(condition) / 2, rank) @ right.T

    return family


def at_distance(distance):
    """A balanced G plus distance·u in every row: ‖vᵀG‖ = distance for its v of sum 1."""

    def family(K, P, rng):
        return strongly_stationary(K, P, rng) + distance * unit(P, rng)

    return family


def proportional(K, P, rng):
    """Positive multiples, up to 100 times as long, of half as many rows: a row and its multiples agree on d."""
    half = (K + 1) // 2
    rows = rng.normal(size=(half, P))
    copies = rows[rng.integers(half, size=K - half)] * 10 ** rng.uniform(-2, 2, size=(K - half, 1))
    return rng.permutation(np.vstack([rows, copies]))


def proportional_integers(K, P, rng):
    """The same in small integers and round factors, where ties are exact."""
    half = (K + 1) // 2
    rows = rng.integers(-3, 4, size=(half, P)).astype(float)
    copies = rows[rng.integers(half, size=K - half)] * rng.choice([0.1, 0.5, 2, 10, 100], size=(K - half, 1))
    return rng.permutation(np.vstack([rows, copies]))


def louder(K, P, rng):
    """Near stationarity, with one row 1e5 times longer than the others."""
    return near_stationary(K, P, rng) * np.where(np.arange(K) == rng.integers(K), 1e5, 1)[:, None]


def nearly_opposite(K, P, rng):
    """Normal rows, the second 1e-4 to 1e-1 of its length from a negative multiple of the first (K >= 2)."""
    G = rng.normal(size=(K, P))
    if K > 1:
        G[1] = G[0] * -(10 ** rng.uniform(-1, 1))
        G[1] += 10 ** rng.uniform(-4, -1) * np.linalg.norm(G[1]) * unit(P, rng)
    return rng.permutation(G)


def nearly_equal(K, P, rng):
    """Two rows and others 1e-6 to 1e-1 from one of them."""
    return rng.normal(size=(2, P))[rng.integers(2, size=K)] + 10 ** rng.uniform(-6, -1) * rng.normal(size=(K, P))


def integers(K, P, rng):
    """Integers of up to two digits: Gramians without rounding."""
    return rng.integers(-99, 100, size=(K, P)).astype(float)


def tiny(K, P, rng):
    """Normal at a global scale of 1e-18, whose square lies near float32's smallest normal number."""
    return 1e-18 * rng.normal(size=(K, P))


def huge(K, P, rng):
    """Normal at a global scale of 1e18, whose square times P nears or passes float32's largest number."""
    return 1e18 * rng.normal(size=(K, P))


FAMILIES = {
    family.__name__: family
    for family in (
        normal,
        correlated,
        rank_deficient,
        rank_one,
        duplicate,
        opposite,
        zero_row,
        all_zero,
        scales,
        strongly_stationary,
        weakly_stationary,
        non_stationary,
        near_stationary,
        tiny,
        huge,
    )
}

# Only for the solvers.
ILL_CONDITIONED = {
    **{f"condition_{c:.0e}": conditioned(c) for c in (1e4, 1e8, 1e12)},
    **{f"distance_{d:.0e}": at_distance(d) for d in (1e-1, 1e-2, 1e-4, 1e-6)},
    **{f.__name__: f for f in (proportional, proportional_integers, louder, nearly_opposite, nearly_equal, integers)},
}

# Stationary at every shape with K >= 2.
STATIONARY = frozenset({"opposite", "zero_row", "all_zero", "strongly_stationary", "weakly_stationary"})


EVERY = {**FAMILIES, **ILL_CONDITIONED}


def stack(name, K, P, draw=None):
    """The family's G (K, P) in float64, seeded by name, shape and draw."""
    seed = zlib.crc32(f"{name} {K} {P}".encode())
    return EVERY[name](K, P, np.random.default_rng(seed if draw is None else [seed, draw]))


def gramian(G, dtype):
    """The Gramian as a solver gets it: cast, with subnormal numbers flushed to zero as in XLA."""
    with np.errstate(over="ignore"):
        M = (G @ G.T).astype(dtype)
    M = np.where(abs(M) < np.finfo(dtype).tiny, 0, M).astype(dtype)
    rows = np.diag(M) > 0
    return np.where(rows & rows[:, None], M, 0).astype(dtype)


def within_contract(M):
    """Whether M is finite, unlike that of `huge` at many columns, and positive semidefinite up to rounding.

    The flushed off-diagonals of `tiny` violate the latter for K > P.
    """
    if not np.isfinite(M).all():
        return False
    n = np.sqrt(np.diag(M).astype(float))
    n = np.where(n > 0, n, 1)
    eps = np.finfo(M.dtype).eps
    return np.linalg.eigvalsh(M.astype(float) / n / n[:, None])[0] > -len(M) * eps
