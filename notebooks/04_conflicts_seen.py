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
# # Conflicts, seen
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/04_conflicts_seen.ipynb)
#
# You learn how to measure what happens between your tasks: lengths, angles and weights of their gradients, and what
# each step does to each loss. Do this before you choose a method.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not (find_spec("mtlgrad_jax") and find_spec("mlxtend")):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax mlxtend matplotlib")

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from mlxtend.data import mnist_data

import mtlgrad_jax as mtl

STEPS = 30 if os.environ.get("MTLGRAD_SMOKE") else 600  # a smoke run only checks that everything works
BATCH = 64
jax.devices()

# %% [markdown]
# ## Four tasks in one image
#
# Two digits overlap in each image. From it, the network should tell the **left** digit, the **right** digit, whether
# the left one is **larger**, and their **total**, a number from 0 to 18. The first three are classifications, the last
# is a regression, so the losses have different units.

# %%
images, labels = mnist_data()  # 5,000 digits of MNIST
images = images.reshape(-1, 28, 28) / 255
rng = np.random.default_rng(0)
left, right = rng.integers(len(images), size=(2, STEPS, BATCH))

x = np.zeros((STEPS, BATCH, 36, 36), np.float32)
x[..., :28, :28] = images[left]
x[..., 8:, 8:] = np.maximum(x[..., 8:, 8:], images[right])
batches = {
    "x": x.reshape(STEPS, BATCH, -1),
    "left": labels[left],
    "right": labels[right],
    "larger": labels[left] > labels[right],
    "total": labels[left] + labels[right],
}
batches = jax.tree.map(jnp.asarray, batches)

figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
for i, ax in enumerate(axes):
    ax.imshow(x[0, i], cmap="gray_r")
    ax.set(title=f"left {labels[left][0, i]}, right {labels[right][0, i]}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## A network with a trunk and four heads
#
# Plain JAX is enough here. The losses are a dict, so everything below can be read by name.

# %%
SIZES = {"left": 10, "right": 10, "larger": 1, "total": 1}
keys = iter(jax.random.split(jax.random.key(0), 6))
glorot = jax.nn.initializers.glorot_normal()
start = {
    "trunk": [glorot(next(keys), (36 * 36, 128)), glorot(next(keys), (128, 64))],
    "heads": {task: glorot(next(keys), (64, size)) for task, size in SIZES.items()},
}


def losses_fn(params, batch):
    features = batch["x"]
    for layer in params["trunk"]:
        features = jax.nn.relu(features @ layer)
    out = {task: features @ head for task, head in params["heads"].items()}
    classes = optax.softmax_cross_entropy_with_integer_labels
    return {
        "left": classes(out["left"], batch["left"]).mean(),
        "right": classes(out["right"], batch["right"]).mean(),
        "larger": optax.sigmoid_binary_cross_entropy(out["larger"][:, 0], batch["larger"]).mean(),
        "total": jnp.mean((out["total"][:, 0] - batch["total"]) ** 2),
    }


# %% [markdown]
# ## Measure
#
# `with_metrics` keeps what a method saw and did in the optimizer's state, and `mtl.metrics` finds it there. It costs a
# Gramian in each step. Tasks can only conflict where they share parameters, so `shared_private` shows the method the
# trunk alone; each head follows its own task.


# %%
def train(method):
    method = mtl.shared_private(mtl.with_metrics(method, num_tasks=4), mtl.under("trunk"))
    tx = mtl.chain(method, optax.adam(1e-3))

    def step(carry, batch):
        params, state = carry
        losses, grads = mtl.task_value_and_grad(losses_fn)(params, batch)
        updates, state = tx.update(grads, state, params, losses=losses)
        return (optax.apply_updates(params, updates), state), (losses, mtl.metrics(state))

    run = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), batches)[1])
    losses, metrics = jax.device_get(run())
    return losses, metrics


losses, metrics = train(mtl.sum())
names = mtl.unstack(jnp.arange(4), like=losses)  # the tasks in the order of the metrics' entries
for key, value in metrics.items():
    print(f"{key:22} {value.shape}")

