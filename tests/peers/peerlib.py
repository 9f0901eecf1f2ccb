"""Comparisons with peers, and this library's side of them: methods in float64, compiled once per method, arguments, K.

List arguments are given as tuples.
"""

import collections
import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mtlgrad_jax as mtl

GRADDROP = importlib.import_module("mtlgrad_jax.methods.coordinates.graddrop")
DOCS = Path(__file__).parents[2] / "docs"
COMING_FROM = DOCS / "coming_from.md"
COMPARED = collections.defaultdict(list)
"""Deviations of all updates compared so far, by peer and method."""
EXPECTED = set()
"""The methods that peers have too."""


def against(peer, covered):
    """Return an assertion that updates, or weights, of a method are those of a peer, which counts as a comparison.

    With `covered`, the peer's methods and our counterparts, each of which is to be compared.
    """
    EXPECTED.update(covered.values())

    def agree(name, ours, wanted, size=0.0, **tolerances):
        ours, wanted = np.asarray(ours, float), np.asarray(wanted, float)
        np.testing.assert_allclose(ours, wanted, **tolerances)
        error, largest = (np.abs(values).max(axis=-1) for values in (ours - wanted, wanted))
        COMPARED[peer, name].extend(np.ravel(error / np.maximum(largest, size or np.finfo(float).tiny)))

    return agree


def _make(name, kwargs):
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs}
    return getattr(mtl, name)(**kwargs)


@functools.cache
def _weigher(name, kwargs, num_tasks, extra):
    method = _make(name, kwargs)
    return method, jax.jit(lambda gramian, state, values: method.weigh(gramian, state, **values))


@functools.cache
def _transformation(name, kwargs, shape, extra):
    method = _make(name, kwargs)
    return method, jax.jit(lambda grads, state, values: method.update(grads, state, **values))


def _walk(step, method, start, inputs, extra):
    state, results = start, []
    for t, value in enumerate(inputs):
        result, state = step(jnp.asarray(value), state, {key: jnp.asarray(values[t]) for key, values in extra.items()})
        results.append(np.asarray(result))
    return np.stack(results), state


def weigh(name, gramians, losses=None, cross_gramian=None, new_losses=None, **kwargs):
    """Weights (T, K) of a method on Gramians (T, K, K), and its last state."""
    given = {"losses": losses, "cross_gramian": cross_gramian, "new_losses": new_losses}
    extra = {key: np.asarray(value, float) for key, value in given.items() if value is not None}
    gramians = np.asarray(gramians, float)
    with jax.enable_x64(True):
        method, step = _weigher(name, tuple(kwargs.items()), gramians.shape[1], tuple(extra))
        return _walk(step, method, method.init(None), gramians, extra)


def weights(name, G, losses=None, **kwargs):
    """Weights (K,) of a method on the Gramian of G (K, P)."""
    G = np.asarray(G, float)
    return weigh(name, (G @ G.T)[None], None if losses is None else [losses], **kwargs)[0][0]


def updates(name, grads, losses=None, **kwargs):
    """Updates (T, P) of a method on stacks (T, K, P)."""
    extra = {} if losses is None else {"losses": np.asarray(losses, float)}
    grads = np.asarray(grads, float)
    with jax.enable_x64(True):
        method, step = _transformation(name, tuple(kwargs.items()), grads.shape[1:], tuple(extra))
        return _walk(step, method, method.init(jnp.zeros(grads.shape[2])), grads, extra)[0]


def update(name, G, losses=None, **kwargs):
    """Update (P,) of a method on one stack G (K, P), through its weights if it has any."""
    G = np.asarray(G, float)
    if _make(name, tuple(kwargs.items())).weigh is not None:
        return weights(name, G, losses, **kwargs) @ G
    return updates(name, G[None], None if losses is None else [losses], **kwargs)[0]


def size(G):
    """The norm of the longest row."""
    return np.linalg.norm(G, axis=-1).max()
