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
# # First steps: two losses in the plane
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/01_first_steps.ipynb)
#
# You learn how a training step with several losses looks, and you see the paths that different methods take.
# No network and no data yet: two losses of two parameters are enough to get the plain sum stuck.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not find_spec("mtlgrad_jax"):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax matplotlib")

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtlgrad_jax as mtl

STEPS = 2_000 if os.environ.get("MTLGRAD_SMOKE") else 100_000  # a smoke run only checks that everything works
EVERY = 100  # steps between two recorded points
jax.devices()

# %% [markdown]
# ## The problem
#
# This toy problem comes from the CAGrad paper (Liu et al., NeurIPS 2021). For $b > 0$ each loss has a steep, curved
# valley; for $b < 0$ each is a bowl, with its lowest point on another side. The losses have names: they are a dict.


# %%
def losses_fn(x):
    a, b = x
    above, below = jnp.maximum(jnp.tanh(b / 2), 0), jnp.maximum(jnp.tanh(-b / 2), 0)

    def valley(gap):
        return jnp.log(jnp.maximum(jnp.abs(gap), 5e-6)) + 6

    def bowl(centre):
        return ((a - centre) ** 2 + 0.1 * (b + 8) ** 2) / 10 - 20

    return {
        "first": above * valley((-a - 7) / 2 + jnp.tanh(b)) + below * bowl(7.0),
        "second": above * valley((-a + 3) / 2 - jnp.tanh(b) + 2) + below * bowl(-7.0),
    }


A, B = np.meshgrid(np.linspace(-11, 11, 300), np.linspace(-11, 11, 300))
surface = jax.vmap(losses_fn)(jnp.stack([A.ravel(), B.ravel()], axis=1))
surface = {name: np.asarray(values).reshape(A.shape) for name, values in surface.items()}

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
for ax, (name, values) in zip(axes, surface.items(), strict=True):
    drawn = ax.contourf(A, B, values, levels=30, cmap="viridis")
    ax.set(title=f"{name} loss", xlabel="a")
    figure.colorbar(drawn, ax=ax)
axes[0].set_ylabel("b")
plt.show()
# %% [markdown]
# No point is best for both losses. The points that are best in the sense that neither loss can fall without the other
# rising, the **Pareto front**, lie near $b = -8.36$, with $a$ from -7 to 7. In its middle, the sum of the losses is
# lowest.
#
# ## One step
#
# `task_value_and_grad` returns both losses and both gradients, stacked along a new first axis. A method, here `upgrad`,
# turns the two gradients into one, and any optax optimizer goes on from there. `mtl.chain` puts the two together.

# %%
tx = mtl.chain(mtl.upgrad(), optax.adam(1e-3))
x = jnp.array([9.0, 9.0])
state = tx.init(x)

losses, grads = mtl.task_value_and_grad(losses_fn)(x)
updates, state = tx.update(grads, state, x, losses=losses)
x = optax.apply_updates(x, updates)

print("losses:", {name: round(float(loss), 3) for name, loss in losses.items()})
print("gradients, one per row:\n", np.round(grads, 3))
print("update:", updates)

# %% [markdown]
# ## A whole run
#
# A state is a tree of arrays, so a run is a `jax.lax.scan` of such steps, and `jax.vmap` runs it from several starts at
# once. `train` compiles all of that into one program.

# %%
STARTS = jnp.array([[-8.5, 7.5], [-8.5, -5.0], [9.0, 9.0]])


