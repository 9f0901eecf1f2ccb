"""Methods inside optax's wrappers, and optax's transformations around them: docs/composing.md says what works."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import P, flat, functions, make, tree, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import ROWS, needs

K, STEPS = 3, 2
G = np.random.default_rng(0).normal(size=(STEPS, K, P)).astype(np.float32)
LOSSES = jnp.asarray([1.0, 2.0, 3.0])
PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "composing.md").read_text()
CHAINS = {"optax": optax.chain, "mtl": mtl.chain}
REPRESENTATIVES = ("mean", "trimmed_mean", "gradnorm", "nash_mtl", "pcgrad", "modo", "db_mtl", "fs_mtl")


def kinds(daily):
    """One method of each kind, most of them nightly."""
    return [pytest.param(name, marks=() if name in daily else pytest.mark.nightly) for name in REPRESENTATIVES]


FROZEN = {"b": True, "w": False}
TRAINED = {"b": False, "w": True}


def table(heading):
    """The rows of the table under a heading, as {first cell: the other cells}."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def halving(step):
    return 0.5**step


def yes(*args, **extra):
    return True


AROUND = {
    "chain": lambda tx: optax.chain(tx, optax.scale(2.0)),
    "named_chain": lambda tx: optax.named_chain(("first", tx), ("second", optax.scale(2.0))),
    "with_extra_args_support": optax.with_extra_args_support,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda a: optax.chain(tx, optax.scale(a)))(a=halving),
    "masked": lambda tx: optax.masked(tx, TRAINED),
    "multi_transform": lambda tx: optax.multi_transform({"a": tx, "b": tx}, {"b": "a", "w": "b"}),
    "partition": lambda tx: optax.partition({"a": tx, "b": tx}, {"b": "a", "w": "b"}),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=FROZEN),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, yes),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, yes),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "flatten": optax.flatten,
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "monitor": lambda tx: optax.monitor({"seen": tx}),
    "contrib.schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "contrib.split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "contrib.sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)),
    "contrib.mechanize": optax.contrib.mechanize,
    "contrib.galore": lambda tx: optax.contrib.galore(0.1, rank=1, base_optimizer=tx),
    "contrib.scale_by_galore": lambda tx: optax.contrib.scale_by_galore(rank=1, base_optimizer=tx),
}
OTHERS = {
    *("lbfgs", "contrib.sophia"),  # take a line search and an estimator, no optimizer
    "inject_stateful_hyperparams",  # the deprecated name of inject_hyperparams
}


def test_every_wrapper_of_optax_is_in_the_table():
    """A wrapper is a public callable with a transformation among its arguments."""
    found = set()
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name, value in vars(module).items():
            if callable(value) and not name.startswith("_") and getattr(value, "__module__", "").startswith("optax"):
                arguments = inspect.signature(value).parameters.values()
                if any("GradientTransformation" in str(argument.annotation) for argument in arguments):
                    found.add(prefix + name)
    states = {"GradientTransformation", "GradientTransformationExtraArgs"}
    assert found - states - OTHERS == set(AROUND) == set(table("Wrappers of optax"))


def loop(tx, grads, params, **extra):
    """The updates of all steps, as if written by hand, and whether the state keeps its shapes."""
    extra = extra if "extra" in str(inspect.signature(tx.update)) else {}
    given = optax.LookaheadParams(params, params) if "Lookahead" in type(tx.init(params)).__name__ else params
    state, updates, kept = tx.init(given), [], True
    for one in grads:
        update, after = tx.update(one, state, given, **extra)
        kept &= jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        state = after
        updates.append(flat(update.fast if isinstance(update, optax.LookaheadParams) else update))
    return np.stack(updates), kept


def arguments(name):
    losses = {"losses": LOSSES} if "losses" in needs(ROWS[name]) else {}
    return losses | functions(name)


