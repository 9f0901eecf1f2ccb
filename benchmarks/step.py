"""Time and memory of a training step against the number of tasks, beside TorchJD's, each in plain steps.

    python -m benchmarks.step [--networks NAME ...] [--tasks K ...] [--rounds N] [--csv FILE] [--page FILE]

A plain step is one backward pass of the mean loss and a step of SGD, in the same framework. The networks are an MLP
(three layers, 512 wide) and a transformer (four layers, 256 wide, 16 tokens), each with a linear head of ten classes
for every task. All steps go from a batch to new parameters; `upgrad` weighs the gradients of the trunk. Ours are one
compiled program each:

- stacked: `task_value_and_grad(strategy="unrolled")`, the default for up to 40 named losses,
- stacked, looped: the same with `strategy=1`,
- stacked, vmap: the same with `strategy="vmap"`, the default for more, and for more than 8 in an array,
- features: `linearize_features`; K cotangents go through the trunk only,
- bound: `linearize_features(bound=True)`, weights from the features' gradients,
- not stored: `linearize`, at the memory of a single backward pass,
- weights kept: the same with `update_every`, in a step between two solves.

TorchJD's are `mtl_backward` with all tasks at once ("autojac") or one after the other ("autojac one by one"), and the
Gramian engine ("autogram").

Ours take turns, round by round; each of TorchJD's runs in a process of its own, in turns with the plain step, so that
its peak memory is known. Memory is what a step needs beyond parameters and batch: for ours the temporaries that the
compiler plans, for TorchJD the growth of the process in its first steps.
"""

import argparse
import copy
import csv
import itertools
import multiprocessing
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtlgrad_jax as mtl
from benchmarks.report import COLORS, MARKERS, fill, markdown_table
from benchmarks.solvers import machine

BATCH, CLASSES, TOKENS, RATE = 128, 10, 16, 1e-3
WIDTH, LAYERS, ATTENTION_HEADS = {"mlp": 512, "transformer": 256}, {"mlp": 3, "transformer": 4}, 4
OURS, PEER, PLAIN = "mtlgrad_jax", "TorchJD", "plain"
THEIRS = ("autojac", "autojac one by one", "autogram")
COLUMNS = ("network", "num_tasks", "framework", "step", "milliseconds", "megabytes", "time_over_plain")
COLUMNS += ("memory_over_plain", "limit", "compile_seconds")
LIMITS: dict[str, Callable[[int], float]] = {
    "stacked": lambda K: 1.25 * (1 + 2 * K) / 3,
    "bound": lambda K: 1.4,
    "not stored": lambda K: 1.15 * (3 + 4 * K) / 3,
    "weights kept": lambda K: 1.15,
}
"""The most plain steps that a step may take, if a backward pass costs two forward passes."""

GREYS = ("#aaaaaa", "#888888", "#555555", "#000000")

Row = dict[str, Any]


class Network(NamedTuple):
    """A trunk with a linear head for every task, and a batch."""

    trunk_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any

    def heads_fn(self, params: Any, features: jax.Array, batch: Any) -> dict[str, jax.Array]:
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        logits = {task: features @ head["kernel"] + head["bias"] for task, head in params["heads"].items()}
        return {task: cross_entropy(logits[task], labels).mean() for task, labels in batch["labels"].items()}

    def losses_fn(self, params: Any, batch: Any) -> dict[str, jax.Array]:
        return self.heads_fn(params, self.trunk_fn(params, batch), batch)


