"""Milliseconds and memory of a whole training step, in units of the plain step: one backward pass of the mean loss.

    python -m benchmarks.cost [--networks NAME ...] [--tasks K ...] [--rounds N] [--csv FILE] [--page FILE]

Every step goes from losses to new parameters, by `optax.sgd`, in one compiled program with donated parameters and
state. Routes: "stacked" aggregates K gradients, and heads get their own; "fs_mtl" and "samo" make that sharpness-aware;
"one backward" is `balanced_value_and_grad`, which takes one backward pass if the method only looks at losses.
`dropgrad` comes before `mean`, `gen_learning_rate` after it, fitting at every step (by default at every eighth).

All steps of a network take turns, round by round in one process, so that their medians cover the same period. In its
turn a step runs twice and the second run counts, since in training a step follows one of its own kind: right after a
step with large stacks, the plain step, which is the unit of all times, takes longer. Memory is what the compiler plans:
arguments, results that do not overwrite them, and temporaries. Flops are the compiler's count, in which the body of a
loop counts once.

If a backward pass costs two forward passes, the plain step costs 3 of these and `fs_mtl` 1 + 2K + 3K: its limit is 1.15
times (1 + 5K) / 3 plain steps.
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtlgrad_jax as mtl
from benchmarks import multimnist
from benchmarks.data import TASKS, Pairs
from benchmarks.multimnist import is_shared
from benchmarks.report import fill, markdown_table
from benchmarks.solvers import machine
from mtlgrad_jax.registry import METHODS, ROWS, needs
from mtlgrad_jax.registry import make as make_row

BASES = ("mean", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad")
ALONE = ("sam_gs", "emtl")  # measured on their own, like all loss weightings
PLAIN, SHARP = "plain", ("fs_mtl", "samo")
ROUTES = ("stacked", *SHARP, "one backward")
OPTIMIZER = optax.sgd(1e-3)
SLACK = 1.15
NOTE = (
    "Time/memory of a step in plain steps; over stacked: in steps of the same method on stacked gradients. "
    "Memory is what the compiler plans."
)
MEASURED = ("milliseconds", "megabytes", "gigaflops")
RATIOS = tuple(f"{kind}_over_{other}" for other in ("plain", "stacked") for kind in ("time", "memory", "flops"))
COLUMNS = ("network", "num_tasks", "method", "route", *MEASURED, *RATIOS, "limit")

Step = Callable[..., tuple[Any, Any]]  # (params, state, batch) -> (updates, state)
Route = tuple[Callable[[Any], Any], Step]  # makes the initial state, and the step


class Network(NamedTuple):
    """The network to train: parameters under "trunk" and, for each task, under "heads"."""

    name: str
    num_tasks: int
    params: Any
    losses_fn: Callable[[Any, Any], dict[str, jax.Array]]
    batch: Any

    def mean_loss(self, params: Any, batch: Any) -> jax.Array:
        return sum(self.losses_fn(params, batch).values()) / self.num_tasks


def multimnist_network(batch: int) -> Network:
    """The network of the demo, on noise."""
    rng = np.random.default_rng(0)
    labels = {task: jnp.asarray(rng.integers(10, size=batch)) for task in TASKS}
    images = jnp.asarray(rng.integers(256, size=(batch, 36, 36), dtype=np.uint8))
    return Network("multimnist", len(TASKS), multimnist.initial_params(0), multimnist.losses_fn, Pairs(images, labels))


def mlp(num_tasks: int, batch: int, width: int, layers: int) -> Network:
    """A trunk of square layers, and a linear head with ten classes for each task."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    trunk = [{"kernel": normal(width, width), "bias": jnp.zeros(width)} for _ in range(layers)]
    heads = {f"task{i}": {"kernel": normal(width, 10), "bias": jnp.zeros(10)} for i in range(num_tasks)}
    labels = {task: jnp.asarray(rng.integers(10, size=batch)) for task in heads}

    def losses_fn(params: Any, batch: Any) -> dict[str, jax.Array]:
        features, labels = batch
        for layer in params["trunk"]:
            features = jax.nn.relu(features @ layer["kernel"] + layer["bias"])
        logits = {task: features @ head["kernel"] + head["bias"] for task, head in params["heads"].items()}
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return {task: cross_entropy(logits[task], labels[task]).mean() for task in logits}

    inputs = jnp.asarray(rng.normal(size=(batch, width)), jnp.float32)
    return Network("mlp", num_tasks, {"trunk": trunk, "heads": heads}, losses_fn, (inputs, labels))


