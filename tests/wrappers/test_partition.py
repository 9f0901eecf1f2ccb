"""Groups of leaves with transformations of their own."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import P, tree, zeros
from walks import G, walk

import mtlgrad_jax as mtl


def test_partition_gives_each_group_its_own_solve():
    tx = mtl.partition({"one": mtl.imtl_g(), "two": optax.chain(mtl.sum(), optax.scale(2.0))}, {"b": "one", "w": "two"})
    updates, _ = walk(tx)
    head, _ = walk(mtl.imtl_g(), np.where(np.arange(P) == 0, G, 0).astype(np.float32))
    np.testing.assert_allclose(updates[:, 0], head[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates[:, 1:], 2 * G[:, :, 1:].sum(axis=1), rtol=1e-5)


def test_partition_refuses():
    stuck = mtl.partition({"one": mtl.imtl_g(), "two": optax.identity()}, {"b": "one", "w": "two"})
    with pytest.raises(ValueError, match=r"`transforms\['two'\]` must take the task axis away: .*w"):
        stuck.update(tree(jnp.asarray(G[0])), stuck.init(zeros()))
    with pytest.raises(ValueError, match=r"`transforms` must have an entry for every label, none for two"):
        mtl.partition({"one": mtl.imtl_g()}, {"b": "one", "w": "two"}).init(zeros())
