"""Seconds to compile one update of every method and wrapper, for trees of many leaves, compared with `optax.adam`.

    python -m benchmarks.compile [--methods NAME ...] [--leaves N ...] [--width N] [--csv FILE] [--page FILE]

Half of the leaves are matrices and half are vectors, for four tasks. The time is that of the first training step:
tracing and compiling `jax.jit(tx.update)` without a cache. `adam` updates one gradient with the same leaves and is
timed again just before each method, as the load of a machine varies. Wrappers wrap the method that the registry gives
them; `grouped` makes each leaf a group; `samo` and `gen_learning_rate` evaluate a loss of one leaf.

Growth is the ratio of the last two sizes: 2 if the number of leaves doubles and time is linear in it, less if most of
the time goes into a solver, which does not depend on it. Instructions are those of the compiled program.
"""

import argparse
import csv
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import fill, markdown_table
from benchmarks.solvers import machine
from mtlgrad_jax.registry import ROWS
from mtlgrad_jax.registry import make as make_row

K = 4
ADAM = "adam"
COLUMNS = ("method", "leaves", "seconds", "adam_seconds", "over_adam", "instructions")

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments


def parameters(leaves: int, width: int) -> dict[str, jax.Array]:
    return {f"leaf{i}": jnp.zeros((width, width) if i % 2 else (width,)) for i in range(leaves)}


def adam(params: Any) -> Call:
    tx = optax.adam(1e-3)
    return tx.update, (params, tx.init(params))


def update(name: str, params: Any, tx: Any = None) -> Call:
    """An update of a registry row's method, or of another transformation with the same arguments."""
    row = ROWS[name]
    tx = make_row(row, K) if tx is None else tx
    stack = jax.tree.map(lambda p: jnp.zeros((K, *p.shape)), params)
    evaluated: dict[str, Callable[..., Any]] = {
        "losses_fn": lambda p: jnp.full(K, jnp.sum(p["leaf0"])),
        "value_fn": lambda p: jnp.sum(p["leaf0"]),
        "grad_fn": lambda p, perturbations: perturbations,
    }
    functions = {need: evaluated[need] for need in row.functions if need in evaluated}
    arrays = {"losses": jnp.ones(K)}
    if any("clean_grads" in need for need in row.functions):
        arrays["clean_grads"] = stack

    def step(grads: Any, state: Any, arrays: Any) -> Any:
        return tx.update(grads, state, params, **arrays, **functions)

    return step, (params if functions else stack, tx.init(params), arrays)


def compiled(call: Call) -> tuple[float, Any]:
    """Seconds to trace and compile, and the compiled program."""
    function, args = call
    jax.clear_caches()
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return time.perf_counter() - start, program


def instructions(program: Any) -> int:
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", program.as_text(), re.MULTILINE))


def measure(names: list[str], sizes: list[int], width: int, console: Console) -> Iterator[dict[str, Any]]:
    """The rows, method by method."""
    for name in track(names, "compiling", console=console, transient=True):
        for leaves in sizes:
            params = parameters(leaves, width)
            reference, _ = compiled(adam(params))
            seconds, program = compiled(update(name, params))
            yield {
                "method": name,
                "leaves": leaves,
                "seconds": seconds,
                "adam_seconds": reference,
                "over_adam": seconds / reference,
                "instructions": instructions(program),
            }


def pivot(rows: list[dict[str, Any]], sizes: list[int]) -> list[list[str]]:
    """The rows as a table with one line per method, heading first."""
    heading = ["method", *(f"{leaves} leaves" for leaves in sizes), "growth", "over adam", "instructions a leaf"]
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = {row["leaves"]: row for row in rows if row["method"] == name}
        last, before = own[sizes[-1]], own[sizes[-2]]
        slope = (last["instructions"] - before["instructions"]) / (sizes[-1] - sizes[-2])
        seconds = [f"{own[leaves]['seconds']:.1f}" for leaves in sizes]
        growth = last["seconds"] / before["seconds"]
        lines.append([name, *seconds, f"{growth:.1f}", f"{last['over_adam']:.1f}", f"{slope:.0f}"])
    return [heading, *lines]


def verdict(rows: list[dict[str, Any]], sizes: list[int]) -> str:
    last = [row for row in rows if row["leaves"] == sizes[-1]]
    times = sorted(row["adam_seconds"] for row in last)
    worst = max(last, key=lambda row: row["over_adam"])
    return (
        f"Seconds. `adam` took {times[0]:.1f} to {times[-1]:.1f} for {sizes[-1]} leaves during this run; the "
        f"slowest row is `{worst['method']}`, {worst['over_adam']:.1f} times the time of `adam`."
    )


def print_table(rows: list[dict[str, Any]], sizes: list[int], console: Console) -> None:
    (_, *headings), *lines = pivot(rows, sizes)
    printed = Table(caption=verdict(rows, sizes).replace("`", ""), box=box.SIMPLE_HEAD, pad_edge=False)
    printed.add_column("method", no_wrap=True)
    for heading in headings:
        printed.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for line in lines:
        printed.add_row(*line)
    console.print(printed)


def markdown(rows: list[dict[str, Any]], sizes: list[int], where: str) -> str:
    heading, *lines = pivot(rows, sizes)
    table = markdown_table(heading, ([f"`{line[0]}`", *line[1:]] for line in lines))
    return "\n\n".join([where + ".", verdict(rows, sizes), table])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="(all)")
    parser.add_argument("--leaves", nargs="+", type=int, default=[300, 600], metavar="N", help="(300 600)")
    parser.add_argument("--width", type=int, default=8, metavar="N", help="of matrices and vectors (%(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("runs/compile.csv"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a Markdown file to put the table into")
    args = parser.parse_args(argv)
    if len(args.leaves) < 2:
        parser.error("--leaves takes two numbers or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args, console = parse(argv), Console()
    where = machine("jax", "optax")
    console.print(where)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with args.csv.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measure(args.methods, args.leaves, args.width, console):
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
            rows.append(row)
    print_table(rows, args.leaves, console)
    if args.page:
        fill(args.page, {"compile": markdown(rows, args.leaves, where)})


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
