"""Write the registry's tables into the pages: `make tables`."""

import pathlib

from benchmarks.report import fill
from mtlgrad_jax.registry import markdown_table

if __name__ == "__main__":
    fill(pathlib.Path(__file__).parent / "methods.md", {"methods": markdown_table()})
