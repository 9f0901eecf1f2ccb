"""Milliseconds of an update coordinate by coordinate, in copies of the stack, beside TorchJD 0.18 (extra `peers`).

    python -m benchmarks.coordinates [--tasks K ...] [--parameters P ...] [--rounds N] [--csv FILE]

The unit is a copy of the K stacked gradients, one matrix in float32, into memory that is already there: what reading
the stack and writing as much costs. Every update runs as one compiled program whose gradient overwrites the last one;
"sum" is the weighted sum that all methods end with. All programs take turns, round by round in one process, so that
their medians cover the same period; in its turn each runs twice and the second run counts. TorchJD has as many threads
as XLA. Its `GradDrop` and `TrimmedMean` return a new vector.
"""

import argparse
import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtlgrad_jax as mtl
from benchmarks.solvers import machine
from mtlgrad_jax.registry import METHODS
from mtlgrad_jax.registry import make as make_row

COLUMNS = ("library", "method", "num_tasks", "parameters", "milliseconds", "over_copy", "over_torchjd")
COPY, OURS, PEER = "copy of the stack", "mtlgrad_jax", "torchjd"


def updates(num_tasks: int) -> dict[str, mtl.Method]:
    """The sum, and every method of the folder `coordinates`."""
    return {"sum": mtl.sum()} | {row.name: make_row(row, num_tasks) for row in METHODS if row.folder == "coordinates"}


def repeated(method: mtl.Method, grads: jax.Array) -> Callable[[], Any]:
    """A call that makes one update; its state and gradient take the place of the last ones."""

    def step(grads: jax.Array, state: Any, last: jax.Array) -> tuple[jax.Array, Any]:
        del last
        return method.update(grads, state)

    program = jax.jit(step, donate_argnums=(1, 2), keep_unused=True)
    now = [jnp.zeros_like(grads[0]), method.init(grads[0])]

    def call() -> Any:
        now[:] = program(grads, now[1], now[0])
        return jax.block_until_ready(now)

    return call


def peers(grads: np.ndarray) -> dict[str, Callable[[], Any]]:
    """TorchJD's aggregators of the same names."""
    import torch
    from torchjd import aggregation

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    matrix = torch.from_numpy(grads)
    found = {"graddrop": aggregation.GradDrop(), "trimmed_mean": aggregation.TrimmedMean(1)}
    return {name: lambda aggregate=aggregate: aggregate(matrix) for name, aggregate in found.items()}


def measure(num_tasks: int, parameters: int, rounds: int, console: Console) -> list[dict[str, Any]]:
    """The rows for one shape of the stack."""
    grads = np.random.default_rng(0).normal(size=(num_tasks, parameters)).astype(np.float32)
    stack, target = jnp.asarray(grads), np.zeros_like(grads)
    calls: dict[tuple[str, str], Callable[[], Any]] = {("numpy", COPY): lambda: np.copyto(target, grads)}
    calls |= {(OURS, name): repeated(method, stack) for name, method in updates(num_tasks).items()}
    calls |= {(PEER, name): call for name, call in peers(grads).items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in track(range(rounds), f"K = {num_tasks}, P = {parameters}", console=console, transient=True):
        for key, call in calls.items():
            for _ in range(2):
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
            times[key].append(1e3 * elapsed)
    cost = {key: float(np.median(own)) for key, own in times.items()}
    rows = []
    for (library, name), own in cost.items():
        row = {"library": library, "method": name, "num_tasks": num_tasks, "parameters": parameters}
        row |= {"milliseconds": own, "over_copy": own / cost["numpy", COPY]}
        if library == OURS and (PEER, name) in cost:
            row["over_torchjd"] = own / cost[PEER, name]
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    printed = Table(title=f"K = {rows[0]['num_tasks']}, P = {rows[0]['parameters']}", box=box.SIMPLE_HEAD)
    for heading in ("library", "method"):
        printed.add_column(heading, no_wrap=True)
    for heading in ("ms", "over\ncopy", "over\nTorchJD"):
        printed.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ratios = (f"{row[key]:.2f}" if key in row else "" for key in COLUMNS[-2:])
        printed.add_row(row["library"], row["method"], f"{row['milliseconds']:.2f}", *ratios)
    console.print(printed)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coordinates", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", type=int, default=[4, 8], metavar="K", help="(4 8)")
    parser.add_argument("--parameters", nargs="+", type=int, default=[1_000_000], metavar="P", help="(1000000)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="runs of each (%(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("runs/coordinates.csv"), metavar="FILE", help="(%(default)s)")
    args, console = parser.parse_args(argv), Console()
    console.print(machine("jax", "torch", "torchjd"))
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for parameters in args.parameters:
            for num_tasks in args.tasks:
                rows = measure(num_tasks, parameters, args.rounds, console)
                for row in rows:
                    writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
                print_table(rows, console)


if __name__ == "__main__":
    main()
