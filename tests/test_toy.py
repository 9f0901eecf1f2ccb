"""The toy problems: known values, known end points, and the command."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import WEIGHED

import mtlgrad_jax as mtl
from benchmarks import toy
from benchmarks.toy_problem import SETTINGS, landscape, losses_fn
from mtlgrad_jax.registry import METHODS, ROWS


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((0, -8.3551), (-15.091638, -15.091638)),
        ((7, -8.4345), (-19.98943, -0.39794)),
        ((-7, -8.4345), (-0.39794, -19.98943)),
        ((9, 9), (7.944, 6.691)),  # the formula as printed in the papers gives -6.205 for the second
    ],
)
def test_losses_at_known_points(point, expected):
    np.testing.assert_allclose(losses_fn(jnp.asarray(point, float)), expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(losses_fn(jnp.asarray(point, float), scale=0.1)[0], 0.1 * expected[0], atol=1e-3)


@pytest.mark.nightly
def test_a_tie_passes_the_gradient_of_both_sides():
    """At (0, 0) both factors are zero with slopes 1/2 and -1/2, the valleys are log(3.5) + 6 and the bowls -14.46."""
    slope = (np.log(3.5) + 6 + 14.46) / 2
    np.testing.assert_allclose(jax.jacobian(losses_fn)(jnp.zeros(2)), [[0, slope], [0, slope]], rtol=1e-6)


def test_what_there_is_to_be_found():
    first, scaled, wells = (landscape(SETTINGS[name]) for name in ("cagrad", "nash", "two_optima"))
    np.testing.assert_allclose(first.optima, [[0, -8.3551]], atol=0.02)
    np.testing.assert_allclose(scaled.optima, [[-5.727, -8.409]], atol=0.02)
    np.testing.assert_allclose(wells.optima, [[-5.46, -10.84], [5.46, -10.84]], atol=0.02)
    assert 2 * wells.mean.min() == pytest.approx(-74.13, abs=0.02)
    for land in (first, scaled):  # scaling a loss does not move the front
        np.testing.assert_allclose(land.front[[0, -1]], [[-7, -8.4345], [7, -8.4345]], atol=0.02)
        np.testing.assert_allclose(land.front[len(land.front) // 2], [0, -8.3551], atol=0.02)
    np.testing.assert_allclose(wells.front[[0, -1]], wells.optima, atol=0.02)


# Results of an independent implementation in three settings: runs on the front and, if all agree, the end point.
END_POINTS = {
    "mean": ((1, None), (4, None), (3, None)),
    "mgda": ((3, None), (5, None), (5, None)),
    "pcgrad": ((3, None), (4, None), None),  # one run had not arrived there
    "upgrad": ((3, None), (4, None), None),
    "cagrad": ((3, (0, -8.36)), (4, (-5.73, -8.41)), (3, (0, -8.36))),
    "imtl_g": ((3, None), (5, None), (5, None)),
    "nash_mtl": ((3, None), (5, None), (5, None)),
    "aligned_mtl": ((3, (0, -8.36)), None, (5, (0, -8.36))),  # in the second, whether all arrive depends on rounding
}


@pytest.mark.nightly
@pytest.mark.parametrize("method", END_POINTS)
def test_end_points(method):
    outcomes = toy.compare(toy.contender(ROWS[method]), ["cagrad", "nash", "unscaled"], SETTINGS["cagrad"].steps)
    for outcome, found in zip(outcomes, END_POINTS[method], strict=True):
        if found is None:
            continue
        reached, place = found
        assert np.sum(outcome.on_front) == reached, outcome.setting
        if place:
            # aligned_mtl ignores components below the rounding of a float32 Gramian: 0.08 off here, exact in float64
            off = np.abs(outcome.ends[outcome.on_front] - place)
            assert off.max() <= (0.1 if method == "aligned_mtl" else 0.02), outcome.setting
    if method == "mean":
        np.testing.assert_allclose(np.abs(outcomes[0].ends[~outcomes[0].on_front]), [[5.1, 2.2]] * 2, atol=0.2)


@pytest.mark.nightly
def test_sam_gs_reaches_the_optimum_from_each_of_its_starts():
    """When a run leaves its valley depends on rounding, which differs between CPUs, so one run says little."""
    runs = 100
    starts = np.tile(np.array(SETTINGS["samgs"].starts, float), (runs, 1))
    starts += np.random.default_rng(0).uniform(-1e-3, 1e-3, starts.shape)
    cases = toy.Case(starts, np.ones(7 * runs), np.zeros(7 * runs, bool))
    path = toy.train(toy.contenders()["sam_gs, gamma=0.1, clipped"], cases, records=300).path
    there = np.linalg.norm(path - [0, -8.36], axis=2).reshape(-1, runs, 7) < 0.1
    assert (there[300].mean(0) >= 0.9).all()
    assert (there[200].mean(0)[[0, 1, 4, 5, 6]] >= 0.9).all()


def test_runs_of_a_method_that_draws_are_independent():
    def draw(*, state):
        key, now = jax.random.split(state)
        return jax.random.uniform(now, (2,)), key

    cases = toy.Case(np.tile([-4.9, 4.0], (8, 1)), np.ones(8), np.zeros(8, bool))
    method = mtl.from_kernel(draw, lambda K: jax.random.key(0), num_tasks=2)
    for make, different in ((lambda: method, 8), (mtl.mgda, 1)):
        path = toy.train(toy.Contender("", make), cases, records=1).path
        assert len(np.unique(path[-1], axis=0)) == different


@pytest.mark.nightly
def test_every_method_runs_or_says_why_not(unchecked):
    reasons = {name: toy.obstacle(method) for name, method in toy.contenders().items()}
    assert set(reasons) >= {row.name for row in METHODS} | {"fs_mtl", "samo"}
    assert {name for name, reason in reasons.items() if reason is not None} >= {"krum", "trimmed_mean"}
    assert all(reasons[row.name] is None for row in METHODS if row.name in WEIGHED and row.fewest <= 2)
    assert reasons["fs_mtl"] is reasons["samo"] is None
    assert "task axis" in toy.obstacle(toy.contender(ROWS["per_task"]))


def test_the_whole_command(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- overview -->\nold\n<!-- /overview -->\nbetween\n")
    arguments = ["--methods", "mean", "db_mtl", "krum", "--settings", "cagrad", "samgs", "--steps", "200"]
    toy.main([*arguments, "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- overview -->\n\n| method |")
    assert "old" not in text
    assert "<!-- /overview -->\nbetween\n<!-- comparison -->" in text
    assert "![SAM-GS's seven starts: 200 steps](page/samgs.png)" in text
    assert "- `krum`: it needs 3 tasks" in text
    assert "Left out: krum: it needs 3 tasks" in capsys.readouterr().out
    for name in ("cagrad.png", "readme.png"):
        assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "page" / "toy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 7)
    # bowls are negative: a method that takes logarithms does not move, and reports this
    low = next(row for row in rows if (row["method"], row["start_a"], row["start_b"]) == ("db_mtl", "10", "-3"))
    assert (low["end_a"], low["end_b"], low["skipped"]) == ("10", "-3", "200")
    toy.main([*arguments, "--out", str(tmp_path / "out")])
    assert "](cagrad.png)" in (tmp_path / "out" / "toy.md").read_text()


@pytest.mark.parametrize("steps", ["0", "150", "-100"])
def test_steps_in_hundreds(steps, capsys):
    with pytest.raises(SystemExit, match="2"):
        toy.main(["--steps", steps])
    assert "must be a multiple of 100" in capsys.readouterr().err
