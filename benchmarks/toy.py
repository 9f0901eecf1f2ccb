"""All methods of the library on two losses of two parameters, on which the mean gets stuck.

    python -m benchmarks.toy [--methods NAME ...] [--settings NAME ...] [--steps N] [--out DIR] [--page FILE]

A method runs with its smallest arguments and Adam, from all starts of all settings at once, in one compiled program.
Methods that cannot run on two tasks, their gradients and losses are left out, with a reason.
"""

import argparse
import csv
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtlgrad_jax as mtl
from benchmarks.report import fill
from benchmarks.toy_problem import SETTINGS, landscape, losses_fn
from mtlgrad_jax.registry import METHODS, WRAPPERS, Row
from mtlgrad_jax.registry import make as make_row

LEARNING_RATE = 1e-3
EVERY = 100  # steps between two points of a recorded path
NEAR_FRONT, NEAR_OPTIMUM = 0.35, 0.1  # distances
IN_README = ("mean", "upgrad", "cagrad", "nash_mtl")  # readme.png has their paths from CAGrad's starts

# What an independent implementation of three settings found (CAGrad's problem solved on a grid of weights).
INDEPENDENT = {
    "mean": ("1/3, sticks at (±5.1, 2.2)", "4/5, sticks from (9, 9)", "3/5"),
    "mgda": ("3/3, spread", "5/5, spread, to the corner (7, -8.4)", "5/5"),
    "pcgrad": ("3/3", "4/5, from (9, 9) still at b = 0", "3/5, slow"),
    "upgrad": ("3/3", "4/5, from (9, 9) still at b = 0", "3/5, slow"),
    "cagrad": ("3/3, all at (0, -8.36)", "4/5, those at (-5.73, -8.41)", "3/5"),
    "imtl_g": ("3/3", "5/5, a from -3.4 to 5.3", "5/5"),
    "nash_mtl": ("3/3", "5/5, a from -3.3 to 5.0", "5/5"),
    "aligned_mtl": ("3/3, all at (0, -8.36)", "5/5, all at (-5.73, -8.41)", "5/5, all at (0, -8.36)"),
    "famo": ("3/3", "5/5, a from -0.95 to 1.74", "5/5"),
}


class Contender(NamedTuple):
    """A method with given arguments."""

    name: str
    make: Callable[[], optax.GradientTransformation]
    fewest: int = 1
    of_mean: bool = False  # whether it takes the gradient of the mean, and computes those of the tasks itself


# With the authors' arguments for this problem, in addition to the smallest arguments in the registry.
PUBLISHED = (
    Contender("cagrad, c=0.5", lambda: mtl.cagrad(c=0.5)),
    Contender(
        "sam_gs, gamma=0.1, clipped",
        lambda: optax.chain(mtl.sam_gs(2, gamma=0.1), optax.scale(2.0), optax.clip_by_global_norm(1.0)),
    ),
)


def contender(row: Row) -> Contender:
    """A method with its smallest arguments."""
    arguments = {name: value for name, value in row.kwargs(2).items() if name not in ("num_tasks", "method")}
    listed = ", ".join(f"{name}={value}" for name, value in arguments.items())
    name = f"{row.name}({listed})" if listed else row.name
    return Contender(name, lambda: make_row(row, 2), row.fewest, of_mean="losses_fn" in row.functions)


def contenders() -> dict[str, Contender]:
    """All contenders, by their names on the command line."""
    perturbed = [row for row in WRAPPERS if row.folder == "sharpness"]
    smallest = {row.name: contender(row) for row in (*METHODS, *perturbed)}
    return smallest | {each.name: each for each in PUBLISHED}


class Case(NamedTuple):
    """The start and the losses of a run; with a leading axis for several runs."""

    start: jax.Array
    scale: jax.Array
    wells: jax.Array


class History(NamedTuple):
    """What is recorded every EVERY steps: leading axes (records, runs)."""

    path: np.ndarray
    skipped: np.ndarray  # steps so far that the method skipped
    fallbacks: np.ndarray  # steps so far that used another gradient in place of the method's


