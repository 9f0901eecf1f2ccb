"""PCGrad's random orders, against every outcome that they can have."""

import jax
import jax.numpy as jnp
import numpy as np
from families import stack
from harness import P, flat, tree, zeros
from reference import pcgrad_outcomes

import mtlgrad_jax as mtl

K = 3


def test_pcgrad_draws_its_order_for_every_task():
    conflicting = np.asarray([[1.0, 0.3, 0], [-0.7, 1, 0], [-0.4, -0.8, 0.9]]) @ np.eye(K, P)
    outcomes = pcgrad_outcomes(conflicting)
    tx = mtl.pcgrad(key=3)
    state, seen = tx.init(zeros()), set()
    for _ in range(60):
        update, state = tx.update(tree(jnp.asarray(conflicting, jnp.float32)), state)
        distance = np.abs(outcomes - np.asarray(flat(update))).max(axis=1)
        assert distance.min() < 1e-4
        seen.add(int(distance.argmin()))
    distinct = {tuple(row) for row in outcomes.round(4)}
    assert len(distinct) == 8  # one order for all tasks would reach six
    assert len({tuple(outcomes[i].round(4)) for i in seen}) == len(distinct)


def test_pcgrad_with_a_mask_draws_over_the_tasks_present():
    rows = stack("normal", 4, 2) @ np.eye(2, P)
    present = np.asarray([True, True, False, True])
    outcomes = pcgrad_outcomes(rows[present])
    tx = mtl.pcgrad(key=1)
    step, state = jax.jit(lambda g, s: tx.update(g, s, task_mask=jnp.asarray(present))), tx.init(zeros())
    seen = set()
    for _ in range(40):
        update, state = step(tree(jnp.asarray(rows, jnp.float32)), state)
        distance = np.abs(outcomes - np.asarray(flat(update))).max(axis=1)
        assert distance.min() < 1e-4
        seen.add(tuple(outcomes[distance.argmin()].round(4)))
    assert seen == {tuple(row) for row in outcomes.round(4)}
