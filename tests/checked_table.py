"""Write docs/checked.md: what each method was compared with, on how many updates, and the largest deviation.

Part of `make tables`; the comparisons are those of `tests/test_methods.py`.
"""

import collections
import pathlib

import numpy as np
from harness import IN_LAW
from rich.progress import track
from test_methods import IN_FLOAT32, OPTIONS, deviations, families_of

from benchmarks.report import fill
from mtlgrad_jax.registry import METHODS

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "checked.md"


def cases(name, kwargs, dtype):
    """Family, number of tasks and tolerance of all comparisons of a method with given arguments."""
    if dtype is np.float64:
        yield from ((family, 3, 2e-6) for family in families_of(name, kwargs))
        if not kwargs:
            yield from ((family, 5, 2e-6) for family in families_of(name, kwargs))
    elif not kwargs:
        yield from ((family, 3, 5e-4 if family == "scales" else 5e-5) for family in IN_FLOAT32)


def main():
    found = collections.defaultdict(list)
    for name, kwargs in track(OPTIONS):
        for dtype in (np.float64, np.float32):
            for family, num_tasks, tolerance in cases(name, kwargs, dtype):
                for errors in deviations(name, kwargs, family, num_tasks, dtype, tolerance):
                    found[name, dtype].extend(errors)
    lines = ["| method | checked against | updates | float64 | updates | float32 |", "|---|---|---:|---:|---:|---:|"]
    for row in METHODS:
        if row.name in IN_LAW or (row.name, np.float64) not in found:
            cells = ["-"] * 4
        else:
            parts = (found[row.name, dtype] for dtype in (np.float64, np.float32))
            cells = [cell for part in parts for cell in (f"{len(part)}", f"{max(part):.0e}")]
        lines.append(f"| `{row.name}` | {row.checked} | {' | '.join(cells)} |")
    fill(PAGE, {"checked": "\n".join(lines)})


if __name__ == "__main__":
    main()