@dataclass(frozen=True)
class Outcome:
    """The results of one method in one setting."""

    method: str
    setting: str
    history: History  # the start is its first record
    seconds: float  # of CPU time, for all settings together

    @property
    def steps(self) -> int:
        return EVERY * (len(self.history.path) - 1)

    @property
    def ends(self) -> np.ndarray:
        return self.history.path[-1]

    @functools.cached_property
    def on_front(self) -> np.ndarray:
        return _near(self.ends, landscape(SETTINGS[self.setting]).front, NEAR_FRONT)

    @functools.cached_property
    def at_optimum(self) -> np.ndarray:
        return _near(self.ends, landscape(SETTINGS[self.setting]).optima, NEAR_OPTIMUM)


def _near(points: np.ndarray, targets: np.ndarray, reach: float) -> np.ndarray:
    return np.linalg.norm(points[:, None] - targets, axis=-1).min(axis=1) < reach


def step(
    tx: optax.GradientTransformation, losses_fn: Callable, x: jax.Array, state: Any, of_mean: bool = False
) -> tuple[jax.Array, Any]:
    """One step of one run, with everything that a method may need."""
    losses, grads = mtl.task_value_and_grad(losses_fn)(x)
    grads = grads.mean(axis=0) if of_mean else grads
    grad_fn = mtl.perturbed_task_grad(losses_fn)
    updates, state = tx.update(grads, state, x, losses=losses, losses_fn=losses_fn, grad_fn=grad_fn)
    return optax.apply_updates(x, updates), state


def train(method: Contender, cases: Case, records: int) -> History:
    """All runs of one method, in one program; runs of a randomized method are independent."""
    tx = optax.chain(method.make(), optax.adam(LEARNING_RATE))

    def init(start: jax.Array, run: jax.Array) -> tuple[jax.Array, Any]:
        def own(leaf: jax.Array) -> jax.Array:
            return jax.random.fold_in(leaf, run) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

        return start, jax.tree.map(own, tx.init(start))

    def count(what: str, state: Any) -> jax.Array:
        return sum(value for name, value in mtl.metrics(state).items() if name.endswith(what))

    @jax.jit
    def run(cases: Case) -> History:
        def advance(carry: tuple, _: None) -> tuple[tuple, None]:
            def one(x: jax.Array, state: Any, case: Case) -> tuple[jax.Array, Any]:
                losses_of = functools.partial(losses_fn, scale=case.scale, wells=case.wells)
                return step(tx, losses_of, x, state, method.of_mean)

            return jax.vmap(one)(*carry, cases), None

        def record(carry: tuple, _: None) -> tuple[tuple, History]:
            carry, _ = jax.lax.scan(advance, carry, length=EVERY)
            return carry, snapshot(*carry)

        def snapshot(x: jax.Array, state: Any) -> History:
            return History(x, count("skipped", state), count("fallbacks", state))

        first = jax.vmap(init)(cases.start, jnp.arange(len(cases.start)))
        _, history = jax.lax.scan(record, first, length=records)
        return jax.tree.map(lambda start, rest: jnp.concatenate([start[None], rest]), snapshot(*first), history)

    return jax.device_get(run(cases))


def obstacle(method: Contender) -> str | None:
    """Why a method cannot run here, or None."""
    if method.fewest > 2:
        return f"it needs {method.fewest} tasks"
    x = jnp.zeros(2)
    try:
        tx = method.make()
        after, _ = jax.eval_shape(lambda x: step(tx, losses_fn, x, tx.init(x), method.of_mean), x)
    except ValueError as error:
        return str(error)
    return None if after.shape == x.shape else "it keeps the task axis"


