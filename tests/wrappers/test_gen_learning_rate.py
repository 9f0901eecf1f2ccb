"""A learning rate from a parabola through the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import P, flat, raises_naming, tree, zeros
from walks import RNG

import mtlgrad_jax as mtl

H = np.diag(np.arange(1.0, 1.0 + P))


def quadratic(params):
    x = flat(params)
    return x @ jnp.asarray(H, x.dtype) @ x / 2


def test_gen_learning_rate_finds_newton_s_step():
    """For a quadratic loss, the best step along any direction is known: <d, g> / <d, Hd>."""
    with jax.enable_x64(True):
        x, d = np.ones(P), RNG.uniform(0.5, 1.5, size=P)
        best = d @ H @ x / (d @ H @ d)
        for first in (0.7 * best, 1.4 * best, 0.1 * best, 10 * best):
            tx = mtl.gen_learning_rate(first, every=1, smoothing=0.0)
            update, state = tx.update(tree(jnp.asarray(d)), tx.init(zeros()), tree(jnp.asarray(x)), value_fn=quadratic)
            wanted = np.clip(best, first / 2, first * 2)
            np.testing.assert_allclose(flat(update), -wanted * d, rtol=1e-9)
            assert float(state.learning_rate) == pytest.approx(wanted)


def test_gen_learning_rate_follows_the_official_fit():
    """Least-squares parabola through zero, clipped minimum, smoothing: 40 steps on a loss that is not a parabola."""

    def loss(x):
        return np.logaddexp(0, -x).sum() + 0.1 * (x**4).sum()

    def slope(x):
        return -1 / (1 + np.exp(x)) + 0.4 * x**3

    def value_fn(params):
        x = flat(params)
        return jnp.logaddexp(0, -x).sum() + 0.1 * (x**4).sum()

    with jax.enable_x64(True):
        tx = mtl.gen_learning_rate(0.05, every=3)
        step = jax.jit(lambda g, s, p, value: tx.update(g, s, p, value_fn=value_fn, value=value))
        params, state = tree(jnp.linspace(-2.0, 2.0, P)), tx.init(zeros())
        x, rate, fits = np.linspace(-2.0, 2.0, P), 0.05, 0
        for t in range(1, 41):
            d = slope(x)
            if t % 3 == 0:
                along = rate * np.asarray([-1.0, 1.0])
                y = np.asarray([loss(x - eta * d) for eta in along]) - loss(x)
                (bend, fall), residual, _, _ = np.linalg.lstsq(np.stack([along**2 / 2, -along], axis=1), y)
                assert residual.sum() <= 1e-20
                if bend > 0 and fall > 0:
                    rate, fits = 0.9 * rate + 0.1 * np.clip(fall / bend, rate / 2, rate * 2), fits + 1
            update, state = step(tree(jnp.asarray(d)), state, params, jnp.asarray(loss(x)))
            params, x = optax.apply_updates(params, update), x - rate * d
            np.testing.assert_allclose(state.learning_rate, rate, rtol=1e-6)
        np.testing.assert_allclose(flat(params), x, rtol=1e-6)
        assert int(state.accepted) == fits > 10
        assert int(state.step) == 40


@pytest.mark.parametrize(("given", "evaluations"), [(False, 3), (True, 2)])
def test_gen_learning_rate_evaluates_only_when_due(given, evaluations):
    calls = []

    def value_fn(params):
        jax.debug.callback(lambda: calls.append(1))
        return quadratic(params)

    tx = mtl.gen_learning_rate(0.1, every=4)
    params = tree(jnp.ones(P))
    value = quadratic(params) if given else None
    step = jax.jit(lambda s: tx.update(params, s, params, value_fn=value_fn, value=value)[1])
    state = tx.init(params)
    for count in (0, 0, 0, 1, 1, 1, 1, 2):
        state = step(state)
        jax.effects_barrier()
        assert len(calls) == count * evaluations
    assert int(state.accepted) == 2


UNFIT = {
    "uphill": (quadratic, -1.0),
    "concave": (lambda params: -quadratic(params), -1.0),
    "flat": (lambda params: 3.0, 1.0),
    "no step": (quadratic, 0.0),
    "nan": (lambda params: quadratic(params) * jnp.nan, 1.0),
    "infinite ahead": (lambda params: jnp.where(flat(params)[0] < 1, jnp.inf, quadratic(params)), 1.0),
    "infinite behind": (lambda params: jnp.where(flat(params)[0] > 1, jnp.inf, quadratic(params)), 1.0),
    "broken step": (quadratic, jnp.nan),
}


@pytest.mark.parametrize("name", UNFIT)
def test_gen_learning_rate_stays_where_the_parabola_has_no_minimum_ahead(name):
    value_fn, sign = UNFIT[name]
    tx = mtl.gen_learning_rate(0.1, every=1)
    params = tree(jnp.ones(P))
    direction = jax.tree.map(lambda leaf: sign * leaf, params)
    update, state = tx.update(direction, tx.init(params), params, value_fn=value_fn)
    np.testing.assert_allclose(flat(update), -0.1 * flat(direction), rtol=1e-6)
    assert (float(state.learning_rate), int(state.accepted), int(state.rejected)) == (pytest.approx(0.1), 0, 1)


def test_gen_learning_rate_is_an_ordinary_optax_transformation():
    """Scan, vmap, donation, bfloat16, and training: a learning rate 1000 times too small grows by 1.1 a fit."""
    tx = optax.chain(mtl.sum(), optax.scale_by_adam(), mtl.gen_learning_rate(1e-5, every=2))

    def train(params, state):
        grads = jax.tree.map(lambda leaf: leaf[None], jax.grad(quadratic)(params))
        update, state = tx.update(grads, state, params, value_fn=quadratic)
        return optax.apply_updates(params, update), state

    @jax.jit
    def run(params):
        return jax.lax.scan(lambda c, _: (train(*c), quadratic(c[0])), (params, tx.init(params)), length=400)

    starts = {"b": jnp.ones((2, 1)), "w": jnp.ones((2, 2, 3))}
    (_, state), values = jax.vmap(run)(starts)
    assert (values[:, -1] < 0.1 * values[:, 0]).all()
    assert (optax.tree.get(state, "learning_rate") > 1e-3).all()
    donated = jax.jit(train, donate_argnums=(0, 1))
    for _ in range(2):
        params = tree(jnp.ones(P))
        donated(params, tx.init(params))
    half = tree(jnp.ones(P, jnp.bfloat16))
    halved, _ = train(half, tx.init(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype(jnp.bfloat16)}


def test_gen_learning_rate_refuses():
    tx = mtl.gen_learning_rate(0.1)
    params = tree(jnp.ones(P))
    with pytest.raises(ValueError, match=raises_naming("value_fn")):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=raises_naming("params")):
        tx.update(params, tx.init(params), value_fn=quadratic)
    with pytest.raises(ValueError, match=raises_naming("value_fn")):
        tx.update(params, tx.init(params), params, value_fn=flat)
    with pytest.raises(ValueError, match=raises_naming("value")):
        tx.update(params, tx.init(params), params, value_fn=quadratic, value=jnp.ones(2))
