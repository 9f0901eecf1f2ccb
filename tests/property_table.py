"""The table of properties, as found by a run: `python tests/property_table.py` writes docs/properties.md.

Every method is evaluated in float64 on one pool of gradient matrices and on variants of them, by one compiled function.
Small-integer matrices come first, ordered by simplicity: the first that violates a property is its counterexample. The
families of `families` are a further check of the properties that hold.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from families import FAMILIES, stack
from harness import EVERY, FIXED, WEIGHED

from mtlgrad_jax._core.row import CONTINUOUS, DESCENT, HOMOGENEOUS, LINEAR, NON_CONFLICTING, PERMUTATION, SCALE_FREE
from mtlgrad_jax.registry import ROWS
from mtlgrad_jax.registry import (
    make as make_row,
)

FILE = pathlib.Path(__file__).parent.parent / "docs" / "properties.md"
P = 4
BATCH = 1024
DRAWS = 1024
CLEAR = (0.1, 0.01)  # violations count from 0.01; the first from 0.1 is shown if there is one
SMALL = 4e-3  # an update shorter than this fraction of its length without cancellation has no direction
TASKS = {"geometric_median": 4}  # 3 for the others: the median of an odd number of rows on a line is unique
STEEP = {"sdmgrad"}  # twenty inner steps of length 10 amplify rounding by up to 45 each
TIED = {"epo"}  # programs with several optima, of which rounding picks one
EAGER = {"excess_mtl": {"learning_rate": 1.0}}  # by default, two steps hardly change anything
LOUD = {"sam_gs": 1e-3}  # for equal lengths its updates are a thousand times longer, no measure for other updates

FACTORS = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (64, 1, 1 / 64))
SUMS = (((1, 1, 1), (2, 1, 1)), ((2, 1, 1), (1, 1, 2)), ((1, 2, 1), (2, 1, 1)))
SCALES = {"8": 8.0, "2^-40": 2.0**-40}
ORDERS = ((1, 0, 2), (2, 1, 0), (1, 2, 0))
SIZES = (1e-10, 1e-6)  # float64 Gramians do not show angles below 1e-8


def longer(values, K):
    """Three factors or indices, extended to K."""
    return (*values, *range(3, K)) if sorted(values) == [0, 1, 2] else (*values, *(1,) * (K - 3))


@functools.cache
def pool(K):
    """Integer matrices (K, P), simplest first, without repetitions; then those of the families."""

    def padded(rows):
        rows = np.asarray(rows)
        return np.pad(rows, ((0, K - len(rows)), (0, P - rows.shape[1])))

    draw = np.random.RandomState(0)  # its stream is frozen
    drawn = [
        padded(draw.randint(-largest, largest + 1, (K, width)))
        for count, largest, width in ((120, 1, 2), (80, 3, 2), (40, 2, 3), (40, 9, 2))
        for _ in range(count)
    ]
    degenerate = [
        [[0, 0]],
        [[1, 0]],
        [[0, 0], [1, 0]],
        [[1, 0], [1, 0]],
        [[1, 0], [1, 0], [1, 0]],
        [[1, 0], [-1, 0]],
        [[1, 0], [-1, 0], [0, 1]],
        [[1, 0], [0, 1], [-1, -1]],
        [[1, 0], [1, 0], [-2, 0]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[i + 1, 0] for i in range(K)],
        [[-51, 0], [26, 44], [26, -44]],  # a mean that nearly cancels
        [[-100, 0], [101, 0]],
        [[101, 0], [-100, 0]],
        [[0, 0], [-100, 0], [101, 0]],
    ]
    matrices = {m.tobytes(): m.astype(float) for m in map(np.int64, drawn + list(map(padded, degenerate)))}
    integers = sorted(matrices.values(), key=lambda m: (abs(m).max(), abs(m).sum(), (m < 0).sum(), tuple(m.ravel())))
    return np.stack(integers + [stack(family, K, P) for family in FAMILIES if family != "all_zero"]), len(integers)


@functools.cache
def variants(K):
    """All inputs to evaluate, by key: matrices (n, K, P) and losses (K,)."""
    G, integers = pool(K)
    losses = 2.0 ** np.arange(K)
    # Lengths of integer matrices are at least 1, so that zero rows can be perturbed.
    unit = np.maximum(np.linalg.norm(G, axis=2).max(axis=1), np.arange(len(G)) < integers)[:, None, None]
    found = {"plain": G, "orthogonal": unit * np.eye(K, P), "equal": unit * np.eye(1, P).repeat(K, axis=0)}
    for factors in {*FACTORS, *(c for pair in SUMS for c in (*pair, tuple(np.add(*pair))))}:
        found["factors", tuple(factors)] = G * np.asarray(longer(factors, K))[:, None]
    found |= {("scale", text): scale * G for text, scale in SCALES.items()}
    found |= {("order", order): G[:, longer(order, K)] for order in ORDERS}
    for size in SIZES:
        for i, j in np.ndindex(K, 2):
            for sign in (1, -1):
                moved = G.copy()
                moved[:, i, j] += sign * size * unit[:, 0, 0]
                found["moved", size, i, j, sign] = moved
    orders = {("order", order): losses[list(longer(order, K))] for order in ORDERS}
    return {key: (value, orders.get(key, losses)) for key, value in found.items()}


def method(name, K, **kwargs):
    """Updates (steps, P) of steps with losses l, 1 and 1/l, and the length of each without cancellation, if known.

    In the second step, the first two coordinates of stacks are exchanged.
    """
    row = ROWS[name]
    exponents = jnp.asarray([1.0] if row.state == "none" else [1.0, 0.0, -1.0])

    def by_weights(G, losses):
        method = make_row(row, K, **kwargs)

        def step(state, exponent):
            weights, state = method.weigh(G @ G.T, state, losses=losses**exponent)
            return state, (weights @ G, jnp.abs(weights) @ jnp.linalg.norm(G, axis=1))

        return jax.lax.scan(step, method.init(None), exponents)[1]

    def by_updates(G, losses):
        tx = make_row(row, K, **kwargs)

        def step(state, now):
            exponent, order = now
            update, state = tx.update(G[:, order], state, jnp.zeros(P), losses=losses**exponent)
            return state, (update[order], jnp.zeros(()))

        orders = jnp.arange(P) * jnp.ones((len(exponents), 1), int)
        orders = orders.at[1:2, :2].set(jnp.asarray([1, 0]))
        return jax.lax.scan(step, tx.init(jnp.zeros(P)), (exponents, orders))[1]

    return by_weights if row.name in WEIGHED else by_updates


class Updates:
    """Updates of a method on all variants of the pool: (n, steps, P)."""

    def __init__(self, name):
        self.name, self.K = name, TASKS.get(name, 3)
        self.G, self.integers = pool(self.K)
        given = variants(self.K)
        grads = np.concatenate([G for G, _ in given.values()])
        losses = np.concatenate([np.broadcast_to(losses, G.shape[:2]) for G, losses in given.values()])
        filled = -(-len(grads) // BATCH) * BATCH
        grads, losses = (np.resize(a, (filled // BATCH, BATCH, *a.shape[1:])) for a in (grads, losses))
        with jax.enable_x64(True):
            evaluate = jax.jit(jax.vmap(method(name, self.K, **FIXED.get(name, {}), **EAGER.get(name, {}))))
            results = [jax.tree.map(np.asarray, evaluate(*batch)) for batch in zip(grads, losses, strict=True)]
        updates, lengths = (np.concatenate(parts) for parts in zip(*results, strict=True))
        assert np.isfinite(updates).all(), f"{name} is not finite"
        shape = (len(given), len(self.G))
        count = shape[0] * shape[1]
        self._updates = dict(zip(given, updates[:count].reshape(*shape, *updates.shape[1:]), strict=True))
        length = lengths[: len(self.G)]  # the plain ones come first
        units = {"plain": 1, "orthogonal": LOUD.get(name, 1), "equal": LOUD.get(name, 1)}
        sizes = [unit * np.linalg.norm(self[key], axis=2) for key, unit in units.items()]
        self.scale = functools.reduce(np.maximum, sizes)
        self.length = np.maximum(length, self.scale)

    def __getitem__(self, key):
        return self._updates[key]

    def after(self, factors):
        return self["plain"] if factors == (1, 1, 1) else self["factors", factors]

    def moved(self):
        return [key for key in self._updates if key[0] == "moved"]

    def calm(self):
        """Where (n, steps) the result does not depend on rounding: no tie, no equilibrium, no amplification."""
        if self.name not in STEEP | TIED:
            return np.ones(self.scale.shape, bool)
        jumps = [self.apart(self["plain"], self[key]) for key in self.moved() if key[1] == SIZES[0]]
        steady = (np.max(jumps, axis=0) < 1e-6).all(axis=1, keepdims=True) & np.ones(self.scale.shape, bool)
        if self.name in TIED:
            return steady
        slopes = np.einsum("nkp,np->nk", self.G, self.G.mean(axis=1))
        return steady & (np.ptp(slopes, axis=1) > 1e-3 * abs(slopes).max(axis=1))[:, None]

    def apart(self, left, right):
        """Distance relative to their length, or to the length for equal or orthogonal gradients of the largest norm."""
        size = functools.reduce(np.maximum, (np.linalg.norm(d, axis=2) for d in (left, right)))
        return np.linalg.norm(left - right, axis=2) / np.maximum(np.maximum(size, self.scale), 1e-300)

    def show(self, i, d):
        """The coordinates of the update for matrix i, to two digits."""
        size = max(np.abs(d).max(), self.scale[i].max())
        return f"({', '.join(digits(x, size) for x in d[: self.width(i)])})"

    def width(self, i):
        return max(2, np.flatnonzero(self.G[i].any(axis=0)).max(initial=0) + 1)


def digits(x, size=0.0):
    """Two digits, with ties rounded away from zero; zero below a thousandth of `size`."""
    return "0" if abs(x) <= 1e-3 * size else np.format_float_positional(x * (1 + 1e-7), 2, fractional=False, trim="-")


Found = Iterator[tuple[np.ndarray, Callable[[int, int], str]]]  # violations (n, steps), and a text that shows one


def _against(u, vectors, name_of) -> Found:
    """How far the products with some vectors (n, vectors, P) fall below zero, as cosines."""
    d = u["plain"]
    products = np.einsum("nvp,nsp->nsv", vectors, d)
    norms, lengths = np.linalg.norm(vectors, axis=2)[:, None], np.linalg.norm(d, axis=2)
    lengths = np.where(lengths > SMALL * u.length, lengths, u.length)[:, :, None]
    cosines = products / np.where(norms > 0, norms, 1) / np.where(lengths > 0, lengths, 1)

    def show(i, s):
        worst = int(np.argmin(cosines[i, s]))
        return f"d = {u.show(i, d[i, s])}, ⟨{name_of(worst)}, d⟩ = {digits(products[i, s, worst])}"

    yield -cosines.min(axis=2), show


def non_conflicting(u) -> Found:
    return _against(u, u.G, lambda i: f"g{i + 1}")


def descent(u) -> Found:
    return _against(u, u.G.mean(axis=1, keepdims=True), lambda _: "g0")


def _same(u, left, right, text) -> Found:
    yield (
        u.apart(left, right),
        lambda i, s: text.format(u.show(i, left[i, s]), u.show(i, right[i, s])),
    )


def scale_free(u) -> Found:
    for factors in FACTORS:
        text = ", ".join("1/64" if c == 1 / 64 else f"{c:g}" for c in longer(factors, u.K))
        yield from _same(u, u["plain"], u["factors", factors], f"d(G) = {{}}, s = ({text}): d(diag(s) G) = {{}}")


def homogeneous(u) -> Found:
    for text, scale in SCALES.items():
        yield from _same(u, u["plain"], u["scale", text] / scale, f"d(G) = {{}}, s = {text}: d(s G) / s = {{}}")


def permutation(u) -> Found:
    for order in ORDERS:
        text = ", ".join(str(i + 1) for i in longer(order, u.K))
        yield from _same(u, u["plain"], u["order", order], f"d = {{}}, in the order {text}: d = {{}}")


def continuous(u) -> Found:
    # If products cancel, the result of a steep method depends only on rounding.
    settled = (u.name not in STEEP) | (u.G >= 0).all(axis=(1, 2))[:, None]
    small = (np.arange(len(u.G)) < u.integers) & (abs(u.G).max(axis=(1, 2)) < 10)
    for key in u.moved():
        _, size, i, j, sign = key
        judged = settled & (small | (size < 1e-8))[:, None]
        text = f"d = {{}}, with {sign * size:+.0e} in row {i + 1}, column {j + 1}: d = {{}}"
        for amount, show in _same(u, u["plain"], u[key], text):
            yield np.where(judged, amount, 0), show


def linear(u) -> Found:
    for first, second in SUMS:
        both = tuple(np.add(first, second))
        texts = [", ".join(f"{c:g}" for c in longer(c, u.K)) for c in (first, second)]
        text = f"c1 = ({texts[0]}), c2 = ({texts[1]}): d(diag(c1) G) + d(diag(c2) G) = {{}}, d(diag(c1 + c2) G) = {{}}"
        yield from _same(u, u.after(first) + u.after(second), u.after(both), text)


@dataclass(frozen=True)
class Property:
    name: str
    definition: str
    violations: Callable[[Updates], Found]
    tolerance: float  # violations up to this are rounding


PROPERTIES = (
    Property(
        NON_CONFLICTING, "⟨g_i, d⟩ ≥ 0 for every task i: to first order no task gets worse.", non_conflicting, 1e-6
    ),
    Property(DESCENT, "⟨g_0, d⟩ ≥ 0, with g_0 the mean gradient: the mean loss does not get worse.", descent, 1e-6),
    Property(SCALE_FREE, "d(diag(s) G) = d(G) for s > 0: rescaling a task's loss changes nothing.", scale_free, 1e-4),
    Property(HOMOGENEOUS, "d(s G) = s d(G) for a number s > 0.", homogeneous, 1e-4),
    Property(PERMUTATION, "Renumbering the tasks, with their losses, leaves d as it is.", permutation, 1e-4),
    Property(
        CONTINUOUS, "A change of G that tends to zero changes d by something that tends to zero.", continuous, 1e-4
    ),
    Property(LINEAR, "d(diag(a c1 + b c2) G) = a d(diag(c1) G) + b d(diag(c2) G) for a, b, c1, c2 > 0.", linear, 1e-4),
)


@dataclass(frozen=True)
class Outcome:
    """Whether a property holds on the whole pool, or else the simplest counterexample; None if neither is clear."""

    holds: bool | None
    text: str = ""


@functools.cache
def outcomes(name):
    """The outcome for every property of a method, by name."""
    updates = Updates(name)
    found = {prop.name: judge(updates, prop) for prop in PROPERTIES}
    if ROWS[name].randomized:
        found[PERMUTATION] = Outcome(same_distribution(name) or None, "in distribution")
    return found


def judge(updates, prop):
    found = list(prop.violations(updates))
    amounts = np.stack([amount for amount, _ in found], axis=1)  # (n, variants, steps)
    if prop.name != CONTINUOUS:
        amounts = np.where(updates.calm()[:, None], amounts, 0)
    worst = float(amounts.max())
    if worst <= prop.tolerance:
        return Outcome(True)
    for clear in CLEAR:
        broken = np.argwhere(amounts[: updates.integers] > clear)
        if len(broken):
            i, v, s = broken[0]
            G = updates.G[i, :, : updates.width(i)].astype(int).tolist()
            steps = amounts.shape[2]
            when = "" if steps == 1 else f", {('first', 'second', 'third')[s]} step"
            return Outcome(False, f"G = {G}{when}: {found[v][1](i, s)}")
    return Outcome(None, f"up to {worst:.1e}")


def same_distribution(name):
    """Whether d has the same distribution over seeds for renumbered tasks, by the Kolmogorov-Smirnov distance."""
    G, _ = pool(3)
    chosen = G[np.linspace(0, len(G) - 1, 12).astype(int)]
    order = list(ORDERS[-1])
    losses = 2.0 ** np.arange(3)

    def draw(G, losses, seed):
        return method(name, 3, key=jax.random.key(seed))(G, losses)[0][-1]

    with jax.enable_x64(True):
        drawn = jax.jit(jax.vmap(jax.vmap(draw, (None, None, 0)), (0, None, None)))
        seeds = np.arange(DRAWS)
        straight = np.asarray(drawn(chosen, losses, seeds))
        turned = np.asarray(drawn(chosen[:, order], losses[order], seeds + DRAWS))
    size = np.abs(straight).max(axis=(1, 2), keepdims=True)
    straight, turned = (np.round(d / np.where(size > 0, size, 1), 6) for d in (straight, turned))

    def distance(x, y):
        at = np.union1d(x, y)
        shares = [np.searchsorted(np.sort(z), at, side="right") / len(z) for z in (x, y)]
        return np.abs(shares[0] - shares[1]).max()

    # By chance, the distance exceeds 2.8 / sqrt(DRAWS / 2) less than once in a million.
    return max(distance(x[:, j], y[:, j]) for x, y in zip(straight, turned, strict=True) for j in range(P)) < 0.125


INTRODUCTION = """\
# Properties

