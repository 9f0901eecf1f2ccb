"""Methods that a user steers: by scores, or by a preference among the losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import stack
from harness import P, raises_naming

import mtlgrad_jax as mtl

K = 3
G = jnp.asarray(stack("normal", K, P), jnp.float32)
LOSSES = jnp.asarray([1.0, 2.0, 3.0])


def updated(method, grads=G, losses=LOSSES, **extra):
    return method.update(grads, method.init(jnp.zeros(P)), losses=losses, **extra)


def named(values):
    return dict(zip("abc", values, strict=True))


def test_scores_of_a_step_take_precedence():
    scores = jnp.asarray([0.0, 30.0, 5.0])
    wanted, _ = updated(mtl.pivrg(scores))
    for method in (mtl.pivrg(), mtl.pivrg([1.0, 2.0, 9.0])):
        update, _ = updated(method, scores=scores)
        np.testing.assert_array_equal(update, wanted)
    by_name, _ = updated(mtl.pivrg(), losses=named(LOSSES), scores=named(scores))
    np.testing.assert_array_equal(by_name, wanted)
    with pytest.raises(ValueError, match=raises_naming("scores")):
        updated(mtl.pivrg())
    with pytest.raises(ValueError, match=raises_naming("scores")):
        updated(mtl.pivrg(), losses=named(LOSSES), scores=scores)


def test_equal_scores_are_fairgrad_and_a_worse_task_gains():
    equal, _ = updated(mtl.pivrg([7.0] * K))
    np.testing.assert_allclose(equal, updated(mtl.fairgrad(alpha=2.0))[0], rtol=1e-6)
    worse, _ = updated(mtl.pivrg([7.0, 90.0, 7.0]))
    assert G[1] @ worse > G[1] @ equal


def test_priorities_over_the_tasks_present():
    """Of orthogonal unit gradients the weights are p^(1/3); an absent task's score does not matter."""
    grads = jnp.eye(K, P)
    update, _ = updated(mtl.pivrg([1e6, 0.0, 20.0]), grads, task_mask=jnp.asarray([False, True, True]))
    np.testing.assert_allclose(update[:K] ** 3, [0, 2 / 3, 4 / 3], rtol=1e-5)
    update, _ = updated(mtl.pivrg([0.0, 0.0, 1e30]), grads)
    np.testing.assert_allclose(update[:K] ** 3, [3 / 4, 3 / 4, 3 / 2], rtol=1e-5)
    broken, state = updated(mtl.pivrg(), scores=jnp.asarray([jnp.nan, 0, 0]))
    assert not broken.any()
    assert int(state.info.skipped) == 1


FRONTS = {
    "pivrg": (mtl.pivrg, [[0.0, 0.0, 0.0], [50.0, 0.0, 10.0], [-5.0, 0.0, 30.0]]),
}


@pytest.mark.parametrize("name", FRONTS)
def test_many_preferences_at_once(name):
    """A factory inside vmap: what trains several points of a front together does this."""
    factory, values = FRONTS[name]
    together = jax.jit(jax.vmap(lambda value: updated(factory(value))[0]))(jnp.asarray(values))
    alone = [updated(factory(value))[0] for value in values]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert abs(together[1] - together[0]).max() > 1e-3