def train(method):
    tx = mtl.chain(method, optax.adam(1e-3))

    def step(carry, _):
        x, state = carry
        losses, grads = mtl.task_value_and_grad(losses_fn)(x)
        updates, state = tx.update(grads, state, x, losses=losses)
        return (optax.apply_updates(x, updates), state), None

    def record(carry, _):
        return jax.lax.scan(step, carry, length=EVERY)[0], carry[0]

    @jax.jit
    @jax.vmap
    def path(start):
        return jax.lax.scan(record, (start, tx.init(start)), length=STEPS // EVERY)[1]

    return np.asarray(path(STARTS))


METHODS = {
    "mean": mtl.mean(),
    "upgrad": mtl.upgrad(),
    "cagrad": mtl.cagrad(c=0.5),
    "mgda": mtl.mgda(),
    "nash_mtl": mtl.nash_mtl(),
    "aligned_mtl": mtl.aligned_mtl(),
}
paths = {name: train(method) for name, method in METHODS.items()}

# %% [markdown]
# ## Their paths
#
# The contours show the mean of the two losses. Each color is a start (dot); a star marks the end of a path. The grey
# line is the Pareto front.

# %%
mean_loss = (surface["first"] + surface["second"]) / 2
figure, axes = plt.subplots(2, 3, figsize=(11, 7.5), layout="constrained", sharex=True, sharey=True)
for ax, (name, path) in zip(axes.flat, paths.items(), strict=True):
    ax.contour(A, B, mean_loss, levels=25, cmap="Greys", linewidths=0.6)
    ax.plot([-7, 7], [-8.36, -8.36], color="0.45", linewidth=5, alpha=0.5, label="Pareto front")
    for points, color in zip(path, ("tab:blue", "tab:green", "tab:orange"), strict=True):
        ax.plot(*points.T, color=color, linewidth=2)
        ax.plot(*points[0], "o", color=color, markersize=8)
        ax.plot(*points[-1], "*", color=color, markersize=15, markeredgecolor="black")
    ax.set_title(name)
axes[0, 0].legend(loc="lower left")
figure.supxlabel("a")
figure.supylabel("b")
plt.show()
# %% [markdown]
# Where does each run end, and what is the mean of the losses there? It is -15.1 in the middle of the front.

# %%
print(f"{'method':12}", *(f"{f'from ({a:g}, {b:g})':>26}" for a, b in STARTS))
for name, path in paths.items():
    means = [np.mean(list(losses_fn(end).values())) for end in path[:, -1]]
    cells = [f"({a:.2f}, {b:.2f}) mean {m:.1f}" for (a, b), m in zip(path[:, -1], means, strict=True)]
    print(f"{name:12}", *(f"{cell:>26}" for cell in cells))

# %% [markdown]
# The mean gets stuck from two of the three starts, and all five other methods reach the front from everywhere. They
# end at different points of it: `cagrad` and `aligned_mtl` in the middle, where the mean is lowest, the others wherever
# they first meet it. No point of the front is wrong. Which one you want is a question of what the tasks are worth to
# you.
#
# ## Why the mean gets stuck
#
# At the end of its first path, one gradient is far longer than the other: the run jumps from one wall of a steep valley
# to the other. The Gramian holds the inner products of the gradients, and it is all that most methods look at. From it,
# a method computes one weight for each task.

# %%
end = jnp.asarray(paths["mean"][0, -1])
_, grads = mtl.task_value_and_grad(losses_fn)(end)
gramian = mtl.stacks.gramian(grads)
norms = np.sqrt(np.diagonal(gramian))
print(f"norms of the gradients: {norms[0]:.1f} and {norms[1]:.1f}, cosine {gramian[0, 1] / norms[0] / norms[1]:.2f}\n")

print(f"{'method':12} {'weights':>18} {'descent of each loss':>22}")
for name, method in METHODS.items():
    weights, _ = method.weigh(gramian, method.init(end))
    descent = np.asarray(gramian @ weights)  # to first order, for a step of size 1 against the combined gradient
    print(f"{name:12} {weights[0]:9.2g}{weights[1]:9.2g} {descent[0]:11.2g}{descent[1]:11.2g}")

# %% [markdown]
# A negative descent means that the loss rises. Under the mean, the long gradient decides and the other loss rises,
# step after step. `upgrad`, `mgda` and `nash_mtl` promise that no loss rises, to first order; `cagrad` and
# `aligned_mtl` do not promise it at every point.
#
# Most training is not like this: on many data sets, a tuned sum does as well as any method.
# [Notebook 2](02_multimnist_nnx.ipynb) compares them on images, and [notebook 4](04_conflicts_seen.ipynb) shows how to
# see whether your tasks conflict at all.
