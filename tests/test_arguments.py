"""Wrong values for every argument of every public function, by annotation, raise a ValueError naming the argument."""

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from unittest.mock import Mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import FIXED, UNSTACKED, flat, functions, losses_of, raises_naming, zeros
from jax.typing import DTypeLike
from jaxtyping import PyTree

import mtlgrad_jax as mtl
from mtlgrad_jax import diagnostics, stacks
from mtlgrad_jax._core.checks import Number
from mtlgrad_jax._core.trees import Labels
from mtlgrad_jax.integrations import logging, nnx
from mtlgrad_jax.registry import METHODS, ROWS, WRAPPERS, smallest
from mtlgrad_jax.registry import make as make_row

K = 3
MIXED = {"flag": jnp.asarray(True), "count": jnp.asarray([1, 2]), "w": jnp.ones(2)}


def stack_of(params):
    return jax.tree.map(lambda leaf: jnp.stack([jnp.ones_like(leaf)] * K), params)


def parts(annotation):
    """The parts of an annotation, without None; any Callable[...] counts as Callable."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    found = typing.get_args(annotation) if union else (annotation,)
    return frozenset(typing.get_origin(part) or part for part in found if part is not type(None))


WRONG = {
    Number: ("x", np.nan, np.inf, -np.inf, 1e300, 1j, True, np.ones(2)),
    bool: ("no", 0, 1.0, np.ones(2, bool)),
    str: ("nonsense", 3),
    int: (1.5, True, -1, "x", np.nan),
    typing.Literal["a choice"]: ("nonsense", 3),
    typing.Literal["a choice"] | int: ("nonsense", 0, 1.5, True),
    int | Sequence[int]: (1.5, "x", True, [0, "x"]),
    int | jax.Array: (
        *("x", 1.5, True, np.ones(2, np.float32), np.zeros(2, np.int32), np.zeros(3, np.uint32)),
        *(np.zeros((1, 2), np.uint32), jax.random.split(jax.random.key(0), 2)),
    ),
    PyTree: ("x", {}, *([1.0, value] for value in (np.nan, np.inf, 1j, "x", True, None)), np.full(K, -np.inf)),
    Sequence[PyTree] | np.ndarray | jax.Array: (3, "x", [], [[0.0] * K], [[1.0, -1.0, 1.0]], [[1.0, np.nan, 1.0]]),
    int | PyTree: ("x", -1, K, 1.5, True, [True, True, False], [0, 1, 0]),
    jax.Array: (3, np.float32(1), [1.0] * K, dict.fromkeys("abc", 1.0), np.ones(K + 1)),
    DTypeLike: ("x", 3, "int32", jnp.int8, bool, np.float64, jnp.complex64),
    Callable: (3, "x"),
    Labels: (3,),
    PyTree | Callable: (3,),
    Iterable: (3, "losses", ("losses",)),
    Mapping: (3, {"a": 3}),
    dict: (3, ("weights",)),
    mtl.Method: (3, mtl.mean),
    optax.GradientTransformation: (3, "adam", mtl.mean),
}
WRONG = {parts(annotation): values for annotation, values in WRONG.items()}
"""Wrong values by annotation; None is wrong too if it is not the default."""

OTHERWISE = {
    ("unstack", "like"): (3.0, None, {}),
    ("metrics", "opt_state"): (3, None, optax.EmptyState()),
    ("scalars", "like"): (3.0, None, {}),
    ("scalars", "metrics"): (3, jnp.zeros(2), [0.0]),
    ("has_updated", "state"): (3, None, optax.EmptyState()),
    ("sam_perturbation", "task_grads"): (3, None, {}, zeros()),
    ("ntk_traces", "residual_fns"): (3, None, {}),
    ("linearize_features", "params"): ("x", None, {}, jnp.ones(2, complex)),
    ("ntk_traces", "params"): (None, {}),
    ("ntk_traces", "points"): (3, None, {}, np.ones(2)),
    ("pareto_front", "params"): (),  # any tree that the losses take
    ("pareto_front", "batches"): (),  # likewise
    ("pareto_front", "preferences"): (3.0, None, {}, {"a": np.ones(2), "b": np.ones(3)}),
    ("sam_perturbation", "params"): (),  # if a stack and parameters do not match, the error names the stack
}
"""Trees that do not hold one number per task."""

TOOLS = {
    mtl.task_value_and_grad: {"losses_fn": losses_of},
    mtl.linearize: {"losses_fn": losses_of},
    mtl.linearize_features: {
        "features_fn": lambda params: params,
        "losses_fn": lambda params, features: losses_of(features),
        "params": zeros(),
    },
    mtl.balanced_value_and_grad: {"losses_fn": losses_of, "method": mtl.mean()},
    mtl.sam_value_and_grad: {"losses_fn": losses_of, "is_shared": dict.fromkeys(zeros(), True)},
    mtl.perturbed_task_grad: {"losses_fn": losses_of},
    mtl.sam_perturbation: {
        "task_grads": stack_of(zeros()),
        "params": zeros(),
        "is_shared": dict.fromkeys(zeros(), True),
    },
    mtl.ntk_traces: {
        "residual_fns": {"a": lambda params, point: params["w"] * point},
        "params": zeros(),
        "points": {"a": jnp.ones(2)},
    },
    mtl.from_rule: {"rule": lambda task_grads, *, present: task_grads},
    mtl.from_kernel: {"kernel": lambda *, present: present},
    mtl.chain: {},
    mtl.accumulate: {"tx": mtl.mean(), "num_tasks": K, "steps": 2},
    mtl.has_updated: {"state": 0},
    mtl.pareto_front: {
        "losses_fn": losses_of,
        "optimizer": lambda preference: mtl.chain(mtl.constant(preference), optax.sgd(0.1)),
        "params": zeros(),
        "preferences": np.eye(K),
        "steps": 1,
    },
    mtl.under: {},
    mtl.unstack: {"values": np.ones(K), "like": np.ones(K)},
    mtl.metrics: {"opt_state": 0},
    mtl.cite: {"name": "cagrad"},
    mtl.scalars: {"metrics": {}, "like": jnp.zeros(2)},
}
"""Public functions outside the registry, with their smallest arguments."""

SMALLEST = {row.factory: smallest(row, K) for row in METHODS + WRAPPERS} | TOOLS
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
ARGUMENTS = [
    (function, parameter)
    for function in SMALLEST
    for parameter in inspect.signature(function).parameters.values()
    if parameter.kind in NAMED
]


ELSEWHERE = {
    diagnostics.delta_m: {"values": [1.0], "baselines": [1.0]},
    diagnostics.hypervolume: {"losses": np.eye(2), "reference": np.ones(2)},
    diagnostics.simplex_lattice: {"num_tasks": 2, "divisions": 2},
    diagnostics.plot_front: {"losses": np.eye(2)},
    diagnostics.plot_weights: {"metrics": {"weights": np.ones((2, K))}},
    diagnostics.plot_cosines: {"metrics": {"cosines": np.ones((2, K, K))}},
    diagnostics.plot_conflicts: {"metrics": {"conflict_fraction": np.ones(2)}},
    logging.write_scalars: {"writer": Mock(), "metrics": {}, "like": np.ones(K), "step": 0},
    nnx.task_value_and_grad: {"losses_fn": losses_of},
    nnx.balanced_value_and_grad: {"losses_fn": losses_of, "method": mtl.mean()},
    stacks.num_tasks: {"task_grads": np.ones((K, 2))},
    stacks.zeros: {"params": zeros(), "num_tasks": K},
    stacks.gramian: {"task_grads": np.ones((K, 2))},
    stacks.cross_gramian: {"first": np.ones((K, 2)), "second": np.ones((K, 2))},
    stacks.task_norms: {"task_grads": np.ones((K, 2))},
    stacks.finite_tasks: {"task_grads": np.ones((K, 2))},
    stacks.project: {"task_grads": np.ones((K, 2)), "direction": np.ones(2)},
    stacks.combine: {"weights": np.ones(K), "task_grads": np.ones((K, 2))},
    stacks.mix: {"a": np.ones(K), "first": np.ones((K, 2)), "b": np.ones(K), "second": np.ones((K, 2))},
    stacks.select: {"tasks": np.ones(K, bool), "stack": np.ones((K, 2))},
}
"""Functions of public modules that users call."""


def named(value):
    return getattr(value, "__name__", None) or getattr(value, "name", None) or repr(value)


def use(function, **kwargs):
    """Call a function, and also its result if arguments can only be compared with parameters then."""
    given = {**(SMALLEST | ELSEWHERE)[function], **kwargs}
    positional = (given.pop("losses_fn"), zeros()) if function is mtl.linearize else ()
    made = function(*positional, **given)
    if isinstance(made, optax.GradientTransformation):
        made.init(zeros())
    elif function is mtl.sam_value_and_grad:
        jax.eval_shape(made, zeros())


def test_every_public_function_is_here():
    public = {value for name, value in vars(mtl).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert set(SMALLEST) == public
    assert set(ROWS) <= {function.__name__ for function in SMALLEST}


@pytest.mark.parametrize(("function", "parameter"), ARGUMENTS, ids=named)
@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_named(function, parameter):
    optional = parameter.default is None or type(None) in typing.get_args(parameter.annotation)
    place = function.__name__, parameter.name
    wrong = OTHERWISE[place] if place in OTHERWISE else WRONG[parts(parameter.annotation)] + (None,) * (not optional)
    for value in wrong:
        with pytest.raises(ValueError, match=raises_naming(parameter.name)):
            use(function, **{parameter.name: value})


@pytest.mark.parametrize(
    ("function", "parameter"),
    [(f, p) for f, p in ARGUMENTS if parts(p.annotation) in (parts(Number), parts(bool))],
    ids=named,
)
@pytest.mark.usefixtures("unchecked")
def test_numbers_and_flags_in_any_form(function, parameter):
    """Numpy numbers and flags, arrays of one number, and traced values."""
    if isinstance(parameter.default, bool):
        return use(function, **{parameter.name: np.bool_(parameter.default)})
    number = 1.5 if isinstance(parameter.default, float) and parameter.default > 1 else 0.5
    for value in (number, *(make(number) for make in (np.float32, np.asarray, jnp.asarray, jnp.bfloat16))):
        use(function, **{parameter.name: value})
    return jax.eval_shape(lambda traced: use(function, **{parameter.name: traced}), np.nan)


@pytest.mark.parametrize("zero", [[0.0] * K, np.zeros(K), dict.fromkeys("abc", 0)], ids=["list", "array", "named"])
@pytest.mark.usefixtures("unchecked")
def test_a_preference_for_nobody_is_refused(zero):
    """Weights of `constant`, by contrast, may all be zero."""
    other = (mtl.constant, mtl.epo, mtl.ferero)  # the last two take no zero at all
    preferring = [(f, p.name) for f, p in ARGUMENTS if p.name in ("preference", "weights") and f not in other]
    assert len(preferring) == 9
    for function, argument in preferring:
        with pytest.raises(ValueError, match=raises_naming(argument)):
            use(function, **{argument: zero})
        jax.eval_shape(lambda one, f=function, a=argument: use(f, **{a: [one, 0.0, 0.0]}), 0.0)
    tx = mtl.constant(np.zeros(K))
    assert not flat(tx.update(stack_of(zeros()), tx.init(zeros()))[0]).any()


@pytest.mark.parametrize("function", ELSEWHERE, ids=named)
@pytest.mark.usefixtures("unchecked")
def test_numpy_arrays_of_two_precisions_are_taken(function):
    """They are float64 here, and float32 in JAX: no warning of it."""
    use(function)


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", ROWS)
def test_numpy_updates_are_taken(name):
    """Also outside jit, with leaves of the widths that numpy prefers."""
    params = {"w": np.ones(2), "count": np.asarray([1, 2]), "flag": np.asarray(True)}
    grads = params if name in UNSTACKED else {key: np.stack([leaf] * K) for key, leaf in params.items()}
    tx = make_row(ROWS[name], K, **FIXED.get(name, {}))
    updates, _ = tx.update(grads, tx.init(params), params, losses=np.ones(K), **functions(name))
    assert np.isfinite(updates["w"]).all()


ONES, MASK = jnp.ones((K, 2)), jnp.ones(K, bool)
STACKS = {
    "task_mask": [
        lambda mask=mask: stacks.gramian(ONES, mask) for mask in (np.ones(K, int), np.ones(K), MASK[1:], MASK[:, None])
    ],
    "task_grads": [
        *(lambda f=f: f(jnp.ones(())) for f in (stacks.num_tasks, stacks.gramian, stacks.task_norms)),
        *(lambda f=f: f({"a": ONES, "b": ONES[1:]}) for f in (stacks.gramian, stacks.task_norms, stacks.finite_tasks)),
        lambda: stacks.combine(jnp.ones(K), ONES * 1j),
        lambda: stacks.project(jnp.ones(()), jnp.ones(())),
    ],
    "first": [lambda: stacks.cross_gramian(1.0, ONES), lambda: stacks.mix(MASK, 1j * ONES, MASK, ONES)],
    "second": [
        *(lambda bad=bad: stacks.cross_gramian(ONES, bad) for bad in (1.0, ONES * 1j, ONES[:, 1:], {"a": ONES})),
        *(lambda bad=bad: stacks.mix(jnp.ones(K), ONES, jnp.ones(K), bad) for bad in (ONES[1:], [ONES])),
    ],
    "direction": [lambda bad=bad: stacks.project(ONES, bad) for bad in (1.0, jnp.ones(3), [jnp.ones(2)])],
    "weights": [
        lambda bad=bad: stacks.combine(bad, ONES) for bad in (jnp.ones(2), 1.0, [1.0, 2.0], jnp.ones(K) * 1j, ONES)
    ],
    "a": [lambda: stacks.mix(jnp.ones(2), ONES, jnp.ones(K), ONES)],
    "b": [lambda: stacks.mix(jnp.ones(K), ONES, jnp.ones((K, 1)), ONES)],
    "tasks": [lambda bad=bad: stacks.select(bad, ONES) for bad in (jnp.ones(K), jnp.ones(K, int), MASK[1:], True)],
    "stack": [lambda: stacks.select(MASK, {"a": ONES, "b": ONES[1:]})],
    "other": [lambda bad=bad: stacks.select(MASK, ONES, bad) for bad in (ONES[1:], [ONES], 1.0)],
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.usefixtures("unchecked")
def test_wrong_stacks_are_named(name):
    for call in STACKS[name]:
        with pytest.raises(ValueError, match=raises_naming(name)):
            call()


def test_losses_must_be_real():
    with pytest.raises(ValueError, match=raises_naming("losses")):
        mtl.uw(num_tasks=K).update(stack_of(zeros()), mtl.uw(num_tasks=K).init(zeros()), losses=jnp.ones(K) * 1j)


@pytest.mark.usefixtures("unchecked")
def test_labels_must_be_keys_of_a_dict():
    with pytest.raises(ValueError, match=raises_naming("labels")):
        mtl.grouped(mtl.mgda(), lambda path: [str(path)]).init(zeros())


MODES = {f"fs_mtl({mode})": {"mode": mode, "num_tasks": K} for mode in ("direct", "second", "each")}


@pytest.mark.parametrize("name", [*ROWS, *MODES])
def test_leaves_that_are_not_floating_count_as_zero(name):
    """Also bool leaves, as the oracles return them: their part of the update has their shape and dtype."""
    row = ROWS[name.split("(")[0]]
    tx = make_row(row, K, **FIXED.get(name, {}), **MODES.get(name, {}))
    grads = MIXED if row.name in UNSTACKED else stack_of(MIXED)

    def step(grads, params):
        return tx.update(grads, tx.init(params), params, losses=jnp.ones(K), **functions(row.name))[0]

    wanted = grads if row.name in ("per_task", "dropgrad") else MIXED
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(step, grads, MIXED)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), wanted
    )


@pytest.mark.parametrize("name", ["value_fn", "losses_fn", "grad_fn"])
@pytest.mark.usefixtures("unchecked")
def test_functions_of_a_step_are_named(name):
    method = {"value_fn": "gen_learning_rate", "losses_fn": "samo", "grad_fn": "samo"}[name]
    tx = make_row(ROWS[method], K)
    with pytest.raises(ValueError, match=raises_naming(name)):
        tx.update(zeros(), tx.init(zeros()), zeros(), **{**functions(method), name: 3})


OURS = re.compile(r"`[\w.\[\]]+` (must|is no)|A method cannot stand")
HANDED_ON = {
    mtl.ntk_traces: ("residual_fns", "params", "points"),
    mtl.pareto_front: ("losses_fn", "optimizer", "params", "preferences", "batches"),
}
"""Functions of the user that are called at once, and what they are called with."""


def junk():
    """Values that users pass by mistake: numbers, texts, arrays, trees and functions."""
    numbers = st.one_of(st.booleans(), st.integers(-5, 5), st.floats(), st.complex_numbers(max_magnitude=9))
    shapes = st.sampled_from([(), (0,), (1,), (K,), (K + 1,), (K, K), (K, 1, 2)])
    dtypes = st.sampled_from([bool, np.int32, np.uint32, np.float16, np.float32, np.float64, np.complex64])
    arrays = st.builds(
        lambda shape, dtype, number: np.full(shape, number).astype(dtype), shapes, dtypes, st.floats(-9, 9)
    )
    others = [None, "", "mean", b"x", object(), repr, mtl.mean(), optax.adam(0.1)]
    leaves = st.one_of(numbers, arrays, st.sampled_from(others))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=K) | st.dictionaries(st.sampled_from("abwc"), inner)
    )


FUZZED = hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))


@functools.cache
def made(name):
    """One of each, whose solvers are traced once."""
    return make_row(ROWS[name], K)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row in METHODS or row.wraps])
@pytest.mark.usefixtures("unchecked")
@hypothesis.given(data=st.data())
@FUZZED
def test_any_argument_of_an_update_is_taken_or_named(name, data):
    """As those of functions; traced only."""
    tx = made(name)
    declared = [argument.name for argument in tx.arguments] if isinstance(tx, mtl.Method) else []
    given = {"grads": zeros() if name in UNSTACKED else stack_of(zeros()), "params": zeros(), "losses": jnp.ones(K)}
    given |= functions(name)
    argument = data.draw(st.sampled_from(["grads", "params", *declared]))
    given[argument] = value = data.draw(junk())
    message = None
    try:
        jax.eval_shape(
            lambda state: tx.update(given.pop("grads"), state, given.pop("params"), **given), tx.init(zeros())
        )
    except ValueError as error:
        message = str(error)
    assert message is None or OURS.match(message), (argument, value)


@pytest.mark.nightly
@pytest.mark.parametrize("function", SMALLEST | ELSEWHERE, ids=named)
@pytest.mark.usefixtures("unchecked")
@hypothesis.given(data=st.data())
@FUZZED
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")
def test_any_argument_is_taken_or_named(function, data):
    """A call returns, or raises a ValueError of ours; never an error from within JAX, numpy or Python."""
    parameters = [p.name for p in inspect.signature(function).parameters.values() if p.kind in NAMED]
    parameters = [name for name in parameters if name not in HANDED_ON.get(function, ("axis_name",))]
    if not parameters:
        return
    parameter = data.draw(st.sampled_from(parameters))
    value = data.draw(junk())
    message = None
    try:
        use(function, **{parameter: value})
    except ValueError as error:
        message = str(error)
    assert message is None or OURS.match(message), (parameter, value)
