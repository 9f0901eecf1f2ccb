"""Flax NNX and Linen, TensorBoard, and plots: against flax's own gradients, files read back, and data drawn."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorboardX
from flax import linen, nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from harness import raises_naming
from tensorboardX.proto.event_pb2 import Event

import mtlgrad_jax as mtl
from mtlgrad_jax.diagnostics import plot_conflicts, plot_cosines, plot_weights
from mtlgrad_jax.integrations.linen import TrainState
from mtlgrad_jax.integrations.logging import write_scalars
from mtlgrad_jax.integrations.nnx import balanced_value_and_grad, task_value_and_grad

X = jax.random.normal(jax.random.key(0), (8, 3))
NAMES = ("depth", "seg")


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.trunk = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.heads = nnx.Dict({name: nnx.Linear(4, 1, rngs=rngs) for name in NAMES})
        self.calls = nnx.data(jnp.zeros((), int))
        self.widest = nnx.Variable(jnp.zeros(()))

    def __call__(self, x, rngs):
        self.calls += 1
        features = self.dropout(jnp.tanh(self.norm(self.trunk(x))), rngs=rngs)
        self.widest[...] = jnp.maximum(self.widest[...], jnp.abs(features).max())
        return {name: head(features) for name, head in self.heads.items()}


def losses_fn(model, x, rngs=None, *, train=True):
    assert train is True  # not traced
    return {name: jnp.mean((out - 1) ** 2) for name, out in model(x, rngs).items()}


def variables(*nodes):
    """All arrays, by path."""
    leaves = jax.tree_util.tree_leaves_with_path([nnx.as_pure(nnx.state(node)) for node in nodes if node is not None])
    return {jax.tree_util.keystr(path): plain(leaf) for path, leaf in leaves}


def plain(leaf):
    """A leaf as an array, also if it is a key."""
    return jax.random.key_data(leaf) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf


def close(ours, theirs):
    assert jax.tree.structure(nnx.as_pure(ours)) == jax.tree.structure(nnx.as_pure(theirs))
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ Flax NNX


def added(**kwargs):
    def gradient(model, x, rngs):
        losses, grads = task_value_and_grad(losses_fn, **kwargs)(model, x, rngs=rngs, train=True)
        return losses, jax.tree.map(lambda leaf: leaf.sum(axis=0), grads)

    return gradient


def balanced(rows):
    method = mtl.sum()

    def gradient(model, x, rngs):
        step = balanced_value_and_grad(losses_fn, method, rows=rows)
        return step(model, method.init(nnx.state(model, nnx.Param)), x, rngs, train=True)[:2]

    return gradient


ROUTES = {"unrolled": added(), "vmap": added(strategy="vmap"), "not stored": balanced(None), "rows": balanced(1)}


CASES = itertools.product(ROUTES, [True, False], [True, False])
NIGHTLY = {("vmap", True), ("rows", True), ("not stored", True), ("unrolled", False)}


@pytest.mark.parametrize(
    ("route", "own_rngs", "jit"),
    [pytest.param(*case, marks=() if case[2] and case[:2] not in NIGHTLY else pytest.mark.nightly) for case in CASES],
)
def test_a_module_moves_as_under_value_and_grad(route, jit, own_rngs):
    """Statistics, counters and keys after three calls; and the gradient is that of the sum of the losses."""

    def total(model, x, rngs):
        losses = losses_fn(model, x, rngs)
        return sum(losses.values()), losses

    def flax(model, x, rngs):
        (_, losses), grads = nnx.value_and_grad(total, has_aux=True)(model, x, rngs)
        return losses, grads

    calls = [nnx.jit(call) if jit else call for call in (flax, ROUTES[route])]
    nodes = [(Net(), None if own_rngs else nnx.Rngs(7)) for _ in calls]
    for t in range(3):
        (wanted, sums), (losses, grads) = (
            call(model, X + t, rngs) for call, (model, rngs) in zip(calls, nodes, strict=True)
        )
        close(losses, wanted)
        close(grads, sums)
    after, ours = (variables(*node) for node in nodes)
    assert after.keys() == ours.keys()
    assert ours["[0]['calls']"] == 3
    for path, leaf in after.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-6, err_msg=path)


def test_each_row_is_the_gradient_of_its_loss_with_the_same_masks():
    @nnx.jit
    def rows(model, *others):
        own = [nnx.grad(lambda m, name=name: losses_fn(m, X)[name])(m) for name, m in zip(NAMES, others, strict=True)]
        return task_value_and_grad(losses_fn)(model, X)[1], own

    grads, own = rows(Net(), Net(), Net())
    close(grads, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own))


@pytest.mark.parametrize("stored", [True, False])
def test_an_nnx_optimizer_gets_the_arguments_of_the_step(stored):
    """Scale-invariant weights are those of the sum of the log-losses, here of the tasks present."""
    method = mtl.scale_invariant()
    model, reference = Net(), Net()
    optimizer = nnx.Optimizer(model, mtl.chain(method, optax.sgd(0.1)) if stored else optax.sgd(0.1), wrt=nnx.Param)
    plain = nnx.Optimizer(reference, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, state, x, mask):
        if stored:
            losses, grads = task_value_and_grad(losses_fn)(model, x)
            optimizer.update(model, grads, losses=losses, task_mask=mask)
            return state
        one = balanced_value_and_grad(losses_fn, method)
        _, gradient, state = one(model, state, x, extra_args={"task_mask": mask})
        optimizer.update(model, gradient)
        return state

    @nnx.jit
    def plain_step(model, optimizer, x, seg):
        def total(model):
            losses = losses_fn(model, x)
            return jnp.log(losses["depth"]) + seg * jnp.log(losses["seg"])

        optimizer.update(model, nnx.grad(total)(model))

    state = method.init(nnx.state(model, nnx.Param))
    for t, seg in enumerate([True, False, True]):
        state = step(model, optimizer, state, X + t, {"depth": jnp.asarray(True), "seg": jnp.asarray(seg)})
        plain_step(reference, plain, X + t, float(seg))
    for path, leaf in variables(reference).items():
        np.testing.assert_allclose(variables(model)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("stored", [True, False])
def test_buffers_of_the_parameters_size(stored):
    """Running averages of constant gradients, those of linear losses, are 1/2 and then 3/4 of them; traced once."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    method = mtl.moco(num_tasks=2, beta=0.5, gamma=0.0)
    optimizer = nnx.Optimizer(
        model, optax.chain(method, optax.scale(1.0)) if stored else optax.scale(1.0), wrt=nnx.Param
    )
    wanted = nnx.as_pure(nnx.grad(lambda model: jnp.mean(model(X)))(model))

    def losses_fn(model):
        return jnp.mean(model(X), axis=0)

    @nnx.jit
    def step(model, optimizer, state):
        if stored:
            losses, grads = task_value_and_grad(losses_fn)(model)
            return optimizer.update(model, grads, losses=losses), state
        _, gradient, state = balanced_value_and_grad(losses_fn, method)(model, state)
        return optimizer.update(model, gradient), state

    state = method.init(nnx.state(model, nnx.Param))
    for part in (0.5, 0.75):
        with jax.no_tracing(part == 0.75):
            updates, state = step(model, optimizer, state)
        close(updates, jax.tree.map(lambda leaf, part=part: part * leaf, wanted))


