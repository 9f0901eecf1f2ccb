"""The stack algebra: exactness, range, dtypes, errors; sharding is in sharded/."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import mtlgrad_jax as mtl
from mtlgrad_jax import stacks
from mtlgrad_jax.stacks import _BLOCK, _RUN, _SHORT, _UNROLLED_ROWS, _batch_axes, _batched_dot


def random_tree(K, seed=0, scale=1.0, dtype=np.float32, width=5000):
    rng = np.random.default_rng(seed)
    tree = {"a": rng.normal(size=(K, 3, 7)), "b": {"c": rng.normal(size=(K,)), "d": rng.normal(size=(K, width))}}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf * scale, dtype), tree)


def dense(tree):
    leaves = jax.tree.leaves(tree)
    return np.concatenate(
        [np.asarray(leaf.astype(np.float32), float).reshape(len(leaf), -1) for leaf in leaves], axis=1
    )


def relative_error(matrix, G):
    """The largest error relative to n_i n_j, ignoring errors below float32's smallest normal number."""
    norms = np.linalg.norm(G, axis=1)
    error = np.abs(np.asarray(matrix, float) - G @ G.T) - np.finfo(np.float32).tiny
    return (error / np.outer(norms, norms)).max()


ROUNDING = 1e-5  # of a float32 sum over some 1e4 terms


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("width", [1, _RUN, _SHORT + 1, _BLOCK, 3 * _BLOCK + 17])
def test_gramian_is_accurate_at_every_width(K, width):
    tree = random_tree(K, width=width)
    matrix = stacks.gramian(tree)
    assert matrix.dtype == jnp.float32
    np.testing.assert_array_equal(matrix, matrix.T)
    assert relative_error(matrix, dense(tree)) < ROUNDING


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices add up in an order of their own")
@pytest.mark.sample(5)
@pytest.mark.parametrize("entries", ["equal", "random"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("widths", [[100], [255], [8192], 28 * [64, 0, 5, 4097], [3_000_001]], ids=sum)
def test_sums_of_positive_terms_round_to_a_few_eps(widths, dtype, entries):
    """Equal terms always round the same way: summed one after the other, 8192 terms are off by 100 eps or more."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 2, (4, sum(widths) if entries == "random" else 1)) + np.zeros((4, sum(widths)))
    tree = [jnp.asarray(leaf, dtype) for leaf in np.split(values, np.cumsum(widths)[:-1], axis=1)]
    most = 32 if entries == "equal" else np.log2(sum(widths))
    G = dense(tree)
    M, direction = G @ G.T, [leaf[0] for leaf in tree]
    found = {
        "gramian": (stacks.gramian(tree), M),
        "cross": (stacks.cross_gramian(tree, [leaf[:1] for leaf in tree]), M[:, :1]),
        "project": (stacks.project(tree, direction), M[:, 0]),
        "norms": (stacks.task_norms(tree), np.sqrt(np.diag(M))),
    }
    errors = {name: abs(np.asarray(ours, float) / exact - 1).max() for name, (ours, exact) in found.items()}
    assert max(errors.values()) <= most * np.finfo(np.float32).eps, errors


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1.0, 1e9, 1e17])
def test_gramian_is_exact_at_every_scale(scale):
    """Coordinates count even if their squares are far below the smallest float."""
    tree = random_tree(3, scale=1.0)
    unit = jax.tree.map(lambda leaf: leaf / np.linalg.norm(dense(tree), axis=1).max(), tree)
    scaled = jax.tree.map(lambda leaf: leaf * jnp.float32(scale), unit)
    assert relative_error(stacks.gramian(scaled), dense(scaled)) < ROUNDING
    norms = np.linalg.norm(dense(scaled), axis=1)
    np.testing.assert_allclose(np.asarray(stacks.task_norms(scaled), float), norms, rtol=1e-5)


def test_rows_of_very_different_scale():
    rows = jnp.asarray([1e-18, 1.0, 1e17], jnp.float32)
    tree = jax.tree.map(lambda leaf: leaf * rows.reshape(-1, *[1] * (leaf.ndim - 1)), random_tree(3, width=50))
    G = dense(tree)
    assert relative_error(stacks.gramian(tree), G) < ROUNDING


def test_norms_beyond_the_gramian():
    """Norms do not overflow or vanish even if the squares do."""
    for scale in (1e-30, 1e30):
        tree = random_tree(2, scale=scale, width=10)
        np.testing.assert_allclose(
            np.asarray(stacks.task_norms(tree), float), np.linalg.norm(dense(tree), axis=1), rtol=1e-5
        )


def test_several_stacks_and_leaves_at_once():
    """Each is as exact as on its own, next to much larger ones, a zero row, and a stack without floating leaves."""
    scales = jnp.asarray([[1.0, 1e-18, 0.0], [1e17, 1.0, 1e-9], [0.0, 0.0, 0.0]])
    trees = [random_tree(3, seed=s, width=50) for s in range(3)]
    groups = [
        jax.tree.map(lambda leaf, row=row: leaf * stacks.column(row, leaf), tree)
        for row, tree in zip(scales, trees, strict=True)
    ]
    for matrix, group in zip(stacks.gramians(groups), groups, strict=True):
        G = dense(group)
        norms = np.linalg.norm(G, axis=1)
        allowed = ROUNDING * np.outer(norms, norms) + np.finfo(np.float32).tiny
        assert (abs(np.asarray(matrix, float) - G @ G.T) <= allowed).all()
    assert not stacks.gramians([{"steps": jnp.ones((3, 2), jnp.int32)}]).any()
    leaves = jax.tree.leaves(groups)
    norms = [np.linalg.norm(dense([leaf]), axis=1) for leaf in leaves]
    np.testing.assert_allclose(np.asarray(jax.tree.leaves(stacks.leaf_norms(groups)), float), norms, rtol=1e-5)


@pytest.mark.parametrize("compile_first", [False, True])
def test_rows_of_each_leaf(compile_first):
    """A function of a leaf's rows gives the same in a batch of 70 leaves alike, next to other shapes and dtypes."""
    shapes = [(4,)] * 70 + [(2, 3), (), (4,), (2, 3), (3000,)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    stack = [
        jax.random.normal(key, (3, *shape)) * 2.0**i for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    ]
    stack.append(stack[0].astype(jnp.bfloat16))
    other = [jnp.full(leaf.shape[1:], i, leaf.dtype) for i, leaf in enumerate(stack)]

    def found(stack, other):
        return stacks.map_rows(
            lambda rows, own: rows / stacks.column(stacks.leaf_norms(rows), rows) + own, stack, other
        )

    for i, (ours, leaf) in enumerate(
        zip((jax.jit(found) if compile_first else found)(stack, other), stack, strict=True)
    ):
        rows = np.asarray(leaf, float).reshape(3, -1)
        expected = rows / np.linalg.norm(rows, axis=1, keepdims=True) + i
        np.testing.assert_allclose(np.asarray(ours, float).reshape(3, -1), expected, rtol=1e-5, atol=1e-6)


def test_derivatives():
    """The derivative of <g_0, g_1> with respect to g_0 is g_1."""
    tree = random_tree(2, width=3000)
    slope = jax.grad(lambda tree: stacks.gramian(tree)[0, 1])(tree)
    np.testing.assert_allclose(dense(slope), dense(tree)[::-1], rtol=1e-5)


def test_bfloat16_is_accumulated_in_float32():
    tree = random_tree(4, dtype=jnp.bfloat16, width=20_000)
    matrix = stacks.gramian(tree)
    assert matrix.dtype == jnp.float32
    assert relative_error(matrix, dense(tree)) < ROUNDING
    combined = stacks.combine(jnp.asarray([1.0, -2.0, 0.5, 3.0]), tree)
    assert combined["a"].dtype == jnp.bfloat16
    wanted = np.asarray([1, -2, 0.5, 3]) @ dense(tree)
    np.testing.assert_allclose(dense(jax.tree.map(lambda leaf: leaf[None], combined))[0], wanted, rtol=1e-2, atol=1e-2)


def test_float64_under_x64():
    with jax.enable_x64(True):
        tree = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), random_tree(3, dtype=np.float64))
        matrix = stacks.gramian(tree)
        assert matrix.dtype == jnp.float64
        G = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(tree)], axis=1)
        np.testing.assert_allclose(matrix, G @ G.T, rtol=1e-13, atol=1e-11)
        assert stacks.gramian(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)).dtype == jnp.float64


