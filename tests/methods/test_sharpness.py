"""The sharpness-aware methods and their oracles, against the papers' algorithms on losses with known gradients."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from harness import FIXED, REFERENCED, raises_naming

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import ROWS
from mtlgrad_jax.registry import make as make_row
from mtlgrad_jax.solvers._solution import NO_TASKS

K, P = 3, 5
RNG = np.random.default_rng(0)
CURVATURE = RNG.uniform(0.2, 3.0, size=(K, P))
MINIMUM = RNG.normal(size=(K, P))
HEAD = np.asarray([0.5, 2.0, 1.0])
POINT = RNG.normal(size=P)
RHO = 0.3
MODES = ("individual", "direct", "second", "each")
EXACT = ("mean", "mgda", "imtl_g", "upgrad", "cagrad")  # of any number of gradients, without state


def losses_fn(params):
    """sum_j a_ij (x_j - m_ij)^2 / 2 + (x_j - m_ij)^4 / 4 for each task i."""
    moved = params - jnp.asarray(MINIMUM, params.dtype)
    losses = jnp.sum(jnp.asarray(CURVATURE, params.dtype) * moved**2 / 2 + moved**4 / 4, axis=1)
    return {name: losses[i] for i, name in enumerate("abc")}


def slopes(points):
    """Gradient of loss i at row i, by hand."""
    moved = points - MINIMUM
    return CURVATURE * moved + moved**3


CLEAN = slopes(np.tile(POINT, (K, 1)))
MOVED = POINT + RHO * reference.unit(CLEAN)
PERTURBED = slopes(MOVED)
FLAT = PERTURBED - CLEAN


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def aggregate(name, G):
    return reference.REFERENCES[name](np.asarray(G)[None], np.ones((1, len(G))), np.ones((1, len(G)), bool))[0]


def by_the_paper(name, mode):
    """FS-MTL's four modes, where Agg is the reference of a method."""
    if mode == "direct":
        return aggregate(name, PERTURBED)
    if mode == "each":
        return aggregate(name, [aggregate(name, pair) for pair in zip(CLEAN, FLAT, strict=True)])
    parts = aggregate(name, CLEAN), aggregate(name, FLAT)
    return sum(parts) if mode == "individual" else aggregate(name, parts)


def update_of(tx, params=POINT, **kwargs):
    params = jnp.asarray(params)
    return tx.update(jnp.asarray(kwargs.pop("grads", CLEAN)), tx.init(params), params, **kwargs)[0]


# ------------------------------------------------------------------------------------------------------------ oracles


@pytest.mark.parametrize("strategy", ["unrolled", "vmap", 1, 2])
@pytest.mark.usefixtures("x64")
def test_all_gradients_at_the_perturbed_points_in_one_call(strategy):
    f = jax.jit(mtl.sam_value_and_grad(losses_fn, RHO, strategy=strategy))
    losses, clean, perturbed = f(jnp.asarray(POINT))
    np.testing.assert_allclose(clean, CLEAN, rtol=1e-12)
    np.testing.assert_allclose(perturbed, PERTURBED, rtol=1e-12)
    assert set(losses) == set("abc")


@pytest.mark.usefixtures("x64")
def test_adaptive_perturbations_are_in_units_of_the_parameters():
    """ASAM: |e / p| = rho, elementwise, and e maximises <g, e> there; scaling the parameters scales e."""
    e = np.asarray(mtl.sam_perturbation(jnp.asarray(CLEAN), jnp.asarray(POINT), RHO, adaptive=True))
    np.testing.assert_allclose(np.linalg.norm(e / abs(POINT), axis=1), RHO)
    np.testing.assert_allclose(np.sum(CLEAN * e, axis=1), RHO * np.linalg.norm(abs(POINT) * CLEAN, axis=1))
    scale = np.asarray([1, 2, 1 / 4, 8, 1])
    scaled = mtl.sam_perturbation(jnp.asarray(CLEAN / scale), jnp.asarray(POINT * scale), RHO, adaptive=True)
    np.testing.assert_allclose(scaled, e * scale)


BLOCKS = {"trunk": np.asarray([[3.0, 4.0], [0.0, 0.0]]), "head": np.asarray([[12.0, 0.0], [0.0, 2.0]])}
TWO = {"trunk": np.ones(2), "head": np.ones(2)}