Written by `python tests/property_table.py`. `tests/test_properties.py` checks that a run renders exactly this, and that
the registry promises exactly this.

d(G) is the update for the gradients g_1, ..., g_K, the rows of G, in float64, with losses 1, 2, 4, ... and a method's
smallest arguments. K = 3, except 4 for `geometric_median`, whose median is unique for an odd number of rows on a line.
For methods with state, three steps are checked, with these losses, with ones, and with their inverses; changes to G
apply to all three. Methods without weights (`weigh`) get the coordinates of G in the order 2, 1, 3, 4 in the second;
their d is shown and judged in the old order. `excess_mtl` has a learning rate of 1.
`pcgrad` and `gradvac` visit the tasks in a fixed order, except for property 5: there the order is random, and samples
over seeds are compared. `graddrop` draws the same numbers for all inputs, again except for property 5; 5 and 6 hold for
the distribution of its d.

✓: holds on the whole pool: {count} small-integer matrices, including stationary ones and ones with zero, equal and
opposite rows, and the families of `tests/families.py`. ✗: links to the simplest counterexample found.

{definitions}

For 1 and 2, ≥ holds up to rounding, relative to ‖g_i‖ and to Σ |w_j| ‖g_j‖, the length of d without cancellation; if
nearly opposite gradients get large weights, that is more than ‖d‖. For 6, one entry is changed by 1e-10 of the longest
row, or by 1e-6, as float64 Gramians do not show angles below 1e-8; d must change by less than 1e-4 of its length, or of
its length for equal or orthogonal gradients. For 7, a = b = 1. The inner steps of `sdmgrad` amplify rounding, and the
linear programs of `epo` may have several optima. So except for 6, they are only checked where a change of 1e-10 moves d
by less than 1e-6, and `sdmgrad` also only where its start is not an equilibrium.
"""


def render():
    """The text of docs/properties.md."""
    definitions = "\n".join(f"{i}. **{prop.name}**: {prop.definition}" for i, prop in enumerate(PROPERTIES, 1))
    lines = [
        INTRODUCTION.format(count=pool(3)[1], definitions=definitions),
        f"| method | {' | '.join(prop.name for prop in PROPERTIES)} |",
        f"|---|{'---|' * len(PROPERTIES)}",
    ]
    for name in EVERY:
        cells = [cell(name, outcome) for outcome in outcomes(name).values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "## Counterexamples"]
    for name in EVERY:
        broken = [f"- {prop}: {outcome.text}" for prop, outcome in outcomes(name).items() if not outcome.holds]
        lines += ["", f"### {name}", "", *broken] if broken else []
    return "\n".join(lines) + "\n"


def cell(name, outcome):
    if outcome.holds is None:
        return "?"
    return f"✓ {outcome.text}".strip() if outcome.holds else f"[✗](#{name})"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(render())
