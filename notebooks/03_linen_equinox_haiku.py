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
# # Linen, Equinox and Haiku
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/03_linen_equinox_haiku.ipynb)
#
# One small problem in three frameworks. You see that the methods do not care where the parameters come from, and what
# changes in the training step of each. [Notebook 2](02_multimnist_nnx.ipynb) does it in Flax NNX.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not all(map(find_spec, ("mtlgrad_jax", "flax", "equinox", "haiku", "sklearn"))):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax[flax] equinox dm-haiku scikit-learn matplotlib")

# %%
import os

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen
from sklearn.datasets import load_digits

import mtlgrad_jax as mtl
from mtlgrad_jax.integrations.linen import TrainState

STEPS = 10 if os.environ.get("MTLGRAD_SMOKE") else 1_500  # a smoke run only checks that everything works
jax.devices()

# %% [markdown]
# ## The problem
#
# Two small digits of 8 x 8 pixels overlap by half. One task is to name the left one, the other to name the right one.
# The last 300 digits are kept for the test.

# %%
digits, classes = load_digits(return_X_y=True)
digits = digits.reshape(-1, 8, 8) / 16


def pairs(part, count, seed):
    left, right = np.random.default_rng(seed).choice(np.arange(len(digits))[part], size=(2, count))
    x = np.zeros((count, 8, 12), np.float32)
    x[:, :, :8] = digits[left]
    x[:, :, 4:] = np.maximum(x[:, :, 4:], digits[right])
    return {"x": jnp.asarray(x.reshape(count, -1)), "left": classes[left], "right": classes[right]}


train, test = pairs(slice(None, -300), 20_000, seed=0), pairs(slice(-300, None), 3_000, seed=1)

figure, axes = plt.subplots(1, 4, figsize=(9, 2), layout="constrained")
for i, ax in enumerate(axes):
    ax.imshow(test["x"][i].reshape(8, 12), cmap="gray_r")
    ax.set(title=f"left {test['left'][i]}, right {test['right'][i]}", xticks=[], yticks=[])
plt.show()


# %% [markdown]
# What all three share: the losses of the outputs, a method with an optimizer, and a batch for each step.


# %%
def task_losses(outputs, batch):
    classes = optax.softmax_cross_entropy_with_integer_labels
    return {task: classes(outputs[task], batch[task]).mean() for task in ("left", "right")}


def draw(key):
    chosen = jax.random.choice(key, len(train["x"]), (128,))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], train)


method = mtl.shared_private(mtl.upgrad(), mtl.under("trunk"))  # the heads, outside the trunk, follow their own task
tx = mtl.chain(method, optax.adam(2e-3))
keys = jax.random.split(jax.random.key(1), STEPS)
curves, accuracies = {}, {}


def keep(name, losses, outputs):
    curves[name] = jax.device_get(losses)
    accuracies[name] = {task: float(jnp.mean(outputs[task].argmax(-1) == test[task])) for task in outputs}


# %% [markdown]
# ## Flax Linen
#
# The state of training is `mtlgrad_jax.integrations.linen.TrainState`: flax's own, except that `apply_gradients` passes
# `losses` on to the method. `setup` gives the trunk its name, so `mtl.under("trunk")` finds it.


# %%
class LinenNet(linen.Module):
    def setup(self):
        self.trunk = linen.Sequential([linen.Dense(128), linen.relu, linen.Dense(64), linen.relu])
        self.left, self.right = linen.Dense(10), linen.Dense(10)

    def __call__(self, x):
        features = self.trunk(x)
        return {"left": self.left(features), "right": self.right(features)}


net = LinenNet()
state = TrainState.create(apply_fn=net.apply, tx=tx, params=net.init(jax.random.key(0), test["x"])["params"])


def linen_step(state, key):
    batch = draw(key)

    def losses_fn(params):
        return task_losses(state.apply_fn({"params": params}, batch["x"]), batch)

    losses, grads = mtl.task_value_and_grad(losses_fn)(state.params)
    return state.apply_gradients(grads=grads, losses=losses), losses


