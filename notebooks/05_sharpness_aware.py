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
# # Flat minima: FS-MTL, and similar lengths: SAM-GS
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/05_sharpness_aware.ipynb)
#
# FS-MTL makes any method look for flat minima of every task; SAM-GS looks at the lengths of the gradients only. You
# train with both, measure how flat the results are, and see what it costs.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not (find_spec("mtlgrad_jax") and find_spec("mlxtend")):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax mlxtend matplotlib")

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from mlxtend.data import mnist_data

import mtlgrad_jax as mtl

SMOKE = bool(os.environ.get("MTLGRAD_SMOKE"))  # a smoke run only checks that everything works
STEPS, SEEDS, TEST = (5, 1, 200) if SMOKE else (1_000, 3, 5_000)
TASKS = ("left", "right")
jax.devices()

# %% [markdown]
# ## Data and network
#
# Pairs of digits that overlap, as in [notebook 2](02_multimnist_nnx.ipynb), drawn on the device. Only 100 digits of
# each class are for training, so that the network can learn them by heart: flat minima are meant to help there.

# %%
images, labels = mnist_data()  # sorted by class, 500 digits of each
images = jnp.asarray(images.reshape(10, 500, 28, 28) / 255, jnp.float32)
labels = jnp.asarray(labels.reshape(10, 500))


def draw(key, part, count):
    digits, classes = images[:, part].reshape(-1, 28, 28), labels[:, part].ravel()
    left, right = jax.random.choice(key, len(digits), (2, count))
    x = jnp.maximum(jnp.pad(digits[left], ((0, 0), (0, 8), (0, 8))), jnp.pad(digits[right], ((0, 0), (8, 0), (8, 0))))
    return {"x": x.reshape(count, -1), "left": classes[left], "right": classes[right]}


train_part, test_part = slice(0, 100), slice(400, 500)
test = draw(jax.random.key(7), test_part, TEST)
known = draw(jax.random.key(8), train_part, TEST)  # training digits, in other pairs


def make_params(key):
    glorot, keys = jax.nn.initializers.glorot_normal(), jax.random.split(key, 4)
    trunk = [glorot(keys[0], (36 * 36, 128)), glorot(keys[1], (128, 64))]
    return {"trunk": trunk, "heads": {task: glorot(k, (64, 10)) for task, k in zip(TASKS, keys[2:], strict=True)}}


def predict(params, x):
    for layer in params["trunk"]:
        x = jax.nn.relu(x @ layer)
    return {task: x @ head for task, head in params["heads"].items()}


def losses_fn(params, batch):
    logits = predict(params, batch["x"])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {task: cross_entropy(logits[task], batch[task]).mean() for task in TASKS}


# %% [markdown]
# ## Two gradients for each task
#
# `sam_value_and_grad` moves the parameters by a small distance `rho` towards each task's worst point nearby and takes
# that task's gradient there. It returns the losses, the clean gradients and the perturbed ones. `fs_mtl` wraps a method
# and combines two things with it, one after the other: the clean gradients, and what the perturbed ones add to them.

# %%
is_shared, rho = mtl.under("trunk"), 0.1
sam = mtl.sam_value_and_grad(losses_fn, rho_shared=rho, is_shared=is_shared)
params, batch = make_params(jax.random.key(0)), draw(jax.random.key(1), train_part, 128)
losses, clean, perturbed = jax.jit(sam)(params, batch)
print("losses:", {task: round(float(loss), 3) for task, loss in losses.items()})
print("lengths of the clean gradients:    ", mtl.stacks.task_norms(clean))
print("lengths of the perturbed gradients:", mtl.stacks.task_norms(perturbed))


# %% [markdown]
# ## Training
#
# Two base methods, each plain and sharpness-aware, and SAM-GS. With `mean`, the sharpness-aware form is plain SAM.
# Behind SAM-GS stand the two transformations that its official code has there: a factor K and clipping.


# %%
def sharp(method):
    return mtl.fs_mtl(method, is_shared=is_shared)


def plain(method):
    return mtl.shared_private(method, is_shared)


METHODS = {
    "mean": [plain(mtl.mean())],
    "F-mean": [sharp(mtl.mean())],
    "nash_mtl": [plain(mtl.nash_mtl())],
    "F-nash_mtl": [sharp(mtl.nash_mtl())],
    "sam_gs": [mtl.sam_gs(num_tasks=2, gamma=0.9), optax.scale(2.0), optax.clip_by_global_norm(1.0)],
}


