"""Behaviour that all methods share: optax's contract, errors, masks, names, steps with a NaN or inf."""

import inspect
import pathlib
import pickle
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_arguments import BAD
from families import stack
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
    raises_naming,
    run,
    tree,
    under_names,
    zeros,
)
from reference import pcgrad_outcomes

import mtlgrad_jax as mtl
from mtlgrad_jax.methods.sharpness.fs_mtl import COPIES
from mtlgrad_jax.registry import METHODS, ROWS, WRAPPERS, describe, markdown_table, needs
from mtlgrad_jax.registry import make as make_row
from mtlgrad_jax.solvers._solution import MAX_STEPS, SOLVED, Solution

K = 3
STEPS = 3
G = np.stack([stack("normal", K, P), stack("correlated", K, P), stack("opposite", K, P)])
LOSSES = np.asarray([[1.0, 2.0, 3.0], [0.5, 2.5, 2.0], [0.4, 2.6, 1.0]])
WRAPPED = {
    "update_every": lambda: mtl.update_every(mtl.imtl_g(), num_tasks=K, k=2),
    "smoothed": lambda: mtl.smoothed(mtl.conflict_free(), num_tasks=K),
    "skip_nonfinite_tasks": lambda: mtl.skip_nonfinite_tasks(mtl.imtl_g()),
    "skip_nonfinite_tasks(db_mtl)": lambda: mtl.skip_nonfinite_tasks(mtl.db_mtl(num_tasks=K)),
    "with_metrics": lambda: mtl.with_metrics(mtl.pcgrad(), num_tasks=K),
    "with_metrics(trimmed_mean)": lambda: mtl.with_metrics(mtl.trimmed_mean(), num_tasks=K),
    "shared_private": lambda: mtl.shared_private(mtl.gradnorm(num_tasks=K), {"b": False, "w": True}),
    "shared_private(weighted)": lambda: mtl.shared_private(mtl.imtl_g(), {"b": False, "w": True}, private="weighted"),
    "partition": lambda: mtl.partition({"one": mtl.imtl_g(), "two": mtl.uw(num_tasks=K)}, {"b": "one", "w": "two"}),
    "shared_private(nested)": lambda: mtl.shared_private(
        mtl.with_metrics(mtl.smoothed(mtl.update_every(mtl.nash_mtl(), K, 2), K), K), {"b": False, "w": True}
    ),
}
FACTORIES = {name: (lambda name=name: make(name, K)) for name in EVERY} | WRAPPED
ALL = list(FACTORIES)
EAGER = FACTORIES | {row.name: (lambda row=row: make_row(row, K)) for row in WRAPPERS}
EAGER |= {f"fs_mtl({mode})": (lambda m=mode: mtl.fs_mtl(mtl.mgda(), mode=m, num_tasks=K)) for mode in COPIES}
EAGER |= {
    "gen_learning_rate(every=1)": lambda: mtl.gen_learning_rate(0.1, every=1),
    "grouped(update_every)": lambda: mtl.grouped(mtl.update_every(mtl.mgda(), K, 2), str),
}


UNSTORED = [*EVERY, *(row.name for row in WRAPPERS if row.wraps and row.name not in UNSTACKED)]
"""Those that take gradients which are not stored."""


def step_of(tx, **own):
    @jax.jit
    def step(grads, state, losses, mask):
        return tx.update(grads, state, zeros(), losses=losses, task_mask=mask, **own)

    return step


def arguments(t=0, mask=None):
    return tree(jnp.asarray(G[t], jnp.float32)), jnp.asarray(LOSSES[t], jnp.float32), mask


@pytest.fixture(scope="module")
def compiled():
    """The transformation and compiled step of each method, made once."""
    made = {}

    def get(name):
        if name not in made:
            tx = EAGER[name]()
            made[name] = tx, step_of(tx, **functions(name.split("(")[0]))
        return made[name]

    return get


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", ALL)
def test_jit_equals_eager_and_compiles_once(name, compiled):
    tx, step = compiled(name)
    present = jnp.ones(K, bool)
    jitted, plain = tx.init(zeros()), tx.init(zeros())
    for t in range(2):
        grads, losses, _ = arguments(t)
        one, jitted = step(grads, jitted, losses, present)
        other, plain = tx.update(grads, plain, zeros(), losses=losses, task_mask=present)
        np.testing.assert_allclose(flat(one), flat(other), rtol=1e-4, atol=1e-5)
    assert step._cache_size() == 1
    assert {key: leaf.shape for key, leaf in one.items()} == PARAMS


