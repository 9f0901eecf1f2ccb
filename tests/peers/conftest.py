"""`make peers ARGS=--page` writes what was compared with peers into docs/checked.md."""

from peerlib import COMPARED, DOCS, EXPECTED

from benchmarks.report import fill, markdown_table
from mtlgrad_jax.registry import ROWS

PEERS = ("TorchJD", "formulas")


def pytest_addoption(parser):
    parser.addoption("--page", action="store_true", help="write the comparisons into docs/checked.md")


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--page", default=False) and exitstatus == 0:
        compared = {name for _, name in COMPARED}
        assert compared >= EXPECTED, f"Peers have these too, and no test compares them: {EXPECTED - compared}."
        heading = ("method", "updates", "TorchJD", "updates", "formulas of others")
        rows = [[f"`{name}`", *cells(name)] for name in ROWS if name in compared]
        fill(DOCS / "checked.md", {"peers": markdown_table(heading, rows)})


def cells(name):
    """The number of updates compared with each peer, and the largest deviation."""
    for peer in PEERS:
        found = COMPARED.get((peer, name))
        yield from (f"{len(found)}", f"{max(found):.0e}") if found else ("-", "-")