def test_products_are_at_the_highest_precision():
    """TPUs multiply float32 in bfloat16 unless told otherwise."""
    program = str(jax.make_jaxpr(stacks.gramian)(random_tree(3, width=3 * _BLOCK)))
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


@pytest.mark.parametrize(
    ("shape", "batch"),
    [((3, 40, 1024), (1,)), ((2, 3, 5, 8, 512), (1, 2, 3)), ((2, 40, 3, 500), (1,)), ((80, 64, 512), ()), ((2, 9), ())],
)
def test_slices_that_a_gpu_multiplies(shape, batch):
    """As many as leave at least 512 entries, and eight rows' worth, in each."""
    assert _batch_axes(shape) == batch
    x, y = np.random.default_rng(0).normal(size=(2, *shape)).astype("f4")
    found = _batched_dot(_batch_axes(shape), jnp.asarray(x), jnp.asarray(y[:1]))
    wanted = x.reshape(len(x), -1).astype(float) @ y[0].reshape(-1).astype(float)
    np.testing.assert_allclose(found[:, 0], wanted, atol=1e-6 * x[0].size)


def test_absent_rows_may_hold_anything():
    tree = random_tree(3)
    present = jnp.asarray([True, False, True])
    dirty = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), tree)
    matrix = stacks.gramian(dirty, present)
    assert not matrix[1].any()
    assert not matrix[:, 1].any()
    np.testing.assert_array_equal(matrix, stacks.gramian(tree, present))