state, losses = jax.jit(lambda state: jax.lax.scan(linen_step, state, keys))(state)
keep("Linen", losses, net.apply({"params": state.params}, test["x"]))

# %% [markdown]
# ## Equinox
#
# A model is a tree of arrays and other things. `eqx.partition` separates the arrays, which train, from the rest.


# %%
class EquinoxNet(eqx.Module):
    trunk: eqx.nn.MLP
    heads: dict[str, eqx.nn.Linear]

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        relu = jax.nn.relu
        self.trunk = eqx.nn.MLP(96, 64, 128, depth=1, activation=relu, final_activation=relu, key=keys[0])
        self.heads = {task: eqx.nn.Linear(64, 10, key=k) for task, k in zip(("left", "right"), keys[1:], strict=True)}

    def __call__(self, x):
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


params, static = eqx.partition(EquinoxNet(jax.random.key(0)), eqx.is_inexact_array)


def equinox_step(carry, key):
    params, opt_state = carry
    batch = draw(key)

    def losses_fn(params):
        return task_losses(jax.vmap(eqx.combine(params, static))(batch["x"]), batch)

    losses, grads = mtl.task_value_and_grad(losses_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
    return (eqx.apply_updates(params, updates), opt_state), losses


(params, _), losses = eqx.filter_jit(lambda carry: jax.lax.scan(equinox_step, carry, keys))((params, tx.init(params)))
keep("Equinox", losses, jax.vmap(eqx.combine(params, static))(test["x"]))

# %% [markdown]
# ## Haiku
#
# Parameters are a dict by module name, so the trunk is whatever is named `trunk`.


# %%
def forward(x):
    features = hk.nets.MLP([128, 64], activate_final=True, name="trunk")(x)
    return {task: hk.Linear(10, name=task)(features) for task in ("left", "right")}


net = hk.without_apply_rng(hk.transform(forward))
params = net.init(jax.random.key(0), test["x"])
print(*params, sep="\n")

# %% [markdown]
# Here the trunk's layers are called `trunk/~/linear_0` and so on. `shared_private` also takes a function of a leaf's
# path, for names of any form.

# %%
method = mtl.shared_private(mtl.upgrad(), lambda path: path[0].key.startswith("trunk"))
tx = mtl.chain(method, optax.adam(2e-3))


def haiku_step(carry, key):
    params, opt_state = carry
    batch = draw(key)
    losses, grads = mtl.task_value_and_grad(lambda params: task_losses(net.apply(params, batch["x"]), batch))(params)
    updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
    return (optax.apply_updates(params, updates), opt_state), losses


(params, _), losses = jax.jit(lambda carry: jax.lax.scan(haiku_step, carry, keys))((params, tx.init(params)))
keep("Haiku", losses, net.apply(params, test["x"]))

# %% [markdown]
# ## Side by side

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)
for ax, (name, losses) in zip(axes, curves.items(), strict=True):
    for task, values in losses.items():
        ax.plot(values, label=task, linewidth=0.8)
    ax.set(title=name, xlabel="step", yscale="log")
axes[0].set_ylabel("loss")
axes[0].legend()
plt.show()
for name, accuracy in accuracies.items():
    print(f"{name:8}", {task: f"{value:.1%}" for task, value in accuracy.items()})

# %% [markdown]
# Three frameworks, one result: the accuracies are close, though each framework draws other first parameters.
# What differs in the training step is only how parameters are passed:
#
# | | parameters | the update |
# |---|---|---|
# | Linen | `state.params` | `state.apply_gradients(grads=grads, losses=losses)` |
# | Equinox | the arrays of the model, from `eqx.partition` | `tx.update(grads, opt_state, params, losses=losses)` |
# | Haiku | a dict by module name | the same |
#
# The page on [training loops](https://github.com/mtlgrad/mtlgrad_jax/blob/main/docs/training_loops.md) adds BatchNorm,
# dropout and logging.
