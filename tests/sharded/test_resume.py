"""Training that is stored on some devices and resumed on others."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as S
from steps import BATCHES, PARAMS, SPLIT, put, step_of, train

DEVICES = {1: (1, 1), 4: (2, 2), 8: (4, 2)}


def mesh_of(count):
    return jax.sharding.Mesh(np.asarray(jax.devices()[:count]).reshape(DEVICES[count]), ("data", "model"))


def on(mesh, leaf):
    """A leaf that is not yet on the mesh, such as a counter, as a copy on every device."""
    return leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, NamedSharding(mesh, S()))


@functools.cache
def optimizer():
    return step_of("pcgrad", "stored")


@pytest.mark.parametrize(("before", "after"), [(8, 1), (8, 4), (1, 8)])
def test_resumed_on_another_number_of_devices(before, after, tmp_path):
    tx, step = optimizer()

    def go_on(mesh, params, state, batches):
        for x in batches:
            params, state, losses = step(params, state, put(x, mesh, S("data")))
        return params, state, losses

    def start(mesh):
        params = put(PARAMS, mesh, SPLIT)
        return params, jax.tree.map(lambda leaf: on(mesh, leaf), tx.init(params))

    *middle, _ = go_on(mesh_of(before), *start(mesh_of(before)), BATCHES[:2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "training", tuple(middle))
        checkpointer.wait_until_finished()
        params, state = checkpointer.restore(tmp_path / "training", start(mesh_of(after)))
    params, _, losses = go_on(mesh_of(after), params, state, BATCHES[2:])
    assert len(params["trunk"].sharding.device_set) == after
    wanted = train("pcgrad", "stored")[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (params, losses), wanted)
