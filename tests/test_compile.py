"""Compiled programs are linear in the number of leaves, whose loops they share; the command writes every row."""

import csv
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

import mtlgrad_jax as mtl
from benchmarks import compile as benchmark
from benchmarks.compile import K, compiled, instructions, parameters, update

WIDTH = 34  # of matrices that the Gramian takes one by one on a CPU; vectors of this width are joined
LEAVES = (32, 64, 128)  # XLA fuses the joins of fewer; with 64 and 128 all joins are of 32


def nested(method, num_tasks):
    """Five wrappers around a method, heads and missing labels included."""
    weighed = mtl.with_metrics(mtl.smoothed(mtl.update_every(method, num_tasks, 2), num_tasks), num_tasks)
    return mtl.skip_nonfinite_tasks(mtl.shared_private(weighed, lambda path: "leaf0" not in str(path)))


@pytest.mark.nightly
@pytest.mark.parametrize("make", [mtl.upgrad, mtl.cagrad, mtl.conicgrad])
def test_wrappers_do_not_multiply_a_solver(make):
    """Of eight tasks and a tree of four leaves; what the wrappers add themselves is less than half of a solver."""
    params = parameters(4, WIDTH)
    stack = jax.tree.map(lambda p: jnp.zeros((8, *p.shape)), params)
    alone, wrapped = (
        instructions(compiled((lambda g, s, tx=tx: tx.update(g, s, params), (stack, tx.init(params))))[1])
        for tx in (make(), nested(make(), 8))
    )
    assert wrapped < 1.5 * alone


def slopes(counts):
    """The numbers of instructions that each further leaf takes."""
    return [(many - few) / (n - m) for (m, few), (n, many) in itertools.pairwise(zip(LEAVES, counts, strict=True))]


def kernels(program):
    """The number of different loops, each of which XLA:CPU compiles once, however many leaves use it."""
    text = re.sub(r", metadata=\{[^}]*\}", "", program.as_text())
    bodies = re.findall(r"^%(?:fused|wrapped)[^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)

    def anonymous(body):
        names = {}
        return re.sub(r"%[\w.\-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), body)

    return len(set(map(anonymous, bodies)))


# One method for each way to use the leaves: Gramian, losses, rule, buffers, draws, groups, and what wrappers add.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("row", "tx", "most"),
    [
        ("imtl_g", mtl.imtl_g(), 60),
        ("uw", mtl.uw(K), 50),
        ("trimmed_mean", mtl.trimmed_mean(), 130),
        ("graddrop", mtl.graddrop(), 150),
        ("sam_gs", mtl.sam_gs(K), 150),
        ("conflict_free_momentum", mtl.conflict_free_momentum(K), 380),
        ("with_metrics", mtl.with_metrics(mtl.db_mtl(K), K), 200),
        ("fs_mtl", mtl.fs_mtl(mtl.mean()), 200),
        ("samo", None, 220),
        ("grouped", None, 200),
        ("dropgrad", mtl.dropgrad(), 50),
        ("imtl_g", nested(mtl.imtl_g(), K), 150),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_programs_are_linear_in_the_leaves(row, tx, most):
    """No leaf's part holds a sum over all leaves, and leaves of the same shape share their loops."""
    programs = [compiled(update(row, parameters(n, WIDTH), tx))[1] for n in LEAVES]
    first, second = slopes(map(instructions, programs))
    assert second <= 1.08 * first
    assert second <= most
    assert kernels(programs[2]) - kernels(programs[1]) < 8


@pytest.mark.nightly
def test_a_function_of_leaves_is_traced_once_for_each_shape():
    """Under jit. Outside, it is called for each leaf, so that errors and breakpoints are those of the user's line."""
    seen = []

    def first(leaf):
        seen.append(leaf.shape)
        return leaf[0]

    stack, present = [jnp.ones((2, n)) for n in (3, 3, 4, 3)], jnp.ones(2, bool)
    jax.jit(lambda stack: mtl.stacks.by_coordinate(first, stack, present=present))(stack)
    assert seen == [(2, 3), (2, 4)]
    mtl.stacks.by_coordinate(first, stack, present=present)
    assert len(seen) == 2 + 4


@pytest.mark.nightly
def test_programs_of_several_updates_at_once_are_linear_too():
    """Under vmap, both branches of a condition are computed."""
    counts = []
    for n in LEAVES:
        step, args = update("imtl_g", parameters(n, WIDTH))
        batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), args)
        counts.append(instructions(compiled((jax.vmap(step), batch))[1]))
    first, second = slopes(counts)
    assert second <= 1.08 * first


@pytest.mark.nightly
def test_the_command_writes_every_row_and_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compile -->\n<!-- /compile -->\nafter\n")
    small = "--methods mean dropgrad --leaves 2 4 --width 2"
    benchmark.main([*small.split(), "--csv", str(tmp_path / "compile.csv"), "--page", str(page)])
    with (tmp_path / "compile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["leaves"]) for row in rows] == [
        (name, leaves) for name in ("mean", "dropgrad") for leaves in ("2", "4")
    ]
    assert all(float(row[column]) > 0 for row in rows for column in ("seconds", "adam_seconds", "instructions"))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| `mean` |") == 1
