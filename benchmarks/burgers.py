"""A physics-informed network on Burgers' equation: loss weightings beside the plain sum.

    python -m benchmarks.burgers [--methods NAME ...] [--steps N] [--seeds N] [--page FILE]

u_t + u u_x = (0.01/π) u_xx on x in [-1, 1], t in [0, 1], with u(x, 0) = -sin(πx) and u(±1, t) = 0 (Raissi, Perdikaris &
Karniadakis, Journal of Computational Physics 2019). The error is relative to the exact solution, computed here: by the
Cole-Hopf transformation it is a ratio of two integrals against a Gaussian, which Gauss-Hermite quadrature gives.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtlgrad_jax as mtl
from benchmarks.report import fill, markdown_table

VISCOSITY = 0.01 / np.pi
WIDTH, HIDDEN, POINTS, EDGE = 24, 3, 1024, 128
LEARNING_RATE = 3e-3
K, EVERY = 3, 100


def averaged(method, k=EVERY):
    """Weights averaged with a decay of 0.9 and refreshed in every k-th step, as in jaxpi."""
    return mtl.update_every(mtl.smoothed(method, K, decay=0.9, init=dict.fromkeys(LOSSES, 1.0)), K, k)


LOSSES = ("boundary", "initial", "residual")
METHODS = {
    "sum": lambda _: mtl.sum(),
    "inverse norms": lambda _: averaged(mtl.avgnorm(scale="mean_norm")),
    "relobralo": lambda seed: mtl.relobralo(K, key=seed),
    "softadapt": lambda _: mtl.softadapt(K),
    "conflict_free": lambda _: mtl.conflict_free(),
    "upgrad": lambda _: mtl.upgrad(),
}


def exact(t, x, nodes=200):
    """The solution by Cole and Hopf, in float64."""
    z, w = np.polynomial.hermite.hermgauss(nodes)
    t, x = np.maximum(np.asarray(t, float), 1e-12)[..., None], np.asarray(x, float)[..., None]
    y = x - np.sqrt(4 * VISCOSITY * t) * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    density = w * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    return -(density * np.sin(np.pi * y)).sum(-1) / density.sum(-1)


def network(key):
    """Glorot-normal layers from (t, x) to u."""
    sizes = [2, *[WIDTH] * HIDDEN, 1]
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = list(itertools.pairwise(sizes))
    normal = jax.nn.initializers.glorot_normal()
    return [{"w": normal(k, shape), "b": jnp.zeros(shape[1])} for k, shape in zip(keys, shapes, strict=True)]


def u(params, t, x):
    """The network at one point."""
    h = jnp.stack([2 * t - 1, x])
    for layer in params[:-1]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    return (h @ params[-1]["w"] + params[-1]["b"])[0]


def residual(params, t, x):
    """How far the network is from Burgers' equation at one point."""
    u_x = jax.grad(u, 2)
    _, u_xx = jax.jvp(lambda x: u_x(params, t, x), (x,), (1.0,))
    return jax.grad(u, 1)(params, t, x) + u(params, t, x) * u_x(params, t, x) - VISCOSITY * u_xx


def losses_fn(params, points):
    """Mean squared residuals of the equation, the initial condition and the boundary."""
    (t, x), (t0, x0), (t1, x1) = points["residual"], points["initial"], points["boundary"]
    at = jax.vmap(partial(u, params))
    return {
        "residual": jnp.mean(jax.vmap(partial(residual, params))(t, x) ** 2),
        "initial": jnp.mean((at(t0, x0) + jnp.sin(jnp.pi * x0)) ** 2),
        "boundary": jnp.mean(at(t1, x1) ** 2),
    }


def draw_points(key):
    """Uniform points inside, and fixed ones on the edges."""
    line, ends = jnp.linspace(-1, 1, EDGE), jnp.repeat(jnp.asarray([-1.0, 1.0]), EDGE // 2)
    t, x = jax.random.uniform(key, (2, POINTS))
    return {
        "residual": (t, 2 * x - 1),
        "initial": (jnp.zeros(EDGE), line),
        "boundary": (jnp.tile(jnp.linspace(0, 1, EDGE // 2), 2), ends),
    }


def train(name, seed, steps):
    """The trained parameters."""
    key = jax.random.key(seed)
    params = network(key)
    tx = mtl.chain(METHODS[name](seed), optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps)))

    def step(i, carry):
        params, state = carry
        losses, grads = mtl.task_value_and_grad(losses_fn)(params, draw_points(jax.random.fold_in(key, i)))
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    run = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry), donate_argnums=0)
    return run((params, tx.init(params)))[0]


GRID = np.meshgrid(np.linspace(0, 1, 101), np.linspace(-1, 1, 257), indexing="ij")


def error(params):
    """Relative error in the root mean square over a grid."""
    t, x = GRID
    found = jax.vmap(partial(u, params))(jnp.asarray(t.ravel()), jnp.asarray(x.ravel()))
    wanted = exact(t, x).ravel()
    return float(np.linalg.norm(np.asarray(found, float) - wanted) / np.linalg.norm(wanted))


COLUMNS = ("method", "median error", "lowest", "highest")


def measure(names, steps, seeds, console):
    """A row for each method."""
    for name in track(names, "training", console=console, transient=True):
        errors = [error(train(name, seed, steps)) for seed in range(seeds)]
        yield f"`{name}`", *(f"{value:.2g}" for value in (np.median(errors), min(errors), max(errors)))


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page", type=Path, help="Markdown page whose table to write")
    arguments = parser.parse_args()
    console = Console()
    rows = list(measure(arguments.methods, arguments.steps, arguments.seeds, console))
    table = Table(*COLUMNS, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if arguments.page:
        fill(arguments.page, {"burgers": markdown_table(COLUMNS, rows)})


if __name__ == "__main__":
    main()