def plain(network: Network) -> Route:
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        return OPTIMIZER.update(jax.grad(network.mean_loss)(params, batch), state, params)

    return OPTIMIZER.init, step


def stacked(network: Network, tx: optax.GradientTransformation) -> Route:
    oracle = mtl.task_value_and_grad(network.losses_fn)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        losses, grads = oracle(params, batch)
        mean_loss = sum(losses.values()) / network.num_tasks  # this and value_fn are for gen_learning_rate
        value_fn = partial(network.mean_loss, batch=batch)
        return tx.update(grads, state, params, losses=losses, value_fn=value_fn, value=mean_loss)

    return tx.init, step


def fs_mtl(network: Network, method: optax.GradientTransformation) -> Route:
    tx = optax.chain(mtl.fs_mtl(method, is_shared=is_shared), OPTIMIZER)
    oracle = mtl.sam_value_and_grad(network.losses_fn, is_shared=is_shared)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        losses, clean, perturbed = oracle(params, batch)
        return tx.update(perturbed, state, params, losses=losses, clean_grads=clean)

    return tx.init, step


def samo(network: Network, method: optax.GradientTransformation) -> Route:
    tx = optax.chain(mtl.samo(method, heads=lambda path: None if is_shared(path) else path[1].key), OPTIMIZER)
    oracle = mtl.perturbed_task_grad(network.losses_fn)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        return tx.update(
            jax.grad(network.mean_loss)(params, batch),
            state,
            params,
            losses=network.losses_fn(params, batch),
            losses_fn=lambda p: network.losses_fn(p, batch),
            grad_fn=lambda p, perturbations: oracle(p, perturbations, batch),
        )

    return tx.init, step


def one_backward(network: Network, method: mtl.Method) -> Route:
    oracle = mtl.balanced_value_and_grad(network.losses_fn, method)

    def init(params: Any) -> tuple[Any, Any]:
        return method.init(params), OPTIMIZER.init(params)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        _, gradient, own = oracle(params, state[0], batch)
        updates, rest = OPTIMIZER.update(gradient, state[1], params)
        return updates, (own, rest)

    return init, step


def routes(network: Network, bases: list[str]) -> Iterator[tuple[str, str, Route]]:
    """All steps to measure, as (method, route, step)."""
    K = network.num_tasks

    def heads_own(method: optax.GradientTransformation, *then: optax.GradientTransformation) -> Route:
        return stacked(network, optax.chain(mtl.shared_private(method, is_shared), *(then or (OPTIMIZER,))))

    yield "mean loss", PLAIN, plain(network)
    for name in bases:
        method = make_row(ROWS[name], K)
        yield name, "stacked", heads_own(method)
        yield name, "fs_mtl", fs_mtl(network, method)
        yield name, "samo", samo(network, method)
    for row in METHODS:
        if row.folder == "losses" and needs(row):
            yield row.name, "stacked", stacked(network, optax.chain(make_row(row, K), OPTIMIZER))
            yield row.name, "one backward", one_backward(network, make_row(row, K))
    for name in ALONE:
        if name in ROWS:
            yield name, "stacked", heads_own(make_row(ROWS[name], K))
    if "dropgrad" in ROWS:
        yield "dropgrad", "stacked", heads_own(optax.chain(mtl.dropgrad(), mtl.mean()))
    if "gen_learning_rate" in ROWS:
        yield "gen_learning_rate", "stacked", heads_own(mtl.mean(), mtl.gen_learning_rate(1e-3, every=1))


def compiled(network: Network, route: Route) -> tuple[Callable, Any, Any]:
    """The step as one program, with its own initial parameters and state."""
    init, update = route

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = update(params, state, batch)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, network.params)
    state = init(params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, network.batch).compile(), params, state


def megabytes(program: Any) -> float:
    """Size of a program's arguments, results and temporaries; results that overwrite donated arguments count once."""
    plan = program.memory_analysis()
    own = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return 1e-6 * (own + plan.temp_size_in_bytes)


def limit(num_tasks: int) -> float:
    """The most plain steps that a step of `fs_mtl` may cost."""
    return SLACK * (1 + 5 * num_tasks) / 3


def gigaflops(program: Any) -> float:
    return 1e-9 * program.cost_analysis()["flops"]


