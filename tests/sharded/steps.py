"""A model with three tasks and its training steps on both routes, for tests on several devices and in processes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as S

import mtlgrad_jax as mtl

TASKS = ("depth", "normal", "seg")
RNG = np.random.default_rng(0)
BATCHES = RNG.normal(size=(3, 16, 8)).astype(np.float32)
PARAMS = {
    "trunk": RNG.normal(size=(8, 16)).astype(np.float32) / 3,
    "heads": {task: RNG.normal(size=16).astype(np.float32) / 4 for task in TASKS},
}
WHOLE = jax.tree.map(lambda leaf: S(), PARAMS)
SPLIT = {"trunk": S("data", "model"), "heads": dict.fromkeys(TASKS, S("model"))}
METHODS = {
    "mgda": lambda: mtl.with_metrics(mtl.mgda(), num_tasks=3),
    "pcgrad": lambda: mtl.pcgrad(),
    "gradvac": lambda: mtl.gradvac(num_tasks=3),
    "rlw": lambda: mtl.rlw(),
    "graddrop": lambda: mtl.graddrop(),
}


def losses_fn(params, x):
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if AxisType.Explicit in kinds:
        params = jax.sharding.reshard(params, S())  # gathered before use, as fully sharded training does
    features = jnp.tanh(x @ params["trunk"])
    losses = {task: jnp.mean((features @ head - i) ** 2) for i, (task, head) in enumerate(params["heads"].items())}
    return jax.lax.pmean(losses, "data") if AxisType.Manual in kinds else losses


def stored(tx, params, state, x):
    losses, grads = mtl.task_value_and_grad(losses_fn)(params, x)
    return (*tx.update(grads, state, params, losses=losses), losses)


def not_stored(tx, params, state, x):
    jacobian = mtl.linearize(losses_fn, params, x)
    return (*tx.update(jacobian, state, params), jacobian.losses)


ROUTES = {"stored": stored, "not stored": not_stored}
IN_PROCESSES = {"pcgrad": "not stored", "rlw": "stored", "graddrop": "stored"}


def put(tree, mesh, specs):
    """Give every leaf its sharding; each process has all the data."""

    def place(leaf, spec):
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda index: leaf[index])

    return jax.tree.map(place, tree, specs)


def step_of(name, route, manual=False):
    """Return an optimizer and a compiled step with it, inside shard_map if manual."""
    tx = mtl.chain(METHODS[name](), optax.adam(1e-2))

    def step(params, state, x):
        updates, state, losses = ROUTES[route](tx, params, state, x)
        return optax.apply_updates(params, updates), state, losses

    return tx, jax.jit(jax.shard_map(step, in_specs=(S(), S(), S("data")), out_specs=S()) if manual else step)


def train(name, route, mesh=None, specs=SPLIT, manual=False):
    """Return the parameters and losses after each of three steps; on one device without a mesh."""
    tx, step = step_of(name, route, manual)
    params = jax.tree.map(jnp.asarray, PARAMS) if mesh is None else put(PARAMS, mesh, specs)
    state, found = jax.jit(tx.init)(params), []
    for x in BATCHES:
        params, state, losses = step(params, state, x if mesh is None else put(x, mesh, S("data")))
        found.append((params, losses))
    return found