@pytest.mark.parametrize("name", ALL)
def test_two_runs_at_once_under_vmap_scan_and_cond(name, compiled):
    """One program for two orders of the data, with one step left out, against the steps one after the other."""
    tx, step = compiled(name)
    flags, present = [True, False, True], jnp.ones(K, bool)
    orders = np.asarray([range(STEPS), range(STEPS)[::-1]])
    grads, losses = (jnp.asarray(values, jnp.float32)[orders] for values in (G, LOSSES))

    @jax.jit
    @jax.vmap
    def train(grads, losses):
        def body(state, now):
            flag, grads, losses = now
            update, state = jax.lax.cond(
                flag,
                lambda: tx.update(tree(grads), state, zeros(), losses=losses, task_mask=present),
                lambda: (zeros(), state),
            )
            return state, flat(update)

        return jax.lax.scan(body, tx.init(zeros()), (jnp.asarray(flags), grads, losses))[1]

    together = train(grads, losses)
    assert np.isfinite(together).all()
    for i, order in enumerate(orders):
        state = tx.init(zeros())
        for j, t in enumerate(order):
            update = zeros()
            if flags[j]:
                update, state = step(tree(grads[i, j]), state, losses[i, j], present)
            rounding = 1e-4 if t < 2 else 2e-3  # fairgrad weighs opposite gradients by 2e3
            np.testing.assert_allclose(together[i, j], flat(update), rtol=1e-3, atol=rounding)


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", EAGER)
def test_under_the_flags_for_debugging(name, compiled):
    """JAX raises if an update or a state holds a NaN, even of an absent task, or a key is drawn from twice.

    Outside jit it also raises if a NaN occurs on the way, and inside if an array moves between host and device.
    """
    tx, step = compiled(name)
    state = tx.init(zeros())
    for t, mask in enumerate(([True, True, True], [False, True, True], [False, False, False])):
        grads, losses, present = *arguments(t)[:2], jnp.asarray(mask)
        grads = jax.tree.map(lambda leaf: leaf[0], grads) if name.split("(")[0] in UNSTACKED else grads
        with jax.debug_nans(True), jax.debug_key_reuse(True):
            step.__wrapped__(grads, state, losses, present)
            with jax.transfer_guard("disallow"):
                _, state = step(grads, state, losses, present)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", UNSTORED)
def test_under_the_flags_for_debugging_without_a_stack(name):
    tx, params = make(name, K), {"b": jnp.asarray([0.5]), "w": jnp.asarray([[0.2, -0.1, 0.4], [0.5, 0.3, -0.2]])}
    goals = jnp.asarray(np.random.default_rng(0).normal(size=(K, P)), jnp.float32)

    def losses_fn(params):
        return 1 + jnp.sum((flat(params) - goals) ** 2, axis=1)

    def step(params, state):
        return tx.update(mtl.linearize(losses_fn, params), state, params, **functions(name, losses_fn))

    compiled, state = jax.jit(step), tx.init(params)
    for _ in range(2):
        with jax.debug_nans(True), jax.debug_key_reuse(True):
            step(params, state)
            with jax.transfer_guard("disallow"):
                update, state = compiled(params, state)
        assert {leaf: value.shape for leaf, value in update.items()} == PARAMS
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("name", ALL)
def test_no_state_shares_its_arrays(name, compiled):
    """With itself or with another state, so that it can be donated."""
    tx, step = compiled(name)
    grads, losses, _ = arguments()
    state = tx.init(zeros())
    first, _ = step(grads, state, losses, jnp.ones(K, bool))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
    assert len(buffers) == len(set(buffers))
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    second, _ = step(grads, tx.init(zeros()), losses, jnp.ones(K, bool))
    np.testing.assert_array_equal(flat(first), flat(second))


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name, compiled):
    tx, step = compiled(name)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arguments()[0])
    params = zeros(jnp.bfloat16)
    losses = arguments()[1]
    update, state = tx.update(half, tx.init(params), params, losses=losses)
    again, _ = tx.update(half, state, params, losses=losses)
    assert {leaf.dtype for leaf in jax.tree.leaves((update, again))} == {jnp.dtype(jnp.bfloat16)}
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    wanted, _ = step(whole, tx.init(zeros()), losses, jnp.ones(K, bool))
    np.testing.assert_allclose(flat(update).astype(np.float32), flat(wanted), rtol=0.02, atol=0.02)


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