# %% [markdown]
# ### Lengths
#
# The squared error of the total is a large number, and so is its gradient.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for name, i in names.items():
    axes[0].plot(losses[name], label=name)
    axes[1].plot(metrics["norms"][:, i], label=name)
axes[0].set(title="losses", xlabel="step", yscale="log")
axes[1].set(title="lengths of the gradients in the trunk", xlabel="step", yscale="log")
axes[0].legend()
plt.show()

# %%
late = slice(STEPS // 2, None)
norms = {name: float(np.median(metrics["norms"][late, i])) for name, i in names.items()}
print({name: f"{norm:.2f}" for name, norm in norms.items()})
print(f"longest over shortest: {max(norms.values()) / min(norms.values()):.0f}")

# %% [markdown]
# The gradient of the total is about ten times as long as the others, or more, so it decides most of the sum.
#
# ### Angles
#
# Red pairs conflict: a small step for one task, taken alone, would make the other worse.

# %%
axes = plt.subplots(figsize=(9, 3.2), layout="constrained")[1]
mtl.diagnostics.plot_cosines(metrics, like=names, ax=axes)
plt.show()
axes = plt.subplots(figsize=(9, 3.2), layout="constrained")[1]
mtl.diagnostics.plot_conflicts(metrics, ax=axes)
plt.show()

# %% [markdown]
# Conflicts are frequent here, about a third of the pairs in a step, but mild: most cosines are near zero.
#
# ### What each step does to each loss
#
# `predicted_change` is the change of each loss to first order, per unit of learning rate. Where it is positive, the
# combined gradient makes that task worse. Adam changes the direction afterwards, so this is about the gradient that
# Adam gets.


# %%
def worse(metrics):
    return {name: float(np.mean(metrics["predicted_change"][:, i] > 0)) for name, i in names.items()}


print("share of steps in which the sum makes a task worse:")
print({name: f"{share:.0%}" for name, share in worse(metrics).items()})

# %% [markdown]
# ## Other methods beside the sum
#
# The same start and the same batches; only the method changes. `constant` has weights chosen by hand from the lengths
# above, `uw` learns a scale for each loss, `upgrad` makes no task worse, and `nash_mtl` does not see how long a
# gradient is.

# %%
METHODS = {
    "constant": mtl.constant({"left": 1.0, "right": 1.0, "larger": 1.0, "total": 0.05}),
    "uw": mtl.uw(num_tasks=4),
    "upgrad": mtl.upgrad(),
    "nash_mtl": mtl.nash_mtl(),
}
runs = {"sum": (losses, metrics)} | {name: train(method) for name, method in METHODS.items()}

print(f"{'':10} {'share of steps that make a task worse':^36}   {'mean loss in the last tenth':^36}")
print(f"{'method':10}", *(f"{name:>8}" for name in names), "  ", *(f"{name:>8}" for name in names))
for method, (found, seen) in runs.items():
    last = [f"{np.mean(found[name][-STEPS // 10 :]):8.3f}" for name in names]
    print(f"{method:10}", *(f"{share:8.0%}" for share in worse(seen).values()), "  ", *last)

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
for ax, name in zip(axes, ("uw", "upgrad", "nash_mtl"), strict=True):
    mtl.diagnostics.plot_weights(runs[name][1], like=names, ax=ax)
    ax.set(title=f"weights of {name}", yscale="log", ylim=(5e-3, 100))
    ax.label_outer()
plt.show()

# %% [markdown]
# ## What was seen
#
# - The gradients differ in length more than in direction. What changes their lengths, `constant` by hand and
#   `nash_mtl` by itself, lowers the three classification losses most, and `nash_mtl` does so at no cost to the total.
# - `upgrad` keeps every step from making a task worse, as promised, but it follows the long gradient nearly as the sum
#   does, so it ends only a little below the sum.
# - Once the lengths are known, good weights by hand cost nothing and come close to the best method on the three
#   classifications, here at some cost to the total. Measure first.
#
# These are the losses of one run on training images. For a comparison by accuracy on test images, over several seeds,
# see [notebook 2](02_multimnist_nnx.ipynb).