def test_what_is_differentiated_and_what_else_comes_back():
    """`wrt` selects variables; aux, sown intermediates and shared references come back."""

    class Adapted(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
            self.adapter = nnx.LoRA(3, 1, 2, rngs=nnx.Rngs(1))
            self.tied = self.linear

        def __call__(self, x):
            out = self.linear(x) + self.adapter(x)
            self.sow(nnx.Intermediate, "out", out)
            return out

    def losses_fn(model, x):
        out = model(x) + model.tied(x)
        return jnp.mean(out**2, axis=0), {"out": out}

    model = Adapted()
    oracle = task_value_and_grad(losses_fn, wrt=nnx.LoRAParam, has_aux=True)
    with pytest.warns(DeprecationWarning, match="sow"):
        (losses, aux), grads = oracle(model, X)
    assert jax.tree.map(jnp.shape, nnx.as_pure(grads)) == nnx.State(
        {"adapter": {"lora_a": (2, 3, 1), "lora_b": (2, 1, 2)}}
    )
    np.testing.assert_allclose(losses, np.mean(np.square(aux["out"]), axis=0), rtol=1e-6)
    assert model.out[0].shape == (8, 2)
    assert model.tied is model.linear


@pytest.mark.parametrize(
    "model", [{"w": jnp.ones(2)}, jnp.ones(2), 3, None, nnx.Dropout(0.5)], ids=lambda model: type(model).__name__
)
def test_models_without_parameters(model):
    with pytest.raises(ValueError, match=raises_naming("wrt")):
        task_value_and_grad(lambda model: jnp.ones(2))(model)
    with pytest.raises(ValueError, match=raises_naming("wrt")):
        balanced_value_and_grad(lambda model: jnp.ones(2), mtl.mean())(model, mtl.mean().init(None))


def test_wrong_losses_of_modules(unchecked):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    for fn, has_aux, message in [
        (lambda model: jnp.sum(model(X)), False, r"`losses_fn` must return a \(K,\) array.*shape \(\)"),
        (lambda model: (jnp.sum(model(X), axis=0), 3), False, r"`losses_fn` must return .*pass has_aux=True"),
        (lambda model: jnp.sum(model(X), axis=0), True, r"`losses_fn` must return \(losses, aux\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            task_value_and_grad(fn, has_aux=has_aux)(model)
    for oracle in (task_value_and_grad, lambda fn, **kwargs: balanced_value_and_grad(fn, mtl.mean(), **kwargs)):
        with pytest.raises(ValueError, match=raises_naming("losses_fn")):
            oracle(None)
        with pytest.raises(ValueError, match=raises_naming("has_aux")):
            oracle(losses_fn, has_aux="yes")
    with pytest.raises(ValueError, match=raises_naming("strategy")):
        task_value_and_grad(losses_fn, strategy="map")(model)
    with pytest.raises(ValueError, match=raises_naming("method")):
        balanced_value_and_grad(losses_fn, None)


def test_metrics_of_an_nnx_optimizer_stay_as_they_were():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(mtl.with_metrics(mtl.mean(), 2), optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        losses, grads = task_value_and_grad(lambda model: jnp.mean((model(X) - 1) ** 2, axis=0))(model)
        optimizer.update(model, grads, losses=losses)
        squares = [jnp.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(grads)]
        return losses, jnp.sqrt(sum(squares))

    norms = []
    for t in range(2):
        losses, norm = step(model, optimizer)
        norms.append(norm)
        if not t:
            first = mtl.metrics(optimizer.opt_state)
    for found, wanted in zip((first, mtl.metrics(optimizer.opt_state)), norms, strict=True):
        np.testing.assert_allclose(found["norms"], wanted, rtol=1e-5)
        assert all(isinstance(value, jax.Array) for value in mtl.scalars(found, like=losses).values())


# ---------------------------------------------------------------------------------------------------------- Flax Linen


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.BatchNorm(use_running_average=False)(linen.Dense(4)(x)))
        return {name: linen.Dense(1, name=name)(x) for name in NAMES}


def linen_losses(params, batch_stats, x):
    outputs, moved = Linen().apply({"params": params, "batch_stats": batch_stats}, x, mutable="batch_stats")
    return {name: jnp.mean((out - 1) ** 2) for name, out in outputs.items()}, moved["batch_stats"]


class State(TrainState):
    batch_stats: dict


class FlaxState(train_state.TrainState):
    batch_stats: dict


@pytest.mark.parametrize("stored", [True, False])
def test_a_train_state_passes_arguments_on_and_fields_through(stored):
    """Against flax's own, on the gradient of the sum of the log-losses."""
    start = Linen().init(jax.random.key(0), X)
    tx = mtl.chain(mtl.scale_invariant(), optax.sgd(0.1, momentum=0.9))
    ours = State.create(apply_fn=Linen().apply, tx=tx, **start)
    theirs = FlaxState.create(apply_fn=Linen().apply, tx=optax.sgd(0.1, momentum=0.9), **start)

    @jax.jit
    def step(state, x, mask):
        inputs = state.params, state.batch_stats, x
        if not stored:
            jacobian = mtl.linearize(linen_losses, *inputs, has_aux=True)
            return state.apply_gradients(grads=jacobian, task_mask=mask, batch_stats=jacobian.aux)
        (losses, stats), grads = mtl.task_value_and_grad(linen_losses, has_aux=True)(*inputs)
        return state.apply_gradients(grads=grads, losses=losses, task_mask=mask, batch_stats=stats)

    @jax.jit
    def plain(state, x, seg):
        def total(params):
            losses, stats = linen_losses(params, state.batch_stats, x)
            return jnp.log(losses["depth"]) + seg * jnp.log(losses["seg"]), stats

        grads, stats = jax.grad(total, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats)

    for t, seg in enumerate([True, False, True]):
        after = step(ours, X + t, {"depth": jnp.asarray(True), "seg": jnp.asarray(seg)})
        assert jax.tree.structure(after.replace(step=0)) == jax.tree.structure(ours.replace(step=0))  # no recompilation
        ours, theirs = after, plain(theirs, X + t, float(seg))
    assert int(ours.step) == 3
    close((ours.params, ours.batch_stats), (theirs.params, theirs.batch_stats))


def test_a_train_state_with_an_ordinary_optimizer_is_flaxs():
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.asarray([1.0, -2.0])}
    ours, theirs = (
        cls.create(apply_fn=jnp.sum, params=params, tx=optax.adam(0.1)).apply_gradients(grads=grads, **extra)
        for cls, extra in ((TrainState, {"losses": jnp.ones(2)}), (train_state.TrainState, {}))
    )
    np.testing.assert_array_equal(ours.params["w"], theirs.params["w"])


def test_a_misspelt_field_raises():
    state = State.create(apply_fn=jnp.sum, params={"w": jnp.ones(2)}, tx=mtl.mean(), batch_stats={})
    grads = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="`batch_stat` is no argument of update: write batch_stats="):
        state.apply_gradients(grads=grads, batch_stat={})
    with pytest.raises(ValueError, match="`losess` is no argument of update: write losses="):
        state.apply_gradients(grads=grads, losess=jnp.ones(2))


# ------------------------------------------------------------------------------------------------------------- Equinox


def test_a_callable_model_is_a_tree_of_flags_and_labels():
    """The mean for the trunk, own rows for heads; and for groups, sums of rows at unit length in the group."""

    class Model(eqx.Module):
        trunk: eqx.nn.Linear
        heads: list
        name: str = "static"

        def __call__(self, x):
            return jnp.stack([head(self.trunk(x)) for head in self.heads])

    keys = jax.random.split(jax.random.key(0), 3)
    model = Model(eqx.nn.Linear(3, 4, key=keys[0]), [eqx.nn.Linear(4, 1, key=key) for key in keys[1:]])
    params, static = eqx.partition(model, eqx.is_inexact_array)
    flags = eqx.tree_at(lambda m: m.trunk, jax.tree.map(lambda _: False, params), replace_fn=lambda _: True)
    labels = jax.tree.map(lambda flag: "trunk" if flag else "heads", flags)

    def losses_fn(params):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(X)[..., 0] ** 2, axis=0)

    @jax.jit
    def combine(params):
        _, grads = mtl.task_value_and_grad(losses_fn)(params)
        methods = mtl.shared_private(mtl.mean(), flags), mtl.grouped(mtl.avgnorm("one"), labels)
        return grads, *(method.update(grads, method.init(params))[0] for method in methods)

    grads, update, by_group = combine(params)
    np.testing.assert_allclose(update.trunk.weight, np.mean(grads.trunk.weight, axis=0), rtol=1e-6)
    np.testing.assert_allclose(update.heads[1].weight, grads.heads[1].weight[1], rtol=1e-6)
    for group, found in ((grads.trunk, by_group.trunk), (grads.heads, by_group.heads)):
        rows = np.concatenate([np.reshape(leaf, (2, -1)) for leaf in jax.tree.leaves(group)], axis=1)
        wanted = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).sum(axis=0)
        np.testing.assert_allclose(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)]), wanted, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- reinforcement learning


