"""Milliseconds of an update on whatever device JAX has, beside `optax.adam` alone and a plain training step.

    python -m benchmarks.device [--methods NAME ...] [--tasks K ...] [--parameters P ...] [--rounds N] [--csv FILE]

The stack holds the K gradients of a network with three square layers, random normal in float32. A plain step is one
backward pass of this network's mean loss over K outputs, for 128 samples, and an update by `optax.sgd`. A measurement
is ten updates one after the other, each with the state of the last, after two such runs as a warm-up. All programs of
one size take turns, round by round, so that their medians cover the same period.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.solvers import machine
from mtlgrad_jax.registry import METHODS, ROWS
from mtlgrad_jax.registry import make as make_row

ADAM, PLAIN = "adam alone", "plain step"
LAYERS, BATCH, UPDATES = 3, 128, 10
COLUMNS = ("device", "method", "num_tasks", "parameters", "milliseconds", "over_adam", "over_plain")
NAMES = [row.name for row in METHODS if not row.functions]


def parameters(size: int) -> dict[str, jax.Array]:
    """Square layers with about `size` entries in all."""
    width = max(round((size / LAYERS) ** 0.5), 1)
    normal = np.random.default_rng(0).normal(size=(LAYERS, width, width)) / width**0.5
    return {f"layer{i}": jnp.asarray(layer, jnp.float32) for i, layer in enumerate(normal)}


def loss(params: dict[str, jax.Array], x: jax.Array, num_tasks: int) -> jax.Array:
    for layer in params.values():
        x = jnp.tanh(x @ layer)
    return jnp.mean(x[:, : min(num_tasks, x.shape[1])] ** 2)


def programs(names: list[str], num_tasks: int, params: dict[str, jax.Array]) -> dict[str, Callable[[], Any]]:
    """For each method, adam and the plain step, a call that runs ten updates."""
    rng = np.random.default_rng(1)
    stack = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(num_tasks, *p.shape)), jnp.float32), params)
    losses, x = jnp.linspace(0.5, 2.0, num_tasks), jnp.asarray(rng.normal(size=(BATCH, len(params["layer0"]))), "f4")

    def repeated(step: Callable[[Any, Any], Any], data: Any, state: Any) -> Callable[[], Any]:
        program, now = jax.jit(step, donate_argnums=1), [state]

        def call() -> Any:
            for _ in range(UPDATES):
                now[0] = program(data, now[0])
            return jax.block_until_ready(now)

        return call

    def of_method(name: str) -> Callable[[], Any]:
        tx = make_row(ROWS[name], num_tasks)

        def step(stack: Any, carry: Any) -> Any:
            return tx.update(stack, carry[1], losses=losses)

        return repeated(step, stack, (jax.tree.map(jnp.zeros_like, params), tx.init(params)))

    def plain(x: Any, params: Any) -> Any:
        return optax.apply_updates(params, jax.tree.map(lambda g: -1e-3 * g, jax.grad(loss)(params, x, num_tasks)))

    adam = optax.adam(1e-3)
    gradient = jax.tree.map(lambda leaf: leaf[0], stack)
    first = (jax.tree.map(jnp.zeros_like, params), adam.init(params))
    return {
        ADAM: repeated(lambda gradient, carry: adam.update(gradient, carry[1]), gradient, first),
        PLAIN: repeated(plain, x, jax.tree.map(jnp.copy, params)),
        **{name: of_method(name) for name in names},
    }


def measure(names: list[str], num_tasks: int, size: int, rounds: int, console: Console) -> list[dict[str, Any]]:
    """The rows of one size, fastest first."""
    params = parameters(size)
    calls = programs(names, num_tasks, params)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in track(calls.values(), f"K = {num_tasks}, P = {size}: compiling", console=console, transient=True):
        for _ in range(2):
            call()
    for _ in track(range(rounds), f"K = {num_tasks}, P = {size}", console=console, transient=True):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start) / UPDATES)
    cost = {name: float(np.median(own)) for name, own in times.items()}
    row = {"device": jax.devices()[0].device_kind, "num_tasks": num_tasks, "parameters": size}
    return [
        {**row, "method": name, "milliseconds": own, "over_adam": own / cost[ADAM], "over_plain": own / cost[PLAIN]}
        for name, own in sorted(cost.items(), key=lambda item: item[1])
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="(all)")
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 8, 40], metavar="K", help="(2 8 40)")
    sizes = [100_000, 10_000_000]
    parser.add_argument("--parameters", nargs="+", type=int, default=sizes, metavar="P", help="(100000 10000000)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="measurements of each (%(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("runs/device.csv"), metavar="FILE", help="(%(default)s)")
    args, console = parser.parse_args(argv), Console()
    console.print(f"{jax.devices()[0].device_kind}; {machine('jax', 'optax')}")
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for size in args.parameters:
            for num_tasks in args.tasks:
                rows = measure(args.methods, num_tasks, size, args.rounds, console)
                writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
                printed = Table(title=f"K = {num_tasks}, P = {size}", box=box.SIMPLE_HEAD)
                for heading in ("method", "ms", "over adam", "over a plain step"):
                    printed.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
                for row in rows:
                    numbers = (f"{row[key]:.3g}" for key in COLUMNS[-3:])
                    printed.add_row(row["method"], *numbers)
                console.print(printed)


if __name__ == "__main__":
    main()
