"""One row a method: what tests, tables and help() say about it is read from here."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import mtlgrad_jax as mtl
from mtlgrad_jax import weighting

Kind = Literal["weighting", "loss weighting", "coordinate-wise", "buffered", "wrapper"]

# What a row can promise; each is a property test, and each that is missing has a counterexample in the tests.
NON_CONFLICTING = "non-conflicting"  # no task ascends to first order: <g_i, d> >= 0
PERMUTATION = "permutation-equivariant"  # the order of the tasks does not matter
HOMOGENEOUS = "scale-equivariant"  # method(s G) = s method(G) for s > 0
SCALE_FREE = "invariant to task scaling"  # rescaling one task's gradient leaves d as it is


@dataclass(frozen=True)
class Row:
    """A public factory.

    Attributes:
      factory: in `mtlgrad_jax`; a weighting's is also in `mtlgrad_jax.weighting`.
      kind: what it needs to see.
      scale: native scale of the update.
      state: what its state costs.
      paper: reference.
      promises: properties that hold for every input.
      kwargs: smallest arguments, as a function of K.
      needs: extra arguments of update.
      fewest: present tasks below which it falls back to their mean.
      checked: what it was compared with.
      bad: arguments that must raise, and the argument that the error must name.
      randomized: whether it draws; then permutation and masks hold in distribution.
    """

    factory: Callable[..., Any]
    kind: Kind
    scale: str
    state: str
    paper: str
    promises: frozenset[str] = frozenset()
    kwargs: Callable[[int], dict[str, Any]] = lambda num_tasks: {}
    needs: tuple[str, ...] = ()
    fewest: int = 1
    checked: str = "numpy float64 of the published formula"
    bad: tuple[dict[str, Any], ...] = ()
    randomized: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Name the row as its factory."""
        object.__setattr__(self, "name", self.factory.__name__)

    def make(self, num_tasks: int, **kwargs: Any) -> mtl.TaskTransformation:
        """Return the method for K tasks with its smallest arguments and those given."""
        return self.factory(**self.kwargs(num_tasks), **kwargs)

    @property
    def weighting(self) -> Callable[..., weighting.Weighting] | None:
        """The factory in `mtlgrad_jax.weighting`, or None."""
        return getattr(weighting, self.name, None) if self.kind in ("weighting", "loss weighting") else None


def _num_tasks(num_tasks: int) -> dict[str, Any]:
    return {"num_tasks": num_tasks}


METHODS = (
    Row(
        mtl.mean,
        "weighting",
        scale="mean",
        state="none",
        paper="baseline",
        promises=frozenset({PERMUTATION, HOMOGENEOUS}),
    ),
    Row(
        mtl.sum,
        "weighting",
        scale="sum (K times the mean)",
        state="none",
        paper="baseline",
        promises=frozenset({PERMUTATION, HOMOGENEOUS}),
    ),
    Row(
        mtl.constant,
        "weighting",
        scale="as given",
        state="none",
        paper="baseline",
        promises=frozenset({HOMOGENEOUS}),
        kwargs=lambda num_tasks: {"weights": [1.0 + i for i in range(num_tasks)]},
    ),
    Row(
        mtl.mgda,
        "weighting",
        scale="mean (weights sum to 1)",
        state="none",
        paper="Desideri, Comptes Rendus Mathematique 350, 2012; Sener & Koltun, NeurIPS 2018, arXiv 1810.04650",
        promises=frozenset({NON_CONFLICTING, PERMUTATION, HOMOGENEOUS}),
        checked="support enumeration and scipy's NNLS; duality gap; published values; formula from official code",
        bad=({"normalization": "l1"}, {"apply_to": "both"}),
    ),
    Row(
        mtl.pcgrad,
        "weighting",
        scale="sum (K times the mean where nothing conflicts)",
        state="a random key",
        paper="Yu et al., NeurIPS 2020, arXiv 2001.06782",
        promises=frozenset({PERMUTATION, HOMOGENEOUS}),
        checked="numpy float64 of the published formula over all orders; published values; formula from official code",
        bad=({"reduction": "max"}, {"order": "sorted"}, {"key": None}),
        randomized=True,
    ),
    Row(
        mtl.cagrad,
        "weighting",
        scale="mean",
        state="none",
        paper="Liu et al., NeurIPS 2021, arXiv 2110.14048",
        promises=frozenset({PERMUTATION, HOMOGENEOUS}),
        checked="Brent's method on the dual; duality gap; published values",
        bad=({"c": -0.1}, {"c": None}, {"rescale": "2"}),
    ),
    Row(
        mtl.nash_mtl,
        "weighting",
        scale="norm sqrt(K)",
        state="none",
        paper="Navon et al., ICML 2022, arXiv 2202.01017",
        promises=frozenset({NON_CONFLICTING, PERMUTATION, SCALE_FREE}),
        checked="the equation's residual; published values; formula from official code",
    ),
    Row(
        mtl.fairgrad,
        "weighting",
        scale="as solved",
        state="none",
        paper="Ban & Ji, ICML 2024, arXiv 2402.15638",
        promises=frozenset({NON_CONFLICTING, PERMUTATION}),
        checked="the equation's residual; published values; formula from official code",
        bad=({"alpha": 0.0}, {"alpha": -1.0}),
    ),
    Row(
        mtl.upgrad,
        "weighting",
        scale="mean",
        state="none",
        paper="Quinton & Rey, 2024, arXiv 2406.16232",
        promises=frozenset({NON_CONFLICTING, PERMUTATION, HOMOGENEOUS}),
        checked="support enumeration and scipy's NNLS; optimality conditions; published values; formula from TorchJD",
        bad=({"regularization": -1e-4}, {"regularization": "none"}),
    ),
    Row(
        mtl.uw,
        "loss weighting",
        scale="half the sum at first, then learned",
        state="K log-variances and their optimizer's state",
        paper="Kendall, Gal & Cipolla, CVPR 2018, arXiv 1705.07115",
        promises=frozenset({PERMUTATION, HOMOGENEOUS}),
        kwargs=_num_tasks,
        needs=("losses",),
        bad=({"num_tasks": 0}, {"num_tasks": 2.0}),
    ),
    Row(
        mtl.gradnorm,
        "weighting",
        scale="sum (weights sum to K)",
        state="K weights, their Adam, K first losses",
        paper="Chen et al., ICML 2018, arXiv 1711.02257",
        promises=frozenset({PERMUTATION}),
        kwargs=_num_tasks,
        needs=("losses",),
        bad=({"num_tasks": 0}, {"alpha": -1.0}, {"learning_rate": -0.1}),
    ),
    Row(
        mtl.trimmed_mean,
        "coordinate-wise",
        scale="mean",
        state="none",
        checked="numpy float64 of the published formula; definition from TorchJD",
        paper="Yin et al., ICML 2018, arXiv 1803.01498",
        promises=frozenset({PERMUTATION, HOMOGENEOUS}),
        fewest=3,
        bad=({"trim": -1}, {"trim": 0.1}),
    ),
    Row(
        mtl.db_mtl,
        "buffered",
        scale="sum of K gradients of the largest norm",
        state="K gradients",
        paper="Lin et al., Neural Networks (accepted 2025), arXiv 2308.12029",
        promises=frozenset({PERMUTATION, HOMOGENEOUS}),
        kwargs=_num_tasks,
        needs=("losses",),
        bad=({"num_tasks": 0}, {"beta": 1.0}, {"beta": -0.1}, {"sigma": -1.0}),
    ),
)
"""Every method, in the order of the documentation."""

