"""Every method and wrapper for 200,000 updates with random faults: `make soak ARGS="--methods cagrad --seed 1"`.

Absent tasks, NaN and inf, losses and gradients that jump by 1e6 or vanish, opposite and equal tasks. No update and no
state may hold a NaN, arrays in memory must not grow, weights must keep their sum and counters must count.
"""

import argparse
import sys
import time

import faults
import jax
from rich.console import Console
from rich.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=faults.NAMES, choices=faults.NAMES)
    arguments = parser.parse_args()

    table, failed = Table("method", "updates", "skipped", "microseconds an update", "failure"), 0
    for name in arguments.methods:
        began, skipped, failure = time.perf_counter(), 0, ""
        try:
            skipped = faults.soak(name, arguments.updates, arguments.seed)
        except AssertionError as error:
            failure, failed = str(error), failed + 1
        spent = (time.perf_counter() - began) / arguments.updates
        table.add_row(name, str(arguments.updates), str(skipped), f"{1e6 * spent:.0f}", failure)
        faults.program.cache_clear()
        jax.clear_caches()
    Console().print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
