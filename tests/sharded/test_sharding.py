"""Eight virtual devices: what an update sends, and that sharded results equal those on one device.

Run separately from the other tests, because the number of devices is fixed when JAX starts: see the Makefile.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as S

import mtlgrad_jax as mtl
from mtlgrad_jax import stacks
from mtlgrad_jax.registry import METHODS, ROWS
from mtlgrad_jax.registry import make as make_row

K = 3
WEIGHTINGS = [row.name for row in METHODS if make_row(row, K).weigh]
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() == 8
    return Mesh(np.asarray(jax.devices()), ("model",))


def gradients(num_tasks):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(num_tasks, 64, 24)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(num_tasks, 16)), jnp.float32),
    }


@pytest.fixture(scope="module")
def grads():
    return gradients(K)


def put(tree, mesh, stacked=True):
    """Parameters split over the mesh; the task axis is not."""
    lead = (None,) if stacked else ()
    specs = {"w": S(*lead, None, "model"), "b": S(*lead, "model")}
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}


def branches(hlo):
    """Names of the computations that run only in a branch of a conditional, and of those they call."""
    called = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.M | re.S))
    rare, todo = set(), []
    for body in called.values():
        for match in re.findall(
            r"(?:true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{(.*?)\}", body
        ):
            todo += [name.strip().lstrip("%") for group in match for name in group.split(",") if name.strip()]
    while todo:
        name = todo.pop()
        if name in called and name not in rare:
            rare.add(name)
            todo += re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)", called[name])
    return called, rare


def collectives(hlo):
    """Collectives (kind, shape) on the path that every step takes."""
    called, rare = branches(hlo)
    found = []
    for name, body in called.items():
        if name not in rare:
            found += [(kind, shape) for shape, kind in COLLECTIVE.findall(body)]
    return found


def compiled(tx, grads, mesh, losses):
    params = put(jax.tree.map(lambda leaf: leaf[0], grads), mesh, stacked=False)
    state = tx.init(params)
    out = (jax.tree.map(lambda leaf: leaf.sharding, params), None)
    step = jax.jit(lambda g, s: tx.update(g, s, losses=losses), out_shardings=out)
    return step.lower(put(grads, mesh), state).compile(), state


DIVISIBLE = ["mgda", "cagrad", "upgrad", "conicgrad", "nash_mtl", "imtl_g", "pcgrad"]


@pytest.mark.parametrize(("name", "num_tasks"), [(name, K) for name in WEIGHTINGS] + [(name, 8) for name in DIVISIBLE])
def test_an_update_sends_one_gramian_and_gathers_nothing(name, num_tasks, mesh):
    """With eight tasks on eight devices too, the K×K work is not split."""
    grads, losses = gradients(num_tasks), jnp.arange(1.0, 1 + num_tasks)
    tx = make_row(ROWS[name], num_tasks)
    step, state = compiled(tx, grads, mesh, losses)
    sent = collectives(step.as_text())
    assert all(kind == "all-reduce" for kind, _ in sent), sent
    if tx.looks:
        [(_, shape)] = sent  # one message; XLA:CPU sends a K×K matrix per leaf in it, where XLA:TPU adds them up first
        assert set(re.findall(r"\w+\[[\d,]*\]", shape)) == {f"f32[{num_tasks},{num_tasks}]"}, sent
    else:
        # Whether the update is finite; and the Gramian, where no cross-Gramian takes its place.
        assert len(sent) <= (2 if ROWS[name].folder == "two_batches" else 1)
    update, _ = step(put(grads, mesh), state)
    alone, _ = tx.update(grads, tx.init(None), losses=losses)
    for leaf in update:
        np.testing.assert_allclose(update[leaf], alone[leaf], rtol=1e-4, atol=1e-5 * abs(alone[leaf]).max())


@pytest.mark.parametrize("name", ["mean", "mgda", "cagrad", "uw", "db_mtl", "sam_gs", "excess_mtl", "graddrop"])
def test_explicitly_sharded_parameters(name, grads):
    """The axes of jax.make_mesh are explicit: products that sum over them must specify the output sharding."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    losses = jnp.asarray([1.0, 2.0, 3.0])
    tx = mtl.with_metrics(make_row(ROWS[name], K), K)
    step, state = compiled(tx, grads, mesh, losses)
    update, _ = step(put(grads, mesh), state)
    alone, _ = tx.update(grads, tx.init(jax.tree.map(lambda leaf: leaf[0], grads)), losses=losses)
    for leaf in update:
        np.testing.assert_allclose(update[leaf], alone[leaf], rtol=1e-4, atol=1e-5)


