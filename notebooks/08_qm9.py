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
# # Eleven properties of molecules: QM9, from scales to a tuned model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mtlgrad/mtlgrad_jax/blob/main/notebooks/08_qm9.ipynb)
#
# Eleven regressions with units from debye to bohr². You learn what units do to a sum of losses, what standardizing
# repairs, which methods do not need it, and to tune the learning rate of each before you compare them.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not (find_spec("mtlgrad_jax") and find_spec("qm9pack")):
    get_ipython().run_line_magic("pip", "install -q mtlgrad-jax qm9pack pandas matplotlib")

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd

import mtlgrad_jax as mtl

SMOKE = bool(os.environ.get("MTLGRAD_SMOKE"))  # a smoke run only checks that everything works
STEPS, BATCH, MOLECULES = (3, 32, 300) if SMOKE else (1_000, 256, 15_000)
RATES = jnp.array([1e-2]) if SMOKE else jnp.array([3e-3, 1e-2, 3e-2])
jax.devices()

# %% [markdown]
# ## Data
#
# The package qm9pack holds the 130,831 molecules of QM9 (Ramakrishnan et al. 2014) in three files. Use a random part of
# them. The targets are the eleven of the usual benchmark.

# %%
TARGETS = {
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "u0": "InternalEnergy_0K_au",
    "u": "InternalEnergy_298K_au",
    "h": "Enthalphy_298K_au",
    "g": "GibbsFreeEnergy_298K_au",
    "cv": "Heatcapacity_Cv_cal_mol_K",
}
TASKS = sorted(TARGETS)  # the order in which named losses are flattened
folder = Path(find_spec("qm9pack").origin).parent / "data"
files = [
    pd.read_csv(
        folder / f"qm9_part{i}.csv", usecols=["XYZ_Ang", "Elements", *TARGETS.values()], nrows=200 if SMOKE else None
    )
    for i in (1, 2, 3)
]
table = pd.concat(files).sample(MOLECULES, random_state=0)
electronvolts = [column for column in table if column.endswith("_au")]
table[electronvolts] *= 27.211386  # energies, from hartree
table = table.rename(columns={column: task for task, column in TARGETS.items()})
table[list(TARGETS)].describe().loc[["mean", "std", "min", "max"]].round(2)

# %% [markdown]
# Features that do not depend on how a molecule is turned: the number of atoms of each element, and the eigenvalues of
# the Coulomb matrix (Rupp et al. 2012). It has $Z_i Z_j / \|r_i - r_j\|$ off its diagonal, and $Z_i^{2.4}/2$ on it.

# %%
CHARGES = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
LARGEST = 29


def read(elements, positions):
    z = np.zeros(LARGEST)
    found = [CHARGES[symbol] for symbol in elements.strip("[]").replace("'", "").split(",")]
    z[: len(found)] = found
    r = np.full((LARGEST, 3), 1e6)
    r[: len(found)] = np.array(positions.replace("[", "").replace("]", "").split(","), float).reshape(-1, 3)
    return z, r


pairs = [read(*row) for row in zip(table["Elements"], table["XYZ_Ang"], strict=True)]
Z, R = (np.stack(part) for part in zip(*pairs, strict=True))
distances = np.linalg.norm(R[:, :, None] - R[:, None], axis=-1) / 0.529177  # in bohr
with np.errstate(divide="ignore", invalid="ignore"):
    coulomb = np.where(np.eye(LARGEST) == 1, Z[:, None] ** 2.4 / 2, Z[:, :, None] * Z[:, None] / distances)
coulomb = np.where((Z[:, :, None] > 0) & (Z[:, None] > 0), coulomb, 0)
counts = np.stack([np.sum(charge == Z, axis=1) for charge in CHARGES.values()], axis=1)
features = np.concatenate([counts, np.linalg.eigvalsh(coulomb)], axis=1)

# %% [markdown]
# A total energy is mostly the sum of its atoms' energies. As in the benchmark, what matters is the rest, here what a
# linear fit on the numbers of atoms leaves. Then every target is centred, and keeps its unit.

