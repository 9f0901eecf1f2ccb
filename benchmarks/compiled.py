"""What every update is compiled to for a TPU v5e, alone and as one of four, and for an H100, with neither at hand.

    python -m benchmarks.compiled [--targets h100 v5e v5e:2x2] [--methods NAME ... | --all] [--tasks K ...] [--tree]
                                  [--csv FILE] [--resume] [--page FILE]

The programs are those of the compilers for these devices; nothing runs on them. How often loops and branches run is
counted on the CPU, for gradients of every family in tests/families.py, at three numbers of columns. Loops of the
compiled program are found again by their names. `--tree` prints the programs: their loops, their branches and what
these launch. The exit status is 1 if a program is not as it must be: see `faults`.

On a GPU, a launch is a kernel, a copy or a call of a library, which launches one kernel or more. XLA may record five
launches or more in a row as one CUDA graph; here each counts. The host waits for the device before each iteration of a
loop of unknown length, after its last one, and at each conditional. On a TPU, bytes are the operands and results of
the instructions in main memory; a part of an operand that is cut out of it counts as this part.
"""

import argparse
import csv
import functools
import itertools
import os
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track
from rich.tree import Tree

from benchmarks import hlo
from benchmarks.control_flow import named, place
from benchmarks.report import fill, markdown_table
from mtlgrad_jax.registry import FOLDERS, METHODS, ROWS
from mtlgrad_jax.registry import make as make_row

# The published figures of the card, from which the compiler chooses tilings.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 85045149696
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
COMPILERS = ("jax", "jax-cuda12-pjrt", "libtpu")
TARGETS = {"h100": "cuda", "v5e": "tpu", "v5e:2x2": "tpu"}
PARAMETERS = {"cuda": 1 << 12, "tpu": 1 << 24}  # on a TPU many, so that bytes of K×K matrices do not count
NAMES = [row.name for row in METHODS]
SHORT = ["mean", "uw", "mgda", "cagrad", "nash_mtl", "pcgrad", "epo", "coordinate_median", "modo", "db_mtl"]
LAUNCH, WAIT = 4, 10  # microseconds on a GPU
TPU_TASKS = 8
NAMED = 6  # methods of a kind whose names the page lists
PADDED = 512  # bytes that a TPU sends for a single number
# Gradients that must move: those of all tasks for the Gramian, again for the weighted sum, and the update.
FLOORS = {"gramian": lambda K: 2 * K + 1, "mixed": lambda K: 2 * K + 1}
COLUMNS = (
    *("target", "num_tasks", "method", "launches", "launches_worst", "library", "waits", "waits_worst"),
    *("iterations", "iterations_worst", "gradients", "sent", "seconds"),
)


def prepare() -> None:
    """Set what the compilers read when they start, so that they look for no device."""
    nvcc = Path(sysconfig.get_path("purelib")) / "nvidia" / "cuda_nvcc"
    os.environ["PATH"] = f"{nvcc / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={nvcc}"
    tpu = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-4", "WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}
    os.environ |= {f"TPU_{key}": value for key, value in tpu.items()} | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")


@functools.cache
def devices(platform: str) -> Any:
    """The devices of a machine that is described, not there."""
    if platform == "tpu":
        return topologies.get_topology_desc("v5e:2x2", platform).devices
    return topologies.get_topology_desc("", platform, topology="1x1x1", target_config=H100).devices


def update(name: str, num_tasks: int, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """An update, and the shapes of its arguments for parameters of one leaf."""
    tx = make_row(ROWS[name], num_tasks)
    params = {"leaf": jax.ShapeDtypeStruct((size,), "float32")}
    stack = {"leaf": jax.ShapeDtypeStruct((num_tasks, size), "float32")}
    losses = jax.ShapeDtypeStruct((num_tasks,), "float32")

    def step(stack: Any, state: Any, params: Any, losses: Any) -> Any:
        return tx.update(stack, state, params, losses=losses)

    return step, (stack, jax.eval_shape(tx.init, params), params, losses)


def compiled(name: str, num_tasks: int, target: str) -> str:
    """The text of the compiled update; on several devices, each holds a part of all parameters."""
    platform = TARGETS[target]
    size = PARAMETERS[platform]
    step, args = update(name, num_tasks, size)
    mesh = Mesh(np.array(devices(platform))[: 4 if target == "v5e:2x2" else 1], "parameters")

    def on_device(leaf: Any) -> Any:
        split = ("parameters" if n == size else None for n in leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*split)))

    traced = jax.jit(named(step, platform)).trace(*jax.tree.map(on_device, args))
    return traced.lower(lowering_platforms=(platform,)).compile().as_text()