def test_methods_without_weights_have_none_in_the_metrics(compiled):
    tx, step = compiled("with_metrics(trimmed_mean)")
    grads, losses, _ = arguments()
    _, state = step(grads, tx.init(zeros()), losses, jnp.ones(K, bool))
    assert "weights" not in mtl.metrics(state)


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


@pytest.mark.parametrize("name", ALL)
def test_no_task_present_changes_nothing(name, compiled):
    tx, step = compiled(name)
    grads, losses, _ = arguments()
    _, before = step(grads, tx.init(zeros()), losses, jnp.ones(K, bool))
    update, after = step(grads, before, losses, jnp.zeros(K, bool))
    assert not flat(update).any()
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        where = jax.tree_util.keystr(path)
        time = where.endswith(".step") and ".method" not in where  # of update_every; db_mtl's steps are per task
        if not (time or any(f".{field}" in where for field in ("info", "key", "metrics", "dropped"))):
            np.testing.assert_array_equal(old, new, err_msg=where)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_gradient_is_a_counted_zero_update(name, broken, compiled):
    tx, step = compiled(name)
    grads, losses, _ = arguments()
    present = jnp.ones(K, bool)
    _, before = step(grads, tx.init(zeros()), losses, present)
    bad = {**grads, "w": grads["w"].at[K - 1, 0, 1].set(broken)}  # the largest loss, so that it counts everywhere
    update, after = step(bad, before, losses, present)
    assert np.isfinite(flat(update)).all()
    following, _ = step(*[arguments(1)[0], after, arguments(1)[1], present])
    if name.startswith("skip_nonfinite_tasks"):
        assert int(after.dropped) == 1
        alone, _ = step(grads, before, losses, jnp.asarray([True, True, False]))
        np.testing.assert_array_equal(flat(update), flat(alone))
        return
    found = mtl.metrics(after)
    assert sum(int(value) for key, value in found.items() if key.endswith("skipped")) >= 1
    assert not flat(update).any()
    expected, _ = step(arguments(1)[0], before, arguments(1)[1], present)
    np.testing.assert_array_equal(flat(following), flat(expected))


@pytest.mark.parametrize("name", [name for name in EVERY if "losses" in needs(ROWS[name])])
def test_missing_losses(name):
    tx = FACTORIES[name]()
    with pytest.raises(ValueError, match=raises_naming("losses")):
        tx.update(arguments()[0], tx.init(zeros()))


@pytest.mark.parametrize("name", [name for name in EVERY if "losses" in needs(ROWS[name])])
def test_a_broken_loss_is_a_counted_zero_update(name, compiled):
    tx, step = compiled(name)
    grads, losses, _ = arguments()
    start = tx.init(zeros())
    update, state = step(grads, start, losses.at[2].set(jnp.nan), jnp.ones(K, bool))
    assert not flat(update).any()
    assert int(state.info.skipped) == 1
    np.testing.assert_array_equal(*map(flat, [step(grads, s, losses, jnp.ones(K, bool))[0] for s in (start, state)]))


@pytest.mark.parametrize("name", ALL)
def test_named_tasks(name):
    """Names are sorted; a mask must have the same names."""
    smallest = ROWS[name].kwargs(K) if name in EVERY else {}
    per_task = {key: under_names(values) for key, values in smallest.items() if isinstance(values, (list, tuple))}
    tx = make(name, K, **per_task) if per_task else FACTORIES[name]()
    grads, losses, _ = arguments()
    named = dict(zip("abc", losses, strict=True))
    mask = {"c": jnp.asarray(False), "a": jnp.asarray(True), "b": jnp.asarray(True)}
    one, _ = tx.update(grads, tx.init(zeros()), losses=named, task_mask=mask)
    plain = FACTORIES[name]()
    other, _ = plain.update(grads, plain.init(zeros()), losses=losses, task_mask=jnp.asarray([True, True, False]))
    np.testing.assert_array_equal(flat(one), flat(other))
    with pytest.raises(ValueError, match=raises_naming("task_mask")):
        tx.update(grads, tx.init(zeros()), losses=named, task_mask=jnp.ones(K, bool))
    with pytest.raises(ValueError, match=raises_naming("task_mask")):
        tx.update(grads, tx.init(zeros()), losses=named, task_mask={"a": True, "b": True, "d": True})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("mask", "what"), [(np.ones(2, bool), "shape"), (np.ones((K, 1), bool), "shape"), (np.ones(K), "bool")]
)
def test_wrong_masks(name, mask, what):
    tx = FACTORIES[name]()
    grads, losses, _ = arguments()
    with pytest.raises(ValueError, match=what) as error:
        tx.update(grads, tx.init(zeros()), losses=losses, task_mask=mask)
    assert str(error.value).startswith("`task_mask` must")


