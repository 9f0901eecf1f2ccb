"""The comparison of base methods with their sharpness-aware versions runs, resumes and reports."""

import json

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from benchmarks import fs_mtl

SMALL = ["--bases", "mean", "mgda", "--seeds", "2", "--steps", "20", "--train", "512"]


def contents(directory):
    return {path.name: json.loads(path.read_text()) for path in directory.glob("*-*.json")}


def test_a_killed_run_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "runs", tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\n<!-- /results -->\nafter\n")
    arguments = [*SMALL, "--out", str(out), "--page", str(page)]
    train, runs = fs_mtl.train, []

    def killed_in_the_fourth(*args):
        runs.append(args)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(fs_mtl, "train", killed_in_the_fourth)
    assert fs_mtl.main(arguments) == 130
    before = contents(out)
    assert len(before) == 3
    assert fs_mtl.main(arguments) == 0
    after = contents(out)
    assert len(runs) == 4 + 5
    assert len(after) == 8
    assert all(after[name] == before[name] for name in before)
    # Runs of one seed begin alike and see the same batches: without conflicts these two methods part later.
    assert {row["seed"] for row in after.values()} == {0, 1}
    text = page.read_text()
    assert text.startswith("before\n<!-- results -->\n\n| MultiMNIST |")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert text.count("| `mgda` |") == 2
    for name in ("conflicts-multimnist.png", "differences.png"):
        with Image.open(tmp_path / "page" / name) as image:
            assert min(image.size) > 100
    assert "goes on from here" in capsys.readouterr().out


def test_other_settings_are_not_mixed_in(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("{}")
    assert fs_mtl.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "other settings" in capsys.readouterr().out


def test_a_set_without_its_data_is_refused(tmp_path, capsys):
    assert fs_mtl.main(["--sets", "MultiFashion", "--out", str(tmp_path)]) == 2
    assert "--fashion" in capsys.readouterr().out


def test_intervals_are_students():
    differences = np.asarray([0.3, -0.1, 0.4, 0.2, 0.2])
    mean, half = fs_mtl.interval(differences)
    low, high = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
