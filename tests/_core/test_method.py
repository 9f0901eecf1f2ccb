"""What every method is: optax's contract, programs, dtypes, derivatives, schedules."""

import inspect
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import ALL, EAGER, FACTORIES, UNSTORED, G, K, arguments
from harness import (
    EVERY,
    FIXED,
    PARAMS,
    UNSTACKED,
    WEIGHED,
    P,
    flat,
    functions,
    losses_of,
    make,
    precisions,
    primitives,
    tree,
    zeros,
)

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import ROWS, WRAPPERS
from mtlgrad_jax.solvers._solution import SOLVED


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", UNSTORED)
def test_under_the_flags_for_debugging_without_a_stack(name):
    tx, params = make(name, K), {"b": jnp.asarray([0.5]), "w": jnp.asarray([[0.2, -0.1, 0.4], [0.5, 0.3, -0.2]])}
    goals = jnp.asarray(np.random.default_rng(0).normal(size=(K, P)), jnp.float32)

    def losses_fn(params):
        return 1 + jnp.sum((flat(params) - goals) ** 2, axis=1)

    def step(params, state):
        return tx.update(mtl.linearize(losses_fn, params), state, params, **functions(name, losses_fn))

    traces = []

    @jax.jit
    def compiled(params, state):
        traces.append(name)
        return step(params, state)

    state = tx.init(params)
    for _ in range(2):
        with jax.debug_nans(True), jax.debug_key_reuse(True):
            step(params, state)
            compiled(params, state)  # constants move when the program is compiled
            with jax.transfer_guard("disallow"):
                update, state = compiled(params, state)
        assert {leaf: value.shape for leaf, value in update.items()} == PARAMS
    assert traces == [name]


@pytest.mark.parametrize("name", ALL)
def test_in_a_chain_with_strangers(name):
    """In a chain with Adam, extra arguments that no member uses are ignored."""
    tx = optax.chain(FACTORIES[name](), optax.adam(1e-2))
    grads, losses, _ = arguments()
    params = zeros()
    update, _ = tx.update(grads, tx.init(params), params, losses=losses, value=1.0, unknown="x")
    assert {key: leaf.shape for key, leaf in optax.apply_updates(params, update).items()} == PARAMS


SWITCHES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "leaks": jax.checking_leaks,
}


@pytest.mark.parametrize("name", [*EVERY, *(row.name for row in WRAPPERS)])
@pytest.mark.parametrize(
    ("switch", "num_tasks"),
    [
        *((switch, K) for switch in SWITCHES if switch != "leaks"),
        ("rank promotion", 2),
        pytest.param("leaks", 1, marks=pytest.mark.nightly),  # slow: without caches
    ],
)
def test_under_the_users_switches(name, switch, num_tasks):
    """On both routes, traced only: the update has the dtypes of the gradients, and the state keeps its own."""
    losses_fn = partial(losses_of, num_tasks=num_tasks)
    own, params = functions(name, losses_fn), zeros(jnp.float32)
    grads = params if name in UNSTACKED else jax.tree.map(lambda p: jnp.ones((num_tasks, *p.shape), p.dtype), params)
    like = grads if name in ("per_task", "dropgrad") else params

    def kept(tx, start, given, losses):
        update, state = jax.eval_shape(lambda s, g: tx.update(g, s, params, losses=losses, **own), start, given)
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (update, state))

    with SWITCHES[switch]():
        tx = make(name, num_tasks)
        start = tx.init(params)
        wanted = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (like, start))
        assert kept(tx, start, grads, jnp.ones(num_tasks)) == wanted
        if name in UNSTORED:

            def step(params, state):
                return tx.update(mtl.linearize(losses_fn, params), state, params, **own)

            found = jax.eval_shape(step, params, start)
            assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == wanted


