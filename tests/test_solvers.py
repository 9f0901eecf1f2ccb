"""Every solver, checked independently by `certificates` in float64 on the Gramian that the solver got.

The standard: 1e-5 in float32, 1e-12 in float64, relative to tr(M)/K, plus the floor implied by weights of that dtype:
changing each w_i by a few eps changes M w by a few eps |M| |w|. Looser tolerances are explained where they are used.
"""

import certificates
import families
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from harness import precisions

from mtlgrad_jax import solvers
from mtlgrad_jax.solvers import cosines, direction_of_products, project_simplex, significant_eigh
from mtlgrad_jax.solvers._nonnegative_qp import nonnegative_qp
from mtlgrad_jax.solvers._solution import INFEASIBLE, MAX_STEPS, SOLVED, shift

SHAPES = [(1, 3), (2, 5), (3, 3), (5, 3), (5, 50), (8, 6), (16, 8), (16, 40), (64, 10), (64, 64), (64, 200)]
SHAPES += [(128, 64), (128, 512)]
# The families for the larger shapes.
HARDEST = ["normal", "scales", "duplicate", "weakly_stationary", "condition_1e+08", "distance_1e-02"]
DTYPES = ["float32", "float64"]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
FLOOR = 4  # eps
EITHER = (SOLVED, INFEASIBLE)  # the certificates tell which is correct
RADII = [0.1, 0.4, 0.9]
ALPHAS = [0.1, 0.5, 1, 2, 10]
CAPS = [0.15, 0.3, 0.5, 1]
COSINES = [0, 0.25, 0.5, 0.9, 0.99]
SHARES = [0, 0.02, 0.5, 1]

eigh, solve_products = jax.jit(significant_eigh), jax.jit(direction_of_products)
solve_qp = jax.jit(lambda Q, q: nonnegative_qp(Q, q, jnp.ones(len(q), bool))[0])


@pytest.fixture(params=DTYPES)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def cases(K, P, dtype):
    """(family, Gramian) of one shape, without Gramians that violate the contract, which `stacks` does not produce."""
    names = families.EVERY if K < 64 else HARDEST
    every = [(name, families.gramian(families.stack(name, K, P), dtype)) for name in names]
    return [(name, M) for name, M in every if families.within_contract(M)]


def floor(M, w, scale):
    return FLOOR * np.finfo(M.dtype).eps * max(abs(M.astype(float)) @ abs(np.asarray(w, float))) / (scale or 1)


def shifted(M):
    """The solvers' shift of a unit diagonal: an entry may differ by that much, relative to n_i n_j."""
    return shift(jnp.asarray(M))


def ones(K, dtype):
    return np.full(K, 1 / K, dtype)


def checked(solution, tolerance, results=(SOLVED,)):
    """The value in float64, after checking that the solution reports success and a small residual."""
    assert np.isfinite(solution.value).all()
    assert solution.result in results
    assert solution.residual <= tolerance
    return np.asarray(solution.value, float)


# ------------------------------------------------------------------------------------------------------- certificates


def judge_min_norm(M, w):
    M64, dtype = M.astype(float), str(M.dtype)
    assert certificates.min_norm_gap(M64, w) <= TOLERANCE[dtype] + floor(M, w, np.trace(M64) / len(M))


def judge_capped(M, cap, w):
    M64, dtype = M.astype(float), str(M.dtype)
    assert certificates.min_norm_gap(M64, w, cap) <= TOLERANCE[dtype] + floor(M, w, np.trace(M64) / len(M))


def judge_projection(M, u, v):
    M64, dtype = M.astype(float), str(M.dtype)
    size = np.diag(M64).max() * abs(u).sum()
    assert certificates.dual_cone_residual(M64, u, v, shifted(M)) <= TOLERANCE[dtype] + floor(M, v, size)


def judge_max_min(M, c, t):
    M64, dtype = M.astype(float), str(M.dtype)
    assert (t >= 0).all()
    d = 1 / len(M) + t
    allowed = TOLERANCE[dtype] + floor(M, d, np.trace(M64) / len(M))
    assert certificates.cagrad_gap(M64, c, d, FLOOR * np.finfo(dtype).eps, enough=allowed) <= allowed


def judge_conic(M, c, w):
    M64, dtype = M.astype(float), str(M.dtype)
    scale, length, share = np.trace(M64) / len(M), np.sqrt(max(M64.mean(), 0)), w / (abs(w).sum() or 1)
    allowed = TOLERANCE[dtype] + floor(M, share, scale)
    # Rounding M by eps moves ‖d‖² by eps |w|ᵀ|M||w|, much more than eps ‖d‖² where the rows cancel.
    blur = FLOOR * np.finfo(dtype).eps * abs(w) @ abs(M64) @ abs(w)
    assert certificates.conic_gap(M64, c, w, FLOOR * np.finfo(dtype).eps, enough=allowed) <= allowed
    assert abs(np.sqrt(max(w @ M64 @ w, 0)) - length) * length <= TOLERANCE[dtype] * length**2 + blur


def judge_median(M, w):
    rounding = 2 * FLOOR * np.finfo(M.dtype).eps  # of a distance: rounding of two rows adds up
    assert certificates.geometric_median_gap(M.astype(float), w, rounding) <= TOLERANCE[str(M.dtype)]


def judge_progress(M, primary, share, w, distance=None):
    """`distance` is that of the others' hull, which does not depend on the share: 0 if no progress is possible."""
    M64, dtype, share = M.astype(float), str(M.dtype), np.full(len(M), float(share))
    eps, own, n = np.finfo(dtype).eps, np.eye(len(M))[primary], np.sqrt(np.diag(M64))
    if n[primary] == 0:
        assert not w[np.arange(len(M)) != primary].any()
        return
    if share.any() and distance is None:
        distance = certificates.progress_distance(M64, primary, share)
    y = certificates.progress_multipliers(M64, primary)
    hidden = y @ M64 @ y <= 100 * eps * (n @ y) ** 2  # the direction without conflict is rounding
    if not w.any():  # the only one, or rounding hides another
        assert not share.any()
        assert hidden
    elif (w == own).all() and certificates.progress_residual(M64, primary, share, own) > TOLERANCE[dtype]:
        assert share.any()
        assert distance**2 <= TOLERANCE[dtype] or hidden
    else:
        possible = not share.any() or distance**2 > FLOOR * eps
        assert possible or certificates.progress_residual(M64, primary, share, own) == 0
        assert certificates.progress_residual(M64, primary, share, w) <= TOLERANCE[dtype]
        rounding = FLOOR * eps * (n @ abs(w)) ** 2
        assert abs(w @ M64 @ w - n[primary] ** 2) <= TOLERANCE[dtype] * n[primary] ** 2 + rounding


