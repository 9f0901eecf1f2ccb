"""The output of a comparison: steps.csv while it runs; then a table, summary.csv and a figure made from it."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.data import TASKS
from mtlgrad_jax.diagnostics import delta_m

SINGLE = "single-"  # "single-left" is a network for the task "left" alone


def _per_task(name: str) -> list[str]:
    return [f"{name}_{task}" for task in TASKS]


ACCURACIES = _per_task("accuracy")
COLUMNS = (
    *("method", "seed", "epoch", "step", "milliseconds"),
    *(*_per_task("loss"), *_per_task("weight"), *_per_task("norm"), "cosine", "conflict"),
    *_per_task("predicted_change"),
    *ACCURACIES,  # on the test pairs, in percent; empty between evaluations
)
# Okabe and Ito's colours, safe for colour-blind eyes
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES, MARKERS = ("-", "--", ":"), "os^vDPX*"

Run = dict[str, np.ndarray]  # column -> one value per step
Runs = dict[str, dict[int, Run]]  # method -> seed -> run


@contextmanager
def step_writer(path: Path) -> Iterator[Callable[[dict], None]]:
    """A function that appends a row to the CSV file and flushes it."""
    with path.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        yield lambda row: writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_runs(path: Path) -> Runs:
    """The runs in a CSV file of steps, which may be truncated anywhere."""
    text = path.read_text()
    rows: dict[str, dict[int, list]] = {}
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        numbers = [float(row[column] or "nan") for column in COLUMNS[1:]]
        rows.setdefault(row["method"], {}).setdefault(int(row["seed"]), []).append(numbers)
    return {
        method: {seed: dict(zip(COLUMNS[1:], np.array(steps).T, strict=True)) for seed, steps in seeds.items()}
        for method, seeds in rows.items()
    }


def report(directory: Path, console: Console) -> None:
    """Print the table of the finished runs in `directory`, and write summary.csv and the figure."""
    config = json.loads((directory / "config.json").read_text())
    runs = finished(read_runs(directory / "steps.csv"), config["steps"])
    if all(SINGLE + task in runs for task in TASKS):
        summary = summarize(runs)
        write_summary(summary, directory / "summary.csv")
        draw(runs, config["steps_per_epoch"]).savefig(directory / "multimnist.png", dpi=150)
        console.print(table(summary, config["seeds"]))
    else:
        console.print("Not even both single-task networks are finished.")
    names = ", ".join(sorted(path.name for path in directory.iterdir()))
    console.print(f"In {directory}: {names}", markup=False)


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with numbers in all columns but the first."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, rule, *rows))


def fill(page: Path, sections: dict[str, str]) -> None:
    """Rewrite the sections of a page, each between two comments with its name; missing sections are appended."""
    text = page.read_text() if page.exists() else ""
    for name, content in sections.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{content}\n\n{end}{after}"
    page.write_text(text)


def finished(runs: Runs, steps: int) -> Runs:
    """The runs that took all their steps."""
    whole = {m: {seed: run for seed, run in seeds.items() if run["step"][-1] == steps} for m, seeds in runs.items()}
    return {method: seeds for method, seeds in whole.items() if seeds}


def summarize(runs: Runs) -> list[dict]:
    """A row for single-task and for each method: means and spreads over seeds; Delta_m is computed per seed."""
    single = [runs[SINGLE + task] for task in TASKS]
    plain = [np.median(_pool(seeds, "milliseconds")) for seeds in single]
    alone = {
        seed: [seeds[seed][column][-1] for seeds, column in zip(single, ACCURACIES, strict=True)]
        for seed in single[-1]  # trained last: the others are finished too
    }
    rows = [{"method": "single-task", **_accuracies(alone), "milliseconds": sum(plain)}]
    for method in _methods(runs):
        last = {seed: [run[column][-1] for column in ACCURACIES] for seed, run in runs[method].items()}
        deltas = [delta_m(values, alone[seed], higher_is_better=True) for seed, values in last.items()]
        row = {"method": method, **_accuracies(last), **_spread("delta_m", deltas)}
        row["conflict_percent"] = 100 * np.mean(_pool(runs[method], "conflict"))
        row["milliseconds"] = np.median(_pool(runs[method], "milliseconds"))
        rows.append(row)
    return [row | {"relative_time": row["milliseconds"] / np.mean(plain)} for row in rows]


def write_summary(summary: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, max(summary, key=len), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in summary)


def table(summary: list[dict], seeds: int) -> Table:
    """The summary for the terminal, within 80 columns."""
    notes = [f"±: standard deviation over {seeds} seeds."] * (seeds > 1)
    notes += ["Δm: mean relative loss of accuracy against single-task, lower is better."]
    notes += ["Conflict: steps whose two gradients of the trunk had a negative cosine."]
    notes += ["Time: median without compilation, also in single-task steps."]
    notes += ["n/N: n of N seeds are finished."] * any(row["seeds"] < seeds for row in summary)
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    view.title, view.caption = "MultiMNIST: test accuracy (%) after the last step", "\n".join(notes)
    view.add_column("\nmethod", no_wrap=True)
    for heading in (*(f"{task}\ndigit" for task in TASKS), "Δm\n%", "conflict\n%", "ms a\nstep", "×\nplain"):
        view.add_column(heading, justify="right", no_wrap=True)
    columns = dict.fromkeys((*ACCURACIES, "delta_m"), ".2f")
    columns |= {"conflict_percent": ".1f", "milliseconds": ".1f", "relative_time": ".2f"}
    for row in summary:
        name = row["method"] if row["seeds"] == seeds else f"{row['method']} {row['seeds']}/{seeds}"
        view.add_row(name, *(_cell(row, column, spec) for column, spec in columns.items()))
    return view


def draw(runs: Runs, steps_per_epoch: int) -> Figure:
    """Learning curves, task weights and conflict: the mean over seeds, with a band from lowest to highest."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (left, right), (weights, conflict) = axes = figure.subplots(2, 2, sharex=True)
    right.sharey(left)

    def curve(axis: Axes, seeds: dict[int, Run], points: Callable[[Run], tuple], label: str, **style: Any) -> None:
        steps, values = zip(*(points(run) for run in seeds.values()), strict=True)
        x = steps[0] / steps_per_epoch
        axis.plot(x, np.mean(values, axis=0), label=label, linewidth=1.5, markersize=4, **style)
        axis.fill_between(x, np.min(values, axis=0), np.max(values, axis=0), color=style["color"], alpha=0.12, lw=0)

    for axis, task, column in zip((left, right), TASKS, ACCURACIES, strict=True):
        curve(axis, runs[SINGLE + task], _measured(column), "single-task", color="black", linestyle="--", marker=".")
        axis.set(title=f"{task.capitalize()} digit", ylabel="test accuracy (%)")
    for k, method in enumerate(_methods(runs)):
        style = {"color": COLORS[k % len(COLORS)], "linestyle": LINES[k // len(COLORS) % len(LINES)]}
        for axis, column in zip((left, right), ACCURACIES, strict=True):
            curve(axis, runs[method], _measured(column), method, marker=MARKERS[k % len(MARKERS)], **style)
        curve(weights, runs[method], _binned(_left_share), method, **style)
        curve(conflict, runs[method], _binned(lambda run: 100 * run["conflict"]), method, **style)

    # the first evaluation would compress the scale of all later ones
    left.set_ylim(bottom=min(line.get_ydata()[:2].max() for axis in (left, right) for line in axis.get_lines()))
    weights.axhline(50, color="grey", linewidth=0.8, zorder=0)
    weights.set(title="Task weights", ylabel="weight of the left digit (% of both)", xlabel="epochs")
    conflict.set(title="Conflict between the two gradients of the trunk", xlabel="epochs", ylim=(0, None))
    conflict.set_ylabel("steps with conflicting gradients (%)")
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    count = max(len(seeds) for seeds in runs.values())
    bands = f"mean of {count} seeds, band from lowest to highest" if count > 1 else "one seed"
    figure.suptitle(f"MultiMNIST: two tasks, one trunk ({bands})", fontsize=13)
    return figure


def _methods(runs: Runs) -> list[str]:
    return [method for method in runs if not method.startswith(SINGLE)]


def _pool(seeds: dict[int, Run], column: str) -> np.ndarray:
    return np.concatenate([run[column] for run in seeds.values()])


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1)) if len(values) > 1 else np.nan}