@pytest.mark.parametrize("name", EAGER)
def test_products_are_in_full_precision(name):
    """On both routes. By default, they are in bfloat16 on TPUs and in TensorFloat-32 on GPUs."""
    tx, own = EAGER[name](), functions(name.split("(")[0])
    grads = zeros() if name.split("(")[0] in UNSTACKED else arguments()[0]
    stored = jax.make_jaxpr(lambda g, s, loss: tx.update(g, s, zeros(), losses=loss, **own))
    unstored = jax.make_jaxpr(lambda p, s: tx.update(mtl.linearize(losses_of, p), s, p, **own))
    with jax.default_matmul_precision("bfloat16"):
        programs = [stored(grads, tx.init(zeros()), arguments()[1])]
        programs += [unstored(zeros(), tx.init(zeros()))] if name.split("(")[0] in UNSTORED else []
        found = {precision for program in programs for precision in precisions(program.jaxpr)}
    assert found <= {(jax.lax.Precision.HIGHEST,) * 2}
    assert found or not getattr(tx, "looks", False)


@pytest.mark.parametrize("name", WEIGHED)
def test_info_is_found_through_any_nesting(name):
    tx = optax.chain(optax.identity(), optax.chain(mtl.with_metrics(FACTORIES[name](), num_tasks=K), optax.sgd(0.1)))
    grads, losses, _ = arguments()
    _, state = tx.update(grads, tx.init(zeros()), losses=losses)
    info = optax.tree.get(state, "info")
    assert int(info.result) in (SOLVED, *(argument.missing for argument in FACTORIES[name]().arguments))
    found = mtl.metrics(state)
    weights = np.asarray(found["weights"], float)
    gradient = FACTORIES[name]().update(grads, FACTORIES[name]().init(zeros()), losses=losses)[0]
    np.testing.assert_allclose(weights @ G[0], flat(gradient), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["norms"], np.linalg.norm(G[0], axis=1), rtol=1e-5)
    np.testing.assert_allclose(
        found["predicted_change"], -G[0] @ np.asarray(flat(gradient), float), rtol=1e-3, atol=1e-3
    )


NINE = partial(losses_of, num_tasks=9)  # in an array, more than are unrolled
MGDA = mtl.mgda()
ORACLES = {
    "named": mtl.task_value_and_grad(lambda params: dict(zip("abc", losses_of(params), strict=True))),
    **{f"strategy={s}": mtl.task_value_and_grad(NINE, strategy=s) for s in ("vmap", "unrolled", 1, 2)},
    **{f"sam, strategy={s}": mtl.sam_value_and_grad(NINE, strategy=s) for s in ("vmap", 2)},
    **{f"gramian({rows})": lambda p, rows=rows: mtl.linearize(NINE, p, rows=rows).gramian() for rows in (None, 2)},
    "pullback(2)": lambda params: mtl.linearize(NINE, params, rows=2).pullback(jnp.ones(9)),
    "pushforward": lambda params: mtl.linearize(NINE, params).pushforward(params),
    "balanced": lambda params: mtl.balanced_value_and_grad(NINE, MGDA)(params, MGDA.init(params)),
}


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", [*EAGER, *ORACLES])
def test_eager_steps_compile_once(name):
    """Also outside jit: loops and branches are compiled once, or run in Python, but never recompiled in every call."""
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    if name in EAGER:
        tx, own = EAGER[name](), functions(name.split("(")[0])
        grads, losses, _ = arguments()
        grads = zeros() if name.split("(")[0] in UNSTACKED else grads
        state, step = tx.init(zeros()), lambda state: tx.update(grads, state, zeros(), losses=losses, **own)[1]
    else:
        state, step = None, lambda _: ORACLES[name](zeros())
    for _ in range(2):
        state = step(state)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        step(state)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.usefixtures("unchecked")
def test_injected_hyperparameters(name):
    """Floats may be schedules; counts and choices must be static."""
    row = ROWS[name]
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(row.factory).parameters.items()
        if isinstance(parameter.default, float)
    }
    static = [key for key in inspect.signature(row.factory).parameters if key not in defaults]
    injected = optax.inject_hyperparams(row.factory, static_args=static)
    floors = {key: float(value > 1) for key, value in defaults.items()}
    schedules = {
        key: (lambda step, value=value, floor=floors[key]: floor + (value - floor) * 0.5 ** (step + 1))
        for key, value in defaults.items()
    }
    own = {**row.kwargs(K), **FIXED.get(name, {})}
    own = {key: value for key, value in own.items() if key not in schedules}
    tx = injected(**own, **schedules)
    state = tx.init(zeros())
    plain_state = make(name, K).init(zeros())
    for t in range(2):
        grads, losses, _ = arguments(t)
        update, state = tx.update(grads, state, zeros(), losses=losses)
        plain = make(name, K, **{key: schedule(t) for key, schedule in schedules.items()})
        wanted, plain_state = plain.update(grads, plain_state, zeros(), losses=losses)
        np.testing.assert_allclose(flat(update), flat(wanted), rtol=1e-4, atol=1e-5)
    if "num_tasks" in own:
        with pytest.raises(ValueError, match="static_args=\\('num_tasks',\\)"):
            optax.inject_hyperparams(row.factory)(**own).init(zeros())