def project(rows):
    """PCGrad with the tasks in order, averaged, on vectors."""
    projected = rows.copy()
    for i, j in itertools.permutations(range(len(rows)), 2):
        projected[i] -= min(projected[i] @ rows[j], 0) / (rows[j] @ rows[j]) * rows[j]
    return projected.mean(axis=0)


def rebalance(rows, later):
    """GradNorm's first two steps: Adam's first step on the weights is the learning rate times a sign."""
    norms = np.linalg.norm(rows, axis=1)
    weights = 1 - 0.025 * np.sign(norms - norms.mean())
    return rows.sum(axis=0), weights * 10 / weights.sum() @ later


@pytest.mark.parametrize("name", ["pcgrad", "gradnorm"])
def test_critics_of_ten_tasks(name):
    """A stack made by a vmap over replay batches, given to apply_gradients, against formulas on vectors."""
    data = jax.random.normal(jax.random.key(5), (2, 10, 16, 6))
    method = {"pcgrad": mtl.pcgrad("mean", order="fixed"), "gradnorm": mtl.gradnorm(10)}[name]
    critic = TrainState.create(
        apply_fn=linen.Dense(2).apply,
        params=linen.Dense(2).init(jax.random.key(0), data[0, 0, :, :5]),
        tx=mtl.chain(method, optax.sgd(0.01)),
    )

    def loss(params, samples):
        return jnp.mean((critic.apply_fn(params, samples[:, :5]) - samples[:, 5:]) ** 2)

    @jax.jit
    def step(critic, samples):
        losses, grads = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(critic.params, samples)
        return critic.apply_gradients(grads=grads, losses=losses), grads

    def vectors(tree, *lead):
        return np.concatenate([np.reshape(leaf, (*lead, -1)) for leaf in jax.tree.leaves(tree)], axis=-1, dtype=float)

    rows, moves = [], []
    for samples in data:
        after, grads = step(critic, samples)
        rows.append(vectors(grads, 10))
        moves.append((vectors(critic.params) - vectors(after.params)) / 0.01)
        critic = after
    wanted = [project(G) for G in rows] if name == "pcgrad" else rebalance(*rows)
    np.testing.assert_allclose(moves, wanted, rtol=1e-4, atol=3e-5)


