"""Write the registry's tables into the pages: `make tables`."""

import pathlib

from pages import method_tables

from benchmarks.report import fill

if __name__ == "__main__":
    fill(pathlib.Path(__file__).parent / "methods.md", {"methods": method_tables()})