def judge_alpha_fair(M, alpha, w, tolerance):
    M64, tiny = M.astype(float), np.finfo(M.dtype).tiny
    n = np.sqrt(np.diag(M64))
    assert (w[n == 0] == 0).all()
    # A weight below the smallest normal number comes out as zero: restore its value.
    lost = (n > 0) & (w == 0)
    filled = w.copy()
    # Rounding the other weights changes M w by a few eps |M| w, which may hide it completely.
    for _ in range(3):  # it contributes a little to M w itself
        filled[lost] = (M64 @ filled + FLOOR * np.finfo(M.dtype).eps * abs(M64) @ w)[lost] ** -float(alpha)
    assert (filled[lost] < tiny).all()
    assert certificates.alpha_fair_residual(M64, filled, alpha) <= tolerance
    assert certificates.conflict(M64, w) <= tolerance


def check_min_norm(M):
    judge_min_norm(M, checked(solvers.min_norm(M), 100 * TOLERANCE[M.dtype.name]))


def check_project_rows(M):
    K, tolerance = len(M), TOLERANCE[M.dtype.name]
    uniform = checked(solvers.project_rows(M, ones(K, M.dtype)), 100 * tolerance)
    n = np.sqrt(np.diag(M.astype(float)))
    assert (uniform >= ones(K, M.dtype)).all()
    # The residuals of the projections are summed: each is at most its tolerance times n_max / K, plus what the shift
    # may hide.
    size = n.max() + (floor(M, uniform, n.max()) + shifted(M) * (n @ uniform)) / tolerance
    assert certificates.conflict(M.astype(float), uniform, size) <= tolerance
    for u in np.eye(K, dtype=M.dtype)[:2]:
        judge_projection(M, u, checked(solvers.project_rows(M, u), 100 * tolerance))


def check_project_weights(M):
    K = len(M)
    signed = np.random.default_rng(0).normal(size=K).astype(M.dtype)
    for u in (signed, -abs(signed), np.where(np.arange(K) % 3, signed, 0)):
        judge_projection(M, u, checked(solvers.project_weights(M, u), 100 * TOLERANCE[M.dtype.name]))


def check_capped_min_norm(M):
    for cap in CAPS:
        solved = solvers.capped_min_norm(M, jnp.asarray(cap, M.dtype), np.ones(len(M), bool))
        judge_capped(M, cap, checked(solved, 100 * TOLERANCE[M.dtype.name]))


def check_conic(M):
    for c in COSINES if len(M) < 64 else COSINES[::2]:
        solved = solvers.conic_direction(M, jnp.asarray(c, M.dtype), np.ones(len(M), bool))
        judge_conic(M, c, checked(solved, 100 * TOLERANCE[M.dtype.name], EITHER))


def check_geometric_median(M):
    # The solution's own residual is the force at the median, in which rounding is not small near a row.
    judge_median(M, checked(solvers.geometric_median(M, np.ones(len(M), bool)), 0.1))


def check_progress(M):
    K = len(M)
    distance = certificates.progress_distance(M.astype(float), K - 1, np.ones(K))
    for share in SHARES:
        solved = solvers.progress_direction(M, K - 1, jnp.full(K, share, M.dtype))
        judge_progress(M, K - 1, share, checked(solved, 100 * TOLERANCE[M.dtype.name], EITHER), distance)


def check_max_min(M):
    for c in RADII if len(M) < 128 else RADII[:2]:
        solved = solvers.max_min_direction(M, jnp.asarray(c, M.dtype), np.ones(len(M), bool))
        judge_max_min(M, c, checked(solved, 100 * TOLERANCE[M.dtype.name]))


def check_alpha_fair(M):
    for alpha in ALPHAS:
        judged, solved = M, solvers.alpha_fair(M, jnp.asarray(alpha, M.dtype))
        if np.isinf(solved.value).any():  # beyond the largest number: checked where it is finite
            judged, scale = M * np.ldexp(M.dtype.type(1), 60), 2.0 ** (60 * alpha / (1 + alpha))
            solved = solvers.alpha_fair(judged, jnp.asarray(alpha, M.dtype))
            assert np.max(solved.value) > np.finfo(M.dtype).max / scale
        w = checked(solved, 100 * TOLERANCE[M.dtype.name])
        # The error of a power is eps times the logarithm.
        powers = np.finfo(M.dtype).eps * abs(np.log(np.diag(M), where=np.diag(M) > 0, out=np.zeros(len(M)))).max()
        judge_alpha_fair(judged, alpha, w, TOLERANCE[M.dtype.name] + powers)


def check_alpha_fair_with_priorities(M):
    q = np.logspace(-2, 2, len(M), dtype=M.dtype)
    w = checked(solvers.alpha_fair(M, jnp.asarray(2, M.dtype), q), 100 * TOLERANCE[M.dtype.name])
    assert certificates.alpha_fair_residual(M.astype(float), w, 2, q) <= 2 * TOLERANCE[M.dtype.name]
    assert certificates.conflict(M.astype(float), w) <= TOLERANCE[M.dtype.name]


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize(("K", "P"), SHAPES)
@pytest.mark.parametrize("solver", CHECKS)
def test_solver(solver, K, P, dtype):
    for _, M in cases(K, P, dtype):
        CHECKS[solver](M)


@pytest.mark.nightly
@pytest.mark.parametrize("P", [2, 5, 40])
@pytest.mark.parametrize("solver", CHECKS)
def test_many_draws(solver, P, dtype):
    """A sample of `make stress`."""
    for name in families.EVERY:
        for draw in range(10):
            M = families.gramian(families.stack(name, 3, P, draw), dtype)
            if families.within_contract(M):
                CHECKS[solver](M)


