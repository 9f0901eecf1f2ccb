"""The demo's parts: data, records and summaries. No training here beyond a few steps."""

import csv
import gzip
import io
import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import burgers, data, device, multimnist, report

IMAGES = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"


def idx(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_mnist(folder, *, dots=False, compressed=False, train=5, test=3):
    """Tiny random idx files under the usual names; returns the training images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = []
    for images, labels, size in zip(IMAGES, LABELS, (train, test), strict=True):
        pixels = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        for name, array in ((images, pixels), (labels, np.arange(size, dtype=np.uint8) % 10)):
            name = name.replace("-idx", ".idx") if dots else name
            raw = gzip.compress(idx(array)) if compressed else idx(array)
            (folder / (name + ".gz" if compressed else name)).write_bytes(raw)
        written.append(pixels)
    return written[0]


@pytest.fixture(scope="module")
def digits():
    return data.load()


def test_overlay_is_the_maximum_of_two_shifted_digits():
    left, right = np.zeros((2, 1, 28, 28), np.uint8)
    left[0, 0, 0], left[0, 27, 27], left[0, 8, 8] = 10, 20, 30
    right[0, 0, 0], right[0, 27, 27], right[0, 19, 19] = 40, 50, 15
    canvas = data.overlay(left, right)
    expected = np.zeros((1, 36, 36), np.uint8)
    expected[0, 0, 0], expected[0, 27, 27] = 10, 20  # 20 > 15, both at (27, 27)
    expected[0, 8, 8], expected[0, 35, 35] = 40, 50  # 40 > 30, both at (8, 8)
    np.testing.assert_array_equal(canvas, expected)


def test_train_and_test_share_no_image(digits):
    train, test = digits
    assert len(train.images) == 4000
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


def test_split_is_stratified_and_uses_every_index_once():
    labels = np.repeat([0, 1, 2], [10, 20, 50])
    train, test = data.split(labels, 0.2, np.random.default_rng(3))
    assert np.bincount(labels[test]).tolist() == [2, 4, 10]
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(80))


def test_pairs_hold_what_their_labels_say_and_only_given_digits():
    """The pixels of each digit equal its index, so the sources of a pair can be read from its corners."""
    sources = np.arange(7, 40)
    tagged = data.Digits(np.broadcast_to(sources[:, None, None], (33, 28, 28)).astype(np.uint8), sources % 10)
    pairs = data.pair(tagged, np.random.default_rng(0))
    left, right = pairs.images[:, 0, 0], pairs.images[:, -1, -1]
    np.testing.assert_array_equal(np.sort(left), sources)
    np.testing.assert_array_equal(np.sort(right), sources)
    np.testing.assert_array_equal(pairs.labels["left"], left % 10)
    np.testing.assert_array_equal(pairs.labels["right"], right % 10)
    batches = list(pairs.batches(10))
    assert len(batches) == 3
    np.testing.assert_array_equal(batches[2].images, pairs.images[20:30])
    np.testing.assert_array_equal(batches[2].labels["right"], pairs.labels["right"][20:30])


def test_pairs_depend_on_the_seed_alone(digits):
    first, again, other = (data.pair(digits[1], np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != other.images).any()
    np.testing.assert_array_equal(data.load()[0].labels, digits[0].labels)


@pytest.mark.parametrize("layout", [".", "raw", "MNIST/raw", "package/data"])
@pytest.mark.parametrize(("dots", "compressed"), [(False, False), (True, False), (False, True)])
def test_idx_files_in_usual_places(tmp_path, layout, dots, compressed):
    root = tmp_path / "root"
    written = write_mnist(root / layout, dots=dots, compressed=compressed)
    train, test = data.load(root)
    np.testing.assert_array_equal(train.images, written)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 2])


def test_missing_idx_files(tmp_path):
    with pytest.raises(data.DataError, match=r"--data must name a folder"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"No train-images-idx3-ubyte .* also looked into its raw, MNIST/raw"):
        data.load(tmp_path)
    write_mnist(tmp_path / "raw")
    with pytest.raises(data.DataError, match=r"At least 4 .* got 5 and 3"):
        data.load(tmp_path, at_least=4)
    (tmp_path / "raw" / LABELS[1]).unlink()
    with pytest.raises(data.DataError, match=r"lacks the idx file of t10k-labels"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (IMAGES[0], b"", "not an idx file .* nothing"),
        (IMAGES[0], b"<html>not found</html>", "not an idx file"),
        (IMAGES[0], idx(np.zeros((5, 28, 28), np.uint8), kind=13), "not an idx file of bytes"),
        (IMAGES[0], idx(np.zeros((5, 28, 28), np.uint8))[:-1], r"shape \(5, 28, 28\) but holds 3,919 bytes"),
        (IMAGES[0], idx(np.zeros((5, 32, 32), np.uint8)), r"N images of 28 x 28 .* got train images of .*32"),
        (LABELS[0], idx(np.zeros(4, np.uint8)), r"labels of shape \(4,\)"),
        (LABELS[0], idx(np.full(5, 10, np.uint8)), "labels from 0 to 9"),
    ],
)
def test_malformed_idx_files(tmp_path, name, raw, message):
    write_mnist(tmp_path / "raw")
    (tmp_path / "raw" / name).write_bytes(raw)
    with pytest.raises(data.DataError, match=message):
        data.load(tmp_path)


@pytest.mark.parametrize("raw", [b"plain", gzip.compress(bytes(999), mtime=0)[:-9], b"", b"\x1f\x8b\x08" + bytes(30)])
def test_malformed_gzip(tmp_path, raw):
    (tmp_path / "file.gz").write_bytes(raw)
    with pytest.raises(data.DataError, match=r"file\.gz"):
        data.read_idx(tmp_path / "file.gz")


def row(method, seed, step, **values):
    base = {"method": method, "seed": seed, "epoch": 1, "step": step, "milliseconds": 4.0 if "-" in method else 6.0}
    if not method.startswith(report.SINGLE):
        base |= {"weight_left": 0.75, "weight_right": 0.25, "conflict": float(step == 2), "cosine": 0.1}
    return base | values


def write_runs(write, *, seeds=2):
    """Runs of two steps: mean is exactly 10 % worse than single-task on both tasks with seed 0, equal with seed 1."""
    for seed in range(seeds):
        for method, left, right in (
            ("single-left", 80.0, float("nan")),
            ("single-right", float("nan"), 90.0),
            ("mean", 72.0 + 8 * seed, 81.0 + 9 * seed),
        ):
            write(row(method, seed, 1))
            write(row(method, seed, 2, accuracy_left=left, accuracy_right=right))


def test_an_interrupted_csv_is_readable_at_any_moment(tmp_path):
    path = tmp_path / "steps.csv"
    with report.step_writer(path) as write:
        write(row("mean", 0, 1, loss_left=2.5, accuracy_left=50.25))
        write(row("mean", 0, 2))
        assert report.read_runs(path)["mean"][0]["step"].tolist() == [1, 2]  # not closed yet
    with path.open(newline="") as file:
        assert next(csv.DictReader(file))["loss_left"] == "2.5"
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        for run in report.read_runs(path).get("mean", {}).values():
            np.testing.assert_array_equal(run["loss_left"], [2.5, np.nan][: len(run["step"])])
            assert run["accuracy_left"][0] == 50.25


def test_summary_of_known_runs(tmp_path):
    with report.step_writer(tmp_path / "steps.csv") as write:
        write_runs(write)
    single, mean = report.summarize(report.read_runs(tmp_path / "steps.csv"))
    assert (single["method"], single["accuracy_left"], single["accuracy_right"]) == ("single-task", 80.0, 90.0)
    assert (single["milliseconds"], single["relative_time"]) == (8.0, 2.0)  # two networks
    assert (mean["accuracy_left"], mean["accuracy_right"], mean["seeds"]) == (76.0, 85.5, 2)
    assert (mean["delta_m"], mean["delta_m_std"]) == pytest.approx((5.0, 50**0.5))  # 10 and 0 %
    assert (mean["conflict_percent"], mean["milliseconds"], mean["relative_time"]) == (50.0, 6.0, 1.5)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (0, None),
        (1, None),
        (3, None),
        (5, {"single-task": "1"}),
        (6, {"single-task": "1", "mean": "1"}),
        (9, {"single-task": "1", "mean": "1"}),
        (12, {"single-task": "2", "mean": "2"}),
    ],
)
def test_report_after_an_interruption(tmp_path, lines, expected):
    """Whatever is finished is reported: nothing, one baseline, both, the first method, ..."""
    (tmp_path / "config.json").write_text('{"steps": 2, "steps_per_epoch": 2, "seeds": 2}')
    with report.step_writer(tmp_path / "steps.csv") as write:
        write_runs(write)
    written = (tmp_path / "steps.csv").read_text().splitlines(keepends=True)
    (tmp_path / "steps.csv").write_text("".join(written[: 1 + lines]))
    terminal = io.StringIO()
    report.report(tmp_path, Console(width=80, file=terminal))
    assert (tmp_path / "multimnist.png").exists() == bool(expected)
    if expected is None:
        assert "Not even both single-task networks" in terminal.getvalue()
    else:
        with (tmp_path / "summary.csv").open(newline="") as file:
            summary = {line["method"]: line["seeds"] for line in csv.DictReader(file)}
        assert summary == expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist") / "MNIST/raw"
    write_mnist(folder, train=300, test=250)
    return folder


@pytest.mark.nightly
def test_the_whole_command(tiny, tmp_path, capsys, monkeypatch):
    """Two epochs of two steps on noise: every step is recorded, and all files are there."""
    monkeypatch.setattr(multimnist, "TEST_PAIRS", 250)
    arguments = ["--data", str(tiny), "--out", str(tmp_path), "--seeds", "2", "--epochs", "2", "--methods", "upgrad"]
    assert multimnist.main(arguments) == 0
    runs = report.read_runs(tmp_path / "steps.csv")
    assert {(method, *seeds) for method, seeds in runs.items()} == {
        (method, 0, 1) for method in ("single-left", "single-right", "upgrad")
    }
    first, second = runs["upgrad"].values()
    assert first["step"].tolist() == [1, 2, 3, 4]
    assert all(np.isfinite(first[column]).all() for column in report.COLUMNS[1:-2])
    assert (first["loss_left"] != second["loss_left"]).all()
    assert first["loss_left"][0] == runs["single-left"][0]["loss_left"][0]  # the same parameters, the same batch
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["methods"], config["seeds"], config["steps"]) == (["upgrad"], 2, 4)
    assert {"jax", "optax", "flax", "mtlgrad-jax"} <= set(config["versions"])
    assert (tmp_path / "multimnist.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "upgrad" in printed
    assert printed.rstrip().endswith(multimnist.NEXT)
    with pytest.raises(SystemExit, match="2"):
        multimnist.main(arguments)  # does not overwrite a run
    assert "already holds a run" in capsys.readouterr().err


def test_control_c_reports_what_is_finished(tiny, tmp_path, capsys, monkeypatch):
    def train(contender, seed, *_):
        for step in (1, 2):
            if contender.name == "mean":
                raise KeyboardInterrupt
            yield row(contender.name, seed, step, accuracy_left=90.0, accuracy_right=90.0)

    monkeypatch.setattr(multimnist, "train", train)
    arguments = ["--data", str(tiny), "--out", str(tmp_path), "--epochs", "1", "--methods", "cagrad,mean"]
    assert multimnist.main(arguments) == 130
    with (tmp_path / "summary.csv").open(newline="") as file:
        assert [line["method"] for line in csv.DictReader(file)] == ["single-task", "cagrad"]
    assert (tmp_path / "multimnist.png").exists()
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "cagrd"], "no method 'cagrd' for two tasks. Did you mean cagrad?"),
        (["--methods", "mean,"], "no method '' for two tasks. Choose from bmtl, constant"),
        (["--methods", "trimmed_mean"], "no method 'trimmed_mean' for two tasks"),
        (["--seeds", "0"], "must be at least 1, got 0"),
        (["--epochs", "x"], "invalid count value: 'x'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        multimnist.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_data_is_said_in_one_line(tmp_path, capsys):
    assert multimnist.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "--data must name a folder" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_solution_of_burgers_equation():
    """It solves the equation, by central differences, and takes the values given at the start and at the edges."""
    t, x = np.meshgrid(np.linspace(0.1, 0.9, 9), np.linspace(-0.95, 0.95, 39), indexing="ij")
    h, u = 1e-4, burgers.exact
    in_time, in_space = (u(t + h, x) - u(t - h, x)) / (2 * h), (u(t, x + h) - u(t, x - h)) / (2 * h)
    curvature = (u(t, x + h) - 2 * u(t, x) + u(t, x - h)) / h**2
    residual = in_time + u(t, x) * in_space - burgers.VISCOSITY * curvature
    assert np.abs(residual).max() < 1e-4 * np.abs(in_space).max()
    np.testing.assert_allclose(u(np.zeros(39), x[0]), -np.sin(np.pi * x[0]), atol=1e-6)
    np.testing.assert_allclose(u(t[:, 0], np.ones(9)), 0, atol=1e-9)


def test_the_benchmark_of_a_device_writes_a_row_for_each_program(tmp_path):
    file = tmp_path / "device.csv"
    sizes = ["--tasks", "3", "--parameters", "300", "--rounds", "1"]
    device.main(["--methods", "mean", "mgda", *sizes, "--csv", str(file)])
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {row["method"] for row in rows} == {"mean", "mgda", device.ADAM, device.PLAIN}
    times = {row["method"]: float(row["milliseconds"]) for row in rows}
    for row in rows:
        np.testing.assert_allclose(float(row["over_adam"]), times[row["method"]] / times[device.ADAM], rtol=2e-3)
