"""Whole training steps on eight virtual devices: oracle, method and optimizer, against the same steps on one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from steps import METHODS, ROUTES, SPLIT, WHOLE, train

LAYOUTS = {
    "data parallel": ((8, 1), AxisType.Auto, WHOLE),
    "fully sharded": ((4, 2), AxisType.Auto, SPLIT),
    "fully sharded, explicit": ((4, 2), AxisType.Explicit, SPLIT),
}


def mesh_of(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


@functools.cache
def alone(name, route):
    return train(name, route)


def check(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


CASES = [(layout, name, route) for layout in LAYOUTS for name in ("mgda", "pcgrad") for route in ROUTES]
CASES += [("fully sharded", name, "stored") for name in METHODS if name not in ("mgda", "pcgrad")]


@pytest.mark.parametrize(("layout", "name", "route"), CASES)
def test_training_is_that_of_one_device(layout, name, route):
    shape, kind, specs = LAYOUTS[layout]
    mesh = mesh_of(shape, kind)
    with jax.set_mesh(mesh):
        found = train(name, route, mesh, specs)
    check(found, alone(name, route))


@pytest.mark.parametrize("name", ["mgda", "pcgrad"])
@pytest.mark.parametrize("route", ROUTES)
def test_training_inside_shard_map_is_that_of_one_device(route, name):
    """Each device has its part of the batch; the losses are averaged."""
    mesh = mesh_of((8, 1))
    with jax.set_mesh(mesh):
        found = train(name, route, mesh, WHOLE, manual=True)
    check(found, alone(name, route))