@pytest.mark.parametrize(
    ("kwargs", "trunk", "head"),
    [
        ({"rho_shared": 1.3}, [[0.3, 0.4], [0, 0]], [[1.2, 0], [0, 1.3]]),  # one norm: 13 and 2
        ({"rho_shared": 1.0, "is_shared": True}, [[0.6, 0.8], [0, 0]], [[1, 0], [0, 1]]),
        ({"rho_shared": 1.0, "rho_private": 0.5, "is_shared": True}, [[0.6, 0.8], [0, 0]], [[0.5, 0], [0, 0.5]]),
    ],
)
def test_norms_are_joint_or_of_each_block(kwargs, trunk, head):
    flags = {"is_shared": {"trunk": True, "head": False}} if "is_shared" in kwargs else {}
    e = mtl.sam_perturbation(jax.tree.map(jnp.asarray, BLOCKS), jax.tree.map(jnp.asarray, TWO), **{**kwargs, **flags})
    np.testing.assert_allclose(e["trunk"], trunk, rtol=1e-6)
    np.testing.assert_allclose(e["head"], head, rtol=1e-6)


@pytest.mark.parametrize("private", [None, 0.1])
@pytest.mark.usefixtures("x64")
def test_radii_blocks_and_adaptive_reach_the_gradients(private):
    """The helper, and fs_mtl with an oracle, perturb each block in units of the parameters."""
    flags = {"trunk": True, "head": False}
    radius = np.where(np.arange(P) < 2, RHO, RHO if private is None else private)
    scaled = abs(POINT) * CLEAN
    length = np.concatenate([np.linalg.norm(part, axis=1, keepdims=True) for part in np.split(scaled, [2], axis=1)], 1)
    wanted = slopes(POINT + radius * abs(POINT) * scaled / np.repeat(length, [2, P - 2], axis=1))

    def losses(params):
        return losses_fn(jnp.concatenate([params["trunk"], params["head"]]))

    params = {"trunk": jnp.asarray(POINT[:2]), "head": jnp.asarray(POINT[2:])}
    _, clean, perturbed = mtl.sam_value_and_grad(losses, RHO, private, is_shared=flags, adaptive=True)(params)
    np.testing.assert_allclose(np.concatenate([perturbed["trunk"], perturbed["head"]], 1), wanted, rtol=1e-12)
    tx = mtl.fs_mtl(mtl.sum(), RHO, private, is_shared=flags, adaptive=True)
    update, _ = tx.update(clean, tx.init(params), params, grad_fn=mtl.perturbed_task_grad(losses))
    np.testing.assert_allclose(np.concatenate([update["trunk"], update["head"]]), wanted.sum(axis=0), rtol=1e-12)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_perturbations_do_not_depend_on_the_gradients_length(exponent):
    """Norms with squares that underflow or overflow; multiplying by powers of two is exact."""
    grads, params = jnp.asarray(CLEAN, jnp.float32), jnp.asarray(POINT, jnp.float32)
    for adaptive in (False, True):
        e, scaled = (mtl.sam_perturbation(g, params, RHO, adaptive=adaptive) for g in (grads, grads * 2.0**exponent))
        np.testing.assert_allclose(scaled, e, rtol=1e-6)


def test_batch_statistics_are_those_of_the_clean_pass():
    """Both passes use one dropout key: with different keys, their gradients would belong to different losses."""

    def with_statistics(params, x, key):
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        out = jnp.where(kept, x, 0) * params
        return {"a": jnp.sum((out - 1) ** 2), "b": jnp.sum((out + 1) ** 2)}, {"mean": jnp.mean(out)}

    x, params, key = jnp.arange(1.0, 5.0), jnp.asarray(2.0), jax.random.key(3)
    kept = np.asarray(jax.random.bernoulli(key, 0.5, x.shape))
    masked = np.where(kept, x, 0)
    (_, aux), clean, perturbed = mtl.sam_value_and_grad(with_statistics, 0.5, has_aux=True)(params, x, key)
    np.testing.assert_allclose(aux["mean"], np.mean(masked * 2.0), rtol=1e-6)
    signs = np.sign(np.asarray(clean))
    wanted = [np.sum(2 * (masked * (2 + 0.5 * s) - t) * masked) for s, t in zip(signs, (1, -1), strict=True)]
    np.testing.assert_allclose(perturbed, wanted, rtol=1e-6)


