"""The benchmark of coordinate-wise methods runs and writes its results."""

import csv

import pytest

pytest.importorskip("torchjd", reason="TorchJD comes with the extra `peers`.")

from benchmarks import coordinates
from mtlgrad_jax.registry import METHODS


def test_the_command_writes_every_row(tmp_path, capsys):
    path = tmp_path / "coordinates.csv"
    coordinates.main(["--tasks", "3", "--parameters", "100", "--rounds", "2", "--csv", str(path)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    ours = {row["method"] for row in rows if row["library"] == "mtlgrad_jax"}
    assert ours == {"sum", *(row.name for row in METHODS if row.folder == "coordinates")}
    assert {row["method"] for row in rows if row["library"] == "torchjd"} == {"graddrop", "trimmed_mean"}
    assert all(float(row["milliseconds"]) > 0 and float(row["over_copy"]) > 0 for row in rows)
    assert [row["method"] for row in rows if row["over_torchjd"]] == ["graddrop", "trimmed_mean"]
    assert "copy of the stack" in capsys.readouterr().out
