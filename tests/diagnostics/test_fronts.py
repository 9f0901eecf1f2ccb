"""Whole Pareto fronts: preferences, training for each, hypervolume, plot."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import raises_naming

import mtlgrad_jax as mtl
from benchmarks import pareto
from mtlgrad_jax.diagnostics import hypervolume, plot_front, simplex_lattice


@pytest.mark.parametrize("name", pareto.METHODS)
def test_a_front_in_one_program_is_that_of_one_training_after_the_other(name):
    preferences, steps = np.array([[0.3, 0.7], [0.6, 0.4]]), 30
    start = jnp.linspace(-0.3, 0.4, pareto.SIZE)
    x, losses = mtl.pareto_front(
        pareto.losses_fn, pareto.optimizer(name, preferences, steps), start, preferences, steps=steps
    )
    assert losses.shape == (2, steps, 2)
    for i, preference in enumerate(preferences):
        tx = pareto.optimizer(name, preferences, steps)(jnp.asarray(preference))

        @jax.jit
        def step(params, state, tx=tx):
            losses, stack = mtl.task_value_and_grad(pareto.losses_fn)(params)
            updates, state = tx.update(stack, state, params, losses=losses)
            return optax.apply_updates(params, updates), state, losses

        params, state = start, tx.init(start)
        for t in range(steps):
            params, state, seen = step(params, state)
            np.testing.assert_allclose(losses[i, t], seen, atol=1e-5)
        np.testing.assert_allclose(x[i], params, atol=1e-4)


@pytest.mark.nightly
def test_linear_weights_find_only_the_ends_of_a_concave_front():
    inner = np.linspace(0.1, 0.9, 9)
    found = pareto.measure(np.stack([inner, 1 - inner], axis=1), steps=1500)
    front = pareto.true_front()
    for name, (losses, _) in found.items():
        assert np.linalg.norm(losses[:, None] - front, axis=2).min(axis=1).max() < 0.02, name
        inside = (losses > pareto.END).all(axis=1).sum()
        assert inside == 0 if name == "constant" else inside >= 7, name


def test_batches_and_named_tasks():
    """Each step takes its batch; preferences under the tasks' names."""
    data = np.random.default_rng(0).normal(size=(5, 8, 2))

    def losses_fn(params, batch):
        return {"b": jnp.mean((batch[:, 0] - params) ** 2), "a": jnp.mean((batch[:, 1] - params) ** 2)}

    preferences = {"a": np.array([1.0, 0.0]), "b": np.array([0.0, 1.0])}
    x, losses = mtl.pareto_front(
        losses_fn, lambda r: mtl.chain(mtl.constant(r), optax.sgd(0.5)), jnp.zeros(()), preferences, jnp.asarray(data)
    )
    # A step of 1/2 along the gradient of a mean square goes to the mean.
    np.testing.assert_allclose(x, data[-1].mean(axis=0)[::-1], rtol=1e-5)
    assert losses["a"].shape == (2, 5)


def test_calling_twice_compiles_once():
    count = 0

    def losses_fn(x):
        nonlocal count
        count += 1
        return jnp.stack([x**2, (x - 1) ** 2])

    def optimizer(preference):
        return mtl.chain(mtl.constant(preference), optax.sgd(0.1))

    traced = []
    for start in (0.0, 0.5):
        mtl.pareto_front(losses_fn, optimizer, jnp.asarray(start), np.eye(2), steps=3)
        traced.append(count)
    assert traced[0] == traced[1]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("losses_fn", {"losses_fn": None}),
        ("optimizer", {"optimizer": optax.sgd(0.1)}),
        ("optimizer", {"optimizer": lambda preference: None}),
        ("steps", {"steps": None}),
        ("steps", {"batches": np.ones(3)}),
        ("steps", {"steps": 0}),
        ("preferences", {"preferences": 1.0}),
        ("preferences", {"preferences": {"a": np.ones(2), "b": np.ones(3)}}),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_a_front(name, change):
    good = {
        "losses_fn": lambda x: jnp.stack([x**2, (x - 1) ** 2]),
        "optimizer": lambda r: mtl.chain(mtl.constant(r), optax.sgd(0.1)),
        "params": jnp.zeros(()),
        "preferences": np.eye(2),
        "steps": 2,
    }
    with pytest.raises(ValueError, match=raises_naming(name)):
        mtl.pareto_front(**{**good, **change})


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_hypervolume_counts_dominated_cells(K):
    """Integer points: the volume is the number of unit cells between some point and the reference."""
    rng = np.random.default_rng(K)
    for count in (0, 1, 7, 12):
        points = rng.integers(0, 7, size=(count, K))
        cells = np.array(list(itertools.product(range(5), repeat=K)))
        wanted = sum(any((point <= cell).all() for point in points) for cell in cells)
        assert hypervolume(points.reshape(count, K), [5] * K) == wanted
    assert hypervolume(np.full((2, K), np.nan), [5] * K) == 0


def test_bad_arguments_of_a_hypervolume():
    with pytest.raises(ValueError, match=raises_naming("losses")):
        hypervolume([1.0, 2.0], [3.0, 3.0])
    with pytest.raises(ValueError, match=raises_naming("losses")):
        hypervolume([[1.0, -np.inf]], [3.0, 3.0])
    for bad in ([3.0], [np.inf, 1.0]):
        with pytest.raises(ValueError, match=raises_naming("reference")):
            hypervolume([[1.0, 2.0]], bad)


@pytest.mark.parametrize(("K", "divisions", "count"), [(1, 3, 1), (2, 4, 5), (3, 4, 15), (4, 5, 56)])
def test_preferences_are_a_lattice_on_the_simplex(K, divisions, count):
    found = simplex_lattice(K, divisions)
    assert len({tuple(row) for row in found}) == len(found) == count
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found.min() >= 0
    assert (np.round(found * divisions) == found * divisions).all()


def test_the_plot_shows_which_points_are_dominated():
    points = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    ax = plot_front(points, names=["seg", "depth"], reference=points[:2], label="front")
    full, hollow = ax.collections
    assert sorted(map(tuple, np.asarray(full.get_offsets()))) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert np.asarray(hollow.get_offsets()).tolist() == [[1.0, 1.0]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("seg", "depth")
    assert plot_front(np.ones((2, 3))).get_zlabel() == "loss 3"
    with pytest.raises(ValueError, match=raises_naming("losses")):
        plot_front(np.ones((3, 4)))
