"""Every solver on many Gramians, checked as in `test_solvers`: `make stress ARGS="--draws 1000 --solvers max_min"`.

A draw is one stack of every family in `families`, at every shape and in both precisions. Prints failures, with the
arguments that reproduce them, and the number of Gramians checked for each solver.
"""

import argparse
import collections
import itertools
import sys

import families
import jax
import test_solvers
from rich.console import Console
from rich.progress import track
from rich.table import Table

SHAPES = [(2, 2), (2, 5), (3, 2), (3, 10), (4, 3), (5, 3), (8, 6), (8, 1000), (12, 8), (12, 40), (16, 8), (64, 40)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--solvers", nargs="*", default=list(test_solvers.CHECKS), choices=list(test_solvers.CHECKS))
    parser.add_argument("--families", nargs="*", default=list(families.EVERY), choices=list(families.EVERY))
    parser.add_argument("--tasks", nargs="*", type=int, help="numbers of tasks, all by default")
    arguments = parser.parse_args()

    console, judged, failed = Console(), collections.Counter(), collections.defaultdict(list)
    shapes = [shape for shape in SHAPES if arguments.tasks is None or shape[0] in arguments.tasks]
    for dtype, (K, P) in track(list(itertools.product(test_solvers.DTYPES, shapes)), console=console):
        with jax.enable_x64(dtype == "float64"):
            for draw, name in itertools.product(range(arguments.draws), arguments.families):
                M = families.gramian(families.stack(name, K, P, arguments.first + draw), dtype)
                if not families.within_contract(M):
                    continue
                for solver in arguments.solvers:
                    judged[solver] += 1
                    try:
                        test_solvers.CHECKS[solver](M)
                    except AssertionError:
                        failed[solver].append(f"{dtype} {name} {K} {P} {arguments.first + draw}")
        jax.clear_caches()
    table = Table("solver", "Gramians", "failed", "the first of them: dtype, family, K, P, draw")
    for solver, count in judged.items():
        table.add_row(solver, str(count), str(len(failed[solver])), "\n".join(failed[solver][:20]))
    console.print(table)
    return int(any(failed.values()))


if __name__ == "__main__":
    sys.exit(main())