# ------------------------------------------------------------------------------------------------- logging and pictures

TASKS = ("a", "b", "c")
K, STEPS = 3, 5


@functools.cache
def history():
    """Metrics of five steps as scan stacks them, and the stacks of gradients."""
    G = jax.random.normal(jax.random.key(3), (STEPS, K, 2))
    tx = mtl.with_metrics(mtl.uw(K), K)

    def step(state, grads):
        _, state = tx.update(grads, state, losses=jnp.arange(1.0, K + 1))
        return state, mtl.metrics(state)

    return jax.device_get(jax.lax.scan(step, tx.init(jnp.zeros(2)), G)[1]), np.asarray(G, float)


def cosines(G):
    unit = G / np.linalg.norm(G, axis=-1, keepdims=True)
    return np.stack([np.sum(unit[:, i] * unit[:, j], axis=-1) for i, j in itertools.combinations(range(K), 2)])


def test_tensorboard_reads_what_was_written(tmp_path):
    stacked, G = history()
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        for t in range(STEPS):
            write_scalars(
                writer,
                jax.tree.map(lambda leaf, t=t: jnp.asarray(leaf[t]), stacked),
                like=dict.fromkeys(TASKS, 0),
                step=t,
            )
    found = {}
    for data in events(next(tmp_path.iterdir()).read_bytes()):
        for value in data.summary.value:
            found[value.tag, data.step] = value.simple_value
    for t in range(STEPS):
        norms = [found[f"norms/{task}", t] for task in TASKS]
        np.testing.assert_allclose(norms, np.linalg.norm(G[t], axis=1), rtol=1e-5)
        pairs = [found[f"cosines/{pair}", t] for pair in ("a/b", "a/c", "b/c")]
        np.testing.assert_allclose(pairs, cosines(G)[:, t], rtol=1e-4, atol=1e-5)
    assert found["skipped", 0] == 0
    with pytest.raises(ValueError, match=raises_naming("writer")):
        write_scalars(None, {}, like=jnp.ones(2), step=0)