def measure(network: Network, bases: list[str], rounds: int, console: Console) -> list[dict[str, Any]]:
    """The rows of one network."""
    programs = {}
    listed = list(routes(network, bases))
    for method, route, how in track(listed, f"{network.name}: compiling", console=console, transient=True):
        programs[method, route] = compiled(network, how)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for _ in track(range(rounds), f"{network.name}: running", console=console, transient=True):
        for key, (program, params, state) in programs.items():
            for _ in range(2):
                start = time.perf_counter()
                params, state = jax.block_until_ready(program(params, state, network.batch))
                elapsed = time.perf_counter() - start
            times[key].append(1e3 * elapsed)
            programs[key] = program, params, state

    cost = {
        key: np.array([np.median(times[key]), megabytes(program), gigaflops(program)])
        for key, (program, _, _) in programs.items()
    }
    rows = []
    for (method, route), own in cost.items():
        row = {"network": network.name, "num_tasks": network.num_tasks, "method": method, "route": route}
        row |= dict(zip(MEASURED, own, strict=True))
        for name, other in (("plain", ("mean loss", PLAIN)), ("stacked", (method, "stacked"))):
            if other in cost:
                ratios = dict(zip(("time", "memory", "flops"), own / cost[other], strict=True))
                row |= {f"{kind}_over_{name}": ratio for kind, ratio in ratios.items()}
        rows.append(row | ({"limit": limit(network.num_tasks)} if route == "fs_mtl" else {}))
    return rows


def short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}"


def pivot(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of one network as a table, heading first: one line per method, one column per route."""
    found = {(row["method"], row["route"]): row for row in rows}

    def cells(method: str) -> Iterator[str]:
        for route in ROUTES:
            row = found.get((method, route))
            yield f"{short(row['time_over_plain'])}/{short(row['memory_over_plain'])}" if row else ""
        for route in SHARP:
            row = found.get((method, route))
            yield f"{short(row['time_over_stacked'])}/{short(row['memory_over_stacked'])}" if row else ""

    title = "{network}, K = {num_tasks}, plain step {milliseconds:.1f} ms, {megabytes:.1f} MB".format(**rows[0])
    heading = [title, *ROUTES, *(f"{route} over stacked" for route in SHARP)]
    return [heading] + [[name, *cells(name)] for name in dict.fromkeys(row["method"] for row in rows[1:])]


def verdict(rows: list[dict[str, Any]]) -> str:
    """The target and the measured cost."""
    own = [row for row in rows if row["route"] == "fs_mtl"]
    worst = max(own, key=lambda row: row["time_over_plain"])
    return (
        f"`fs_mtl`, K = {worst['num_tasks']}: at most {worst['limit']:.2f} plain steps wanted, "
        f"{np.median([row['time_over_plain'] for row in own]):.2f} measured (median over the methods), "
        f"{worst['time_over_plain']:.2f} in the worst case (`{worst['method']}`); "
        f"{max(row['flops_over_plain'] for row in own):.2f} in flops."
    )


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    (title, *headings), *lines = pivot(rows)
    printed = Table(title=title, caption=NOTE, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    printed.add_column("method", no_wrap=True)
    for heading in headings:
        printed.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for line in lines:
        printed.add_row(*line)
    console.print(printed)
    console.print(verdict(rows).replace("`", ""), highlight=False)


def markdown(tables: list[list[dict[str, Any]]]) -> str:
    parts = []
    for rows in tables:
        heading, *lines = pivot(rows)
        parts += [markdown_table(heading, ([f"`{line[0]}`", *line[1:]] for line in lines)), verdict(rows)]
    return "\n\n".join([NOTE, *parts])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.split("\n")[0])
    names = ("multimnist", "mlp")
    parser.add_argument("--networks", nargs="+", choices=names, default=list(names), metavar="NAME", help="(both)")
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 8], metavar="K", help="heads of the mlp (2 8)")
    parser.add_argument("--width", type=int, default=512, metavar="N", help="of the mlp (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of the mlp (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="(%(default)s)")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), metavar="METHOD", help="(all)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="steps of each (%(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("runs/cost.csv"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a Markdown file to put the tables into")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args, console = parse(argv), Console()
    console.print(machine("jax", "optax"))
    makers: dict[str, Callable[[], Iterator[Network]]] = {
        "multimnist": lambda: iter([multimnist_network(args.batch)]),
        "mlp": lambda: (mlp(K, args.batch, args.width, args.layers) for K in args.tasks),
    }
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    tables = []
    with args.csv.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for network in itertools.chain.from_iterable(makers[name]() for name in args.networks):
            tables.append(measure(network, args.bases, args.rounds, console))
            for row in tables[-1]:
                writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
            print_table(tables[-1], console)
    if args.page:
        fill(args.page, {"cost": markdown(tables)})


if __name__ == "__main__":
    main()