def check(name, says, build, behind, rows=G):
    """A chain with a method equals what is behind it, of the method's own gradients, or raises what the page says."""
    params, own = tree(jnp.arange(1.0, 1 + P)), arguments(name)
    stacks = [tree(jnp.asarray(step)) for step in G]
    if not says.startswith("works"):
        with pytest.raises(AttributeError if says.startswith("no:") else ValueError) as error:
            loop(build(), stacks, params, **own)
        for instead in re.findall(r"`([\w.]+)`", says):
            assert instead in str(error.value)
        return
    method = make(name, K)
    state, gradients = method.init(params), []
    for step in rows:
        gradient, state = method.update(tree(jnp.asarray(step)), state, params, **own)
        gradients.append(gradient)
    found, kept = loop(build(), stacks, params, **own)
    wanted, keeps = loop(behind(), gradients, params)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert kept or not keeps


def momentum():
    return optax.sgd(0.1, momentum=0.5)


@pytest.mark.parametrize("name", kinds(["mean", "trimmed_mean", "gradnorm"]))
@pytest.mark.parametrize("chain", CHAINS)
def test_wrappers_around_a_chain(chain, name):
    says = table("Wrappers of optax")
    for wrapper, around in AROUND.items():
        if not ("without" in says[wrapper][0] and arguments(name)):
            check(
                name,
                says[wrapper][0],
                lambda around=around: around(CHAINS[chain](make(name, K), momentum())),
                lambda around=around: around(momentum()),
            )


@pytest.mark.parametrize("name", kinds(["mean"]))
@pytest.mark.parametrize("chain", CHAINS)
def test_wrappers_behind_a_method(chain, name):
    for wrapper, (_, says) in table("Wrappers of optax").items():
        if "in `optax.chain` without" in says and chain == "optax" and arguments(name):
            continue
        refused = says.startswith("works in `optax.chain`") and chain == "mtl"
        check(
            name,
            "error: `optax.chain`" if refused else says,
            lambda wrapper=wrapper: CHAINS[chain](make(name, K), AROUND[wrapper](momentum())),
            lambda wrapper=wrapper: AROUND[wrapper](momentum()),
        )


BEFORE = {
    "clip_by_global_norm": (lambda: optax.clip_by_global_norm(0.1), lambda g: 0.1 * g / np.sqrt((g**2).sum())),
    "clip": (lambda: optax.clip(0.1), lambda g: np.clip(g, -0.1, 0.1)),
    "scale": (lambda: optax.scale(2.0), lambda g: 2 * g),
    "add_decayed_weights": (lambda: optax.add_decayed_weights(0.1), lambda g: g + 0.1 * np.arange(1, 1 + P)),
    "freeze": (lambda: optax.freeze(FROZEN), lambda g: g * (np.arange(P) > 0)),
    "zero_nans": (optax.zero_nans, lambda g: g),
    "trace": (lambda: optax.trace(0.9), None),
    "ema": (lambda: optax.ema(0.9), None),
    "scale_by_adam": (optax.scale_by_adam, None),
    "apply_every": (lambda: optax.apply_every(2), None),
}


@pytest.mark.parametrize("name", kinds(["mean"]))
@pytest.mark.parametrize("chain", CHAINS)
def test_transformations_before_a_method(chain, name):
    """Those with a state of the gradients' shape: optax.chain lets its shape change."""
    says = table("Before the method")
    assert says.keys() == BEFORE.keys()
    for transform, (make_one, formula) in BEFORE.items():
        if formula is None and chain == "optax":
            stacks, params = [tree(jnp.asarray(rows)) for rows in G], zeros()
            _, kept = loop(optax.chain(make_one(), make(name, K)), stacks, params, **arguments(name))
            assert not kept
            continue
        check(
            name,
            says[transform][0],
            lambda make_one=make_one: CHAINS[chain](make_one(), make(name, K), momentum()),
            momentum,
            None if formula is None else [formula(rows).astype(np.float32) for rows in G],
        )


def test_sam_around_a_chain_with_a_grad_fn():
    stack = tree(jnp.asarray(G[0]))
    tx = optax.contrib.sam(
        optax.chain(mtl.mean(), optax.sgd(0.1)), optax.chain(mtl.mean(), optax.sgd(0.1)), opaque_mode=True
    )
    update, _ = tx.update(stack, tx.init(zeros()), zeros(), grad_fn=lambda params, _: stack)
    np.testing.assert_allclose(flat(update), -0.1 * G[0].mean(0), rtol=1e-5)