def events(data):
    """The records of an event file: length, checksum, event, checksum."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


@pytest.mark.parametrize("form", ["stacked", "list"])
def test_plots_show_the_metrics(form):
    stacked, G = history()
    metrics = stacked if form == "stacked" else [jax.tree.map(lambda leaf, t=t: leaf[t], stacked) for t in range(STEPS)]
    like = dict.fromkeys(TASKS, 0.0)
    lines = plot_weights(metrics, like).get_lines()
    assert [line.get_label() for line in lines] == list(TASKS)
    np.testing.assert_allclose([line.get_ydata() for line in lines], np.asarray(stacked["weights"]).T)

    ax = plot_cosines(metrics, like)
    np.testing.assert_allclose(ax.get_images()[0].get_array(), cosines(G), rtol=1e-4, atol=1e-5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a, b", "a, c", "b, c"]
    assert ax.get_images()[0].get_clim() == (-1, 1)

    conflicts = (cosines(G) < 0).mean(axis=0)
    each, average = plot_conflicts(metrics).get_lines()
    np.testing.assert_allclose(each.get_ydata(), conflicts, rtol=1e-6)
    np.testing.assert_allclose(average.get_ydata(), [conflicts[: t + 1].mean() for t in range(STEPS)], rtol=1e-6)


@pytest.mark.parametrize("plot", [plot_weights, plot_cosines, plot_conflicts])
def test_what_cannot_be_plotted(plot, unchecked):
    stacked, _ = history()
    without = {name: value for name, value in stacked.items() if name in ("residual", "skipped")}
    one = jax.tree.map(lambda leaf: leaf[0], stacked)
    for metrics in (without, [], [without, without], one, 3, None):
        with pytest.raises(ValueError, match=raises_naming("metrics")):
            plot(metrics)
    if plot is not plot_conflicts:
        with pytest.raises(ValueError, match=raises_naming("like")):
            plot(stacked, like={"a": 0.0, "b": 0.0})
    axes = plot(stacked)
    assert plot(stacked, ax=axes) is axes


class Masked(TrainState):
    task_mask: jax.Array


def test_a_field_named_like_an_argument_is_both():
    params, mask = {"w": jnp.ones(2)}, jnp.asarray([True, False])
    tx = mtl.chain(mtl.sum(), optax.sgd(1.0))
    state = Masked.create(apply_fn=jnp.square, params=params, tx=tx, task_mask=jnp.ones(2, bool))
    state = state.apply_gradients(grads={"w": jnp.asarray([[1.0, 2.0], [5.0, 7.0]])}, task_mask=mask)
    np.testing.assert_array_equal(state.params["w"], [0, -1])
    np.testing.assert_array_equal(state.task_mask, mask)


def test_scales_of_float8_are_refused():
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(1)}}
    state = TrainState.create(apply_fn=jnp.square, params=params, tx=mtl.chain(mtl.sum(), optax.sgd(1.0)))
    with pytest.raises(ValueError, match=raises_naming("params")):
        state.apply_gradients(grads=jax.tree.map(lambda p: jnp.ones((2, *p.shape)), params))


def test_losses_of_a_module_keep_their_own_keywords():
    model, method = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), mtl.sum()
    step = balanced_value_and_grad(lambda module, x, *, state, model: state * model * module(x)[0], method)
    losses, _, _ = step(model, method.init(nnx.state(model, nnx.Param)), jnp.ones((1, 2)), state=2.0, model=3.0)
    np.testing.assert_allclose(losses, 6 * model(jnp.ones((1, 2)))[0], rtol=1e-6)
    with pytest.raises(ValueError, match="`losses_fn` must not take `extra_args`"):
        balanced_value_and_grad(lambda module, extra_args: module(extra_args), method)