def compare(method: Contender, settings: Sequence[str], most_steps: int) -> list[Outcome]:
    """One method in several settings."""
    chosen = [SETTINGS[name] for name in settings]
    runs = [Case(np.array(start, float), np.array(s.scale), np.array(s.wells)) for s in chosen for start in s.starts]
    steps = [min(setting.steps, most_steps) for setting in chosen]
    begin = time.process_time()
    history = train(method, Case(*map(np.stack, zip(*runs, strict=True))), max(steps) // EVERY)
    seconds = time.process_time() - begin
    ends = np.cumsum([len(setting.starts) for setting in chosen])
    return [
        Outcome(method.name, name, History(*(field[: last // EVERY + 1, end - n : end] for field in history)), seconds)
        for name, last, end, n in zip(settings, steps, ends, np.diff(ends, prepend=0), strict=True)
    ]


def share(flags: np.ndarray) -> str:
    return f"{np.sum(flags)}/{len(flags)}"


def places(outcome: Outcome) -> tuple[str, str]:
    """End points of the runs on the front, and of the others."""

    def point(x: np.ndarray, digits: int) -> str:
        return f"({number(x[0], digits)},{number(x[1], digits)})"

    def number(x: float, digits: int = 2) -> str:
        return f"{np.round(x, digits) + 0.0:.{digits}f}"  # no minus sign before zero

    on, off = outcome.ends[outcome.on_front], outcome.ends[~outcome.on_front]
    where = ""
    if len(on) and np.ptp(on, axis=0).max() < NEAR_OPTIMUM:
        where = f"at {point(on.mean(axis=0), digits=2)}"
    elif len(on):
        where = f"a from {number(on[:, 0].min())} to {number(on[:, 0].max())}"
    return where, ", ".join(point(x, digits=1) for x in off)


class Grid(NamedTuple):
    """A table of text, to print or write."""

    headings: list[str]
    rows: list[list[str]]

    def rich(self, title: str) -> Table:
        view = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for heading in self.headings:
            view.add_column(heading, overflow="fold", no_wrap=heading == "method")
        for row in self.rows:
            view.add_row(*row)
        return view

    def markdown(self) -> str:
        rows = [[f"`{name}`", *cells] for name, *cells in self.rows]
        headings = [heading.replace("\n", " ") for heading in self.headings]
        lines = [headings, ["---"] * len(self.headings), *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def overview(outcomes: list[Outcome]) -> Grid:
    """Runs on the front and at an optimum, in every setting."""
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.method, []).append(outcome)
    settings = {outcome.setting: f"{outcome.setting}\n(of {len(outcome.ends)})" for outcome in outcomes}
    rows = [
        [name, *(f"{sum(o.on_front)}, {sum(o.at_optimum)}" for o in group), f"{group[0].seconds:.1f}"]
        for name, group in by_method.items()
    ]
    return Grid(["method", *settings.values(), "CPU seconds"], rows)


def details(outcomes: list[Outcome]) -> Grid:
    """All methods in one setting."""

    def percent(counts: np.ndarray, steps: int) -> str:
        return f"{100 * counts[-1].mean() / steps:.2g}" if counts[-1].any() else ""

    rows = [
        [
            *(o.method, share(o.on_front), share(o.at_optimum), *places(o)),
            *(percent(counts, o.steps) for counts in (o.history.skipped, o.history.fallbacks)),
        ]
        for o in outcomes
    ]
    headings = ["on the\nfront", "at an\noptimum", "ends\non it", "ends\noff it", "skip\n%", "fallen\nback %"]
    return Grid(["method", *headings], rows)


def comparison(outcomes: list[Outcome]) -> Grid:
    """Comparison with INDEPENDENT."""
    ours = {(o.method, o.setting): o for o in outcomes}
    rows = [
        [method, setting, theirs, ", ".join(filter(None, (share(o.on_front), on))) + (f"; off it {off}" if off else "")]
        for method, found in INDEPENDENT.items()
        for setting, theirs in zip(("cagrad", "nash", "unscaled"), found, strict=True)
        if (o := ours.get((method, setting)))
        for on, off in [places(o)]
    ]
    return Grid(["method", "setting", "independent", "here"], rows)


def draw(outcomes: list[Outcome], columns: int = 6) -> Figure:
    """One setting, one panel per method: paths over contours of the mean loss."""
    setting = SETTINGS[outcomes[0].setting]
    land, coarse = landscape(setting), slice(None, None, 10)
    mean = land.mean[coarse, coarse].T
    levels = np.linspace(mean.min(), np.quantile(mean, 0.95), 14)
    darkest = 2 * levels[0] - levels[-1]  # so that only the lighter half of the greys is used
    columns = min(columns, len(outcomes))
    rows = -(-len(outcomes) // columns)
    figure = Figure(figsize=(11 / 6 * columns, 1.9 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, outcome in zip(panels.flat, outcomes, strict=False):
        axis.contourf(land.a[coarse], land.b[coarse], mean, levels, cmap="Greys_r", vmin=darkest, extend="max")
        axis.plot(*land.front.T, color="white", linewidth=2.5)
        for path in outcome.history.path.swapaxes(0, 1):
            lines = np.stack([path[:-1], path[1:]], axis=1)
            time = np.sqrt(np.arange(len(lines)))
            axis.add_collection(LineCollection(lines, array=time, cmap="plasma", linewidth=1.3))
        axis.scatter(*outcome.history.path[0].T, color="black", s=10, zorder=3)
        axis.scatter(*land.optima.T, marker="*", color="#009E73", edgecolor="white", linewidths=0.4, s=60, zorder=3)
        axis.scatter(*outcome.ends.T, color="#F0E442", edgecolor="black", linewidths=0.5, s=10, zorder=3)
        axis.set(xlim=land.a[[0, -1]], ylim=land.b[[0, -1]], xticks=(-10, 0, 10), yticks=(-10, 0, 10))
        axis.tick_params(labelsize=6, length=2)
        axis.set_title(outcome.method, fontsize=7)
    for axis in panels.flat[len(outcomes) :]:
        axis.set_axis_off()
    figure.suptitle(f"{setting.title}: {outcomes[0].steps:,} steps", fontsize=11)
    return figure


def write_csv(outcomes: list[Outcome], path: Path) -> None:
    """One row per run."""
    points = ("start_a", "start_b", "end_a", "end_b")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "method", "steps", *points, "on_front", "at_optimum", "skipped", "fallbacks"])
        for o in outcomes:
            points = np.concatenate([o.history.path[0], o.ends], axis=1)
            counts = zip(o.on_front, o.at_optimum, o.history.skipped[-1], o.history.fallbacks[-1], strict=True)
            for point, numbers in zip(points, counts, strict=True):
                writer.writerow([o.setting, o.method, o.steps, *(f"{v:.5g}" for v in point), *map(int, numbers)])


def hundreds(text: str) -> int:
    """A number of steps on the command line."""
    if (value := int(text)) < EVERY or value % EVERY:
        raise argparse.ArgumentTypeError(f"must be a multiple of {EVERY}, got {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    everyone = contenders()
    most = max(setting.steps for setting in SETTINGS.values())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toy", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(everyone), default=list(everyone), metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=hundreds, default=most, metavar="N", help="at most; a setting's own otherwise")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for figures and toy.csv (runs/toy, or the page's name)"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="whose tables are rewritten (toy.md in --out)")
    args = parser.parse_args(argv)
    out = args.out or (args.page.with_suffix("") if args.page else Path("runs/toy"))
    page = args.page or out / "toy.md"
    out.mkdir(parents=True, exist_ok=True)

    console = Console()
    outcomes, left_out = [], {}
    for name in track(args.methods, console=console, transient=True):
        if reason := obstacle(everyone[name]):
            left_out[name] = reason
        else:
            outcomes += compare(everyone[name], args.settings, args.steps)

    sections = {"overview": overview(outcomes).markdown(), "comparison": comparison(outcomes).markdown()}
    for name in dict.fromkeys(outcome.setting for outcome in outcomes):
        found = [outcome for outcome in outcomes if outcome.setting == name]
        draw(found).savefig(out / f"{name}.png", dpi=110)
        table, title = details(found), f"{SETTINGS[name].title}: {found[0].steps:,} steps"
        console.print(table.rich(title))
        image = Path(os.path.relpath(out, page.parent), f"{name}.png").as_posix()
        sections[name] = f"![{title}]({image})\n\n{table.markdown()}"
    if few := [outcome for outcome in outcomes if outcome.setting == "cagrad" and outcome.method in IN_README]:
        draw(few).savefig(out / "readme.png", dpi=220)
    console.print(overview(outcomes).rich("Runs that end on the front, at an optimum of the mean loss"))
    sections["left out"] = "\n".join(f"- `{name}`: {reason}" for name, reason in left_out.items()) or "None."
    for name, reason in left_out.items():
        console.print(f"Left out: {name}: {reason}", markup=False)
    write_csv(outcomes, out / "toy.csv")
    fill(page, sections)
    console.print(f"In {out}: toy.csv and figures; tables in {page}", markup=False)


if __name__ == "__main__":
    main()