FOUND = [
    ("max_min", "float32", "scales", 7, 2, 243),  # null vectors of Q with q^T x < 0 met the conditions up to rounding
    ("max_min", "float32", "scales", 16, 3, 154),
    ("max_min", "float32", "nearly_opposite", 8, 6, 5022),  # the certificate's own slope was infinite
    ("max_min", "float64", "nearly_opposite", 11, 40, 132),  # a step so long that its length cancels in float64
    ("min_norm", "float32", "huge", 3, 200, 20005),  # 1/(a squared norm) is a subnormal number
    ("conic", "float64", "louder", 2, 3, 20017),  # for c = 0, rounding put MGDA's direction outside the cone
    ("conic", "float64", "louder", 2, 8, 20083),
    ("alpha_fair", "float64", "nearly_opposite", 8, 6, 20037),
    ("alpha_fair", "float64", "scales", 9, 3, 20125),
    ("alpha_fair", "float64", "scales", 64, 2, 20007),
    ("alpha_fair", "float64", "proportional", 64, 3, 20044),
    ("conic", "float64", "scales", 3, 5, 7),  # two roundings of one number: outside the cone, and on it
]


@pytest.mark.parametrize(("solver", "dtype", "family", "K", "P", "draw"), FOUND)
def test_where_make_stress_found_it_wrong(solver, dtype, family, K, P, draw):
    with jax.enable_x64(dtype == "float64"):
        CHECKS[solver](families.gramian(families.stack(family, K, P, draw), dtype))


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_dtype_of_a_conic_program_is_that_of_its_gramian(K, dtype):
    """Under x64 too, for float32."""
    for own in {"float32", dtype}:
        solved = solvers.conic_direction(jnp.eye(K, dtype=own), jnp.asarray(0.5, own), np.ones(K, bool))
        assert solved.value.dtype == own
        np.testing.assert_allclose(solved.value, 1 / K, rtol=1e-5)


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e10, 1e17, 1e24, 1e36])
def test_an_outlier_costs_the_median_no_digits(outlier, dtype):
    """Wherever it is, it pulls with its unit vector, which adds a linear term to the objective of the others."""
    rows = np.array([[1, 0], [0, 1], [1, 1], [0.5, 0.7]])

    def tilted(x):
        return np.linalg.norm(rows - x, axis=1).sum() - x[0]

    wanted = scipy.optimize.minimize(
        tilted, [0.7, 0.7], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}
    ).x
    G = np.vstack([rows, [outlier, 0]])
    unit = np.sqrt(outlier)  # the Gramian of G itself may not fit into float32
    w = np.asarray(solvers.geometric_median(families.gramian(G / unit, dtype), np.ones(5, bool)).value, float)
    np.testing.assert_allclose(w @ G, wanted, atol=2 / outlier + (2e-5 if dtype == "float32" else 1e-6))


@pytest.mark.parametrize("K", [1, 2, 3, 8, 64])
def test_project_simplex(K, dtype):
    rng, eps = np.random.default_rng(0), np.finfo(dtype).eps
    for size in (1e-3, 1, 100):
        point = (size * rng.normal(size=K)).astype(dtype)
        among = rng.random(K) < 0.7
        among[0] = True
        w = np.asarray(project_simplex(jnp.asarray(point), jnp.asarray(among)), float)
        down = -np.sort(-point[among].astype(float))
        levels = (down.cumsum() - 1) / np.arange(1, len(down) + 1)
        wanted = np.where(among, np.maximum(point - levels[down > levels][-1], 0), 0)
        np.testing.assert_allclose(w, wanted, rtol=0, atol=8 * eps * max(1, abs(point).max()) * np.sqrt(K))
    assert not project_simplex(jnp.asarray(point), jnp.zeros(K, bool)).any()
    corner = jnp.eye(K, dtype=dtype)[-1]
    np.testing.assert_array_equal(project_simplex(corner, jnp.ones(K, bool)), corner)