def network(name: str, num_tasks: int) -> Network:
    width, rng = WIDTH[name], np.random.default_rng(0)

    def dense(inputs: int, outputs: int) -> dict[str, jax.Array]:
        kernel = jnp.asarray(rng.normal(size=(inputs, outputs)) / np.sqrt(inputs), jnp.float32)
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def block() -> dict[str, Any]:
        sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        return {layer: dense(*size) for layer, size in sizes.items()} | {"before": norm(), "between": norm()}

    tasks = [f"task{i:02}" for i in range(num_tasks)]
    shape = (BATCH, width) if name == "mlp" else (BATCH, TOKENS, width)
    trunk = [dense(width, width) if name == "mlp" else block() for _ in range(LAYERS[name])]
    params = {"trunk": trunk, "heads": {task: dense(width, CLASSES) for task in tasks}}
    labels = {task: jnp.asarray(rng.integers(CLASSES, size=BATCH)) for task in tasks}
    inputs = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return Network(mlp if name == "mlp" else transformer, params, {"inputs": inputs, "labels": labels})


def linear(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def mlp(params: Any, batch: Any) -> jax.Array:
    x = batch["inputs"]
    for layer in params["trunk"]:
        x = jax.nn.relu(linear(layer, x))
    return x


def transformer(params: Any, batch: Any) -> jax.Array:
    def normalized(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, epsilon=1e-5) * layer["scale"] + layer["bias"]

    def attention(block: Any, x: jax.Array) -> jax.Array:
        qkv = linear(block["qkv"], x).reshape(*x.shape[:2], 3, ATTENTION_HEADS, -1)
        found = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)))
        return linear(block["out"], found.reshape(x.shape))

    x = batch["inputs"]
    for block in params["trunk"]:
        x = x + attention(block, normalized(block["before"], x))
        x = x + linear(block["down"], jax.nn.relu(linear(block["up"], normalized(block["between"], x))))
    return x.mean(axis=1)


def our_steps(net: Network, num_tasks: int) -> dict[str, tuple[Any, Callable[..., tuple[Any, Any]]]]:
    """For each form of step its first state, and the step itself: (params, state, batch) -> (gradient, state)."""
    shared = mtl.under("trunk")
    method = mtl.shared_private(mtl.upgrad(), shared)
    kept = mtl.shared_private(mtl.update_every(mtl.upgrad(), num_tasks, k=1 << 20), shared)
    state, first = method.init(net.params), kept.init(net.params)
    after_solve = jax.jit(lambda: kept.update(mtl.linearize(net.losses_fn, net.params, net.batch), first)[1])()

    def plain(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        return jax.grad(lambda p: sum(net.losses_fn(p, batch).values()) / num_tasks)(params), state

    def stacked(params: Any, state: Any, batch: Any, *, strategy: Any) -> tuple[Any, Any]:
        losses, grads = mtl.task_value_and_grad(net.losses_fn, strategy=strategy)(params, batch)
        return method.update(grads, state, params, losses=losses)

    def features(params: Any, state: Any, batch: Any, *, bound: bool) -> tuple[Any, Any]:
        jacobian = mtl.linearize_features(net.trunk_fn, net.heads_fn, params, batch, bound=bound)
        return method.update(jacobian, state, params)

    def not_stored(params: Any, state: Any, batch: Any, *, method: mtl.Method) -> tuple[Any, Any]:
        return method.update(mtl.linearize(net.losses_fn, params, batch), state, params)

    return {
        PLAIN: ((), plain),
        "stacked": (state, partial(stacked, strategy="unrolled")),
        "stacked, looped": (state, partial(stacked, strategy=1)),
        "stacked, vmap": (state, partial(stacked, strategy="vmap")),
        "features": (state, partial(features, bound=False)),
        "bound": (state, partial(features, bound=True)),
        "not stored": (state, partial(not_stored, method=method)),
        "weights kept": (after_solve, partial(not_stored, method=kept)),
    }


def ours(name: str, num_tasks: int, rounds: int) -> list[Row]:
    """The rows of this library."""
    net = network(name, num_tasks)
    programs, seconds = {}, {}
    for form, (state, gradient_of) in our_steps(net, num_tasks).items():

        def step(params: Any, state: Any, batch: Any, gradient_of: Callable = gradient_of) -> tuple[Any, Any]:
            gradient, state = gradient_of(params, state, batch)
            return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), state

        carry = jax.tree.map(jnp.copy, (net.params, state))
        start = time.perf_counter()
        program = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, net.batch).compile()
        programs[form], seconds[form] = (program, carry), time.perf_counter() - start
    times: dict[str, list[float]] = {form: [] for form in programs}
    for _ in range(rounds):
        for form, (program, carry) in programs.items():
            for _ in range(2):  # the second counts: in training, a step follows one of its own kind
                start = time.perf_counter()
                carry = jax.block_until_ready(program(*carry, net.batch))
                elapsed = time.perf_counter() - start
            times[form].append(1e3 * elapsed)
            programs[form] = program, carry
    found = {
        form: (float(np.median(times[form])), 1e-6 * program.memory_analysis().temp_size_in_bytes)
        for form, (program, _) in programs.items()
    }
    limits = {form: limit(num_tasks) for form, limit in LIMITS.items()}
    return [
        row(OURS, form, *found[form], *found[PLAIN]) | {"limit": limits.get(form), "compile_seconds": seconds[form]}
        for form in found
    ]