OTHERS = {
    "trimmed_mean": lambda: mtl.trimmed_mean(),
    "coordinate_median": lambda: mtl.coordinate_median(),
    "sign_agreement": lambda: mtl.sign_agreement(rescale=True),
    "db_mtl": lambda: mtl.db_mtl(num_tasks=K),
    "excess_mtl": lambda: mtl.excess_mtl(num_tasks=K),
    "moco": lambda: mtl.moco(num_tasks=K),
    "conflict_free_momentum": lambda: mtl.conflict_free_momentum(num_tasks=K),
    "update_every": lambda: mtl.update_every(mtl.mgda(), K, 2),
    "with_metrics(smoothed)": lambda: mtl.with_metrics(mtl.smoothed(mtl.mgda(), K), K),
    "with_metrics(trimmed_mean)": lambda: mtl.with_metrics(mtl.trimmed_mean(), K),
    "skip_nonfinite_tasks": lambda: mtl.skip_nonfinite_tasks(mtl.mgda()),
    "shared_private": lambda: mtl.shared_private(mtl.mgda(), {"w": True, "b": False}),
    "partition": lambda: mtl.partition({"one": mtl.mgda(), "two": mtl.mean()}, {"w": "one", "b": "two"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_and_wrappers_gather_nothing(name, mesh, grads):
    losses = jnp.asarray([1.0, 2.0, 3.0])
    tx = OTHERS[name]()
    step, state = compiled(tx, grads, mesh, losses)
    sent = collectives(step.as_text())
    assert all(kind == "all-reduce" for kind, _ in sent), sent
    update, _ = step(put(grads, mesh), state)
    alone, _ = tx.update(grads, tx.init(jax.tree.map(lambda leaf: leaf[0], grads)), losses=losses)
    for leaf in update:
        np.testing.assert_allclose(update[leaf], alone[leaf], rtol=1e-4, atol=1e-5)


def test_batch_sharding_averages_before_the_gramian(grads):
    """The Gramian of the mean gradient is not the mean of the local Gramians."""
    rng = np.random.default_rng(1)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    x = jax.device_put(jnp.asarray(rng.normal(size=(32, 5)), jnp.float32), NamedSharding(mesh, S("data")))
    params = jnp.asarray(rng.normal(size=(5, K)), jnp.float32)

    def losses_fn(params, x):
        return jnp.mean((x @ params - 1) ** 2, axis=0)

    step = jax.jit(lambda p, x: mtl.linearize(losses_fn, p, x).gramian())
    one = mtl.linearize(losses_fn, params, np.asarray(x)).gramian()
    np.testing.assert_allclose(step(params, x), one, rtol=1e-4, atol=1e-5)
    local = [mtl.linearize(losses_fn, params, part).gramian() for part in np.split(np.asarray(x), 8)]
    assert np.abs(np.mean(local, axis=0) - one).max() > 0.1 * np.abs(one).max()


def test_what_a_sharded_batch_sends():
    """Stacked: K P numbers in one message. Matrix-free: P for every column of the Gramian and once for the gradient."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    everywhere = NamedSharding(mesh, S())
    x = jax.device_put(jnp.ones((32, 5)), NamedSharding(mesh, S("data")))
    params = jax.device_put(jnp.ones((5, K)), everywhere)

    def losses_fn(params, x):
        return jnp.mean((jnp.tanh(x @ params) @ jnp.ones((K, K)) - jnp.arange(K)) ** 2, axis=0)

    def gradients_sent(f, *args):
        sent = collectives(jax.jit(f, out_shardings=everywhere).lower(*args).compile().as_text())
        shapes = [re.findall(r"\[([\d,]*)\]", shape) for _, shape in sent]
        sizes = [[np.prod([int(n) for n in shape.split(",") if n], dtype=int) for shape in group] for group in shapes]
        return [sum(int(size) // params.size for size in group) for group in sizes]

    assert sum(gradients_sent(mtl.task_value_and_grad(losses_fn), params, x)) == K
    method = mtl.mgda()
    step = mtl.balanced_value_and_grad(losses_fn, method)
    sent = gradients_sent(step, params, method.init(None), x)
    assert sum(sent) == K + 1
    assert max(sent) == 1


def test_axis_name_inside_shard_map(mesh, grads):
    """Manually split parameters: the K×K sum runs over the named axis."""
    specs = {"w": S(None, None, "model"), "b": S(None, "model")}

    def local(grads):
        return stacks.gramian(grads, axis_name="model"), stacks.task_norms(grads, axis_name="model")

    matrix, norms = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=S(), check_vma=False))(
        put(grads, mesh)
    )
    np.testing.assert_allclose(matrix, stacks.gramian(grads), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(norms**2, np.diag(matrix), rtol=1e-4)


@pytest.mark.parametrize("rows", [None, 2])
def test_a_jacobian_inside_shard_map_needs_averages_that_are_tracked(mesh, rows):
    def losses_fn(w, x):
        y = x @ w
        return jnp.stack([jnp.mean(y**2), jnp.mean((y - 1) ** 2), jnp.mean(jnp.sin(y))])

    def averaged_fn(w, x):
        return jax.lax.pmean(losses_fn(w, x), mesh.axis_names)

    w, x = jnp.asarray([0.3, -1.0]), jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)

    def run(function, **options):
        def gramian(w, x):
            return mtl.linearize(function, w, x, rows=rows).gramian()

        specs = {"in_specs": (S(), S(mesh.axis_names)), "out_specs": S()}
        return jax.jit(jax.shard_map(gramian, mesh=mesh, **specs, **options))(w, x)

    np.testing.assert_allclose(run(averaged_fn), mtl.linearize(losses_fn, w, x).gramian(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"`losses_fn` must return the same losses .* Average them"):
        run(losses_fn)
    with pytest.raises(ValueError, match="needs check_vma=True"):
        run(averaged_fn, check_vma=False)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("perturbed", [True, False])
@pytest.mark.parametrize("strategy", ["unrolled", "vmap", 1])
def test_a_stack_inside_shard_map_needs_averaged_losses(mesh, named, perturbed, strategy):
    def losses_fn(w, x):
        losses = {"b": jnp.mean((x @ w) ** 2), "a": jnp.mean(jnp.sin(x @ w))}
        return losses if named else jnp.stack([losses["a"], losses["b"]])

    def averaged_fn(w, x):
        return jax.lax.pmean(losses_fn(w, x), mesh.axis_names)

    w, x = jnp.asarray([0.3, -1.0]), jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)
    moves = jnp.asarray([[0.1, 0.0], [0.0, 0.1]])

    def grads(function, w, x):
        if perturbed:
            return mtl.perturbed_task_grad(function, strategy=strategy)(w, moves, x)
        return mtl.task_value_and_grad(function, strategy=strategy)(w, x)[1]

    def run(function):
        specs = {"in_specs": (S(), S(mesh.axis_names)), "out_specs": S()}
        return jax.jit(jax.shard_map(lambda w, x: grads(function, w, x), mesh=mesh, **specs))(w, x)

    np.testing.assert_allclose(run(averaged_fn), grads(losses_fn, w, x), rtol=1e-5)
    with pytest.raises(ValueError, match=r"`losses_fn` must return the same losses .* Average them"):
        run(losses_fn)
