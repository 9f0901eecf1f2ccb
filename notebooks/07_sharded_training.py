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
# # Sharded training on eight devices
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/07_sharded_training.ipynb)
#
# You split the batch and the parameters over a mesh of devices, check that a step gives the same result as on one
# device, and read in the compiled program what the devices send to each other.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not find_spec("mtlgrad_jax"):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax matplotlib")

# %% [markdown]
# On a CPU, JAX can pretend to have eight devices. Set this before JAX is used. It changes nothing on a GPU
# or TPU.

# %%
import os
import re

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mtlgrad_jax as mtl

STEPS = 5 if os.environ.get("MTLGRAD_SMOKE") else 200  # a smoke run only checks that everything works
jax.config.update("jax_default_matmul_precision", "highest")  # TPUs would round products to bfloat16
jax.devices()

# %% [markdown]
# ## A mesh
#
# The first axis splits the batch, the second the parameters: with eight devices, a mesh of 4 x 2. The same code runs on
# one device.

# %%
count = len(jax.devices())
model = 2 if count % 2 == 0 else 1
mesh = Mesh(np.asarray(jax.devices()).reshape(-1, model), ("data", "model"))
print(dict(mesh.shape))


def on_mesh(*axes):
    return NamedSharding(mesh, P(*axes))


# %% [markdown]
# ## Parameters, batch and losses
#
# Four regressions share a trunk of two layers. The first layer is split by its columns and the second by its rows, so
# that each device holds a part of both.

# %%
K, WIDTH = 4, 256
placed = {
    "first": on_mesh(None, "model"),
    "second": on_mesh("model", None),
    "heads": on_mesh(),
}
keys = jax.random.split(jax.random.key(0), 4)
start = {
    "first": jax.random.normal(keys[0], (32, WIDTH)) / 6,
    "second": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 16,
    "heads": jax.random.normal(keys[2], (WIDTH, K)) / 16,
}
x = jax.random.normal(keys[3], (1024, 32))
y = jnp.stack([jnp.sin(x[:, 0]), x[:, 1] * x[:, 2], jnp.abs(x[:, 3]), jnp.cos(x[:, 0] + x[:, 4])], axis=1)


def losses_fn(params, batch):
    x, y = batch
    features = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"])
    return jnp.mean((features @ params["heads"] - y) ** 2, axis=0)


params = jax.device_put(start, placed)
batch = jax.device_put((x, y), on_mesh("data"))
for name, leaf in params.items():
    print(f"{name:7} {leaf.shape!s:11} of which a device holds {leaf.sharding.shard_shape(leaf.shape)}")
print(f"batch   {x.shape!s:11} of which a device holds {batch[0].sharding.shard_shape(x.shape)}")

# %% [markdown]
# ## The step
#
# Nothing in it mentions devices. Adam's moments get the sharding of the parameters, since `tx.init` runs on them.

# %%
tx = mtl.chain(mtl.upgrad(), optax.adam(optax.cosine_decay_schedule(2e-3, STEPS)))


@jax.jit
def step(params, state, batch):
    losses, grads = mtl.task_value_and_grad(losses_fn)(params, batch)
    updates, state = tx.update(grads, state, params, losses=losses)
    return optax.apply_updates(params, updates), state, losses


state = tx.init(params)
moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (WIDTH, WIDTH)]
print("Adam's moments of the second layer:", *(leaf.sharding.spec for leaf in moments))

# %%
first, _, _ = step(params, state, batch)
alone, _, _ = step(start, tx.init(start), (x, y))  # on one device
for name in start:
    difference = jnp.max(jnp.abs(np.asarray(first[name]) - np.asarray(alone[name])))
    print(f"{name:7} still {first[name].sharding.spec}, largest difference from one device {difference:.1e}")

# %% [markdown]
# ## What is sent
#
# First the update alone, from a stack of gradients split like the parameters. The Gramian is a sum over all parameters,
# so each device sends its parts of K x K numbers, and nothing else. `sent` reads that in the compiled program, without
# the branches for rare cases, such as gradients whose squares overflow, which send a few numbers more.


# %%
def sent(compiled):
    """Collective operations on the path taken, with the shapes that they send."""
    program = compiled.as_text().split("\nENTRY ")[1]
    operations = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shapes, name in re.findall(rf"= (.*?) ({operations})(?:-start)?\(", program):
        print(f"{name:14}", ", ".join(re.findall(r"\w+\[[\d,]*\]", shapes)))


stack = {
    name: jax.ShapeDtypeStruct((K, *leaf.shape), leaf.dtype, sharding=on_mesh(None, *leaf.sharding.spec))
    for name, leaf in params.items()
}
method = mtl.upgrad()
update = jax.jit(lambda grads: method.update(grads, method.init(start))[0], out_shardings=placed)
sent(update.lower(stack).compile())

# %% [markdown]
# With two parts of the parameters split, that is one operation that sends two small arrays, added up afterwards. Then
# the whole step. It also averages each task's gradient over the data axis, as plain training does for one gradient, and
# products inside the network need their own sums over the split axis.

# %%
sent(step.lower(params, state, batch).compile())

# %% [markdown]
# ## Training

# %%
history = []
for _ in range(STEPS):
    params, state, losses = step(params, state, batch)
    history.append(np.asarray(losses))

ax = plt.subplots(figsize=(8, 3.6), layout="constrained")[1]
for i, curve in enumerate(np.array(history).T):
    ax.plot(curve, label=f"task {i}")
ax.set(xlabel="step", ylabel="loss", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# The training loop is that of one device. The page on
# [many devices](https://github.com/mtlgrad/mtlgrad_jax/blob/main/docs/scaling.md) says what each route sends for larger
# networks, and how to save and restore a sharded state.
