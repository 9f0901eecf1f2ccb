# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A physics-informed network
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/09_physics_informed.ipynb)
#
# A network that solves a differential equation has a loss for the equation and one each for boundary and initial
# condition. You learn how these disagree, and compare ways to combine them with the exact solution.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not find_spec("mtlgrad_jax"):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax matplotlib")

# %%
import itertools
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtlgrad_jax as mtl

SMOKE = bool(os.environ.get("MTLGRAD_SMOKE"))  # a smoke run only checks that everything works
STEPS, SEEDS = (10, 1) if SMOKE else (4_000, 2)
INSIDE, EDGE = 512, 64  # points in each step
jax.config.update("jax_default_matmul_precision", "highest")  # TPUs would round products to bfloat16
jax.devices()

# %% [markdown]
# ## Burgers' equation
#
# $u_t + u\,u_x = \frac{0.01}{\pi} u_{xx}$ for $x$ from -1 to 1 and $t$ from 0 to 1, with $u(0, x) = -\sin(\pi x)$ and
# $u = 0$ at both ends. A wave steepens into a sharp front at $x = 0$. The exact solution is known: it is a ratio of two
# integrals (Cole and Hopf), computed here by Gauss-Hermite quadrature.

# %%
VISCOSITY = 0.01 / np.pi


def exact(t, x):
    z, w = np.polynomial.hermite.hermgauss(200)
    t, x = np.maximum(t, 1e-12)[..., None], x[..., None]
    y = x - np.sqrt(4 * VISCOSITY * t) * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    density = w * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    return -(density * np.sin(np.pi * y)).sum(-1) / density.sum(-1)


T, X = np.meshgrid(np.linspace(0, 1, 101), np.linspace(-1, 1, 257), indexing="ij")
U = exact(T, X)

# %% [markdown]
# ## Three losses
#
# The network maps one point $(t, x)$ to $u$. Its derivatives come from `jax.grad` and `jax.jvp`. Each loss is a mean
# square over points.


# %%
def make_network(key):
    sizes = [2, 20, 20, 20, 1]
    shapes, keys = list(itertools.pairwise(sizes)), jax.random.split(key, 4)
    glorot = jax.nn.initializers.glorot_normal()
    return [{"w": glorot(k, shape), "b": jnp.zeros(shape[1])} for k, shape in zip(keys, shapes, strict=True)]


def u(params, t, x):
    h = jnp.stack([2 * t - 1, x])
    for layer in params[:-1]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    return (h @ params[-1]["w"] + params[-1]["b"])[0]


def residual(params, t, x):
    u_x = jax.grad(u, argnums=2)
    u_xx = jax.jvp(lambda x: u_x(params, t, x), (x,), (1.0,))[1]
    return jax.grad(u, argnums=1)(params, t, x) + u(params, t, x) * u_x(params, t, x) - VISCOSITY * u_xx


def losses_fn(params, key):
    t, x = jax.random.uniform(key, (2, INSIDE))
    line, time = jnp.linspace(-1, 1, EDGE), jnp.linspace(0, 1, EDGE)
    at = jax.vmap(partial(u, params))
    ends = at(jnp.tile(time, 2), jnp.repeat(jnp.array([-1.0, 1.0]), EDGE))
    return {
        "equation": jnp.mean(jax.vmap(partial(residual, params))(t, 2 * x - 1) ** 2),
        "initial": jnp.mean((at(jnp.zeros(EDGE), line) + jnp.sin(jnp.pi * line)) ** 2),
        "boundary": jnp.mean(ends**2),
    }


# %% [markdown]
# ## Four ways to combine them
#
# - `sum`: no weights.
# - `inverse norms`: the usual recipe for these networks: weights that give all gradients the same length, computed in
#   every 100th step and averaged.
# - `relobralo`: weights from how fast each loss falls.
# - `upgrad`: no loss gets worse, to first order, in any step.
#
# Each is a method, so the training loop is the same.


# %%
def inverse_norms():
    start = {"equation": 1.0, "initial": 1.0, "boundary": 1.0}
    averaged = mtl.smoothed(mtl.avgnorm(scale="mean_norm"), num_tasks=3, decay=0.9, init=start)
    return mtl.update_every(averaged, num_tasks=3, k=100)


