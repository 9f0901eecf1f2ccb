"""The comparison of base methods with their sharpness-aware versions runs, resumes and reports."""

import hashlib
import json

import jax
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from benchmarks import fs_mtl

SMALL = ["--bases", "mean", "mgda", "--seeds", "2", "--steps", "20", "--train", "512"]


def contents(directory):
    return {path.name: json.loads(path.read_text()) for path in directory.glob("*-*.json")}


def digest(leaf):
    return hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()


@pytest.mark.nightly
def test_a_killed_run_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "runs", tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\n<!-- /results -->\nafter\n")
    arguments = [*SMALL, "--out", str(out), "--page", str(page)]
    train, runs, seen = fs_mtl.train, [], {0: [], 1: []}

    def killed_in_the_fourth(step, tx, seed, *rest):
        runs.append(seed)
        if len(runs) == 4:
            raise KeyboardInterrupt
        begins_with, batches = [], []

        def watched(params, state, batch):
            begins_with.extend([] if begins_with else map(digest, jax.tree.leaves(params)))
            batches.extend(map(digest, jax.tree.leaves(batch)))
            return step(params, state, batch)

        seen[seed].append((begins_with, batches))
        return train(watched, tx, seed, *rest)

    monkeypatch.setattr(fs_mtl, "train", killed_in_the_fourth)
    assert fs_mtl.main(arguments) == 130
    before = contents(out)
    assert len(before) == 3
    assert fs_mtl.main(arguments) == 0
    after = contents(out)
    assert len(runs) == 4 + 5
    assert len(after) == 8
    assert all(after[name] == before[name] for name in before)
    assert {row["seed"] for row in after.values()} == {0, 1}
    for of_a_seed in seen.values():  # required for paired differences
        assert len(of_a_seed) == 4
        assert all(one == of_a_seed[0] for one in of_a_seed)
    assert all(first != second for first, second in zip(seen[0][0], seen[1][0], strict=True))
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