# %%
split = {"train": slice(0, MOLECULES * 8 // 10), "validation": slice(MOLECULES * 8 // 10, MOLECULES * 9 // 10)}
split["test"] = slice(MOLECULES * 9 // 10, None)
train = split["train"]

y = table[TASKS].to_numpy()
energies = [TASKS.index(task) for task in ("u0", "u", "h", "g")]
design = np.concatenate([counts, np.ones((MOLECULES, 1))], axis=1)
y[:, energies] -= design @ np.linalg.lstsq(design[train], y[train][:, energies], rcond=None)[0]
y -= y[train].mean(axis=0)
features = (features - features[train].mean(axis=0)) / (features[train].std(axis=0) + 1e-6)
std = y[train].std(axis=0)

ax = plt.subplots(figsize=(8, 3), layout="constrained")[1]
ax.bar(TASKS, std)
ax.set(yscale="log", ylabel="standard deviation", title="targets in their own units")
plt.show()
ratio = std.max() / std.min()
print(f"largest over smallest: {ratio:.0f}; of the squares, which the losses see: {ratio**2:.0e}")

# %% [markdown]
# ## Training
#
# One network with two hidden layers and eleven outputs. `scale` divides the targets: ones leave the units alone,
# `std` standardizes. `train_all` trains with every learning rate side by side, by `jax.vmap`, in one compiled program;
# the best rate is chosen on the validation molecules, for each method by its own $\Delta_m$.
#
# `linearize` takes one backward pass where a method only looks at the losses. For the two methods that look at the
# Gramian, `rows=11` holds the eleven gradients, which is faster for a network as small as this.

# %%
data = {"x": jnp.asarray(features, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
glorot, keys = jax.nn.initializers.glorot_normal(), jax.random.split(jax.random.key(0), 3)
sizes = [features.shape[1], 128, 128, len(TASKS)]
start = [{"w": glorot(key, (n, m)), "b": jnp.zeros(m)} for key, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def predict(params, x):
    for layer in params[:-1]:
        x = jax.nn.silu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def losses_fn(params, x, y):
    errors = jnp.mean((predict(params, x) - y) ** 2, axis=0)
    return dict(zip(TASKS, errors, strict=True))


def fit(method, scale, rate, rows=None):
    tx = mtl.chain(method, optax.adam(optax.cosine_decay_schedule(1.0, STEPS)), optax.scale(rate))

    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, len(y[train]), (BATCH,))
        jacobian = mtl.linearize(losses_fn, params, data["x"][chosen], data["y"][chosen] / scale, rows=rows)
        updates, state = tx.update(jacobian, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), jax.random.split(jax.random.key(1), STEPS))
    errors = jnp.abs(predict(params, data["x"]) * scale - data["y"])
    return {part: jnp.mean(errors[where], axis=0) for part, where in split.items()}


# %% [markdown]
# ### Each task alone
#
# The baseline is a network for each task, also with its own best learning rate. `constant` with a single weight of one
# trains on one loss; the eleven networks are another axis of `vmap`.

# %%
ones = np.ones(len(TASKS), np.float32)


def alone(weights, rate):
    return fit(mtl.constant(dict(zip(TASKS, weights, strict=True))), std, rate)


every_rate = jax.vmap(alone, in_axes=(None, 0))
single = jax.device_get(jax.jit(jax.vmap(every_rate, in_axes=(0, None)))(jnp.eye(len(TASKS)), RATES))
own = np.arange(len(TASKS))
best = single["validation"][own, :, own].argmin(axis=1)
baseline = {part: errors[own, best, own] for part, errors in single.items()}
for task, error in zip(TASKS, baseline["test"], strict=True):
    print(f"{task:6} mean absolute error {error:.4g}")


# %% [markdown]
# ### All tasks together


# %%
def delta_m(errors, part):
    return 100 * np.mean(errors / baseline[part] - 1, axis=-1)


def train_all(method, scale, rows=None):
    errors = jax.device_get(jax.jit(jax.vmap(lambda rate: fit(method, scale, rate, rows)))(RATES))
    best = int(np.argmin(delta_m(errors["validation"], "validation")))
    return float(RATES[best]), errors["test"][best]


METHODS = {
    "sum, own units": (mtl.sum(), ones),
    "uw, own units": (mtl.uw(num_tasks=len(TASKS)), ones),
    "nash_mtl, own units": (mtl.nash_mtl(), ones, 11),
    "sum, standardized": (mtl.sum(), std),
    "uw, standardized": (mtl.uw(num_tasks=len(TASKS)), std),
    "upgrad, standardized": (mtl.upgrad(), std, 11),
    "nash_mtl, standardized": (mtl.nash_mtl(), std, 11),
}
results = {name: train_all(*contender) for name, contender in METHODS.items()}

# %% [markdown]
# ## Results
#
# $\Delta_m$ is the average relative increase of the error over the networks of one task, in percent; lower is better.

# %%
print(f"{'':24} {'best rate':>9} {'Delta_m %':>10} {'tasks better than alone':>24}")
for name, (rate, errors) in results.items():
    better = np.sum(errors < baseline["test"])
    print(f"{name:24} {rate:9.3g} {delta_m(errors, 'test'):10.1f} {better:15} of {len(TASKS)}")

# %%
figure, ax = plt.subplots(figsize=(10, 4.4), layout="constrained")
for i, (name, (_, errors)) in enumerate(results.items()):
    style = ("o", "s", "^", "o", "s", "D", "^")[i]
    filled = {} if "standardized" in name else {"markerfacecolor": "none"}
    ax.plot(TASKS, errors / baseline["test"], style, label=name, color=f"C{i}", markersize=7, **filled)
ax.axhline(1, color="black", linewidth=0.8)
ax.set(yscale="log", ylabel="error relative to the task alone")
ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## What was seen
#
# - In their own units, the sum follows the targets with large numbers: `zpve`, the smallest, is almost ten times as
#   wrong as with its single network, and the others 1.2 to 1.7 times. `uw` repairs a part of that, and `nash_mtl`,
#   whose direction does not depend on the units of a loss, most of it. What is left may come from the network's
#   outputs, which start at a scale of 1.
# - Standardizing, one line of code, repairs nearly all of it. Do it first, whatever the method.
# - On standardized targets the sum, `uw` and `upgrad` are a few percent from the single networks, and close to each
#   other. Only `nash_mtl` beats the single networks, on every target, and one network then does the work of eleven.
# - The best learning rate is not the same for all methods; that of `nash_mtl` is the largest tried. With one rate for
#   all, the comparison would have been unfair to one of them.
#
# This is one seed, a small network and simple features. The published tables on QM9 use graph networks, which are far
# more accurate, and there, too, the methods differ more than on images.