METHODS = {
    "sum": mtl.sum(),
    "inverse norms": inverse_norms(),
    "relobralo": mtl.relobralo(num_tasks=3, key=0),
    "upgrad": mtl.upgrad(),
}


def train(method):
    tx = mtl.chain(mtl.with_metrics(method, num_tasks=3), optax.adam(optax.cosine_decay_schedule(3e-3, STEPS)))

    def run(seed):
        key = jax.random.key(seed)
        params = make_network(key)

        def step(carry, i):
            params, state = carry
            losses, grads = mtl.task_value_and_grad(losses_fn)(params, jax.random.fold_in(key, i))
            updates, state = tx.update(grads, state, params, losses=losses)
            seen = mtl.metrics(state)
            kept = {name: seen[name] for name in ("norms", "conflict_fraction")}
            return (optax.apply_updates(params, updates), state), (losses, kept)

        (params, _), history = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))
        return jax.vmap(partial(u, params))(T.ravel(), X.ravel()).reshape(T.shape), history

    return jax.device_get(jax.jit(jax.vmap(run))(jnp.arange(SEEDS)))


runs = {name: train(method) for name, method in METHODS.items()}

# %% [markdown]
# ## How the losses disagree
#
# Lengths of the gradients and conflicts during training, averaged over 50 steps: lengths with the plain sum, conflicts
# with every method.


# %%
def smooth(values):
    width = min(50, len(values))
    return np.convolve(values, np.ones(width) / width, mode="valid")


losses, seen = runs["sum"][1]
names = mtl.unstack(jnp.arange(3), like=losses)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for name, i in names.items():
    axes[0].plot(smooth(seen["norms"][0, :, i]), label=name)
axes[0].set(title="length of the gradients (sum)", xlabel="step", yscale="log")
axes[0].legend()
for method, (_, (_, other)) in runs.items():
    axes[1].plot(smooth(other["conflict_fraction"][0]), label=method)
axes[1].set(title="share of conflicting pairs", xlabel="step", ylim=(0, 1))
axes[1].legend()
plt.show()

# %% [markdown]
# ## The solutions
#
# The error is the root mean square over a grid, relative to that of the exact solution.

# %%
errors = {
    name: [float(np.linalg.norm(found - U) / np.linalg.norm(U)) for found in solutions]
    for name, (solutions, _) in runs.items()
}
for name, values in errors.items():
    print(f"{name:14} relative error", *(f"{value:.3f}" for value in values))

# %%
figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained", sharex=True, sharey=True)
image = axes[0, 0].pcolormesh(T, X, U, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
axes[0, 0].set_title("exact solution")
figure.colorbar(image, ax=axes[0, 0])
for ax, (name, (solutions, _)) in zip(axes.flat[1:], runs.items(), strict=False):
    image = ax.pcolormesh(T, X, np.abs(solutions[0] - U), cmap="magma", vmin=0, vmax=0.5, rasterized=True)
    ax.set_title(f"{name}: absolute error")
    figure.colorbar(image, ax=ax)
axes[1, 2].set_visible(False)
figure.supxlabel("t")
figure.supylabel("x")
plt.show()

# %%
ax = plt.subplots(figsize=(8, 3.8), layout="constrained")[1]
ax.plot(X[-1], U[-1], "k--", label="exact")
for name, (solutions, _) in runs.items():
    ax.plot(X[-1], solutions[0, -1], label=name, linewidth=1.2)
ax.set(title="the end, t = 1", xlabel="x", ylabel="u")
ax.legend()
plt.show()

# %% [markdown]
# ## What was seen
#
# - Two of the three pairs of losses conflict in nearly every step, with every method, and the gradient of the boundary
#   is much shorter than the other two. Both problems are real here.
# - `upgrad` has the smallest error for both starts, and `relobralo` is close to the sum. `inverse norms`, the common
#   recipe, does worse than no weights at all on this problem.
# - No network is good yet: after so few steps, the sharp front at $x = 0$ is still too round. More steps lower all
#   errors: the [page on these networks](https://github.com/mtlgrad/mtlgrad_jax/blob/main/docs/pinns.md) trains twice as
#   long with more points, and finds the same order.
#
# On another equation the order may differ, so always compare with the plain sum.