def test_a_broken_task_stays_alone():
    """Each perturbed pass computes one task: a NaN in another task's loss stays there."""

    def broken(params):
        return {"a": jnp.sum(params**2), "b": jnp.sum(params * jnp.log(-jnp.abs(params)))}

    _, clean, perturbed = jax.jit(mtl.sam_value_and_grad(broken, 0.1))(jnp.ones(2))
    for grads in (clean, perturbed):
        assert np.isfinite(grads[0]).all()
        assert np.isnan(grads[1]).all()


# ------------------------------------------------------------------------------------------------------------- fs_mtl


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.usefixtures("x64")
def test_fs_mtl_is_the_papers_algorithm(name, mode):
    tx = mtl.fs_mtl(make_row(ROWS[name], K), RHO, mode=mode, num_tasks=K)
    wanted = by_the_paper(name, mode)
    pure = update_of(tx, grads=PERTURBED, clean_grads=jnp.asarray(CLEAN))
    opaque = update_of(tx, grad_fn=mtl.perturbed_task_grad(losses_fn))
    for update in (pure, opaque):
        np.testing.assert_allclose(update, wanted, rtol=2e-6, atol=1e-9 * np.linalg.norm(CLEAN))


@pytest.mark.parametrize("name", ["mean", "sum"])
@pytest.mark.usefixtures("x64")
def test_an_average_is_plain_sam(name):
    """The loss part and the flat part of a linear method add up to its SAM gradient."""
    update = update_of(mtl.fs_mtl(make_row(ROWS[name], K), RHO), grad_fn=mtl.perturbed_task_grad(losses_fn))
    np.testing.assert_allclose(update, getattr(np, name)(PERTURBED, axis=0), rtol=1e-12)


def steps_of(tx, grads, losses, **extra):
    params = jnp.asarray(POINT, grads.dtype)

    @jax.jit
    def run(grads, losses):
        def step(state, now):
            update, state = tx.update(now[0], state, params, losses=now[1], **extra)
            return state, update

        return jax.lax.scan(step, tx.init(params), (grads, losses))[1]

    return np.asarray(run(grads, losses))