def train(name):
    tx = mtl.chain(*METHODS[name], optax.adam(optax.cosine_decay_schedule(2e-3, STEPS)))

    def step(carry, key):
        params, state = carry
        batch = draw(key, train_part, 128)
        if name.startswith("F-"):
            losses, clean, perturbed = sam(params, batch)
            updates, state = tx.update(perturbed, state, params, clean_grads=clean, losses=losses)
        else:
            losses, clean = mtl.task_value_and_grad(losses_fn)(params, batch)
            updates, state = tx.update(clean, state, params, losses=losses)
        norms = mtl.stacks.task_norms({"trunk": clean["trunk"]})
        return (optax.apply_updates(params, updates), state), (losses, norms)

    def run(seed):
        params = make_params(jax.random.key(seed))
        keys = jax.random.split(jax.random.key(100 + seed), STEPS)
        (params, _), history = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params, history

    compiled = jax.jit(run).lower(0).compile()
    began = time.perf_counter()
    runs = [jax.block_until_ready(compiled(seed)) for seed in range(SEEDS)]
    return runs, 1e3 * (time.perf_counter() - began) / SEEDS / STEPS


trained, milliseconds = {}, {}
for name in METHODS:
    trained[name], milliseconds[name] = train(name)


# %% [markdown]
# ## Accuracy and cost


# %%
@jax.jit
def accuracy(params):
    logits = predict(params, test["x"])
    return jnp.mean(jnp.stack([jnp.mean(logits[task].argmax(-1) == test[task]) for task in TASKS]))


print(f"{'method':12} {'test accuracy, mean of both tasks':36} {'ms a step':>10}")
for name, runs in trained.items():
    values = 100 * np.array([accuracy(params) for params, _ in runs])
    cells = f"{values.mean():.2f} % ({', '.join(f'{value:.2f}' for value in values)})"
    print(f"{name:12} {cells:36} {milliseconds[name]:9.1f}")

# %% [markdown]
# ## How flat?
#
# Move the trained parameters towards each task's worst point at a distance, and see how its loss on the training digits
# grows.


# %%
@jax.jit
def worst(params, radius):
    _, grads = mtl.task_value_and_grad(losses_fn)(params, known)
    moves = mtl.sam_perturbation(grads, params, radius)
    moved = [jax.tree.map(lambda p, m, i=i: p + m[i], params, moves) for i in range(len(TASKS))]
    return jnp.mean(jnp.stack([losses_fn(p, known)[task] for p, task in zip(moved, TASKS, strict=True)]))


radii = jnp.linspace(0, 0.5, 11)
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, runs in trained.items():
    grown = np.mean([[worst(params, radius) for radius in radii] for params, _ in runs], axis=0)
    style = "--" if name.startswith("F-") else ":" if name == "sam_gs" else "-"
    axes[0].plot(radii, grown, style, label=name)
    norms = np.array(runs[0][1][1])
    low, high = norms.min(axis=1), norms.max(axis=1)
    similarity = 2 * low * high / (low**2 + high**2)
    width = min(50, STEPS)
    axes[1].plot(np.convolve(similarity, np.ones(width) / width, mode="valid"), style, label=name)
axes[0].set(title="loss at the worst point nearby", xlabel="distance", ylabel="loss, mean of both tasks")
axes[1].set(title="similarity of the gradients' lengths", xlabel="step", ylabel="1 = same length")
axes[0].legend()
plt.show()

# %% [markdown]
# ## What was seen
#
# - The sharpness-aware networks are far flatter: at a distance of 0.5 their loss is about 0.4, and that of the
#   others 3.5 to 6.
# - They are also more accurate on new digits, by more than one point on average, with every seed and both base methods.
#   There are few training digits here, which favours flat minima. With more data the gain is smaller:
#   [about 0.2 points](https://github.com/mtlgrad/mtlgrad_jax/blob/main/docs/founding_papers.md) on average in a longer
#   comparison.
# - Most of the gain comes from flatness, not from the method: `F-mean`, which is plain SAM, has about three quarters of
#   it.
# - The price is about three times the time for each step: two backward passes more, and a second solve.
# - SAM-GS is close to the plain methods here, within the noise. The two gradients have similar lengths from the start,
#   so there is little for it to equalise.
#
# Compare at equal time, too: in the time of a sharpness-aware run, the plain ones could take three times as many steps,
# or use data augmentation.