def row(
    framework: str, form: str, milliseconds: float, megabytes: float, plain_time: float, plain_memory: float
) -> Row:
    over = {"time_over_plain": milliseconds / plain_time, "memory_over_plain": megabytes / plain_memory}
    return {"framework": framework, "step": form, "milliseconds": milliseconds, "megabytes": megabytes} | over


def torchjd_step(name: str, num_tasks: int, form: str, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of TorchJD's step and of the plain step, and the growth of this process in MB during the first.

    Runs in a process of its own.
    """
    import torch
    from torch import nn
    from torchjd.aggregation import UPGrad, UPGradWeighting
    from torchjd.autogram import Engine
    from torchjd.autojac import jac_to_grad, mtl_backward

    torch.manual_seed(0)
    width = WIDTH[name]
    layers = [
        nn.Sequential(nn.Linear(width, width), nn.ReLU())
        if name == "mlp"
        else nn.TransformerEncoderLayer(width, ATTENTION_HEADS, 4 * width, 0.0, batch_first=True, norm_first=True)
        for _ in range(LAYERS[name])
    ]
    trunk = nn.Sequential(*layers)
    heads = [nn.Linear(width, CLASSES) for _ in range(num_tasks)]
    plain_trunk = copy.deepcopy(trunk)  # an engine watches every forward pass of its trunk
    params = [p for module in (trunk, plain_trunk, *heads) for p in module.parameters()]
    optimizer = torch.optim.SGD(params, RATE)
    inputs = torch.randn((BATCH, width) if name == "mlp" else (BATCH, TOKENS, width))
    labels = torch.randint(CLASSES, (num_tasks, BATCH))
    aggregator, weighting, engine = UPGrad(), UPGradWeighting(), Engine(trunk, batch_dim=None)

    def forward(trunk: nn.Module) -> tuple[Any, list[Any]]:
        features = trunk(inputs)
        features = features if name == "mlp" else features.mean(dim=1)
        return features, [nn.functional.cross_entropy(head(features), y) for head, y in zip(heads, labels, strict=True)]

    def step(form: str) -> None:
        features, losses = forward(plain_trunk if form == PLAIN else trunk)
        if form == "autogram":
            weights = weighting(engine.compute_gramian(torch.stack(losses)))
            torch.stack(losses).backward(weights)
        elif form == PLAIN:
            (sum(losses) / num_tasks).backward()
        else:
            mtl_backward(losses, features, parallel_chunk_size=None if form == "autojac" else 1)
            jac_to_grad(trunk.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()

    forward(plain_trunk)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = megabytes_at_peak()
    for _ in range(3):
        step(form)
    grown = megabytes_at_peak() - before
    times: dict[str, list[float]] = {form: [], PLAIN: []}
    for _ in range(rounds):
        for each in times:
            for _ in range(2):
                start = time.perf_counter()
                step(each)
                elapsed = time.perf_counter() - start
            times[each].append(1e3 * elapsed)
    return float(np.median(times[form])), float(np.median(times[PLAIN])), grown


def megabytes_at_peak() -> float:
    """The most memory that this process has held; Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1.024e-3 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def theirs(name: str, num_tasks: int, rounds: int) -> list[Row]:
    """The rows of TorchJD."""
    found = {}
    for form in (PLAIN, *THEIRS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[form] = pool.apply(torchjd_step, (name, num_tasks, form, rounds))
    plain_memory = found[PLAIN][2]
    return [row(PEER, form, time, memory, plain, plain_memory) for form, (time, plain, memory) in found.items()]


def three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def pivot(rows: list[Row]) -> list[list[str]]:
    """The rows of a network and K as a table, heading first."""
    heading = ["{network}, K = {num_tasks}".format(**rows[0])]
    heading += ["ms", "plain steps", "limit", "MB", "times plain", "compile (s)"]
    lines = []
    for row in rows:
        limit = f"{row['limit']:.2f}" if row.get("limit") else ""
        numbers = [three_digits(row["milliseconds"]), f"{row['time_over_plain']:.2f}", limit]
        numbers += [three_digits(row["megabytes"]), f"{row['memory_over_plain']:.2f}"]
        numbers.append(f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "")
        lines.append([f"{row['framework']}: {row['step']}", *numbers])
    return [heading, *lines]


def print_table(rows: list[Row], console: Console) -> None:
    (title, *headings), *lines = pivot(rows)
    printed = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    printed.add_column("step", no_wrap=True)
    for heading in headings:
        printed.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for line in lines:
        printed.add_row(*line)
    console.print(printed)


def draw(rows: list[Row]) -> Figure:
    """Time and memory against K, for each network."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(5.5 * len(names), 7.5), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    kinds = list(dict.fromkeys((row["framework"], row["step"]) for row in rows))
    for column, name in enumerate(names):
        for i, (framework, form) in enumerate(kinds):
            own = [r for r in rows if (r["network"], r["framework"], r["step"]) == (name, framework, form)]
            tasks = [r["num_tasks"] for r in own]
            color = COLORS[i % len(COLORS)] if framework == OURS else GREYS[i % len(GREYS)]
            style: dict[str, Any] = {"color": color, "marker": MARKERS[i % len(MARKERS)]}
            line = "--" if framework != OURS else "-" if i < len(COLORS) else ":"
            style |= {"linestyle": line, "label": f"{framework}: {form}"}
            if form != PLAIN:
                axes[0, column].plot(tasks, [r["time_over_plain"] for r in own], **style)
            axes[1, column].plot(tasks, [r["megabytes"] for r in own], **style)
        axes[0, column].set(title=name, ylabel="time (plain steps)")
        axes[1, column].set(xlabel="tasks", ylabel="memory (MB)")
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(sorted({row["num_tasks"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", choices=list(WIDTH), default=list(WIDTH), metavar="NAME", help="(both)"
    )
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 8, 40], metavar="K", help="(2 8 40)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps of each (%(default)s)")
    parser.add_argument("--csv", type=Path, default=Path("runs/step.csv"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a Markdown file to put tables and figure into")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args, console = parse(argv), Console()
    where = machine("jax", "torch", "torchjd")
    console.print(where)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    tables: list[list[Row]] = []
    with args.csv.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        sizes = list(itertools.product(args.networks, args.tasks))
        for name, K in track(sizes, "measuring", console=console, transient=True):
            found = ours(name, K, args.rounds) + theirs(name, K, args.rounds)
            tables.append([{"network": name, "num_tasks": K, **row} for row in found])
            for row in tables[-1]:
                writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
            print_table(tables[-1], console)
    if args.page:
        picture = args.page.with_suffix(".png")
        draw(list(itertools.chain.from_iterable(tables))).savefig(picture, dpi=120)
        parts = [markdown_table(*(lambda heading, *lines: (heading, lines))(*pivot(rows))) for rows in tables]
        fill(args.page, {"step": "\n\n".join([where + ".", f"![time and memory against K]({picture.name})", *parts])})


if __name__ == "__main__":
    main()