def _accuracies(by_seed: dict[int, list[float]]) -> dict[str, float]:
    left, right = zip(*by_seed.values(), strict=True)
    return {"seeds": len(by_seed), **_spread(ACCURACIES[0], left), **_spread(ACCURACIES[1], right)}


def _cell(row: dict, name: str, spec: str) -> str:
    value, std = row.get(name, np.nan), row.get(f"{name}_std", np.nan)
    if np.isnan(value):
        return "–"
    return f"{value:{spec}}" if np.isnan(std) else f"{value:{spec}} ± {std:{spec}}"


def _measured(column: str) -> Callable[[Run], tuple[np.ndarray, np.ndarray]]:
    """The steps at which `column` was measured, and its values."""

    def points(run: Run) -> tuple[np.ndarray, np.ndarray]:
        there = ~np.isnan(run[column])
        return run["step"][there], run[column][there]

    return points


def _binned(quantity: Callable[[Run], np.ndarray], bins: int = 25) -> Callable[[Run], tuple[np.ndarray, np.ndarray]]:
    """Means of steps and `quantity` over up to `bins` parts of the training, each of at least ten steps."""

    def points(run: Run) -> tuple[np.ndarray, ...]:
        parts = max(1, min(bins, len(run["step"]) // 10))
        return tuple(
            np.array([part.mean() for part in np.array_split(values, parts)]) for values in (run["step"], quantity(run))
        )

    return points


def _left_share(run: Run) -> np.ndarray:
    left, right = (run[f"weight_{task}"] for task in TASKS)
    return 100 * left / np.where(left + right > 0, left + right, np.nan)


if __name__ == "__main__":  # python -m benchmarks.report runs/<time>, for a run that was killed
    report(Path(sys.argv[1]), Console())