STACKS = jnp.asarray(RNG.normal(size=(3, K, P)), jnp.float32)
LOSSES = jnp.asarray(RNG.uniform(0.5, 2.0, size=(3, K)), jnp.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("name", REFERENCED)
@pytest.mark.usefixtures("x64")
def test_without_a_radius_every_method_is_itself(name):
    """The flat parts are zero, and their aggregate is zero and not NaN; not where every copy draws its own numbers."""
    make = lambda: make_row(ROWS[name], K, **FIXED.get(name, {}))  # noqa: E731
    stacks, losses = STACKS.astype(jnp.float64), LOSSES.astype(jnp.float64)
    plain = steps_of(make(), stacks, losses)
    sharp = steps_of(mtl.fs_mtl(make(), rho_shared=0.0), stacks, losses, grad_fn=mtl.perturbed_task_grad(losses_fn))
    np.testing.assert_allclose(sharp, plain, rtol=1e-9, atol=1e-9 * abs(plain).max())


@pytest.mark.parametrize("ratio", [1.05, 1.1])
def test_narrow_dtypes_keep_their_flat_parts(ratio):
    """A bfloat16 leaf does not raise the rounding threshold of a float32 leaf; its own threshold is 2 eps."""
    trees = {"w": jnp.ones((2, 64)), "b": jnp.zeros((2, 1), jnp.bfloat16)}, {"w": jnp.ones((2, 64), jnp.bfloat16)}
    for clean in trees:
        params = jax.tree.map(lambda leaf: leaf[0], clean)
        perturbed = jax.tree.map(lambda leaf: (leaf * ratio).astype(leaf.dtype), clean)
        tx = mtl.fs_mtl(mtl.mean())
        update, _ = tx.update(perturbed, tx.init(params), params, clean_grads=clean)
        np.testing.assert_allclose(np.asarray(update["w"], float), ratio, rtol=0.01)


def test_parameters_that_are_not_floating_are_left_alone():
    params = {"w": jnp.ones(3), "n": jnp.asarray(2)}
    losses = lambda p: {"a": jnp.sum(p["w"] ** 2), "b": jnp.sum(p["w"] ** 3)}  # noqa: E731
    flags = {"w": True, "n": False}
    _, grads, perturbed = mtl.sam_value_and_grad(losses, 0.1, is_shared=flags)(params)
    tx = mtl.fs_mtl(mtl.mgda(), 0.1, is_shared=flags)
    update, _ = tx.update(grads, tx.init(params), params, grad_fn=mtl.perturbed_task_grad(losses))
    same, _ = tx.update(perturbed, tx.init(params), params, clean_grads=grads)
    np.testing.assert_allclose(update["w"], same["w"], rtol=1e-5)
    assert update["n"].shape == ()
    assert not update["n"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["nash_mtl", "imtl_g", "avgnorm"])
def test_rounding_is_no_flat_part(name, dtype):
    """These methods would scale a difference of rounding errors up to the length of a gradient."""
    params, grads = jnp.asarray(POINT, dtype), STACKS[0].astype(dtype)
    tx = mtl.fs_mtl(make_row(ROWS[name], K))
    noisy = (grads.astype("float32") * (1 + float(jnp.finfo(dtype).eps))).astype(dtype)
    assert (noisy != grads).any()
    update, _ = tx.update(noisy, tx.init(params), params, clean_grads=grads)
    plain, _ = make_row(ROWS[name], K).update(grads, make_row(ROWS[name], K).init(params))
    np.testing.assert_array_equal(update, plain)


def test_the_two_copies_draw_and_remember_apart():
    params = jnp.asarray(POINT, jnp.float32)
    state = mtl.fs_mtl(mtl.pcgrad()).init(params)
    keys = [state.copies[part].method.key.data for part in ("loss", "flat")]
    assert (keys[0] != keys[1]).any()
    tx = mtl.fs_mtl(mtl.db_mtl(num_tasks=K, beta=0.0))
    clean, perturbed = STACKS[0], STACKS[1]
    _, state = tx.update(perturbed, tx.init(params), params, clean_grads=clean, losses=jnp.ones(K))
    np.testing.assert_allclose(state.copies["loss"].method.momentum, clean, rtol=1e-6)
    np.testing.assert_allclose(state.copies["flat"].method.momentum, perturbed - clean, rtol=1e-6)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.usefixtures("x64")
def test_heads_take_their_own_sam_gradient(joint):
    """Two tasks with a head each: l_i = (x h_i - i)^2 with trunk x and heads h, all scalar."""

    def two_heads(params):
        return {str(i): (params["x"] * params["h"][str(i)] - i) ** 2 for i in (1, 2)}

    params = {"x": jnp.asarray(1.5), "h": {"1": jnp.asarray(2.0), "2": jnp.asarray(-1.0)}}
    is_shared = {"x": True, "h": {"1": False, "2": False}}
    radii = {"rho_shared": 0.1} if joint else {"rho_shared": 0.1, "rho_private": 0.2}
    tx = mtl.fs_mtl(mtl.mean(), **radii, is_shared=is_shared, joint=joint)
    _, grads = mtl.task_value_and_grad(two_heads)(params)
    update, _ = tx.update(grads, tx.init(params), params, grad_fn=mtl.perturbed_task_grad(two_heads))
    trunk = []
    for i, h in ((1, 2.0), (2, -1.0)):
        slope = 2 * (1.5 * h - i)
        gx, gh = slope * h, slope * 1.5
        both = np.hypot(gx, gh)
        ex, eh = (0.1 * gx / both, 0.1 * gh / both) if joint else (0.1 * np.sign(gx), 0.2 * np.sign(gh))
        x, h = 1.5 + ex, h + eh
        trunk.append(2 * (x * h - i) * h)
        np.testing.assert_allclose(update["h"][str(i)], 2 * (x * h - i) * x, rtol=1e-12)
    np.testing.assert_allclose(update["x"], np.mean(trunk), rtol=1e-12)


@pytest.mark.sample(2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("x64")
def test_absent_tasks_may_hold_anything(mode):
    """With the last task absent, the update is that of the first two tasks alone."""
    mask = jnp.asarray([True, True, False])
    junk = [jnp.asarray(np.where(np.arange(K)[:, None] == 2, np.nan, stack)) for stack in (PERTURBED, CLEAN)]
    params = jnp.asarray(POINT)
    make = lambda K: mtl.fs_mtl(mtl.mgda(), mode=mode, num_tasks=K)  # noqa: E731
    update = update_of(make(K), grads=junk[0], clean_grads=junk[1], task_mask=mask)
    alone, _ = make(2).update(
        jnp.asarray(PERTURBED[:2]), make(2).init(params), params, clean_grads=jnp.asarray(CLEAN[:2])
    )
    np.testing.assert_allclose(update, alone, rtol=1e-9)
    named = {"a": mask[0], "b": mask[1], "c": mask[2]}
    opaque = update_of(
        make(K), grads=junk[1], grad_fn=mtl.perturbed_task_grad(losses_fn), task_mask=named, losses=losses_fn(params)
    )
    assert np.isfinite(opaque).all()


def test_absent_tasks_keep_their_own_states():
    """In mode "each" every task has a copy of the method, here with a key that moves in each of its steps."""
    tx, params = mtl.fs_mtl(mtl.pcgrad(), mode="each", num_tasks=K), jnp.asarray(POINT, jnp.float32)
    state, mask = tx.init(params), jnp.asarray([True, False, True])
    _, new = tx.update(STACKS[0], state, params, clean_grads=STACKS[1], task_mask=mask)
    before, after = (each.copies["each"] for each in (state, new))
    moved = (before.method.key.data != after.method.key.data).any(axis=1)
    np.testing.assert_array_equal(moved, mask)
    np.testing.assert_array_equal(after.info.result == NO_TASKS, ~mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_broken_gradient_is_a_counted_zero_update(mode, which):
    tx = mtl.fs_mtl(mtl.mgda(), mode=mode, num_tasks=K)
    params, stacks = jnp.asarray(POINT, jnp.float32), [STACKS[0], STACKS[1]]
    if mode == "direct" and which == 1:
        stacks[0] = stacks[0].at[1].set(jnp.nan)  # a NaN in the clean gradient gives one in the perturbed gradient
    stacks[which] = stacks[which].at[1, 2].set(jnp.nan)
    update, state = tx.update(stacks[0], tx.init(params), params, clean_grads=stacks[1])
    assert not update.any()
    infos = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, mtl.Info))
    assert all((info.skipped > 0).all() for info in infos if isinstance(info, mtl.Info))


def test_a_task_that_breaks_at_its_perturbed_point():
    """It is dropped if its perturbed gradient is passed in; with an oracle, the step is skipped and counted."""
    tx = mtl.skip_nonfinite_tasks(mtl.fs_mtl(mtl.mean(), rho_shared=0.5))
    broken = lambda p: {"a": jnp.sum((p - 2) ** 2), "b": -jnp.sum(jnp.sqrt(1.05 - p))}  # noqa: E731
    params = jnp.ones(3)
    _, clean, perturbed = mtl.sam_value_and_grad(broken, 0.5)(params)
    update, state = tx.update(perturbed, tx.init(params), params, clean_grads=clean)
    np.testing.assert_allclose(update, perturbed[0], rtol=1e-5)
    assert int(state.dropped) == 1
    update, state = tx.update(clean, tx.init(params), params, grad_fn=mtl.perturbed_task_grad(broken))
    assert not update.any()
    assert int(state.inner.copies["flat"].info.skipped) == 1


def test_a_broken_task_can_be_dropped():
    tx = mtl.skip_nonfinite_tasks(mtl.fs_mtl(mtl.mgda()))
    params, perturbed = jnp.asarray(POINT, jnp.float32), STACKS[0].at[2].set(jnp.nan)
    update, state = tx.update(perturbed, tx.init(params), params, clean_grads=STACKS[1])
    alone = mtl.fs_mtl(mtl.mgda())
    wanted, _ = alone.update(STACKS[0][:2], alone.init(params), params, clean_grads=STACKS[1][:2])
    np.testing.assert_allclose(update, wanted, rtol=1e-5)
    assert int(state.dropped) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["fs_mtl", "samo"])
