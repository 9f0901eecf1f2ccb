"""The solver benchmark runs and writes its results."""

import csv

import pytest

pytest.importorskip("torchjd", reason="TorchJD comes with the extra `peers`.")

from benchmarks import solvers


def test_the_benchmark_writes_a_row_per_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solvers, "SECONDS", 0.01)
    monkeypatch.setattr(solvers.jax.config, "update", lambda *setting: None)
    methods = ["cagrad", "krum", "modo", "nash_mtl"]
    solvers.main(["--methods", *methods, "--sizes", "2", "4", "--kinds", "wide", "--csv", str(tmp_path / "out.csv")])
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["cagrad", "cagrad", "krum", "modo", "modo", "nash_mtl", "nash_mtl"]
    assert all(float(row["ours_ms"]) > 0 and float(row["torchjd_ms"]) > 0 for row in rows)
    assert all(int(row["unsolved"]) == 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in methods)