@functools.cache
def runs(name: str, num_tasks: int) -> list[Counter[tuple[str, int]]]:
    """For each family of gradients, how often loops and branches run in the first update."""
    import families

    K = num_tasks
    counter: Counter[tuple[str, int]] = Counter()
    step, (_, _, params, _) = update(name, K, 4 * K)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    program, state = jax.jit(named(step, "cuda", counter.update)), make_row(ROWS[name], K).init(params)
    found = []
    for family in families.EVERY:
        for columns in (max(K // 2, 1), K, 4 * K):
            stack = np.zeros((K, 4 * K))
            stack[:, :columns] = families.stack(family, K, columns)
            if families.within_contract(families.gramian(stack, "float32")):
                counter.clear()
                losses = jnp.asarray(np.random.default_rng(columns).uniform(0.5, 2.0, K), "float32")
                jax.block_until_ready(program({"leaf": jnp.asarray(stack, "float32")}, state, params, losses))
                jax.effects_barrier()
                found.append(Counter(counter))
    return found


def costs(program: hlo.Part, name: str, num_tasks: int) -> list[hlo.Cost]:
    """What an update does, for each family of gradients."""
    if not any(part.loops or part.conditionals for part in hlo.walk(program)):
        return [hlo.cost(program, lambda op_name, branch: 0)]
    return [
        hlo.cost(program, lambda op_name, branch, run=run: run[place(op_name), branch]) for run in runs(name, num_tasks)
    ]


def measure(name: str, num_tasks: int, target: str) -> tuple[dict[str, Any], hlo.Part]:
    """The row of one update, and its program."""
    start = time.perf_counter()
    program = hlo.program(compiled(name, num_tasks, target))
    seconds = time.perf_counter() - start
    every = costs(program, name, num_tasks)
    row = {"method": name, "target": target, "num_tasks": num_tasks, "seconds": seconds}
    for key in ("launches", "library", "waits", "iterations"):
        values = [getattr(own, key) for own in every]
        row |= {key: statistics.median_low(values), f"{key}_worst": max(values)}
    gradient = 4 * PARAMETERS[TARGETS[target]] / (4 if target == "v5e:2x2" else 1)
    row["gradients"] = statistics.median_low(own.bytes for own in every) / gradient
    usual = statistics.mode(tuple(sorted(own.sent.items())) for own in every)
    row["sent"] = "; ".join(f"{times:g} {what}" for what, times in usual)
    return {key: row[key] for key in COLUMNS}, program


def faults(row: dict[str, Any], program: hlo.Part) -> list[str]:
    """What a program must be on a TPU and is not."""
    K, kind = row["num_tasks"], ROWS[row["method"]].folder
    if row["target"] == "v5e" and kind in FLOORS and row["gradients"] > 1.05 * FLOORS[kind](K):
        return [f"moves {row['gradients']:.4g} gradients where {FLOORS[kind](K)} are enough"]
    most = max(4 * K * K, PADDED)
    sent = [(line.operation, hlo.size(line.shape)) for part in hlo.walk(program) for line in part.collectives]
    wrong = [f"{operation} of {size} bytes" for operation, size in sent if operation != "all-reduce" or size > most]
    more = [row["sent"]] if kind in FLOORS and ";" in row["sent"] else []  # than the Gramian
    return [f"sends {what}" for what in (*wrong, *more)]


def describe(part: hlo.Part) -> str:
    calls = [f"{count} {name}" for name, count in Counter(part.library).items()]
    return f"{part.launches} launches" + (f" (with {', '.join(calls)})" if calls else "")


def grow(tree: Tree, part: hlo.Part) -> Tree:
    """Add the loops and conditionals of a part to what is printed."""
    for loop in part.loops:
        trips = f"{loop.trips} iterations" if loop.trips is not None else "the host waits for each iteration"
        condition = f" + condition {describe(loop.condition)}" if loop.condition.launches else ""
        line = f"[bold]loop[/] {loop.op_name}: {describe(loop.body)}{condition} an iteration; {trips}"
        grow(tree.add(line), loop.body)
    for choice in part.conditionals:
        branches = tree.add(f"[bold]conditional[/] {choice.op_name}: the host waits")
        for branch in choice.branches:
            grow(branches.add(f"branch: {describe(branch)}"), branch)
    return tree


def microseconds(launches: int, waits: int) -> int:
    return LAUNCH * launches + WAIT * waits


def span(values: Iterable[float], form: str = "{:g}") -> str:
    """One value, or the least and the greatest."""
    least, greatest = min(values := list(values)), max(values)
    return form.format(least) if least == greatest else f"{form.format(least)}-{form.format(greatest)}"


def gpu_table(found: list[dict[str, str]]) -> str:
    """For every method that the host waits for, and for the others of each kind together."""
    own: dict[str, dict[int, dict[str, str]]] = {}
    for row in sorted(found, key=lambda row: NAMES.index(row["method"])):
        if row["target"] == "h100":
            own.setdefault(row["method"], {})[int(row["num_tasks"])] = row
    sizes = sorted({num_tasks for by_size in own.values() for num_tasks in by_size})
    free = [name for name, by_size in own.items() if all(row["waits_worst"] == "0" for row in by_size.values())]
    together: dict[str, list[str]] = {}
    for name in free:
        together.setdefault(ROWS[name].folder, []).append(name)
    heading = ["method", *(f"K = {K}: {what}" for K in sizes for what in ("launches + waits", "µs", "worst µs"))]
    lines: list[list[str]] = []

    def line(title: str, names: list[str]) -> list[str]:
        cells = []
        for K in sizes:
            rows = [{key: int(own[name][K][key]) for key in COLUMNS[3:8]} for name in names if K in own[name]]
            if not rows:
                cells += ["-"] * 3
                continue
            usual = span(row["launches"] for row in rows) + " + " + span(row["waits"] for row in rows)
            cells += [usual, span(microseconds(row["launches"], row["waits"]) for row in rows)]
            cells += [span(microseconds(row["launches_worst"], row["waits_worst"]) for row in rows)]
        return [title, *cells]

    for kind, names in together.items():
        title = f"`{names[0]}`" if len(names) == 1 else f"{len(names)} methods that look at {FOLDERS[kind]}"
        lines.append(line(title, names))
    lines += [line(f"`{name}`", [name]) for name in own if name not in free]
    return markdown_table(heading, lines)


def tpu_table(found: list[dict[str, str]]) -> str:
    """For each kind of method."""
    kinds: dict[str, dict[str, list[dict[str, str]]]] = {}
    for row in found:
        if row["target"] != "h100" and int(row["num_tasks"]) == TPU_TASKS:
            kinds.setdefault(ROWS[row["method"]].folder, {}).setdefault(row["target"], []).append(row)
    heading = ["looks at", "methods", "gradients moved", "over the floor", "sent in an update, split over four"]
    lines: list[list[str]] = []
    for kind, targets in kinds.items():
        alone = targets.get("v5e", [])
        moved = [float(row["gradients"]) for row in alone]
        floor = FLOORS[kind](TPU_TASKS) if kind in FLOORS else 0
        sent = sorted({row["sent"] for row in targets.get("v5e:2x2", [])})
        over = span((value / floor for value in moved), "{:.2f}") if floor else "-"
        names = ", ".join(f"`{row['method']}`" for row in alone) if len(alone) <= NAMED else f"{len(alone)}, all"
        lines.append([FOLDERS[kind], names, span(moved, "{:.4g}"), over, " or ".join(sent) or "nothing"])
    return markdown_table(heading, lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--methods", nargs="+", choices=NAMES, metavar="NAME", help="(ten, of all kinds)")
    parser.add_argument("--all", dest="methods", action="store_const", const=NAMES, help="all methods")
    parser.set_defaults(methods=SHORT)
    parser.add_argument("--tasks", nargs="+", type=int, default=[8], metavar="K", help="(8)")
    parser.add_argument("--tree", action="store_true", help="print the programs' loops and branches")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the CSV file")
    parser.add_argument("--csv", type=Path, default=Path("runs/compiled.csv"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a Markdown file to put the tables into")
    return parser.parse_args(argv)


def rows(args: argparse.Namespace, console: Console) -> Iterator[tuple[dict[str, str], list[str]]]:
    """What the CSV file holds and what is measured now, as text, and what is wrong with it."""
    kept = list(csv.DictReader(args.csv.open())) if args.resume and args.csv.exists() else []
    yield from ((row, []) for row in kept)
    known = {(row["target"], row["num_tasks"], row["method"]) for row in kept}
    wanted = itertools.product(args.targets, args.tasks, args.methods)
    missing = [case for case in wanted if (case[0], str(case[1]), case[2]) not in known]
    for target, num_tasks, name in track(missing, "compiling", console=console, transient=True):
        row, program = measure(name, num_tasks, target)
        if args.tree:
            console.print(grow(Tree(f"[bold]{name}[/], K = {num_tasks}: {describe(program)}"), program))
        text = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}
        yield text, faults(row, program)


def main(argv: list[str] | None = None) -> int:
    """Compile, print, write."""
    args, console = parse(argv), Console(width=160)
    prepare()
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    found, wrong = [], 0
    for row, problems in rows(args, console):
        found.append(row)
        console.print("  ".join(f"{key} {value}" for key, value in row.items() if value), highlight=False)
        for problem in problems:
            console.print(f"[bold red]{row['target']}, {row['method']}, K = {row['num_tasks']}: {problem}[/]")
        wrong += len(problems)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    if args.page:
        used = ", ".join(f"{package} {metadata.version(package)}" for package in COMPILERS)
        fill(args.page, {"gpu": f"{gpu_table(found)}\n\n{used}.", "tpu": f"{tpu_table(found)}\n\n{used}."})
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
