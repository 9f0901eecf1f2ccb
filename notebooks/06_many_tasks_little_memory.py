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
# # Many tasks, little memory
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/06_many_tasks_little_memory.ipynb)
#
# K gradients need K times the memory of one. You learn two routes to the same update that never hold them all, and a
# cheaper bound, and what each costs in memory and time.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not find_spec("mtlgrad_jax"):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax matplotlib")

# %%
import itertools
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtlgrad_jax as mtl

SMOKE = bool(os.environ.get("MTLGRAD_SMOKE"))  # a smoke run only checks that everything works
WIDTH, COUNTS, SECONDS, STEPS = (64, (2, 4), 0, 5) if SMOKE else (512, (2, 4, 8, 16, 32), 1.5, 200)
jax.config.update("jax_default_matmul_precision", "highest")  # TPUs would round products to bfloat16
jax.devices()

# %% [markdown]
# ## A trunk and K heads
#
# Each task is a regression with a target of its own; all share a trunk of four dense layers. The losses are a dict.


# %%
def names(K):
    return [f"task {i:02}" for i in range(K)]


def make_params(K):
    sizes = [64, WIDTH, WIDTH, WIDTH, WIDTH]
    keys = iter(jax.random.split(jax.random.key(0), len(sizes) + K))
    trunk = [jnp.sqrt(2 / n) * jax.random.normal(next(keys), (n, m)) for n, m in itertools.pairwise(sizes)]
    return {"trunk": trunk, "heads": {name: jax.random.normal(next(keys), (WIDTH,)) / WIDTH for name in names(K)}}


def make_batch(K, key):
    x = jax.random.normal(key, (64, 64))
    directions = jax.random.normal(jax.random.key(1), (64, K)) / 8
    return {"x": x, "y": dict(zip(names(K), jnp.sin(x @ directions).T, strict=True))}


def features_fn(params, batch):
    h = batch["x"]
    for layer in params["trunk"]:
        h = jax.nn.relu(h @ layer)
    return h


def heads_fn(params, features, batch):
    return {name: jnp.mean((features @ head - batch["y"][name]) ** 2) for name, head in params["heads"].items()}


def losses_fn(params, batch):
    return heads_fn(params, features_fn(params, batch), batch)


# %% [markdown]
# ## Four routes, one optimizer
#
# The optimizer is always the same. It takes a stack of gradients, or a `TaskJacobian`, which computes what the method
# asks for when it asks, and is never stored.
#
# - **stored**: all K gradients.
# - **linearize**: no gradient is kept. The Gramian is computed column by column, each with one backward and one forward
#   pass, and the weighted sum with a last backward pass.
# - **linearize, rows=4**: four gradients at a time. It works for what JAX cannot transpose, and for 16-bit losses.
# - **features**: the Gramian of the gradients of the *features* stands in for that of the parameters (the bound of
#   MGDA-UB). It costs little more than a plain step, but it is another method: its weights differ.

# %%
tx = mtl.chain(mtl.shared_private(mtl.mgda(), mtl.under("trunk")), optax.adam(1e-3))
ROUTES = {
    "stored": lambda params, batch: mtl.task_value_and_grad(losses_fn)(params, batch),
    "linearize": lambda params, batch: mtl.linearize(losses_fn, params, batch),
    "linearize, rows=4": lambda params, batch: mtl.linearize(losses_fn, params, batch, rows=4),
    "features": lambda params, batch: mtl.linearize_features(features_fn, heads_fn, params, batch, bound=True),
}


def make_step(route):
    @jax.jit
    def step(params, state, batch):
        found = ROUTES[route](params, batch)
        losses, grads = found if route == "stored" else (found.losses, found)
        updates, state = tx.update(grads, state, params, **({"losses": losses} if route == "stored" else {}))
        return optax.apply_updates(params, updates), state, losses

    return step


@jax.jit
def plain_step(params, state, batch):
    def total(params):
        return sum(losses_fn(params, batch).values())

    updates, state = optax.adam(1e-3).update(jax.grad(total)(params), state, params)
    return optax.apply_updates(params, updates), state


# %% [markdown]
# ## The same update
#
# The three exact routes agree up to rounding. To see that, compare the combined gradients before Adam.

