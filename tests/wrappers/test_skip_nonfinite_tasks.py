"""Tasks with a NaN, an inf, or a loss outside the formula's domain, left out of a step."""

import jax.numpy as jnp
import numpy as np
import pytest
from harness import flat, tree, zeros
from walks import G, K, walk

import mtlgrad_jax as mtl


def test_skip_nonfinite_tasks_is_as_if_they_were_absent():
    broken, masks = G.copy(), np.ones((6, K), bool)
    broken[1, 2, 3], broken[3, 0] = np.inf, np.nan
    masks[1, 2] = masks[3, 0] = False
    for method in (mtl.imtl_g(), mtl.trimmed_mean(trim=0), mtl.gradnorm(num_tasks=K)):
        losses = jnp.abs(jnp.asarray(G[:, :, 0])) + 0.1
        updates, states = walk(mtl.skip_nonfinite_tasks(method), broken, losses=losses)
        wanted, _ = walk(method, G, masks, losses=losses)
        np.testing.assert_array_equal(updates, wanted)
        assert int(states[-1].dropped) == 2
    losses = losses.at[0, 1].set(jnp.nan)
    updates, states = walk(mtl.skip_nonfinite_tasks(mtl.uw(num_tasks=K)), losses=losses)
    assert np.isfinite(updates).all()
    assert int(states[-1].dropped) == 1
    _, states = walk(mtl.skip_nonfinite_tasks(mtl.mean()), broken, masks)
    assert int(states[-1].dropped) == 0  # they were absent anyway


@pytest.mark.parametrize("make", [lambda: mtl.db_mtl(K), lambda: mtl.emtl(1.0), lambda: mtl.mgda(normalization="loss")])
def test_a_finished_task_does_not_stop_the_others(make):
    """A loss of exactly zero is outside the formula's domain: the other tasks train as if it were absent."""
    tx, plain = mtl.skip_nonfinite_tasks(make()), make()
    losses = jnp.asarray([1.0, 0.0, 2.0])
    grads = tree(jnp.asarray(G[0]).at[1].set(0))
    update, state = tx.update(grads, tx.init(zeros()), losses=losses)
    mask = jnp.asarray([True, False, True])
    wanted, _ = plain.update(grads, plain.init(zeros()), losses=losses, task_mask=mask)
    np.testing.assert_array_equal(flat(update), flat(wanted))
    assert flat(update).any()
    assert int(state.dropped) == 1