WRAPPERS = (
    Row(
        mtl.shared_private,
        "wrapper",
        scale="the method's; heads as `private` says",
        state="the method's",
        paper="the head conventions of the LibMTL and Nash-MTL code",
        kwargs=lambda num_tasks: {"method": mtl.mean(), "is_shared": lambda path: True},
        bad=({"private": "none"},),
    ),
    Row(
        mtl.partition,
        "wrapper",
        scale="the methods'",
        state="the methods'",
        paper="none",
        kwargs=lambda num_tasks: {"transforms": {True: mtl.mean()}, "labels": lambda path: True},
    ),
    Row(
        mtl.update_every,
        "wrapper",
        scale="the method's",
        state="K weights",
        paper="Navon et al., ICML 2022; Xu et al. (PSMGD), AAAI 2025, arXiv 2412.10961",
        kwargs=lambda num_tasks: {"method": mtl.mgda(), "num_tasks": num_tasks, "k": 2},
        bad=({"k": 0}, {"k": 1.5}, {"num_tasks": 0}),
    ),
    Row(
        mtl.smoothed,
        "wrapper",
        scale="the method's",
        state="K weights",
        paper="Zhou et al. (CR-MOGM), NeurIPS 2022",
        kwargs=lambda num_tasks: {"method": mtl.mgda(), "num_tasks": num_tasks},
        bad=({"decay": 1.0}, {"decay": -0.1}, {"num_tasks": 0}),
    ),
    Row(
        mtl.skip_nonfinite_tasks,
        "wrapper",
        scale="the method's",
        state="a counter",
        paper="none",
        kwargs=lambda num_tasks: {"method": mtl.mean()},
    ),
    Row(
        mtl.with_metrics,
        "wrapper",
        scale="the method's",
        state="K×K metrics",
        paper="none",
        kwargs=lambda num_tasks: {"method": mtl.mgda(), "num_tasks": num_tasks},
        bad=({"num_tasks": 0},),
    ),
)
"""Every wrapper."""

ROWS = {row.name: row for row in METHODS + WRAPPERS}
"""All rows by name."""


def describe(row: Row) -> str:
    """Return what the row adds to its factory's documentation."""
    promises = ", ".join(sorted(row.promises)) or "none"
    needs = ", ".join(f"`{name}`" for name in row.needs) or "nothing beyond the gradients"
    needs = "what the method needs" if row.kind == "wrapper" else needs
    lines = [
        f"Native scale: {row.scale}.",
        f"State: {row.state}.",
        f"Update needs: {needs}." + (f" At least {row.fewest} tasks present." if row.fewest > 1 else ""),
    ]
    if row.kind != "wrapper":
        lines += [
            f"Properties, proved by tests for the default arguments: {promises}.",
            f"Checked against: {row.checked}.",
        ]
    lines += [
        f"Reference: {row.paper}.",
        "Raises: ValueError for arguments out of range, and in update for wrong shapes.",
    ]
    return "\n".join(lines)


def markdown_table() -> str:
    """Return the table of methods of the README."""
    rows = ["| method | native scale | state | guarantee | reference |", "|---|---|---|---|---|"]
    for row in METHODS:
        promises = ", ".join(sorted(row.promises - {PERMUTATION, HOMOGENEOUS})) or "-"
        rows.append(f"| `{row.name}` | {row.scale} | {row.state} | {promises} | {row.paper} |")
    return "\n".join(rows)


def document() -> None:
    """Append to every factory's docstring what its row says."""
    for row in ROWS.values():
        for factory in {row.factory, row.weighting or row.factory}:
            text = (factory.__doc__ or "").rstrip()
            notes = textwrap.indent(describe(row), " " * 6)
            factory.__doc__ = f"{text}\n\n    Notes:\n{notes}\n    "


document()
