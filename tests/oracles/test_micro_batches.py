"""Losses that go through micro-batches under remat: the Gramian of the mean gradients, in the memory of one of them."""

import jax
import jax.numpy as jnp
import numpy as np

import mtlgrad_jax as mtl

COUNT, SIZE, WIDTH, K = 16, 64, 64, 4


def losses_of(params, batch):
    x, y = batch
    for kernel in params["layers"]:
        x = jnp.tanh(x @ kernel)
    return jnp.mean((x @ params["head"] - y) ** 2, axis=0)


def at_once(params, batches):
    return losses_of(params, jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), batches))


def one_by_one(params, batches):
    total, _ = jax.lax.scan(
        lambda total, batch: (total + jax.checkpoint(losses_of)(params, batch), None), jnp.zeros(K), batches
    )
    return total / COUNT


def test_memory_of_one_micro_batch_and_the_gramian_of_all():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)

    params = {"layers": [normal(WIDTH, WIDTH) for _ in range(4)], "head": normal(WIDTH, K)}
    batches = 8 * normal(COUNT, SIZE, WIDTH), normal(COUNT, SIZE, K)

    def compiled(losses_fn):
        return jax.jit(lambda params: mtl.linearize(losses_fn, params, batches).gramian()).lower(params).compile()

    whole, micro = compiled(at_once), compiled(one_by_one)
    rows = [np.asarray(leaf, float).reshape(K, -1) for leaf in jax.tree.leaves(jax.jacrev(at_once)(params, batches))]
    wanted = sum(row @ row.T for row in rows)
    np.testing.assert_allclose(micro(params), wanted, atol=1e-5 * np.trace(wanted) / K)
    temporaries = [program.memory_analysis().temp_size_in_bytes for program in (whole, micro)]
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert temporaries[1] - 3 * parameters < temporaries[0] / 4, temporaries
