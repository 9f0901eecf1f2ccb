"""Wrong input of every method is refused, with errors that say what is wrong."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_arguments import BAD
from factories import ALL, FACTORIES, G, K, arguments
from harness import EVERY, P, raises_naming, run, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import ROWS, WRAPPERS, needs
from mtlgrad_jax.registry import make as make_row


@pytest.mark.parametrize("name", [name for name in EVERY if "losses" in needs(ROWS[name])])
def test_missing_losses(name):
    tx = FACTORIES[name]()
    with pytest.raises(ValueError, match=raises_naming("losses")):
        tx.update(arguments()[0], tx.init(zeros()))


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


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, cases in BAD.items() for bad in cases], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(name, bad):
    with pytest.raises(ValueError, match=raises_naming(next(iter(bad)))) as error:
        make_row(ROWS[name], K, **bad)
    assert repr(next(iter(bad.values()))) in str(error.value)


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