# %%
K = COUNTS[1]
params, batch = make_params(K), make_batch(K, jax.random.key(2))
method = mtl.shared_private(mtl.mgda(), mtl.under("trunk"))
gradients = {}
for route, oracle in ROUTES.items():
    found = jax.jit(
        lambda params, oracle=oracle, route=route: method.update(
            oracle(params, batch)[1] if route == "stored" else oracle(params, batch), method.init(params)
        )[0]
    )(params)
    gradients[route] = jnp.concatenate([leaf.ravel() for leaf in found["trunk"]])
norm = jnp.linalg.norm(gradients["stored"])
for route, gradient in gradients.items():
    print(f"{route:18} relative difference {jnp.linalg.norm(gradient - gradients['stored']) / norm:.1e}")

# %% [markdown]
# ## Memory and time against K
#
# `memory_analysis` tells how much memory a compiled program needs besides its inputs, without running it. The plain
# step, one gradient of the summed loss, is the floor: most of its memory is the new parameters and Adam's moments.
# Times are the shortest of several runs.

# %%
memory, seconds = {}, {}
for K in COUNTS:
    params, batch = make_params(K), make_batch(K, jax.random.key(2))
    runs = {route: (make_step(route), tx.init(params)) for route in ROUTES}
    runs["plain"] = (plain_step, optax.adam(1e-3).init(params))
    for route, (step, state) in runs.items():
        compiled = step.lower(params, state, batch).compile()
        needs = compiled.memory_analysis()
        memory[route, K] = (needs.temp_size_in_bytes + needs.output_size_in_bytes) / 1e6
        jax.block_until_ready(compiled(params, state, batch))
        times = []
        while len(times) < 3 or sum(times) < SECONDS:
            began = time.perf_counter()
            jax.block_until_ready(compiled(params, state, batch))
            times.append(time.perf_counter() - began)
        seconds[route, K] = min(times)

figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for route in runs:
    style = {"color": "black", "linestyle": "--"} if route == "plain" else {"marker": "o"}
    axes[0].plot(COUNTS, [memory[route, K] for K in COUNTS], label=route, **style)
    axes[1].plot(COUNTS, [1e3 * seconds[route, K] for K in COUNTS], label=route, **style)
axes[0].set(title="memory of a step besides its inputs", ylabel="MB")
axes[1].set(title="time of a step", ylabel="milliseconds")
for ax in axes:
    ax.set(xlabel="tasks K", xscale="log", yscale="log")
    ax.set_xticks(COUNTS, COUNTS)
    ax.minorticks_off()
axes[0].legend()
plt.show()

# %%
print(f"K = {COUNTS[-1]}   {'memory, MB':>12} {'time in plain steps':>20}")
for route in runs:
    ratio = seconds[route, COUNTS[-1]] / seconds["plain", COUNTS[-1]]
    print(f"{route:18} {memory[route, COUNTS[-1]]:6.1f} {ratio:16.1f}")

# %% [markdown]
# ## Training without ever holding a gradient per task
#
# Nothing changes in the training loop.

# %%
K = COUNTS[-1]
curves = {}
for route in ("linearize", "features"):
    step, params = make_step(route), make_params(K)
    state, history = tx.init(params), []
    for i in range(STEPS if route == "features" else STEPS // 4):
        params, state, losses = step(params, state, make_batch(K, jax.random.key(3 + i)))
        history.append(np.asarray(list(losses.values())))
    curves[route] = np.array(history)

ax = plt.subplots(figsize=(8, 3.8), layout="constrained")[1]
for (route, losses), color in zip(curves.items(), ("tab:orange", "tab:red"), strict=True):
    ax.plot(losses.mean(axis=1), color=color, label=f"{route}: mean of {K} losses")
    ax.fill_between(range(len(losses)), losses.min(axis=1), losses.max(axis=1), color=color, alpha=0.2, linewidth=0)
ax.set(xlabel="step", ylabel="loss", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# ## What was seen
#
# - The memory of the stored route grows with K. That of `linearize` stays near the floor whatever K is, and with
#   `rows=4` it stays at the level of eight gradients.
# - For a few tasks the stored route is the fastest exact one. For many, `linearize` passes it: then writing and reading
#   K gradients takes longer than computing with them once more. Where the lines cross depends on the network and the
#   machine.
# - `rows=4` is the slowest for many tasks, as it computes gradients again for every pair of blocks. Choose it for what
#   only it can do.
# - The features cost a few plain steps at most. The losses fall as with the exact route here, but what a method
#   guarantees then holds for the features, not for the parameters.