@pytest.mark.parametrize("K", [3, _UNROLLED_ROWS + 1])
def test_combine_selects(K):
    tree = random_tree(K, width=30)
    weights = np.linspace(-1, 2, K)
    weights[1] = 0
    dirty = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), tree)
    combined = stacks.combine(jnp.asarray(weights, jnp.float32), dirty)
    got = dense(jax.tree.map(lambda leaf: leaf[None], combined))[0]
    np.testing.assert_allclose(got, weights @ dense(tree), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_join_of_many_leaves(axis):
    shapes = [(3, 4)] * 70 + [(3, 2, 2), (3, 0)] + [(3, 5)] * 3
    leaves = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)]
    expected = np.concatenate([leaf.reshape(*leaf.shape[:axis], -1) for leaf in leaves], axis)
    np.testing.assert_array_equal(stacks.join(list(map(jnp.asarray, leaves)), axis), expected)


def test_sums_of_several_stacks():
    """Each with its own weights, also where many small ones are one batch, long ones are not, and a row holds NaN."""
    rng, K = np.random.default_rng(0), 3
    shapes = [(4,), *[(2, 3)] * 70, (_SHORT + 1,), (2, 3)]
    groups = [{"a": rng.normal(size=(K, *shape)), "b": rng.normal(size=(K,))} for shape in shapes]
    weights = rng.normal(size=(len(groups), K)) * (rng.random((len(groups), K)) < 0.7)
    dirty = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), groups)
    unused = int(np.argmin(weights[5]))
    weights[5, unused] = 0
    dirty[5] = {name: leaf.at[unused].set(jnp.nan) for name, leaf in dirty[5].items()}
    dirty[6]["steps"] = jnp.ones((K, 2), jnp.int32)
    with pytest.raises(ValueError, match="one row per stack, 73"):
        stacks.combines(jnp.ones((72, K)), dirty)
    sums = stacks.combines(jnp.asarray(weights, jnp.float32), dirty)
    np.testing.assert_array_equal(sums[6].pop("steps"), [0, 0])
    for found, own, group in zip(sums, weights, groups, strict=True):
        for name, leaf in group.items():
            np.testing.assert_allclose(found[name], np.tensordot(own, leaf, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile_first", [False, True])
def test_products_of_two_stacks_of_different_dtypes(compile_first):
    """Leaves that are the same parameter meet, whichever of the two stacks is narrower there."""
    rng, dtypes = np.random.default_rng(0), (jnp.float32, jnp.bfloat16, jnp.float16)
    kinds = [pair for pair in itertools.product(dtypes, repeat=2) for _ in range(2)]
    first, second = (
        [jnp.asarray(rng.normal(size=(K, 7 - i % 5)), pair[side]) for i, pair in enumerate(kinds)]
        for side, K in enumerate((3, 2))
    )
    product = jax.jit(stacks.cross_gramian) if compile_first else stacks.cross_gramian
    np.testing.assert_allclose(product(first, second), dense(first) @ dense(second).T, rtol=1e-5, atol=1e-5)
    direction = [leaf[0] for leaf in second]
    np.testing.assert_allclose(stacks.project(first, direction), dense(first) @ dense(second)[0], rtol=1e-5, atol=1e-5)


def test_leaves_of_different_dtypes_need_no_promotion():
    rng = np.random.default_rng(0)
    tree = [jnp.asarray(rng.normal(size=(3, 5)), dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)]
    G = dense(tree)
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_allclose(stacks.gramian(tree), G @ G.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stacks.cross_gramian(tree, tree), G @ G.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stacks.task_norms(tree), np.linalg.norm(G, axis=1), rtol=1e-5)
        for found, leaf in zip(stacks.combine(jnp.ones(3), tree), tree, strict=True):
            np.testing.assert_allclose(found.astype(float), dense([leaf]).sum(0), rtol=0.02, atol=0.02)
        mixed = stacks.mix(jnp.ones(3), tree, jnp.ones(3), stacks.select(jnp.arange(3) < 1, tree))
        np.testing.assert_allclose(dense(mixed), G * [[2], [1], [1]], rtol=0.02)
        for name, norms in enumerate(stacks.leaf_norms(tree)):
            np.testing.assert_allclose(norms, np.linalg.norm(dense(tree[name : name + 1]), axis=1), rtol=1e-5)
        assert stacks.all_finite(tree)
        assert stacks.finite_tasks(tree).all()


def test_products_of_two_stacks():
    first, second = random_tree(3, seed=1), random_tree(2, seed=2)
    cross = stacks.cross_gramian(first, second)
    np.testing.assert_allclose(cross, dense(first) @ dense(second).T, rtol=1e-4, atol=1e-3)
    direction = jax.tree.map(lambda leaf: leaf[0], second)
    np.testing.assert_allclose(stacks.project(first, direction), cross[:, 0], rtol=1e-5)


@pytest.mark.parametrize("scales", [(1e-18, 1e-18), (1e-18, 1e15), (1e17, 1e17), (1e17, 1e-10)], ids=str)
def test_products_of_two_stacks_are_exact_at_every_scale(scales):
    trees = [random_tree(K, seed=K, width=50) for K in (3, 2)]
    trees = [
        jax.tree.map(lambda leaf, s=s, t=t: leaf * jnp.float32(s / np.linalg.norm(dense(t), axis=1).max()), t)
        for s, t in zip(scales, trees, strict=True)
    ]
    first, second = map(dense, trees)
    error = abs(np.asarray(stacks.cross_gramian(*trees), float) - first @ second.T) - np.finfo(np.float32).tiny
    assert (error / np.outer(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1))).max() < ROUNDING


def test_products_of_stacks_that_do_not_fit_are_refused():
    a = {"enc": jnp.ones((3, 2)), "out": jnp.ones((3, 1))}
    with pytest.raises(ValueError, match=r"`second` must have the structure of"):
        stacks.cross_gramian(a, {"enc": a["enc"], "head": a["out"]})
    with pytest.raises(
        ValueError, match=r"`second` must fit the other stack: leaf \['out'\] has shape \(2, 4\), expected \(2, 1\)"
    ):
        stacks.cross_gramian(a, {"enc": jnp.ones((2, 2)), "out": jnp.ones((2, 4))})
    counts = {"steps": jnp.ones((3, 2), jnp.int32)}
    assert not stacks.cross_gramian(counts, counts).any()


def test_mix_of_two_stacks():
    first, second = random_tree(3, seed=1), random_tree(3, seed=2)
    mixed = stacks.mix(jnp.asarray([1.0, 0.0, 2.0]), first, jnp.asarray([-1.0, 3.0, 0.5]), second)
    wanted = np.asarray([[1], [0], [2]]) * dense(first) + np.asarray([[-1], [3], [0.5]]) * dense(second)
    np.testing.assert_allclose(dense(mixed), wanted, rtol=1e-5, atol=1e-5)


def test_integer_leaves_are_zero_gradients():
    tree = {"w": jnp.ones((2, 3)), "steps": jnp.ones((2, 4), jnp.int32)}
    np.testing.assert_allclose(stacks.gramian(tree), np.full((2, 2), 3.0))
    combined = stacks.combine(jnp.ones(2), tree)
    assert combined["steps"].dtype == jnp.int32
    assert not combined["steps"].any()
    assert not stacks.gramian({"steps": tree["steps"]}).any()


def test_finite_tasks():
    tree = random_tree(4)
    tree["b"]["c"] = tree["b"]["c"].at[2].set(jnp.inf)
    assert stacks.finite_tasks(tree).tolist() == [True, True, False, True]
    assert not stacks.all_finite(tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("check", [stacks.finite_tasks, stacks.all_finite])
def test_looking_for_nan_copies_no_leaf(check, dtype):
    tree = [jnp.ones((2, 1 << 16), dtype), jnp.ones((2, 1 << 16), dtype)]
    program = jax.jit(check).lower(tree).compile()
    flags = sum(leaf.size for leaf in tree) if dtype == "float16" else 0
    assert program.memory_analysis().temp_size_in_bytes <= 1.1 * flags + 4096
    assert program(tree).all()
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not program([tree[0], tree[1].at[1, 77].set(bad)]).all()


def test_gramian_under_vmap_and_scan():
    trees = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(random_tree(3, seed=s) for s in range(2)))
    together = jax.vmap(stacks.gramian)(trees)
    _, one_by_one = jax.lax.scan(lambda carry, tree: (carry, stacks.gramian(tree)), 0, trees)
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5, atol=1e-3)