def test_one_compiled_step_trains(name):
    """Jitted end to end with donation, and scanned over steps; the mean loss decreases."""
    params = jnp.asarray(POINT, jnp.float32)
    tx = optax.chain(ROWS[name].factory(mtl.upgrad()), optax.clip_by_global_norm(1.0), optax.sgd(0.05))
    grad_fn = mtl.perturbed_task_grad(losses_fn)

    def step(carry, _):
        params, state = carry
        if name == "fs_mtl":
            _, grads = mtl.task_value_and_grad(losses_fn)(params)
            updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        else:
            grad = jax.grad(lambda p: sum(losses_fn(p).values()) / K)(params)
            updates, state = tx.update(grad, state, params, grad_fn=grad_fn, losses_fn=losses_fn)
        return (optax.apply_updates(params, updates), state), sum(losses_fn(params).values())

    def run(carry):
        return jax.lax.scan(step, carry, length=60)

    _, means = jax.jit(run, donate_argnums=0)((jnp.array(params), tx.init(params)))
    assert means[-1] < 0.5 * means[0]
    many = jax.jit(jax.vmap(lambda shift: run((params + shift, tx.init(params)))[1]))(jnp.asarray([0.0, 0.1]))
    np.testing.assert_allclose(many[0], means, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
@pytest.mark.usefixtures("x64")
def test_dtypes(dtype):
    params = jnp.asarray(POINT, dtype)
    _, clean, perturbed = mtl.sam_value_and_grad(losses_fn, 0.5)(params)
    tx = mtl.fs_mtl(mtl.mgda())
    update, _ = tx.update(perturbed, tx.init(params), params, clean_grads=clean)
    assert {leaf.dtype for leaf in (clean, perturbed, update)} == {jnp.dtype(dtype)}
    assert np.isfinite(np.asarray(update, float)).all()


def test_radii_may_be_schedules():
    static = [key for key in inspect.signature(mtl.fs_mtl).parameters if key != "rho_shared"]
    tx = optax.inject_hyperparams(mtl.fs_mtl, static_args=static)(mtl.mean(), rho_shared=lambda step: 0.1 * (step + 1))
    params = jnp.asarray(POINT, jnp.float32)
    state, grad_fn = tx.init(params), mtl.perturbed_task_grad(losses_fn)
    for t in range(2):
        update, state = tx.update(jnp.asarray(CLEAN, jnp.float32), state, params, grad_fn=grad_fn)
        wanted = slopes(POINT + 0.1 * (t + 1) * reference.unit(CLEAN)).mean(axis=0)
        np.testing.assert_allclose(update, wanted, rtol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused():
    params, grads, grad_fn = jnp.asarray(POINT, jnp.float32), STACKS[0], mtl.perturbed_task_grad(losses_fn)
    tx = mtl.fs_mtl(mtl.mgda())
    state = tx.init(params)
    for extra in ({}, {"clean_grads": grads, "grad_fn": grad_fn}):
        with pytest.raises(ValueError, match=raises_naming("clean_grads")):
            tx.update(grads, state, params, **extra)
    with pytest.raises(ValueError, match=raises_naming("clean_grads")):
        tx.update(grads, state, params, clean_grads=grads[:, :3])
    with pytest.raises(ValueError, match=raises_naming("clean_grads")):
        tx.update(grads, state, params, clean_grads=grads[:2])
    with pytest.raises(ValueError, match=raises_naming("params")):
        tx.update(grads, state, grad_fn=grad_fn)
    for wrong in ({"w": grads}, grads[:1], grads[:, :2]):
        with pytest.raises(ValueError, match=raises_naming("grad_fn")):
            tx.update(grads, state, params, grad_fn=lambda params, e, wrong=wrong: wrong)
    with pytest.raises(ValueError, match=raises_naming("num_tasks")):
        mtl.fs_mtl(mtl.mgda(), mode="each")
    with pytest.raises(ValueError, match=raises_naming("rho_private")):
        mtl.fs_mtl(mtl.mgda(), rho_private=0.1, joint=True)
    with pytest.raises(ValueError, match=raises_naming("is_shared")):
        mtl.sam_perturbation(grads, params, 0.1, 0.2)
    with pytest.raises(ValueError, match=raises_naming("rho_shared")):
        mtl.sam_perturbation(grads, params, jnp.full(3, 0.1))
    with pytest.raises(ValueError, match=raises_naming("rho_shared")):
        jax.jit(mtl.sam_perturbation)(grads, params, jnp.full(3, 0.1))
    for wrong in (grads[:2], params):
        with pytest.raises(ValueError, match=raises_naming("perturbations")):
            grad_fn(params, wrong)
    samo = mtl.samo(mtl.mgda())
    for name, arguments in (
        ("mean_grad", {"mean_grad": grads, "grad_fn": grad_fn, "losses_fn": losses_fn}),
        ("grad_fn", {"mean_grad": grads[0], "grad_fn": lambda params, e: grads[:2], "losses_fn": losses_fn}),
        ("losses_fn", {"mean_grad": grads[0], "grad_fn": grad_fn, "losses_fn": lambda p: jnp.sum(p)}),
    ):
        with pytest.raises(ValueError, match=raises_naming(name)):
            samo.update(arguments.pop("mean_grad"), samo.init(params), params, **arguments)
    with pytest.raises(ValueError, match=raises_naming("heads")):
        mtl.samo(mtl.mgda(), heads={"w": "a"})
    with pytest.raises(ValueError, match=raises_naming("strategy")):
        mtl.perturbed_task_grad(losses_fn, strategy="all")
    with pytest.raises(ValueError, match=raises_naming("losses_fn")):
        mtl.samo(mtl.mgda()).update(grads[0], mtl.samo(mtl.mgda()).init(params), params, grad_fn=grad_fn)
    with pytest.raises(ValueError, match=raises_naming("method")):
        mtl.fs_mtl(mtl.mgda)


# --------------------------------------------------------------------------------------------------------------- samo


def perturbations_of(tx, losses_fn, mean_grad, params, state=None, **extra):
    """The perturbations that samo requests, and its update."""
    asked = []

    def grad_fn(params, e):
        asked.append(e)
        return mtl.perturbed_task_grad(losses_fn)(params, e)

    state = tx.init(params) if state is None else state
    update, state = tx.update(mean_grad, state, params, losses_fn=losses_fn, grad_fn=grad_fn, **extra)
    return asked[0], update, state


TREE = {"u": POINT[:2], "v": POINT[2:]}


def tree_losses(params):
    return losses_fn(jnp.concatenate([params["u"], params["v"]]))


def leaves_of(rows):
    return {"u": rows[..., :2], "v": rows[..., 2:]}


def by_the_official_code(beta, rho, adaptive, probe=0.01):
    """SAMO with head "v": e = rho p^2 g/||p| g| with g = (1 - beta) g0 + beta |g0| z/|z|, z the zeroth-order estimate.

    The draws match the library's: the key's second half, split over long leaves and all short ones.
    """
    draws = jax.random.normal(jax.random.split(jax.random.split(jax.random.key(0))[1], 1)[0], (K * 2,)).reshape(K, 2)
    mean, weight = leaves_of(CLEAN.mean(axis=0)), (lambda p: abs(p)) if adaptive else np.ones_like
    rows = {leaf: [] for leaf in TREE}
    for i, z in enumerate(np.asarray(draws)):
        ahead, behind = (LOSS(np.concatenate([TREE["u"] + s * probe * z, TREE["v"]]))[i] for s in (1, -1))
        estimate = (ahead - behind) / (2 * probe) * z
        g = (1 - beta) * mean["u"] + beta * np.linalg.norm(mean["u"]) * estimate / np.linalg.norm(estimate)
        for leaf, direction in (("u", g), ("v", mean["v"])):
            scaled = weight(TREE[leaf]) * direction
            rows[leaf].append(rho * weight(TREE[leaf]) * scaled / np.linalg.norm(scaled))
    return {leaf: np.asarray(row) for leaf, row in rows.items()}


def LOSS(x):
    moved = x - MINIMUM
    return np.sum(CURVATURE * moved**2 / 2 + moved**4 / 4, axis=1)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.usefixtures("x64")
def test_samo_perturbs_as_the_official_code(beta, adaptive):
    params, mean = jax.tree.map(jnp.asarray, TREE), jax.tree.map(jnp.asarray, leaves_of(CLEAN.mean(axis=0)))
    heads = lambda path: "v" if path[0].key == "v" else None  # noqa: E731
    tx = mtl.samo(mtl.mean(), rho=0.2, beta=beta, adaptive=adaptive, heads=heads)
    e, update, _ = perturbations_of(tx, tree_losses, mean, params)
    wanted = by_the_official_code(beta, 0.2, adaptive)
    moved = slopes(POINT + np.concatenate([wanted["u"], wanted["v"]], axis=1))
    for leaf in TREE:
        np.testing.assert_allclose(e[leaf], wanted[leaf], rtol=1e-9)
    np.testing.assert_allclose(update["u"], moved.mean(axis=0)[:2], rtol=1e-9)
    np.testing.assert_allclose(update["v"], moved.sum(axis=0)[2:], rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_samo_without_a_radius_is_its_method():
    params, mean = jnp.asarray(POINT), jnp.asarray(CLEAN.mean(axis=0))
    _, update, _ = perturbations_of(mtl.samo(mtl.mgda(), rho=0.0), losses_fn, mean, params)
    np.testing.assert_allclose(update, aggregate("mgda", CLEAN), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_samo_moves_each_head_along_its_own_gradient():
    def two_heads(params):
        return {str(i): (params["x"] * params["h"][str(i)] - i) ** 2 for i in (1, 2)}

    params = {"x": jnp.asarray(1.5), "h": {"1": jnp.asarray(2.0), "2": jnp.asarray(-1.0)}}
    mean_grad = jax.grad(lambda p: sum(two_heads(p).values()) / 2)(params)
    tx = mtl.samo(mtl.mean(), rho=0.1, beta=0.0, heads=lambda path: path[1].key if path[0].key == "h" else None)
    e, update, _ = perturbations_of(tx, two_heads, mean_grad, params)
    for i, h in ((1, 2.0), (2, -1.0)):
        moved = h + 0.1 * np.sign(2 * (1.5 * h - i) * 1.5)
        x = 1.5 + 0.1 * np.sign(float(mean_grad["x"]))
        np.testing.assert_allclose(e["h"][str(i)], moved - h, rtol=1e-12)
        np.testing.assert_allclose(update["h"][str(i)], 2 * (x * moved - i) * x, rtol=1e-12)


def test_samo_draws_anew_and_skips_what_is_broken():
    params, mean = jnp.asarray(POINT, jnp.float32), jnp.asarray(CLEAN.mean(axis=0), jnp.float32)
    tx = mtl.samo(mtl.mgda(), rho=0.1, beta=0.5)
    first, _, state = perturbations_of(tx, losses_fn, mean, params)
    second, _, _ = perturbations_of(tx, losses_fn, mean, params, state)
    again, _, _ = perturbations_of(tx, losses_fn, mean, params)
    assert (first != second).any()
    np.testing.assert_array_equal(first, again)
    _, update, kept = perturbations_of(tx, losses_fn, mean.at[0].set(jnp.nan), params, state)
    assert not update.any()
    np.testing.assert_array_equal(kept.key.data, state.key.data)
    assert int(kept.inner.info.skipped) == 1


@pytest.mark.usefixtures("x64")
def test_samo_leaves_absent_tasks_out():
    """Without a probe (beta = 0), it is MGDA of the tasks present at the perturbed point."""
    params, mean = jnp.asarray(POINT), CLEAN[:2].mean(axis=0)
    mask = {"a": jnp.asarray(True), "b": jnp.asarray(True), "c": jnp.asarray(False)}
    tx = mtl.samo(mtl.mgda(), rho=0.1, beta=0.0)
    _, update, _ = perturbations_of(tx, losses_fn, jnp.asarray(mean), params, task_mask=mask, losses=losses_fn(params))
    moved = slopes(np.tile(POINT + 0.1 * mean / np.linalg.norm(mean), (K, 1)))[:2]
    np.testing.assert_allclose(update, aggregate("mgda", moved), rtol=1e-6)


def test_a_task_that_is_absent_after_a_skipped_step_stops_nobody():
    tx = mtl.fs_mtl(mtl.mean(), mode="each", num_tasks=2)
    grads, clean = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[1.0, 1.0], [1.0, 1.0]])
    update = jax.jit(lambda g, s, mask: tx.update(g, s, clean_grads=clean, task_mask=mask))
    _, state = update(grads.at[0, 0].set(jnp.nan), tx.init(jnp.zeros(2)), jnp.ones(2, bool))
    for _ in range(2):
        moved, state = update(grads, state, jnp.asarray([True, False]))
        np.testing.assert_allclose(moved, [0.5, 1.0])  # the mean of g and of its flat part