RANKS = {
    "normal": min,
    "duplicate": lambda K, P: min((K + 1) // 2, P),
    "opposite": lambda K, P: min((K + 1) // 2, P),
    "rank_deficient": lambda K, P: max(1, min(K, P) // 2),
    "rank_one": lambda K, P: 1,
    "zero_row": lambda K, P: min(K - 1, P),
    "all_zero": lambda K, P: 0,
    "condition_1e+04": min,
    "strongly_stationary": lambda K, P: min(K - 1, P),
}


@pytest.mark.parametrize(("K", "P"), SHAPES)
def test_significant_eigh(K, P, dtype):
    """The kept part is that of M to K eps of its largest eigenvalue; B M B = λ I on it for B = sqrt(λ) M^(-1/2)."""
    rounding = 8 * (K + 16) * np.finfo(dtype).eps
    for name, M in cases(K, P, dtype):
        values, vectors, kept = (np.asarray(x, float) for x in eigh(M))
        kept, M64 = kept.astype(bool), M / np.float64(M.diagonal().max() or 1)
        cut, true = shift(jnp.asarray(M)), np.linalg.eigvalsh(M64)[::-1]
        if name in RANKS and (rank := RANKS[name](K, P)) and true[rank - 1] > 10 * cut * true[0]:
            assert kept.sum() == rank
        assert (true[~kept[::-1]] <= 2 * cut * true[0]).all()
        V, values = vectors[:, kept], values[kept]
        np.testing.assert_allclose(V.T @ V, np.eye(len(values)), atol=rounding)
        largest = values.max(initial=0)
        np.testing.assert_allclose(V * values @ V.T, M64, rtol=0, atol=rounding * largest)
        if kept.any():
            least = values.min()
            B = np.sqrt(least) * V / np.sqrt(values) @ V.T
            np.testing.assert_allclose(B @ M64 @ B, least * V @ V.T, rtol=0, atol=rounding * largest)


def test_absent_tasks_do_not_move_the_cut_off(dtype):
    """An eigenvalue that counts among two tasks, though it would not among sixty-four."""
    eps = np.finfo(dtype).eps
    pair = np.array([[1, 1 - 120 * eps], [1 - 120 * eps, 1]], dtype)
    padded = np.zeros((64, 64), dtype)
    padded[:2, :2] = pair
    for M in (pair, padded):
        assert int(eigh(M)[2].sum()) == 2


@pytest.mark.parametrize(("K", "P"), SHAPES)
def test_direction_of_products(K, P, dtype):
    """Backward error of b, relative to ‖C‖‖b‖ + ‖p‖, in the range of C; zero if p has almost no part in that."""
    p = np.random.default_rng(0).normal(size=K).astype(dtype)
    for _, M in cases(K, P, dtype):
        C, inverse = (np.asarray(x) for x in cosines(jnp.asarray(M)))
        n = np.sqrt(M.diagonal().astype(float))
        np.testing.assert_allclose(inverse * n, n > 0, rtol=0, atol=8 * np.finfo(dtype).eps)
        np.testing.assert_allclose(C * n * n[:, None], M, rtol=16 * np.finfo(dtype).eps)
        _, V, kept = (np.asarray(x, float) for x in eigh(C))
        C64, within = C.astype(float), V * kept @ V.T
        for of in (p, (n > 0).astype(dtype), np.zeros(K, dtype)):
            b, found = (np.asarray(x, float) for x in solve_products(C, of))
            if not b.any():
                assert abs(within @ of).max() <= 8 * K * np.finfo(dtype).eps * abs(of).max()
                continue
            size = np.linalg.norm(C64, 2) * np.linalg.norm(b) + np.linalg.norm(of)
            assert np.linalg.norm(C64 @ b - within @ of) <= TOLERANCE[dtype] * size
            assert np.linalg.norm(b - within @ b) <= TOLERANCE[dtype] * size
            assert np.linalg.norm(found - C64 @ b) <= TOLERANCE[dtype] * size


@pytest.mark.parametrize(("K", "P"), [(2, 5), (3, 3), (16, 8), (64, 200)])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_fair_without_a_solution_makes_a_small_direction(alpha, K, P, dtype):
    M = families.gramian(families.stack("strongly_stationary", K, P), dtype)
    w, n = np.asarray(solvers.alpha_fair(M, jnp.asarray(alpha, dtype)).value, float), np.sqrt(np.diag(M.astype(float)))
    length = np.sqrt(max(w @ M.astype(float) @ w, 0))
    assert length <= np.sqrt((K + 16) * np.finfo(dtype).eps) * 4 * (n @ w)


@pytest.mark.nightly
@pytest.mark.parametrize(("K", "P"), SHAPES)
def test_nonnegative_qp(K, P, dtype):
    rng = np.random.default_rng(0)
    for _, M in cases(K, P, dtype):
        # q <= M z keeps the program bounded on singular M.
        M64, n = M.astype(float), np.sqrt(np.diag(M.astype(float)))
        z = rng.normal(size=K) / np.where(n > 0, n, 1)
        size = n @ abs(z) or 1
        q = (M64 @ z - n * size * rng.integers(0, 2, K) * rng.uniform(0, 1, K)).astype(dtype)
        if not ((abs(q) >= np.finfo(dtype).tiny) | (q == 0)).all():
            continue  # `tiny`: a linear term that XLA flushes
        x = checked(solve_qp(M, q), 100 * TOLERANCE[dtype])
        slack, unit = M64 @ x - q, np.where(n > 0, n, 1) * size
        rounding = floor(M, x, 1) / unit.min() if x.any() else 0
        assert (x >= 0).all()
        assert (x[n == 0] == 0).all()
        assert (slack[n > 0] / unit[n > 0]).min(initial=0) >= -TOLERANCE[dtype] - rounding
        assert abs(n * x * slack / unit).sum() / size <= 100 * (TOLERANCE[dtype] + rounding)


# --------------------------------------------------------------------------------------------------------- cut short


@pytest.mark.nightly
def test_many_tasks():
    M = families.gramian(families.stack("non_stationary", 512, 64), "float32")
    judge_min_norm(M, checked(solvers.min_norm(M), 1e-3))
    everyone = np.ones(512, bool)
    judge_capped(M, 0.01, checked(solvers.capped_min_norm(M, np.float32(0.01), everyone), 1e-3))
    judge_conic(M, 0.5, checked(solvers.conic_direction(M, np.float32(0.5), everyone), 1e-3, EITHER))
    judge_median(M, checked(solvers.geometric_median(M, everyone), 1e-3))
    judge_progress(M, 7, 0.5, checked(solvers.progress_direction(M, 7, np.full(512, 0.5, "float32")), 1e-3, EITHER))
    signed = np.random.default_rng(0).normal(size=512).astype("float32")
    judge_projection(M, signed, checked(solvers.project_weights(M, signed), 1e-3))
    judge_max_min(M, 0.4, checked(solvers.max_min_direction(M, np.float32(0.4), everyone), 1e-3))
    judge_alpha_fair(M, 2.0, checked(solvers.alpha_fair(M, jnp.float32(2)), 1e-3), 1e-5)
    n, uniform = np.sqrt(np.diag(M).astype(float)), checked(solvers.project_rows(M, ones(512, "float32")), 1e-3)
    assert certificates.conflict(M, uniform, n.max() + floor(M, uniform, n.max()) / 1e-5) <= 1e-5


HARD = families.gramian(families.stack("normal", 16, 8), "float32")
FLAT = families.gramian(families.stack("weakly_stationary", 16, 8), "float32")
CONE = families.gramian(families.stack("non_stationary", 16, 40), "float32")
SIGNED = np.random.default_rng(0).normal(size=16).astype("float32")
MEAN, FIRST, PRESENT = ones(16, "float32"), np.eye(16, dtype="float32")[0], np.ones(16, bool)

CUT = {
    "min_norm": (lambda steps: solvers.min_norm(HARD, max_steps=steps), lambda w: judge_min_norm(HARD, w)),
    "project_rows": (
        lambda steps: solvers.project_rows(FLAT, FIRST, max_steps=steps),
        lambda v: judge_projection(FLAT, FIRST, v),
    ),
    "project_weights": (
        lambda steps: solvers.project_weights(HARD, SIGNED, max_steps=steps),
        lambda v: judge_projection(HARD, SIGNED, v),
    ),
    "capped_min_norm": (
        lambda steps: solvers.capped_min_norm(CONE, np.float32(0.3), PRESENT, max_steps=steps),
        lambda w: judge_capped(CONE, 0.3, w),
    ),
    "conic": (
        lambda steps: solvers.conic_direction(CONE, np.float32(0.9), PRESENT, max_steps=steps),
        lambda w: judge_conic(CONE, 0.9, w),
    ),
    "geometric_median": (
        lambda steps: solvers.geometric_median(HARD, PRESENT, max_steps=steps - 1),
        lambda w: judge_median(HARD, w),
    ),
    "progress": (
        lambda steps: solvers.progress_direction(CONE, 0, np.full(16, 0.5, "float32"), max_steps=steps),
        lambda w: judge_progress(CONE, 0, 0.5, w),
    ),
    "max_min": (
        lambda steps: solvers.max_min_direction(HARD, np.float32(0.4), PRESENT, max_steps=steps),
        lambda t: judge_max_min(HARD, 0.4, t),
    ),
    "alpha_fair": (
        lambda steps: solvers.alpha_fair(HARD, 2.0, max_steps=steps),
        lambda w: judge_alpha_fair(HARD, 2.0, w, TOLERANCE["float32"]),
    ),
    "nonnegative_qp": (
        lambda steps: nonnegative_qp(jnp.asarray(FLAT), jnp.asarray(-FLAT @ MEAN), jnp.asarray(PRESENT), steps)[0],
        lambda x: judge_projection(FLAT, MEAN, MEAN + x),
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", CUT)
def test_certificates_see_a_solver_that_stops_short(name):
    solve, judge = CUT[name]
    short, whole = solve(1), solve(300)
    assert short.result == MAX_STEPS
    assert np.isfinite(short.value).all()
    with pytest.raises(AssertionError):
        judge(np.asarray(short.value, float))
    assert whole.result == SOLVED
    judge(np.asarray(whole.value, float))


@pytest.mark.nightly
def test_a_gramian_beyond_rounding_is_not_called_solved():
    M = np.array([[1, 2, 0.5], [2, 1, -2], [0.5, -2, 1]], "float32")
    present = np.ones(3, bool)
    for solved in (solvers.min_norm(-2 * M + 3 * np.eye(3, dtype="float32")), solvers.alpha_fair(M, 2.0)):
        assert solved.result == MAX_STEPS or np.isfinite(solved.value).all()
    solved = solvers.max_min_direction(M, np.float32(0.4), present)
    assert solved.result == MAX_STEPS or np.isfinite(solved.value).all()


# -------------------------------------------------------------------------------------------------------- properties


def every_solver(M, present):
    """Each solver's solution on the tasks present; the other rows of M are zero, as `from_kernel` makes them."""
    M = jnp.where(present[:, None] & present[None, :], M, 0)
    u = jnp.where(present, 1 / jnp.sum(present), 0).astype(M.dtype)
    signed = jnp.where(jnp.diagonal(M) == jnp.max(jnp.diagonal(M)), -u, u)
    return {
        "min_norm": solvers.min_norm(M, present),
        "capped_min_norm": solvers.capped_min_norm(M, jnp.asarray(0.5, M.dtype), present),
        "project_rows": solvers.project_rows(M, u),
        "project_weights": solvers.project_weights(M, signed),
        "max_min": solvers.max_min_direction(M, jnp.asarray(0.4, M.dtype), present),
        "conic": solvers.conic_direction(M, jnp.asarray(0.9, M.dtype), present),
        "geometric_median": solvers.geometric_median(M, present),
        "progress": solvers.progress_direction(M, 0, jnp.where(present, 0.5, 0).astype(M.dtype)),
        "alpha_fair": solvers.alpha_fair(M, jnp.asarray(2, M.dtype)),
    }


OWN = {"geometric_median": 0.1}  # tolerance of the solutions' own residuals


@pytest.mark.nightly
def test_absent_tasks_are_as_if_removed(dtype):
    present = np.array([True, False, True, True, False])
    for _, M in cases(5, 50, dtype):
        found = every_solver(M, present)
        solved = {name: checked(s, OWN.get(name, 100 * TOLERANCE[dtype]), EITHER) for name, s in found.items()}
        sub = M[np.ix_(present, present)]
        assert all((value[~present] == 0).all() for value in solved.values())
        kept = {name: value[present] for name, value in solved.items()}
        judge_min_norm(sub, kept["min_norm"])
        judge_capped(sub, 0.5, kept["capped_min_norm"])
        signed = np.where(sub.diagonal() == sub.max(), -ones(3, dtype), ones(3, dtype))
        judge_projection(sub, signed, kept["project_weights"])
        judge_max_min(sub, 0.4, kept["max_min"])
        judge_conic(sub, 0.9, kept["conic"])
        judge_median(sub, kept["geometric_median"])
        judge_progress(sub, 0, 0.5, kept["progress"])
        judge_alpha_fair(sub, 2, kept["alpha_fair"], TOLERANCE[dtype])
        whole = checked(solvers.project_rows(sub, ones(3, dtype)), 100 * TOLERANCE[dtype])
        apart, n = kept["project_rows"] - whole, np.sqrt(np.diag(sub.astype(float)))
        assert np.sqrt(max(apart @ sub.astype(float) @ apart, 0)) <= np.sqrt(TOLERANCE[dtype]) * n.max()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["normal", "correlated", "non_stationary", "scales"])
def test_permuting_the_tasks_permutes_the_weights(name, dtype):
    M, order = families.gramian(families.stack(name, 5, 50), dtype), np.array([3, 0, 4, 1, 2])
    present = np.ones(5, bool)
    before, after = every_solver(M, present), every_solver(M[np.ix_(order, order)], present)
    n = np.sqrt(np.diag(M))
    for solver in before.keys() - {"progress"}:  # its first task is a different one
        w, permuted = n * before[solver].value, n[order] * after[solver].value
        # The median's objective is flat: an error in the weights changes it by the square of the error.
        apart = np.sqrt(TOLERANCE[dtype]) if solver == "geometric_median" else 30 * TOLERANCE[dtype]
        np.testing.assert_allclose(permuted, w[order], rtol=0, atol=apart * abs(w).max())


@pytest.mark.nightly
@pytest.mark.parametrize("exponent", [-60, -17, 1, 60])
def test_powers_of_two_change_nothing_but_the_scale(exponent, dtype):
    """For integers, with Gramians that stay normal in float32 from 4^-60 to 4^60."""
    G = np.array([[3, 1, 0, -1], [-1, 2, 1, 0], [1, -1, 3, 1], [-2, 0, 1, -1], [1, 1, -1, 2]])
    M, scale, present = (G @ G.T).astype(dtype), np.ldexp(np.ones((), dtype), 2 * exponent), np.ones(5, bool)
    plain, scaled = every_solver(M, present), every_solver(M * scale, present)
    for name in plain.keys() - {"alpha_fair"}:
        np.testing.assert_array_equal(scaled[name].value, plain[name].value)
    alpha = 2
    back = np.asarray(scaled["alpha_fair"].value, float) * float(scale) ** (alpha / (1 + alpha))
    np.testing.assert_allclose(back, plain["alpha_fair"].value, rtol=100 * np.finfo(dtype).eps)


@pytest.mark.nightly
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_no_gradient_gives_finite_weights(K, dtype):
    solved = every_solver(np.zeros((K, K), dtype), np.ones(K, bool))
    assert solved["min_norm"].value.sum() == pytest.approx(1)
    assert solved["capped_min_norm"].value.sum() == pytest.approx(1)
    assert solved["geometric_median"].value.sum() == pytest.approx(1)
    np.testing.assert_allclose(solved["project_rows"].value, 1 / K, rtol=1e-6)
    np.testing.assert_allclose(solved["conic"].value, 1 / K, rtol=1e-6)
    assert all(np.isfinite(solution.value).all() for solution in solved.values())
    assert not solved["max_min"].value.any()
    assert not solved["alpha_fair"].value.any()
    assert all(solution.result == SOLVED for solution in solved.values())


def test_one_task(dtype):
    M = np.array([[9.0]], dtype)
    solved = every_solver(M, np.ones(1, bool))
    np.testing.assert_allclose(solved["min_norm"].value, [1])
    for name in ("capped_min_norm", "project_rows", "conic", "geometric_median", "progress"):
        np.testing.assert_allclose(solved[name].value, [1], rtol=1e-6)
    np.testing.assert_array_equal(solved["project_weights"].value, [0])
    np.testing.assert_allclose(solved["max_min"].value, [0.4], rtol=1e-6)
    np.testing.assert_allclose(solved["alpha_fair"].value, [9 ** (-2 / 3)], rtol=1e-5)


@pytest.mark.nightly
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.int64, (3, 4), elements=hypothesis.strategies.integers(-5, 5)),
    hypothesis.strategies.sampled_from(RADII),
)
def test_any_small_integers(G, c):
    M = families.gramian(G.astype(float), "float32")
    judge_min_norm(M, checked(solvers.min_norm(M), 1e-3))
    every = np.ones(3, bool)
    judge_max_min(M, c, checked(solvers.max_min_direction(M, np.float32(c), every), 1e-3))
    judge_capped(M, 0.5, checked(solvers.capped_min_norm(M, np.float32(0.5), every), 1e-3))
    judge_conic(M, c, checked(solvers.conic_direction(M, np.float32(c), every), 1e-3, EITHER))
    judge_median(M, checked(solvers.geometric_median(M, every), 1e-3))
    towards = solvers.progress_direction(M, 0, np.full(3, 0.5, "float32"))
    judge_progress(M, 0, 0.5, checked(towards, 1e-3, EITHER))
    for u in np.eye(3, dtype="float32"):
        judge_projection(M, u, checked(solvers.project_rows(M, u), 1e-3))
    judge_alpha_fair(M, 2, checked(solvers.alpha_fair(M, jnp.float32(2)), 1e-3), 1e-5)


# ------------------------------------------------------------------------------------------------------ golden values

PAIR = np.array([[-4.0, 1, 1], [6, 1, 1]])  # peers.md §2c
TRIPLE = np.array([[3.0, 1, 0], [-1, 2, 1], [0.5, -1, 4]])  # methods.md §0.4


def check_golden(weights, wanted, dtype, digits):
    np.testing.assert_allclose(weights, wanted, rtol=0, atol=1e-5 if dtype == "float32" else digits)


def cagrad(G, c, dtype):
    K, M = len(G), (G @ G.T).astype(dtype)
    return 1 / K + np.asarray(solvers.max_min_direction(M, jnp.asarray(c, dtype), np.ones(K, bool)).value)


def test_golden_min_norm(dtype):
    check_golden(solvers.min_norm((PAIR @ PAIR.T).astype(dtype)).value, [3 / 5, 2 / 5], dtype, 1e-12)


def test_golden_project_rows(dtype):
    check_golden(
        solvers.project_rows((PAIR @ PAIR.T).astype(dtype), ones(2, dtype)).value, [10 / 9, 15 / 19], dtype, 1e-12
    )


@pytest.mark.parametrize(
    ("c", "weights", "digits"),
    [
        (0.4, (0.6632993, 0.5), 1e-7),
        (0.5, (0.5 + 1 / (2 * np.sqrt(6)), 0.5), 1e-12),
        (1, (1.2, 0.8), 1e-12),
        (2, (2.0071247, 1.3380832), 1e-7),
    ],
)
def test_golden_max_min_of_two(c, weights, digits, dtype):
    check_golden(cagrad(PAIR, c, dtype), weights, dtype, digits)


@pytest.mark.parametrize(
    ("c", "direction"),
    [
        (0.2, (0.68142866, 0.96652772, 1.75918691)),
        (0.4, (0.72673247, 1.20235176, 1.70457813)),
        (0.5, (0.72481299, 1.26195766, 1.63729429)),
    ],
)
def test_golden_max_min_of_three(c, direction, dtype):
    check_golden(cagrad(TRIPLE, c, dtype) @ TRIPLE / (1 + c**2), direction, dtype, 1e-8)


@pytest.mark.parametrize(
    ("G", "direction", "worst"),
    [
        ([[-13, 44], [24, 59], [-37, -94]], (-5.12511453, 2.04334632), -2.44531608),  # two nearly opposite
        ([[1, -2], [0.1, -0.2], [100, 100]], (42.08751453, 15.82497094), 1.04375727),  # two proportional
        ([[-1e6, -6e6], [-9, 2], [5, -1]], (-255578.716, -1192700.640), -85192.9400),  # one a million times louder
    ],
)
def test_golden_max_min_where_lengths_cancel(G, direction, worst, dtype):
    """On the circle ‖d - g0‖ = 0.4 ‖g0‖: by a search in float64, the first where it meets <g_2, d> = <g_3, d>.

    In float32 the Gramian hides 0.4 % of the first one's radius.
    """
    G = np.array(G, float)
    d = cagrad(G, 0.4, dtype) @ G
    digits = 5e-3 if dtype == "float32" else 1e-6
    np.testing.assert_allclose(d, direction, rtol=digits)
    np.testing.assert_allclose((G @ d).min(), worst, rtol=digits)


@pytest.mark.parametrize("P", [3, 7])
def test_max_min_is_nearest_the_mean_where_no_direction_improves_the_worst_off(P, dtype):
    """A zero row gains nothing from any d: of all d without conflict in the ball, it is the one nearest g0."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        G = rng.normal(size=(5, P)).astype(dtype).astype(float)
        G[2] = 0
        g0 = G.mean(axis=0)
        v = scipy.optimize.nnls(G.T, -g0)[0]
        if np.linalg.norm(v @ G) < 0.8 * np.linalg.norm(g0):
            inside += 1
            error = cagrad(G, 0.8, dtype) @ G - (g0 + v @ G)
            assert np.linalg.norm(error) <= 100 * np.finfo(dtype).eps * np.linalg.norm(G, axis=1).max()
    assert inside > 50


@pytest.mark.parametrize(("K", "P"), [(2, 5), (3, 3), (5, 50), (16, 8), (64, 200)])
def test_max_min_never_leaves_the_ball(K, P, dtype):
    """The ball is that of the gradients, however they cancel: its radius is that of G, not of the rounded Gramian."""
    for name in families.EVERY:
        G = families.stack(name, K, P).astype(dtype).astype(float)
        for c in RADII:
            t = cagrad(G, c, dtype) - 1 / K
            radius = c * np.linalg.norm(G.mean(axis=0))
            rounding = 4 * np.finfo(dtype).eps * (np.linalg.norm(G, axis=1) @ (abs(t) + 1 / K))
            assert np.linalg.norm(t @ G) <= radius + rounding, name


def test_products_are_judged_by_their_own_rows(dtype):
    """Rows too far apart for one common scale: the change of a task is relative to its own gradient."""
    G = np.array([[1e-10, 1e-10, 0], [-1e10, 0.5e10, 0], [0, 0, 1]])
    M = families.gramian(G, dtype)
    for w in (
        solvers.project_rows(M, ones(3, dtype)),
        solvers.project_weights(M, ones(3, dtype)),
        solvers.min_norm(M),
        solvers.alpha_fair(M, jnp.asarray(2, dtype)),
    ):
        w = checked(w, 100 * TOLERANCE[dtype])
        d = w @ G
        cosines_with_d = G @ d / np.linalg.norm(G, axis=1) / np.linalg.norm(d)
        assert cosines_with_d.min() >= -8 * np.finfo(dtype).eps


@pytest.mark.sample(1)
@pytest.mark.parametrize(("K", "P"), [(3, 3), (5, 50)])
def test_the_cone_has_a_direction_for_quiet_rows_as_for_loud_ones(K, P):
    """The existence of a direction for all depends only on signs, in float32 too for rows a million times apart."""
    rng = np.random.default_rng(0)
    stacks = rng.normal(size=(50, K, P)) * rng.permuted(np.tile(np.logspace(0, 6, K), (50, 1)), axis=1)[:, :, None]
    found = {}
    for dtype in DTYPES:
        with jax.enable_x64(dtype == "float64"):
            results = [
                solvers.conic_direction(families.gramian(G, dtype), jnp.asarray(0.5, dtype), np.ones(K, bool)).result
                for G in stacks
            ]
            found[dtype] = np.array(results) == SOLVED
    assert found["float64"].sum() >= 20
    assert (found["float32"] == found["float64"]).mean() >= 0.95
    for G, solved in zip(stacks, found["float64"], strict=True):
        unit = G / np.linalg.norm(G, axis=1, keepdims=True)
        if (G @ G.mean(axis=0) > 0.05 * np.linalg.norm(G, axis=1) * np.linalg.norm(G.mean(axis=0))).all():
            assert solved, unit


@pytest.mark.parametrize(
    ("G", "alpha", "weights", "digits"),
    [
        (PAIR, 0.5, (0.7428283, 0.5253926), 1e-7),
        (PAIR, 1, (0.5914612, 0.4070715), 1e-7),
        (PAIR, 2, (0.4713629, 0.3194542), 1e-7),
        (TRIPLE, 0.5, (0.47655795, 0.54619225, 0.36762829), 1e-8),
        (TRIPLE, 1, (0.33152238, 0.40846739, 0.21926258), 1e-8),
        (TRIPLE, 2, (0.23194486, 0.30724684, 0.12836391), 1e-8),
        (TRIPLE, 10, (0.13946314, 0.20467236, 0.05555901), 1e-8),
    ],
)
def test_golden_alpha_fair(G, alpha, weights, digits, dtype):
    check_golden(solvers.alpha_fair((G @ G.T).astype(dtype), jnp.asarray(alpha, dtype)).value, weights, dtype, digits)


# --------------------------------------------------------------------------------------------- under transformations

SMALL = np.stack([families.gramian(families.stack(name, 3, 3), "float32") for name in ("normal", "scales")])


def values(M):
    solved = every_solver(M, jnp.ones(len(M), bool))
    return {name: (solution.value, solution.result) for name, solution in solved.items()}


def test_nash_of_two_tasks_takes_no_step(dtype):
    """It is the bisector: w_i = 1 / (n_i sqrt(1 + cos)), cos the cosine of the two rows."""
    for family, M in cases(2, 50, dtype):
        solved = solvers.alpha_fair(M, 1.0)
        assert solved.steps == 0, family
        n = np.sqrt(np.diag(M.astype(float)))
        cosine = M[0, 1] / n.prod() if n.all() else -1
        if cosine > -0.999:
            np.testing.assert_allclose(solved.value, 1 / (n * np.sqrt(1 + cosine)), rtol=2e-3, err_msg=family)


@pytest.mark.parametrize("cosine", [-1.00001, -1.001])
def test_a_cosine_beyond_rounding_gives_finite_weights(cosine):
    solved = solvers.alpha_fair(np.asarray([[1, cosine], [cosine, 1]], "f4"), 1.0)
    assert np.isfinite(solved.value).all()
    assert (np.asarray(solved.value) > 0).all()


@pytest.mark.nightly
def test_jit_vmap_and_scan_agree_with_eager():
    with jax.disable_jit():
        eager = values(jnp.asarray(SMALL[0]))
    compiled = jax.jit(values)
    jitted = jax.tree.map(lambda *v: np.stack(v), *(compiled(M) for M in SMALL))
    runs = {
        "eager": jax.tree.map(lambda first, every: np.stack([first, *every[1:]]), eager, jitted),
        "vmap": jax.jit(jax.vmap(values))(SMALL),
        "scan": jax.lax.scan(lambda _, M: (None, values(M)), None, jnp.asarray(SMALL))[1],
    }
    n = np.sqrt(np.einsum("bii->bi", SMALL))
    for run in runs.values():
        for name, (value, result) in run.items():
            expected, expected_result = jitted[name]
            np.testing.assert_array_equal(result, expected_result)
            size = abs(n * expected).max(axis=1, keepdims=True)
            np.testing.assert_allclose(n * value / size, n * expected / size, rtol=0, atol=1e-4)


def loops(function, K, platform):
    """The loops of the program for a platform, which need not be at hand."""
    exported = jax.export.export(jax.jit(function), platforms=[platform])(np.eye(K, dtype="float32"))
    return exported.mlir_module().count("stablehlo.while")


@pytest.mark.parametrize(
    "solve",
    [
        solvers.min_norm,
        lambda M: solvers.project_rows(M, M[0]),
        lambda M: solvers.max_min_direction(M, M[0, 0], M[0] >= 0),
        lambda M: solvers.progress_direction(M, 0, M[0]),
    ],
)
def test_few_tasks_take_no_loop(solve):
    assert [loops(solve, K, "cuda") > 0 for K in (3, 8, 9)] == [False, False, True]
    assert [loops(solve, K, "cpu") > 0 for K in (3, 4, 5)] == [False, False, True]


ARGUMENTS = {
    "min_norm": (np.ones(7, bool),),
    "capped_min_norm": (np.float32(0.3), np.ones(7, bool)),
    "project_rows": (ones(7, "float32"),),
    "project_weights": (ones(7, "float32"),),
    "max_min_direction": (np.float32(0.4), np.ones(7, bool)),
    "conic_direction": (np.float32(0.5), np.ones(7, bool)),
    "geometric_median": (np.ones(7, bool),),
    "progress_direction": (0, ones(7, "float32")),
    "alpha_fair": (np.float32(2),),
}


MATRIX = np.eye(7, dtype="float32")
OF_OTHERS = {
    "linear_program": (ones(7, "float32"), MATRIX, ones(7, "float32"), ones(7, "float32"), np.ones(7, bool)),
    "direction_of_products": (MATRIX, jnp.ones(7)),
}


@pytest.mark.parametrize("solver", [*ARGUMENTS, *OF_OTHERS])
def test_products_are_in_full_precision(solver):
    """Whatever the default is: bfloat16 on TPUs, TensorFloat-32 on GPUs."""
    first, *others = OF_OTHERS.get(solver) or (MATRIX, *ARGUMENTS[solver])
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(lambda M: getattr(solvers, solver)(M, *others))(first)
        assert set(precisions(program.jaxpr)) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.nightly
@pytest.mark.parametrize("solver", ARGUMENTS)
def test_workspace(solver):
    """At most 64 K² floats, also for all right-hand sides of UPGrad together."""
    K = 128
    arguments = [np.resize(a, K) if np.ndim(a) else a for a in ARGUMENTS[solver]]
    compiled = getattr(solvers, solver).lower(np.eye(K, dtype="float32"), *arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 64 * K**2 * 4


@pytest.mark.nightly
@pytest.mark.parametrize("solver", ARGUMENTS)
def test_one_compilation_a_shape(solver):
    """Also with other hyper-parameters."""
    for i, name in enumerate(("normal", "scales", "all_zero")):
        M = families.gramian(families.stack(name, 7, 5), "float32")
        arguments = [a / (1 + i) if isinstance(a, np.floating) else a for a in ARGUMENTS[solver]]
        with jax.no_tracing(i > 0):
            getattr(solvers, solver)(M, *arguments)


def test_geometric_median_where_whole_newton_steps_are_too_long(dtype):
    """Two rows nearly equal, two far away on opposite sides: Weiszfeld's steps alone would be too many."""
    M = families.gramian(families.stack("scales", 4, 3, 43), dtype)
    check_geometric_median(M)
    assert solvers.geometric_median(M, np.ones(4, bool)).steps < 20


def test_geometric_median_of_two_rows_too_far_apart_for_the_dtype():
    """Any point between them is a median; the weights sum to 1 whichever is taken."""
    for draw in (201, 0, 1):
        M = families.gramian(families.stack("scales", 2, 2, draw), "float32")
        check_geometric_median(M)
    for ratio in (1e7, 1e9, 1e15):
        for G in ([[ratio, 0], [0, 1]], [[0, 1], [ratio, 0]], [[ratio, 0], [ratio, 0], [0, 1], [0, 1]]):
            w = solvers.geometric_median(families.gramian(np.array(G), "float32"), np.ones(len(G), bool)).value
            assert np.sum(w) == pytest.approx(1)


@pytest.mark.parametrize("radius", [1.0, 10.0])
def test_max_min_takes_the_nearest_of_many_optima(radius, dtype):
    """Opposite gradients: no direction improves both. The smallest change of the mean that harms neither is enough."""
    G = np.array([[3.0, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 1]])
    result = solvers.max_min_direction(families.gramian(G, dtype), jnp.asarray(radius, dtype), np.ones(4, bool))
    np.testing.assert_allclose(result.value, [0, 0.5, 0, 0], atol=4 * jnp.finfo(dtype).eps)