@pytest.mark.parametrize("name", ALL)
def test_wrong_stacks(name):
    tx = FACTORIES[name]()
    grads, losses, _ = arguments()
    state = tx.init(zeros())
    for bad, where in [
        ({**grads, "w": grads["w"][:2]}, "['w']"),
        ({**grads, "w": grads["w"][0]}, "['w']"),
        ({**grads, "b": jnp.zeros(())}, "['b']"),
        ({"w": grads["w"]}, "structure"),
        (jax.tree.map(lambda leaf: leaf.astype(jnp.complex64), grads), "complex"),
        (jax.tree.map(lambda leaf: leaf[:0], grads), "K=0"),
        ({}, "at least one leaf"),
    ]:
        with pytest.raises(ValueError, match="`task_grads` must") as error:
            tx.update(bad, state, zeros(), losses=losses)
        assert where in str(error.value)


@pytest.mark.parametrize("name", ALL)
def test_masked_nodes_are_refused(name):
    """A leaf hidden by optax.masked would come out with its task axis and change its parameter's shape."""
    hidden = {"b": optax.MaskedNode(), "w": jnp.zeros((2, 3))}
    with pytest.raises(ValueError, match=r"MaskedNode at leaf \['b'\].*mtlgrad_jax.partition"):
        FACTORIES[name]().init(hidden)
    with pytest.raises(ValueError, match="MaskedNode"):
        optax.masked(FACTORIES[name](), {"b": False, "w": True}).init(zeros())


@pytest.mark.parametrize("name", EVERY)
def test_wrong_number_of_tasks(name):
    if "num_tasks" not in inspect.signature(ROWS[name].factory).parameters and name not in ("constant", "ntk"):
        one, _ = run(name, G[:1])
        assert one.shape == (1, P)
        return
    tx = FACTORIES[name]()
    grads = jax.tree.map(lambda leaf: leaf[:2], arguments()[0])
    with pytest.raises(ValueError, match=r"`(num_tasks|weights|traces)` must"):
        tx.update(grads, tx.init(zeros()), losses=jnp.ones(2))


NINE = partial(losses_of, num_tasks=9)  # more tasks than are unrolled
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


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, cases in BAD.items() for bad in cases], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(name, bad):
    with pytest.raises(ValueError, match=raises_naming(next(iter(bad)))) as error:
        make_row(ROWS[name], K, **bad)
    assert repr(next(iter(bad.values()))) in str(error.value)


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


@pytest.mark.parametrize("name", list(ROWS))
def test_help_shows_the_real_thing(name):
    row = ROWS[name]
    public = getattr(mtl, name)
    assert public is row.factory
    assert pickle.loads(pickle.dumps(public)) is public
    assert public.__name__ == public.__qualname__ == name
    assert describe(row).splitlines()[0] in public.__doc__
    assert ">>>" in public.__doc__
    if row in METHODS:
        assert inspect.signature(public).return_annotation is mtl.Method
        assert isinstance(make(name, K), mtl.Method)


