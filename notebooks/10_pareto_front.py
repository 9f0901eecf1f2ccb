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
# # A Pareto front in one jit
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/10_pareto_front.ipynb)
#
# You train one model for each of many trade-offs between two losses, all side by side in one compiled program.
# You see why weighting the losses is enough for some problems and finds almost nothing on others.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not find_spec("mtlgrad_jax"):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax matplotlib")

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtlgrad_jax as mtl

SMOKE = bool(os.environ.get("MTLGRAD_SMOKE"))  # a smoke run only checks that everything works
STEPS, COUNT = (20, 5) if SMOKE else (2_000, 15)
jax.devices()

# %% [markdown]
# ## Preferences
#
# A preference is a vector of positive numbers, one for each task. `simplex_lattice` spaces them evenly; the two ends,
# where one task counts for nothing, are left out.

# %%
preferences = mtl.diagnostics.simplex_lattice(num_tasks=2, divisions=COUNT + 1)[1:-1]
print(np.round(preferences, 2).tolist())

# %% [markdown]
# ## One curve, two customers
#
# The first customer wants the network to follow a sine, the second a step. It cannot do both. `mtl.pareto_front` calls
# `optimizer` with each preference, under the names of the tasks; here it is the weights of the losses.


# %%
grid = jnp.linspace(-1, 1, 128)[:, None]
targets = {"sine": jnp.sin(3 * grid[:, 0]), "step": jnp.sign(grid[:, 0])}
keys = jax.random.split(jax.random.key(0), 2)
network = {
    "in": 3 * jax.random.normal(keys[0], (1, 32)),
    "bias": jnp.linspace(-3, 3, 32),
    "out": jax.random.normal(keys[1], (32,)) / 6,
}


def predict(params):
    return jnp.tanh(grid @ params["in"] + params["bias"]) @ params["out"]


def customers(params):
    return {name: jnp.mean((predict(params) - target) ** 2) for name, target in targets.items()}


def optimizer(preference):
    return mtl.chain(mtl.constant(preference), optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)))


began = time.perf_counter()
named = {"sine": preferences[:, 0], "step": preferences[:, 1]}
networks, history = mtl.pareto_front(customers, optimizer, network, named, steps=STEPS)
curves = jax.vmap(predict)(networks)
print(f"{COUNT} networks, {STEPS} steps: {time.perf_counter() - began:.1f} s with compilation")

# %%
found = jax.vmap(customers)(networks)
points = np.stack([found["sine"], found["step"]], axis=1)
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
colors = plt.cm.viridis(np.linspace(0, 1, COUNT))
for curve, color in zip(curves, colors, strict=True):
    axes[0].plot(grid[:, 0], curve, color=color, linewidth=1)
for (name, target), style in zip(targets.items(), ("k--", "k:"), strict=True):
    axes[0].plot(grid[:, 0], target, style, label=f"the {name}")
axes[0].set(title="the networks, from one wish to the other", xlabel="input", ylabel="output")
axes[0].legend()
mtl.diagnostics.plot_front(points, names=["loss of sine", "loss of step"], ax=axes[1])
axes[1].set_title("their losses")
plt.show()

# %% [markdown]
# The networks go from one wish to the other, and their losses form a curve that bends towards the origin: a **convex**
# front. On a convex front, each point is best for some weights, so weighting the losses is enough.
#
# ## A front that bends the other way
#
# Both losses are $1 - \exp(-\|x \mp 1/\sqrt{20}\|^2)$ of 20 parameters (Fonseca & Fleming 1995). This front is known:
# it is the image of the line between the two optima, and it is **concave**.


# %%
SIZE = 20


def concave(x):
    centre = jnp.ones(SIZE) / jnp.sqrt(SIZE)
    return jnp.stack([-jnp.expm1(-jnp.sum((x - centre) ** 2)), -jnp.expm1(-jnp.sum((x + centre) ** 2))])


line = np.linspace(-1, 1, 400)[:, None]
true_front = -np.expm1(-((line - [1.0, -1.0]) ** 2))
start = jax.random.normal(jax.random.key(0), (SIZE,)) * 0.1

# %% [markdown]
# Four methods take a preference $r$, each in its own sense. `constant` weights the losses, `tchebycheff` lowers the
# largest weighted loss, `cosmos` rewards losses that point along the preference, and `epo` ends where the losses are
# exactly proportional to $1/r$.

# %%
METHODS = {
    "constant": lambda r: mtl.constant(r),
    "tchebycheff": lambda r: mtl.tchebycheff(r),
    "cosmos": lambda r: mtl.cosmos(4.0, 1 - r),
    "epo": lambda r: mtl.epo(r),
}
fronts, rate = {}, optax.cosine_decay_schedule(0.02, STEPS)
for name, method in METHODS.items():
    x, _ = mtl.pareto_front(
        concave, lambda r, method=method: mtl.chain(method(r), optax.adam(rate)), start, preferences, steps=STEPS
    )
    fronts[name] = np.asarray(jax.vmap(concave)(x))

figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained", sharex=True, sharey=True)
for ax, (name, losses) in zip(axes, fronts.items(), strict=True):
    mtl.diagnostics.plot_front(losses, reference=true_front, ax=ax)
    ax.set(title=name, xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    ax.label_outer()
plt.show()

# %% [markdown]
# The hypervolume measures a whole front with one number: the area that its points dominate, up to a reference point.
# "Inside" counts the points at which neither loss is near zero.

# %%
best = mtl.diagnostics.hypervolume(true_front, reference=[1.0, 1.0])
for name, losses in fronts.items():
    share = mtl.diagnostics.hypervolume(losses, reference=[1.0, 1.0]) / best
    inside = np.sum((losses > 0.02).all(axis=1))
    print(f"{name:12} hypervolume {share:.2f} of the true front's, {inside:2} of {COUNT} points inside")

# %% [markdown]
# With `constant`, all models end at the two ends of the front: on a concave front, every point between is a *maximum*
# of the weighted sum along it. The other three spread over the front. They do not need a second program or a second
# run, only another method in the same call.
#
# Which front your losses have is seldom known. If models for many weights crowd at its ends, try `tchebycheff` or
# `epo`. The documentation has a [table](https://github.com/mtlgrad/mtlgrad_jax/blob/main/docs/pareto.md) of all methods
# that take a preference, and what each means by it.
