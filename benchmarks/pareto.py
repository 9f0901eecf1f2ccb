"""Whole Pareto fronts in one program each: a concave front, of which linear weights find only the ends.

    python -m benchmarks.pareto [--preferences N] [--steps N] [--page FILE]

The problem is that of Lin et al. (Pareto MTL, 2019) and Fonseca & Fleming (1995), in 20 parameters: both losses are
1 - exp(-‖x ∓ 1/√20‖²), so that the front is known in closed form.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import mtlgrad_jax as mtl
from benchmarks.report import fill

SIZE = 20
WORST = [1.0, 1.0]  # reference point of the hypervolume
END = 0.02  # a smaller loss counts as an end of the front
LEARNING_RATE = 0.02
METHODS = {  # from a preference, and all of them
    "constant": lambda r, _: mtl.constant(r),
    "tchebycheff": lambda r, _: mtl.tchebycheff(r),
    "stch": lambda r, _: mtl.stch(0.02, r),
    "pbi": lambda r, _: mtl.pbi(1 - r),
    "cosmos": lambda r, _: mtl.cosmos(4.0, 1 - r),
    "epo": lambda r, _: mtl.epo(r),
    "pmtl": lambda r, every: mtl.pmtl(1 - every, jnp.argmin(jnp.abs(every - r).sum(axis=1)), initial_steps=300),
    "ferero": lambda r, _: mtl.ferero(2, 1 - r),
}


def losses_fn(x):
    """Two losses of one vector."""
    centre = jnp.ones(SIZE) / jnp.sqrt(SIZE)
    return jnp.stack([-jnp.expm1(-jnp.sum((x - centre) ** 2)), -jnp.expm1(-jnp.sum((x + centre) ** 2))])


def true_front(count=2001):
    """Losses along the segment between the two optima, (count, 2)."""
    t = np.linspace(-1, 1, count)[:, None]
    return -np.expm1(-((t - [1.0, -1.0]) ** 2))


def optimizer(method, preferences, steps):
    """Map a preference to the method's optimizer, whose learning rate falls to zero."""
    rate = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    return lambda preference: mtl.chain(METHODS[method](preference, preferences), optax.adam(rate))


def measure(preferences, steps):
    """The final losses (N, 2) of each method, and seconds to compile and train."""
    start = jax.random.normal(jax.random.key(0), (SIZE,)) * 0.1
    found = {}
    for name in METHODS:
        began = time.perf_counter()
        x, _ = mtl.pareto_front(losses_fn, optimizer(name, preferences, steps), start, preferences, steps=steps)
        losses = np.asarray(jax.block_until_ready(jax.vmap(losses_fn)(x)))
        found[name] = losses, time.perf_counter() - began
    return found


COLUMNS = ("method", "hypervolume", "inside", "farthest from the front", "seconds")


def rows(found):
    """Hypervolume relative to the true front's, points away from its two ends, and their largest distance from it."""
    best = mtl.diagnostics.hypervolume(true_front(), WORST)
    for name, (losses, seconds) in found.items():
        inside = int((losses > END).all(axis=1).sum())
        distance = np.linalg.norm(losses[:, None] - true_front(), axis=2).min(axis=1).max()
        share = mtl.diagnostics.hypervolume(losses, WORST) / best
        yield f"`{name}`", f"{share:.2f}", f"{inside}/{len(losses)}", f"{distance:.3f}", f"{seconds:.1f}"


def draw(found, path):
    """One picture of all fronts."""
    columns = 4
    figure = Figure(figsize=(3 * columns, 3 * -(-len(found) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(found) // columns), columns, squeeze=False, sharex=True, sharey=True).flat
    for ax, (name, (losses, _)) in zip(axes, found.items(), strict=False):
        mtl.diagnostics.plot_front(losses, reference=true_front(), ax=ax)
        ax.set_title(name)
    for ax in list(axes)[len(found) :]:
        ax.set_visible(False)
    figure.savefig(path, dpi=100)


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preferences", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--page", type=Path, help="Markdown page whose table to write, with a picture beside it")
    arguments = parser.parse_args()
    inner = np.linspace(0, 1, arguments.preferences + 2)[1:-1]
    found = measure(np.stack([inner, 1 - inner], axis=1), arguments.steps)
    table = Table(*COLUMNS, box=box.MARKDOWN)
    for row in rows(found):
        table.add_row(*row)
    Console().print(table)
    if arguments.page:
        picture = arguments.page.with_suffix("") / "fronts.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(found, picture)
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(found)]
        fill(arguments.page, {"pareto": "\n".join(f"| {' | '.join(line)} |" for line in lines)})


if __name__ == "__main__":
    main()