def test_every_public_factory_has_a_row():
    tools = {"from_rule", "from_kernel", "metrics", "scalars", "unstack", "under", "linearize", "chain", "accumulate"}
    tools |= {"linearize_features", "has_updated", "pareto_front", "ntk_traces", "cite"}
    tools |= {"task_value_and_grad", "balanced_value_and_grad"}
    tools |= {"sam_value_and_grad", "sam_perturbation", "perturbed_task_grad"}
    public = {name for name, value in vars(mtl).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert public - tools == set(ROWS)


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


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", ALL)
def test_the_number_of_tasks_is_checked(name):
    """Losses, masks and wrappers made for another number of tasks than the stack has."""
    tx = FACTORIES[name]()
    state = tx.init(zeros())
    grads, losses, _ = arguments()
    for wrong in (jnp.ones(K + 1), jnp.ones(K - 1), {"a": 1.0, "b": 2.0}):
        with pytest.raises(ValueError, match=raises_naming("(losses|num_tasks|weights)")):
            tx.update(grads, state, losses=wrong)
    wrapper = ROWS.get(name.split("(")[0])
    if wrapper in WRAPPERS and "num_tasks" in inspect.signature(wrapper.factory).parameters:
        for fewer in (1, 2):
            part = jax.tree.map(lambda leaf, fewer=fewer: leaf[:fewer], grads)
            with pytest.raises(ValueError, match=raises_naming("num_tasks")):
                tx.update(part, state, losses=losses[:fewer])


def test_flat_losses_with_named_arguments_would_swap_tasks():
    grads = arguments()[0]
    tx = mtl.constant({"a": 1.0, "b": 2.0, "c": 3.0})
    with pytest.raises(ValueError, match=raises_naming("weights")):
        tx.update(grads, tx.init(zeros()), losses=jnp.ones(K))
    tx = mtl.mean()
    with pytest.raises(ValueError, match=raises_naming("task_mask")):
        tx.update(grads, tx.init(zeros()), losses=jnp.ones(K), task_mask=dict.fromkeys("abc", True))


POSITIVE = {
    "db_mtl": lambda: mtl.db_mtl(num_tasks=K, beta=0.5),
    "emtl": lambda: mtl.emtl(strength=2.0),
    "mgda-loss": lambda: mtl.mgda(normalization="loss"),
    "mgda-loss+": lambda: mtl.mgda(normalization="loss+", apply_to="normalized"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_losses_that_must_be_positive(name, bad):
    """If losses are divisors, a step with a loss <= 0 is skipped and leaves no trace."""
    tx = POSITIVE[name]()
    step = step_of(tx)
    grads, losses, _ = arguments()
    start, present = tx.init(zeros()), jnp.ones(K, bool)
    for spoiled in (losses.at[1].set(bad), jnp.full(K, bad)):
        update, state = step(grads, start, spoiled, present)
        assert not flat(update).any()
        assert int(state.info.skipped) == 1
        np.testing.assert_array_equal(*(flat(step(grads, s, losses, present)[0]) for s in (start, state)))
    masked, state = step(grads, start, losses.at[1].set(bad), present.at[1].set(False))
    assert np.isfinite(flat(masked)).all()
    assert int(state.info.skipped) == 0


def test_losses_that_nobody_needs_may_be_anything():
    tx = mtl.mean()
    grads = arguments()[0]
    update, _ = tx.update(grads, tx.init(zeros()), losses=jnp.full(K, jnp.nan))
    np.testing.assert_allclose(flat(update), G[0].mean(axis=0), rtol=1e-5)


def test_a_method_whose_weights_fail_falls_back_to_the_mean_and_counts():
    def divided(*, gramian):
        return 1 / jnp.zeros(K)

    tx = mtl.from_kernel(divided)
    update, state = tx.update(arguments()[0], tx.init(zeros()))
    np.testing.assert_allclose(flat(update), G[0].mean(axis=0), rtol=1e-5)
    assert int(state.info.fallbacks) == 1
    assert "not be finite" in mtl.RESULTS[int(state.info.result)]


def test_what_stands_in_has_no_residual_and_a_skipped_step_no_stand_in():
    def failing(*, gramian):
        return Solution(jnp.full(K, jnp.nan), jnp.asarray(jnp.nan), jnp.asarray(7), jnp.asarray(MAX_STEPS))

    _, failed = mtl.from_kernel(failing).update(arguments()[0], mtl.from_kernel(failing).init(zeros()))
    tx, few = mtl.krum(0), jnp.asarray([True, False, True])
    grads, state = arguments()[0], tx.init(zeros())
    _, too_few = tx.update(grads, state, task_mask=few)
    _, skipped = tx.update(jax.tree.map(lambda leaf: leaf / 0, grads), state, task_mask=few)
    assert [float(state.info.residual) for state in (failed, too_few, skipped)] == [0, 0, 0]
    assert [int(state.info.fallbacks) for state in (failed, too_few, skipped)] == [1, 1, 0]
    assert [int(state.info.skipped) for state in (failed, too_few, skipped)] == [0, 0, 1]


@pytest.mark.usefixtures("unchecked")
def test_authors_of_methods_get_clear_errors():
    def one(*, gramian):
        return jnp.ones((K, 1))

    with pytest.raises(ValueError, match=raises_naming("kernel")):
        mtl.from_kernel(lambda *, gramain: jnp.ones(K))
    for given in ("losses", ("losses",)):
        with pytest.raises(ValueError, match=raises_naming("arguments")):
            mtl.from_kernel(one, arguments=given)
    tx = mtl.from_kernel(one)
    with pytest.raises(ValueError, match=raises_naming("kernel")):
        tx.update(arguments()[0], tx.init(zeros()))
    with pytest.raises(ValueError, match=raises_naming("gramian")):
        mtl.cagrad().weigh(None, mtl.cagrad().init(None))
    injected = optax.inject_hyperparams(mtl.cagrad)(c=0.3)
    for wrap in (lambda m: mtl.smoothed(m, K), lambda m: mtl.update_every(m, K, 2)):
        with pytest.raises(ValueError, match="inject_hyperparams"):
            wrap(injected)


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
        assert "callback" not in str(program(arguments()[0], tx.init(zeros()), arguments()[1]))


def test_a_given_key_survives_donation():
    key = jax.random.key(5)
    tx = mtl.pcgrad(key=key)
    step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=1)
    first, second = (step(arguments()[0], tx.init(zeros()))[0] for _ in range(2))
    np.testing.assert_array_equal(flat(first), flat(second))
    jax.random.normal(key)


def test_preference_of_upgrad():
    named = mtl.upgrad(preference={"a": 1.0, "b": 0.0, "c": 2.0})
    flat_one = mtl.upgrad(preference=[1.0, 0.0, 2.0])
    grads, losses, _ = arguments()
    one, _ = named.update(grads, named.init(zeros()), losses=dict(zip("abc", losses, strict=True)))
    other, _ = flat_one.update(grads, flat_one.init(zeros()))
    np.testing.assert_array_equal(flat(one), flat(other))
    with pytest.raises(ValueError, match=raises_naming("preference")):
        mtl.upgrad(preference=[-1.0, 2.0])


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


@pytest.mark.parametrize(
    "key", [7, np.int32(7), jax.random.key(7), jax.random.PRNGKey(7)], ids=["int", "array", "typed", "raw"]
)
@pytest.mark.usefixtures("unchecked")
def test_keys_in_any_form(key):
    grads, _, _ = arguments()
    first, second = (tx.update(grads, tx.init(zeros()))[0] for tx in (mtl.pcgrad(key=7), mtl.pcgrad(key=key)))
    np.testing.assert_array_equal(flat(first), flat(second))


def test_too_few_tasks_fall_back_to_the_mean_and_say_so():
    tx = mtl.trimmed_mean(trim=1)
    grads, _, _ = arguments()
    update, state = tx.update(grads, tx.init(zeros()), task_mask=jnp.asarray([True, False, True]))
    np.testing.assert_allclose(flat(update), G[0][[0, 2]].mean(axis=0), rtol=1e-5)
    assert mtl.RESULTS[int(state.info.result)].startswith("Fewer tasks")
    assert int(state.info.fallbacks) == 1


def test_the_page_of_methods_is_what_the_rows_say():
    text = (pathlib.Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    assert text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip() == markdown_table()


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


@pytest.mark.parametrize("name", WEIGHED)
def test_the_sum_of_the_weights_depends_on_the_number_of_tasks_unless_a_method_is_mean_like(name):
    """For three and for two tasks with orthogonal gradients of length one and equal losses."""
    tx = make(name, K)
    weigh = jax.jit(lambda mask: tx.weigh(jnp.eye(K), tx.init(None), losses=jnp.ones(K), task_mask=mask)[0])
    masks = [jnp.asarray([True, True, True]), jnp.asarray([True, False, True])]
    three, two = (float(weigh(mask).sum()) for mask in masks)
    assert (abs(three - two) < 1e-3 * three) == tx.mean_like