def test_shards_of_a_mesh_of_one_device():
    """As in a script for many devices that runs on a laptop."""
    mesh, grads = jax.make_mesh((1,), ("d",)), jax.random.normal(jax.random.key(0), (2, 3 * _BLOCK))
    split = jax.device_put(grads, NamedSharding(mesh, PartitionSpec(None, "d")))
    specs = {"in_specs": PartitionSpec(None, "d"), "out_specs": PartitionSpec()}
    gramian = jax.shard_map(lambda grads: stacks.gramian(grads, axis_name="d"), mesh=mesh, **specs)
    np.testing.assert_allclose(jax.jit(gramian)(split), stacks.gramian(grads), rtol=1e-6)


def test_the_leaf_is_named():
    with pytest.raises(ValueError, match=r"`task_grads` must.*leaf \['b'\]\['c'\] has 2 rows, leaf \['a'\] has 3"):
        stacks.num_tasks({"a": jnp.ones((3, 2)), "b": {"c": jnp.ones((2, 2))}})


@pytest.mark.parametrize("product", [stacks.gramian, lambda tree: stacks.cross_gramian(tree, tree)])
def test_programs_are_those_of_the_platform_they_are_lowered_for(product):
    """Blocks of columns are only for CPU, whatever platform lowers the program: elsewhere they gather rows."""
    traced = jax.jit(product).trace(random_tree(3, width=3 * _BLOCK))
    loops = {name: traced.lower(lowering_platforms=(name,)).as_text().count("while") for name in ("cpu", "tpu", "cuda")}
    assert loops["cpu"] > 0
    assert loops["tpu"] == loops["cuda"] == 0


