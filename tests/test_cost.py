"""The cost of a step: the command writes every row, and fs_mtl computes no more than necessary."""

import csv

import pytest

from benchmarks import cost


@pytest.mark.nightly
def test_the_command_writes_every_row_and_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- cost -->\n<!-- /cost -->\nafter\n")
    small = "--width=8 --layers=1 --batch=4 --tasks=3 --rounds=1 --bases=mean"
    cost.main([*small.split(), "--csv", str(tmp_path / "cost.csv"), "--page", str(page)])
    with (tmp_path / "cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {("mean loss", "plain"), ("mean", "stacked"), ("mean", "fs_mtl"), ("mean", "samo")}
    expected |= {("uw", "stacked"), ("uw", "one backward"), ("sam_gs", "stacked")}
    for network in (("multimnist", "2"), ("mlp", "3")):
        own = [row for row in rows if (row["network"], row["num_tasks"]) == network]
        found = [(row["method"], row["route"]) for row in own]
        assert len(set(found)) == len(found)
        assert expected <= set(found)
        assert all(float(row[column]) > 0 for row in own for column in (*cost.MEASURED, "time_over_plain"))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| `mean` |") == 2


@pytest.mark.nightly
@pytest.mark.parametrize("num_tasks", [2, 8])
def test_flops_of_fs_mtl_are_those_of_its_passes(num_tasks):
    """1 forward and K backward passes, then K of both, relative to 1 of both: no pass computes another task's."""
    network = cost.mlp(num_tasks, batch=128, width=128, layers=3)
    listed = {(method, route): how for method, route, how in cost.routes(network, ["mgda"])}
    plain, sharp = (cost.compiled(network, listed[key])[0] for key in (("mean loss", "plain"), ("mgda", "fs_mtl")))
    assert cost.gigaflops(sharp) <= cost.limit(num_tasks) * cost.gigaflops(plain)
