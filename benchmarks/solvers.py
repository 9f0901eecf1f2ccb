"""Milliseconds from a given Gramian to weights, compared with TorchJD 0.18 (extra `peers`).

Three kinds of K gradients in P dimensions with independent normal entries: "wide" (P = 4K, a little conflict), "square"
(P = K, much conflict) and "tall" (P = K/2, more tasks than dimensions: rank deficient, and at the threshold of Pareto
stationarity). Each number is a mean over the same few draws of each kind; TorchJD's slowest only run the first few.

This library is timed as in training, inside one compiled program (a scan over the draws), and again as a separate call,
which adds the start of a compiled program, about ten microseconds. Results are float32 on both sides; TorchJD's QP,
cone and equation solvers work in float64 on copies. If TorchJD's default stops early (mgda's Frank-Wolfe), it gets 100
iterations, doubled until it is within 1 % of the optimal objective, up to 12800. Its upgrad and dualproj solve a
regularised problem; the rows named "regularized" solve the same one.
"""

import argparse
import csv
import functools
import itertools
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtlgrad_jax as mtl

SIZES = (2, 4, 8, 16, 40, 128)
KINDS: dict[str, Callable[[int], int]] = {"wide": lambda K: 4 * K, "square": lambda K: K, "tall": lambda K: K // 2}
COLUMNS = (
    *("method", "num_tasks", "kind", "ours_ms", "call_ms", "torchjd_ms", "ratio", "steps", "residual", "unsolved"),
    "torchjd_note",
)
DRAWS = 6
SECONDS = 0.5  # per measurement; at least two solves


def methods(num_tasks: int) -> dict[str, mtl.Method]:
    """The methods that both libraries have, with the same parameters."""
    K = num_tasks
    return {
        "mgda": mtl.mgda(),
        "pcgrad": mtl.pcgrad(),
        "gradvac": mtl.gradvac(num_tasks=K),
        "cagrad": mtl.cagrad(c=0.4),
        "nash_mtl": mtl.nash_mtl(),
        "fairgrad": mtl.fairgrad(alpha=2.0),
        "imtl_g": mtl.imtl_g(),
        "aligned_mtl": mtl.aligned_mtl(),
        "upgrad": mtl.upgrad(),
        "upgrad regularized": mtl.upgrad(regularization=1e-4),
        "dualproj": mtl.dualproj(),
        "dualproj regularized": mtl.dualproj(regularization=1e-4),
        "conflict_free": mtl.conflict_free(),
        "krum": mtl.krum(num_byzantine=0),
        "pcd": mtl.pcd(num_tasks=K),
        "modo": mtl.modo(num_tasks=K),
        "sdmgrad": mtl.sdmgrad(num_tasks=K),
        "mean": mtl.mean(),
    }


def peers(num_tasks: int, grads: np.ndarray) -> dict[str, Callable[[], tuple[Callable[[Any, Any], Any], str]]]:
    """For each method, a factory of TorchJD's counterpart `(gramian, gradients) -> weights`, and a note on it."""
    from torchjd import aggregation as peer

    def of_gramian(make: Callable[[], Any], note: str = "") -> Callable:
        def build() -> tuple[Callable, str]:
            solver = make()
            return (lambda gramian, gradients: solver(gramian)), note

        return build

    def nash() -> tuple[Callable, str]:
        solver = peer.NashMTL(n_tasks=num_tasks)

        def solve(gramian: Any, gradients: Any) -> Any:
            solver.reset()  # cold start, as in this library; otherwise it starts from its last weights
            return solver(gradients)

        return solve, "from gradients"

    def config() -> tuple[Callable, str]:
        solver = peer.ConFIG()
        return (lambda gramian, gradients: solver(gradients)), "from gradients"

    def mgda() -> tuple[Callable, str]:
        for doublings in range(8):
            solver = peer.MGDAWeighting(epsilon=1e-12, max_iters=100 * 2**doublings)
            excess = max(_frank_wolfe_excess(G, solver) for G in grads)
            if excess <= 0.01:
                break
        return (lambda gramian, gradients: solver(gramian)), f"{solver.max_iters} iterations, {100 * excess:.2g} % off"

    return {
        "mgda": mgda,
        "pcgrad": of_gramian(peer.PCGradWeighting),
        "gradvac": of_gramian(lambda: peer.GradVacWeighting(beta=0.01)),
        "cagrad": of_gramian(lambda: peer.CAGradWeighting(c=0.4)),
        "nash_mtl": nash,
        "fairgrad": of_gramian(lambda: peer.FairGradWeighting(alpha=2.0)),
        "imtl_g": of_gramian(peer.IMTLGWeighting),
        "aligned_mtl": of_gramian(peer.AlignedMTLWeighting),
        "upgrad": of_gramian(peer.UPGradWeighting, "regularized by 1e-4"),
        "upgrad regularized": of_gramian(peer.UPGradWeighting),
        "dualproj": of_gramian(peer.DualProjWeighting, "regularized by 1e-4"),
        "dualproj regularized": of_gramian(peer.DualProjWeighting),
        "conflict_free": config,
        "krum": of_gramian(lambda: peer.KrumWeighting(n_byzantine=0)),
        "pcd": of_gramian(peer.PCDWeighting),
        "modo": of_gramian(peer.MoDoWeighting),
        "sdmgrad": of_gramian(peer.SDMGradWeighting),
        "mean": of_gramian(peer.MeanWeighting),
    }


def _frank_wolfe_excess(grads: np.ndarray, solver: Any) -> float:
    """Excess of Frank-Wolfe's objective, relative to the optimum or to a percent of the mean squared norm."""
    import torch

    M = (grads @ grads.T).astype(np.float64)
    w = solver(torch.tensor(M)).numpy()
    gap = 2 * (w @ M @ w - (M @ w).min())  # bounds the excess from above
    return gap / max(w @ M @ w, 0.01 * np.trace(M) / len(M))


def draw(kind: str, num_tasks: int) -> np.ndarray:
    """The gradients of one kind, (draws, K, P)."""
    return np.random.default_rng(num_tasks).normal(size=(DRAWS, num_tasks, KINDS[kind](num_tasks))).astype(np.float32)


def milliseconds(runs: list[Callable[[], Any]]) -> float:
    """Milliseconds per run: the mean over the runs of their medians, after a warm-up run.

    The first pass may stop after two runs.
    """
    runs[0]()
    times: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    for i in itertools.count():
        enough = time.perf_counter() - begin > SECONDS
        if enough and i >= min(2, len(runs)):
            break
        start = time.perf_counter()
        runs[i % len(runs)]()
        times[i % len(runs)].append(time.perf_counter() - start)
    return 1e3 * float(np.mean([np.median(part) for part in times if part]))


@functools.cache
def compiled(name: str, num_tasks: int) -> tuple[Callable, Callable, Any]:
    """A scan of a method over Gramians, a single update, and the initial state."""
    method = methods(num_tasks)[name]
    crossed = any(argument.name == "cross_gramian" for argument in method.arguments)

    def solve(state: Any, matrix: Any) -> tuple[Any, Any]:
        weights, state = method.weigh(matrix, state, **({"cross_gramian": matrix} if crossed else {}))
        return state, (weights, state.info)

    scanned = jax.jit(lambda state, matrices: jax.lax.scan(solve, state, matrices)[1])
    return scanned, jax.jit(solve), method.init(None)


def measure(name: str, num_tasks: int, kind: str) -> dict[str, Any]:
    """One row of the table."""
    import torch

    grads = draw(kind, num_tasks)
    matrices = np.einsum("dkp,dlp->dkl", grads, grads)
    scanned, single, state = compiled(name, num_tasks)
    on_device = jnp.asarray(matrices)
    ours = milliseconds([lambda: jax.block_until_ready(scanned(state, on_device))]) / DRAWS
    call = milliseconds([lambda matrix=matrix: jax.block_until_ready(single(state, matrix)) for matrix in on_device])
    info = scanned(state, on_device)[1]

    peer, note = peers(num_tasks, grads)[name]()
    pairs = [(torch.tensor(matrix), torch.tensor(G)) for matrix, G in zip(matrices, grads, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = milliseconds([lambda pair=pair: peer(*pair) for pair in pairs])
    row = (name, num_tasks, kind, ours, call, theirs, theirs / ours, float(np.mean(info.steps)))
    unsolved = int(np.sum((np.asarray(info.result) != 0) & (np.asarray(info.result) != 6)))
    return dict(zip(COLUMNS, (*row, float(np.max(info.residual)), unsolved, note), strict=True))


def rows(names: list[str], sizes: list[int], kinds: list[str]) -> Iterator[tuple[str, int, str]]:
    """The measurements, in order."""
    for name, K, kind in itertools.product(names, sizes, kinds):
        if name != "krum" or K >= 3:
            yield name, K, kind


def machine(*packages: str) -> str:
    """The machine and the versions, in words."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    device = jax.local_devices()[0].device_kind
    return f"{device}, {os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, {versions}"


def report(table: list[dict[str, Any]], console: Console) -> None:
    """Print how many times faster this library is than TorchJD: the minimum over the kinds."""
    sizes = sorted({row["num_tasks"] for row in table})
    for title, value in (
        ("times faster than TorchJD, the worst of the kinds", lambda found: f"{min(r['ratio'] for r in found):.3g}"),
        ("ours, milliseconds, the slowest of the kinds", lambda found: f"{max(r['ours_ms'] for r in found):.3g}"),
    ):
        printed = Table(title=title)
        printed.add_column("method")
        for K in sizes:
            printed.add_column(f"K={K}", justify="right")
        for name in dict.fromkeys(row["method"] for row in table):
            found = [[r for r in table if (r["method"], r["num_tasks"]) == (name, K)] for K in sizes]
            printed.add_row(name, *(value(part) if part else "" for part in found))
        console.print(printed)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=__doc__.split("\n")[0])
    everything = list(methods(2))
    parser.add_argument("--methods", nargs="+", choices=everything, default=everything, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), metavar="K")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--csv", type=Path, default=Path("runs/solvers.csv"))
    args = parser.parse_args(argv)
    # As inside a training step, where nothing is dispatched to another thread.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    console = Console()
    console.print(machine("jax", "torch", "torchjd"))
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    table = []
    with args.csv.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for case in track(list(rows(args.methods, args.sizes, args.kinds)), console=console, transient=True):
            table.append(measure(*case))
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in table[-1].items()})
    report(table, console)


if __name__ == "__main__":
    main()