def test_one_export_serves_several_platforms():
    tree = random_tree(3, width=3 * _BLOCK)
    tree["m"] = tree["b"]["d"].reshape(3, 96, -1)
    exported = jax.export.export(jax.jit(stacks.gramian), platforms=("cpu", "tpu", "cuda"))(tree)
    assert relative_error(exported.call(tree), dense(tree)) < ROUNDING


def test_leaves_without_entries():
    empty = jnp.zeros((2, 0))
    np.testing.assert_array_equal(stacks.gramian(empty), np.zeros((2, 2)))
    np.testing.assert_array_equal(stacks.cross_gramian(empty, jnp.zeros((3, 0))), np.zeros((2, 3)))
    tree = {"a": empty, "b": jnp.asarray([[1.0, 0.0], [0.0, 2.0]])}
    method = mtl.grouped(mtl.mgda(), {"a": "x", "b": "y"})
    update, _ = method.update(tree, method.init({"a": jnp.zeros(0), "b": jnp.zeros(2)}))
    np.testing.assert_allclose(update["b"], [0.8, 0.4], rtol=1e-6)
    assert update["a"].shape == (0,)


def test_a_direction_of_integers():
    np.testing.assert_array_equal(stacks.project(jnp.asarray([[2.0, 2.0]]), jnp.asarray([1, 2])), [6.0])


@pytest.mark.parametrize("method", [mtl.mean(), mtl.mgda(), mtl.graddrop()], ids=["mean", "mgda", "graddrop"])
@pytest.mark.parametrize("shapes", [((2, 16), (2, 16)), ((2, 64, 64), (2, 64, 64)), ((2, 1024, 1024),)], ids=str)
def test_explicitly_sharded_parameters_with_one_cpu_device(method, shapes):
    """As on a host with GPUs, which traces what it would do on its CPU too."""
    assert jax.device_count("cpu") == 1
    mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    axes = [-1 if i == 0 or len(shape) == 2 else 1 for i, shape in enumerate(shapes)]  # that are split
    specs = [
        PartitionSpec(*np.insert([None] * (len(s) - 1), axis % len(s), "x"))
        for s, axis in zip(shapes, axes, strict=True)
    ]
    stack = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.jit(lambda grads: method.update(grads, method.init(None))[0]).trace(stack)
        assert "sdy" in program.lower(lowering_platforms=("cuda",)).as_text()