@pytest.mark.parametrize("name", WEIGHED)
def test_weights_are_constants_to_differentiation(name):
    """The derivative of c . d in the gradients is the outer product of the weights and c."""
    tx = mtl.with_metrics(FACTORIES[name](), num_tasks=K)
    _, losses, _ = arguments()
    direction = jnp.arange(1.0, 1.0 + P)

    def along(stacked, losses):
        update, state = tx.update(tree(stacked), tx.init(zeros()), losses=losses)
        return flat(update) @ direction, mtl.metrics(state)["weights"]

    (slope, by_loss), weights = jax.grad(along, argnums=(0, 1), has_aux=True)(jnp.asarray(G[0], jnp.float32), losses)
    np.testing.assert_allclose(slope, weights[:, None] * direction, rtol=1e-6)
    assert not by_loss.any()


def test_no_array_is_made_before_init():
    """Arrays made in a factory would start the backend early, and be deleted by the first donation."""
    program = """
from mtlgrad_jax.registry import ROWS, make
from jax._src import xla_bridge
for row in ROWS.values():
    make(row, 3)
assert not xla_bridge._backends, "the backend has started"
import jax.numpy as jnp
jnp.zeros(())
assert xla_bridge._backends  # so the check above can fail
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", EVERY)
def test_as_an_aggregator_of_optax(name):
    """Between a preprocessor and an optimizer, like the aggregators of optax.experimental.aggregating."""
    aggregating = pytest.importorskip("optax.experimental").aggregating
    pre, post = map(optax.with_extra_args_support, (optax.identity(), optax.sgd(1.0)))
    tx = aggregating.process(pre, FACTORIES[name](), post)
    grads, losses, _ = arguments()
    update, _ = tx.update(grads, tx.init(zeros()), zeros(), losses=losses)
    alone = FACTORIES[name]()
    wanted, _ = alone.update(grads, alone.init(zeros()), zeros(), losses=losses)
    np.testing.assert_allclose(flat(update), -flat(wanted), rtol=1e-5, atol=1e-6)


def test_nothing_calls_back_to_the_host():
    for name in ALL:
        tx = FACTORIES[name]()
        program = jax.make_jaxpr(lambda g, s, loss, tx=tx: tx.update(g, s, losses=loss))
        used = primitives(program(arguments()[0], tx.init(zeros()), arguments()[1]))
        assert not any("callback" in primitive for primitive in used)


@pytest.mark.parametrize("name", WEIGHED)
def test_the_sum_of_the_weights_depends_on_the_number_of_tasks_unless_a_method_is_mean_like(name):
    """For three and for two tasks with orthogonal gradients of length one and equal losses."""
    tx = make(name, K)
    weigh = jax.jit(lambda mask: tx.weigh(jnp.eye(K), tx.init(None), losses=jnp.ones(K), task_mask=mask)[0])
    masks = [jnp.asarray([True, True, True]), jnp.asarray([True, False, True])]
    three, two = (float(weigh(mask).sum()) for mask in masks)
    assert (abs(three - two) < 1e-3 * three) == tx.mean_like


@pytest.mark.parametrize(
    "method", [mtl.imtl_g(), mtl.db_mtl(num_tasks=K), mtl.trimmed_mean()], ids=["mgda", "db", "trim"]
)
def test_the_update_has_the_dtype_of_the_gradients(method):
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree(jnp.asarray(G[0])))
    update, _ = method.update(grads, method.init(zeros()), zeros(), losses=jnp.ones(K))
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}
