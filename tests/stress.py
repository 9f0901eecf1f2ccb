"""Every solver on many Gramians, checked as in `test_solvers`: `make stress ARGS="--draws 1000 --solvers max_min"`.

A draw is one stack of every family in `families`, for every number of tasks and in both precisions; the number of
parameters changes from draw to draw. Prints failures, with the arguments that reproduce them, and the number of
Gramians checked for each solver.
"""

import argparse
import collections
import itertools
import sys

import families
import harness
import jax
import test_solvers
from rich.console import Console
from rich.progress import track
from rich.table import Table

TASKS = [*range(2, 13), 16, 64]
WIDTHS = [2, 3, 5, 6, 8, 10, 40, 200, 1000]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--solvers", nargs="*", default=list(test_solvers.CHECKS), choices=list(test_solvers.CHECKS))
    parser.add_argument("--families", nargs="*", default=list(families.EVERY), choices=list(families.EVERY))
    parser.add_argument("--tasks", nargs="*", type=int, default=TASKS, help="numbers of tasks")
    parser.add_argument("--platform", default="cpu", choices=["cpu", "cuda"], help="whose form of the solvers to run")
    arguments = parser.parse_args()
    with harness.traced_for(arguments.platform):
        return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Judge, print, and return the exit status."""
    console, judged, failed = Console(), collections.Counter(), collections.defaultdict(list)
    draws = range(arguments.first, arguments.first + arguments.draws)
    for dtype, K in track(list(itertools.product(test_solvers.DTYPES, arguments.tasks)), console=console):
        with jax.enable_x64(dtype == "float64"):
            for draw, name in itertools.product(draws, arguments.families):
                P = WIDTHS[draw % len(WIDTHS)]
                M = families.gramian(families.stack(name, K, P, draw), dtype)
                if not families.within_contract(M):
                    continue
                for solver in arguments.solvers:
                    judged[solver] += 1
                    try:
                        test_solvers.CHECKS[solver](M)
                    except AssertionError:
                        failed[solver].append(f"{dtype} {name} {K} {P} {draw}")
        jax.clear_caches()
    table = Table("solver", "Gramians", "failed", "the first of them: dtype, family, K, P, draw")
    for solver, count in judged.items():
        table.add_row(solver, str(count), str(len(failed[solver])), "\n".join(failed[solver][:20]))
    console.print(table)
    return int(any(failed.values()))


if __name__ == "__main__":
    sys.exit(main())
