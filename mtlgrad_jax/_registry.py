"""One row a method: what tests, tables and help() say about it is read from here."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import optax

import mtlgrad_jax as mtl
from mtlgrad_jax import weighting

Kind = Literal[
    "weighting",
    "loss weighting",
    "cross weighting",
    "coordinate-wise",
    "buffered",
    "task-wise",
    "perturbed",
    "wrapper",
    "learning rate",
]

# What a row can promise; each is a property test, and each that is missing has a counterexample in docs/properties.md.
NON_CONFLICTING = "non-conflicting"  # no task ascends to first order: <g_i, d> >= 0
PERMUTATION = "permutation-equivariant"  # the order of the tasks does not matter
HOMOGENEOUS = "scale-equivariant"  # method(s G) = s method(G) for s > 0
SCALE_FREE = "invariant to task scaling"  # rescaling one task's gradient leaves d as it is
DESCENT = "descent direction"  # the mean loss does not ascend to first order: <g_0, d> >= 0
CONTINUOUS = "continuous"  # a change of G that tends to zero changes d by something that tends to zero
LINEAR = "linear under scaling"  # d(diag(a c1 + b c2) G) = a d(diag(c1) G) + b d(diag(c2) G), all positive


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
        return self.factory(**{**self.kwargs(num_tasks), **kwargs})

    @property
    def weighting(self) -> Callable[..., weighting.Weighting] | None:
        """The factory in `mtlgrad_jax.weighting`, or None."""
        return getattr(weighting, self.name, None) if self.kind.endswith("weighting") else None


def _num_tasks(num_tasks: int) -> dict[str, Any]:
    return {"num_tasks": num_tasks}


METHODS = (
    Row(
        mtl.mean,
        "weighting",
        scale="mean",
        state="none",
        paper="baseline",
        promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    ),
    Row(
        mtl.sum,
        "weighting",
        scale="sum (K times the mean)",
        state="none",
        paper="baseline",
        promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    ),
    Row(
        mtl.constant,
        "weighting",
        scale="as given",
        state="none",
        paper="baseline",
        promises=frozenset({HOMOGENEOUS, CONTINUOUS, LINEAR}),
        kwargs=lambda num_tasks: {"weights": [1.0 + i for i in range(num_tasks)]},
        bad=({"weights": None}, {"weights": "equal"}),
    ),
    Row(
        mtl.mgda,
        "weighting",
        scale="mean (weights sum to 1)",
        state="none",
        paper="Desideri, Comptes Rendus Mathematique 350, 2012; Sener & Koltun, NeurIPS 2018, arXiv 1810.04650",
        promises=frozenset({NON_CONFLICTING, DESCENT, HOMOGENEOUS, PERMUTATION, CONTINUOUS}),
        checked="support enumeration and scipy's NNLS; duality gap; published values; formula from official code",
        bad=({"normalization": "l1"}, {"apply_to": "both"}),
    ),
    Row(
        mtl.capped_mgda,
        "weighting",
        scale="mean (weights sum to 1)",
        state="none",
        paper="Hu, Ho & Yu, 2026, arXiv 2605.30452 (the cap's parametrisation is a reconstruction)",
        promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION, CONTINUOUS}),
        kwargs=lambda num_tasks: {"cap": 0.5},
        checked="an independent exact solve; duality gap",
        bad=({"cap": 0.0}, {"cap": 1.5}),
    ),
    Row(
        mtl.pcgrad,
        "weighting",
        scale="sum (K times the mean where nothing conflicts)",
        state="a random key",
        paper="Yu et al., NeurIPS 2020, arXiv 2001.06782",
        promises=frozenset({HOMOGENEOUS, PERMUTATION, LINEAR}),
        checked="numpy float64 of the published formula over all orders; published values; formula from official code",
        bad=({"reduction": "max"}, {"order": "sorted"}, {"key": None}),
        randomized=True,
    ),
    Row(
        mtl.gradvac,
        "weighting",
        scale="sum",
        state="K×K target cosines and a random key",
        paper="Wang et al., ICLR 2021, arXiv 2010.05874",
        promises=frozenset({HOMOGENEOUS, PERMUTATION, LINEAR}),
        kwargs=_num_tasks,
        checked="numpy float64 of the published formula; TorchJD",
        bad=({"num_tasks": 0}, {"beta": 1.5}, {"target": 1.0}, {"update": "never"}, {"order": "sorted"}, {"key": None}),
        randomized=True,
    ),
    Row(
        mtl.cagrad,
        "weighting",
        scale="mean",
        state="none",
        paper="Liu et al., NeurIPS 2021, arXiv 2110.14048",
        promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION}),
        checked="Brent's method on the dual; duality gap; published values",
        bad=({"c": -0.1}, {"c": None}, {"rescale": "2"}),
    ),
    Row(
        mtl.conicgrad,
        "weighting",
        scale="norm of the mean gradient",
        state="none",
        paper="Hassanpour et al., 2025, arXiv 2502.00217 (abstract only; its closed form is unverified)",
        promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION}),
        checked="an independent solve of the dual; brute force over directions",
        bad=({"c": -0.1}, {"c": 1.0}),
    ),
    Row(
        mtl.nash_mtl,
        "weighting",
        scale="norm sqrt(K)",
        state="none",
        paper="Navon et al., ICML 2022, arXiv 2202.01017",
        promises=frozenset({NON_CONFLICTING, DESCENT, SCALE_FREE, PERMUTATION}),
        checked="the equation's residual; published values; formula from official code",
    ),
    Row(
        mtl.fairgrad,
        "weighting",
        scale="as solved",
        state="none",
        paper="Ban & Ji, ICML 2024, arXiv 2402.15638",
        promises=frozenset({NON_CONFLICTING, DESCENT, PERMUTATION}),
        checked="the equation's residual; published values; formula from official code",
        bad=({"alpha": 0.0}, {"alpha": -1.0}),
    ),
    Row(
        mtl.imtl_g,
        "weighting",
        scale="weights sum to 1",
        state="none",
        paper="Liu et al., ICLR 2021, OpenReview IMPnRXEWpvr",
        promises=frozenset({HOMOGENEOUS, PERMUTATION}),
        checked="the paper's closed form; equal projections; TorchJD; published values",
        bad=({"sign": "plus"},),
    ),
    Row(
        mtl.aligned_mtl,
        "weighting",
        scale="sum",
        state="none",
        paper="Senushkin et al., CVPR 2023, arXiv 2305.19000",
        promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION}),
        checked="numpy float64 of the published formula; TorchJD; published values",
        bad=({"scale": "max"},),
    ),
    Row(
        mtl.upgrad,
        "weighting",
        scale="mean",
        state="none",
        paper="Quinton & Rey, 2024, arXiv 2406.16232",
        promises=frozenset({NON_CONFLICTING, DESCENT, HOMOGENEOUS, PERMUTATION, LINEAR}),
        checked="support enumeration and scipy's NNLS; optimality conditions; published values; formula from TorchJD",
        bad=({"regularization": -1e-4}, {"regularization": "none"}),
    ),
    Row(
        mtl.dualproj,
        "weighting",
        scale="mean",
        state="none",
        paper="Lopez-Paz & Ranzato, NeurIPS 2017, arXiv 1706.08840; Quinton & Rey, 2024, arXiv 2406.16232",
        promises=frozenset({NON_CONFLICTING, DESCENT, HOMOGENEOUS, PERMUTATION}),
        checked="support enumeration and scipy's NNLS; optimality conditions; TorchJD; published values",
        bad=({"regularization": -1e-4},),
    ),
    Row(
        mtl.conflict_free,
        "weighting",
        scale="sum (of the projections)",
        state="none",
        paper="Liu, Chu & Thuerey, ICLR 2025, arXiv 2408.11104",
        promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION, LINEAR}),
        checked="the dense pseudo-inverse; TorchJD; published values",
        bad=({"length": "sum"},),
    ),
    Row(
        mtl.krum,
        "weighting",
        scale="mean",
        state="none",
        paper="Blanchard et al., NeurIPS 2017, arXiv 1703.02757",
        promises=frozenset({HOMOGENEOUS}),
        kwargs=lambda num_tasks: {"num_byzantine": 0},
        fewest=3,
        checked="numpy float64 of the published formula; TorchJD; published values",
        bad=({"num_byzantine": -1}, {"num_selected": 0}, {"num_selected": 1.5}, {"squared": "no"}),
    ),
    Row(
        mtl.geometric_median,
        "weighting",
        scale="mean (weights sum to 1)",
        state="none",
        paper="Pillutla, Kakade & Harchaoui, IEEE TSP 2022, arXiv 1912.13445",
        promises=frozenset({HOMOGENEOUS}),
        checked="an independent solve; optimality conditions",
    ),
    Row(
        mtl.dibs,
        "weighting",
        scale="eta r times the sum of unit gradients after one step",
        state="none",
        paper="DiBS-MTL, 2025 (formulas from the official code)",
        promises=frozenset({SCALE_FREE, PERMUTATION}),
        bad=({"num_steps": 0}, {"radius": 0.0}, {"learning_rate": 0.0}),
    ),
    Row(
        mtl.rotograd_scale,
        "weighting",
        scale="sum of K gradients of one length",
        state="K first norms, K counts",
        paper="Javaloy & Valera, ICLR 2022, arXiv 2103.02631",
        promises=frozenset({HOMOGENEOUS, PERMUTATION, LINEAR}),
        kwargs=_num_tasks,
        bad=({"num_tasks": 0}, {"burn_in": -1}),
    ),
    Row(
        mtl.pcd,
        "weighting",
        scale="norm of the primary gradient",
        state="K root mean square norms, K counts",
        paper="TMLR 2026, arXiv 2606.29521 (formulas from TorchJD 0.18)",
        promises=frozenset({HOMOGENEOUS, LINEAR}),
        kwargs=_num_tasks,
        checked="an independent solve; TorchJD",
        bad=({"num_tasks": 0}, {"primary": -1}, {"primary": {"a": True, "b": True}}, {"progress": 1.5}, {"decay": 1.0}),
    ),
    Row(
        mtl.ngdiff,
        "weighting",
        scale="unit (sum of unit gradients)",
        state="none",
        paper="Jin, Bu et al., NAACL 2025, arXiv 2410.22086 (formula second hand)",
        promises=frozenset({SCALE_FREE}),
        kwargs=lambda num_tasks: {"signs": [1.0] + [-1.0] * (num_tasks - 1)},
        bad=({"signs": None}, {"signs": [0.3, -7.0, 1.0]}),
    ),
    Row(
        mtl.avgnorm,
        "weighting",
        scale="sum of K gradients of the sum's norm",
        state="none",
        paper="Guo et al., 2025, arXiv 2509.23915 (read through notes)",
        promises=frozenset({HOMOGENEOUS, PERMUTATION}),
        bad=({"scale": "norm"},),
    ),
    Row(
        mtl.slw,
        "weighting",
        scale="sum (weights sum to K)",
        state="none",
        paper="Crawshaw & Kosecka, 2021, arXiv 2109.08218",
        promises=frozenset({HOMOGENEOUS, PERMUTATION}),
    ),
    Row(
        mtl.modo,
        "cross weighting",
        scale="mean (weights sum to 1)",
        state="K weights",
        paper="Chen et al., JMLR 2024, arXiv 2305.20057",
        promises=frozenset({PERMUTATION, CONTINUOUS}),
        kwargs=_num_tasks,
        checked="numpy float64 of the published formula; TorchJD",
        bad=({"num_tasks": 0}, {"learning_rate": 0.0}, {"regularization": -0.1}),
    ),
    Row(
        mtl.sdmgrad,
        "cross weighting",
        scale="mean",
        state="K weights",
        paper="Xiao, Ban & Ji, NeurIPS 2023, arXiv 2305.18409",
        promises=frozenset({HOMOGENEOUS, PERMUTATION}),
        kwargs=_num_tasks,
        checked="numpy float64 of the published formula; TorchJD; published values",
        bad=({"num_tasks": 0}, {"lam": -0.1}, {"learning_rate": 0.0}, {"momentum": 1.0}, {"num_steps": 0}),
    ),
    Row(
        mtl.uw,
        "loss weighting",
        scale="half the sum at first, then learned",
        state="K log-variances and their optimizer's state",
        paper="Kendall, Gal & Cipolla, CVPR 2018, arXiv 1705.07115",
        promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
        kwargs=_num_tasks,
        needs=("losses",),
        bad=({"num_tasks": 0}, {"num_tasks": 2.0}, {"optimizer": "adam"}, {"init": None}),
    ),
    Row(
        mtl.slaw,
        "loss weighting",
        scale="sum (weights sum to K)",
        state="K means and deviations of losses, K counts",
        paper="Crawshaw & Kosecka, 2021, arXiv 2109.08218 (formulas from the official code)",
        promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
        kwargs=_num_tasks,
        needs=("losses",),
        checked="numpy float64 of the definition over all steps; formula from official code",
        bad=({"num_tasks": 0}, {"num_tasks": 2.0}, {"beta": -0.1}, {"beta": 1.1}),
    ),
    Row(
        mtl.bmtl,
        "loss weighting",
        scale="sum (weights sum to K)",
        state="none",
        paper="Liang & Zhang, IEEE BigData 2021, arXiv 2002.04792 (abstract only; formula from an implementation)",
        promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
        needs=("losses",),
        bad=({"temperature": 0.0}, {"temperature": -1.0}, {"normalize": "no"}),
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
        mtl.emtl,
        "weighting",
        scale="sum where all r are equal",
        state="none",
        paper="Yuan & Zhang, 2023, arXiv 2306.09373 (a reconstruction from the abstract)",
        promises=frozenset({PERMUTATION}),
        kwargs=lambda num_tasks: {"strength": 1.0},
        needs=("losses",),
        checked="numpy float64 of the reconstructed objective's derivative, not of a published formula",
        bad=({"strength": -1.0}, {"strength": "weak"}),
    ),
    Row(
        mtl.trimmed_mean,
        "coordinate-wise",
        scale="mean",
        state="none",
        checked="numpy float64 of the published formula; definition from TorchJD",
        paper="Yin et al., ICML 2018, arXiv 1803.01498",
        promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS}),
        fewest=3,
        bad=({"trim": -1}, {"trim": 0.1}),
    ),
    Row(
        mtl.db_mtl,
        "buffered",
        scale="sum of K gradients of the largest norm",
        state="K gradients",
        paper="Lin et al., Neural Networks (accepted 2025), arXiv 2308.12029",
        promises=frozenset({HOMOGENEOUS, PERMUTATION}),
        kwargs=_num_tasks,
        needs=("losses",),
        bad=({"num_tasks": 0}, {"beta": 1.0}, {"beta": -0.1}, {"sigma": -1.0}),
    ),
    Row(
        mtl.sam_gs,
        "buffered",
        scale="the paper's, without the official code's factor K; quadratic in the gradients in its momentum branch",
        state="K gradients, a running dissimilarity",
        paper="Borsani et al., ECML-PKDD 2025, arXiv 2506.06130",
        promises=frozenset({PERMUTATION}),
        kwargs=_num_tasks,
        checked="numpy float64 of the published formula; published values; formula from official code",
        bad=(
            {"num_tasks": 0},
            {"gamma": -0.1},
            {"b1": 1.0},
            {"b2": 1.0},
            {"similarity": "cosine"},
            {"reduction": "max"},
            {"epsilon": "none"},
            {"aligned": "mean"},
        ),
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
        mtl.grouped,
        "wrapper",
        scale="the method's, in each group",
        state="the method's for each group",
        paper="the groups of Wang et al. (GradVac), ICLR 2021, arXiv 2010.05874",
        kwargs=lambda num_tasks: {"method": mtl.mgda(), "labels": lambda path: str(path)},
    ),
    Row(
        mtl.fs_mtl,
        "perturbed",
        scale="the method's, of losses and flat parts together",
        state="two of the method's",
        paper="Phan et al., ICCV 2025, arXiv 2211.13723",
        kwargs=lambda num_tasks: {"method": mtl.mgda()},
        needs=("clean_grads` or `grad_fn",),
        checked="numpy float64 of the published formula; plain SAM for averages",
        bad=({"rho_shared": -0.1}, {"rho_private": -0.1}, {"mode": "both"}),
    ),
    Row(
        mtl.samo,
        "perturbed",
        scale="the method's",
        state="the method's and a random key",
        paper="Ban, Subramani & Ji, ICCV 2025, arXiv 2507.07883 (formulas from the official code)",
        kwargs=lambda num_tasks: {"method": mtl.mgda()},
        needs=("losses_fn", "grad_fn"),
        checked="numpy float64 of the official code's formula",
        bad=({"rho": -0.1}, {"beta": 1.5}, {"probe": 0.0}, {"key": None}),
        randomized=True,
    ),
    Row(
        mtl.gram_over,
        "wrapper",
        scale="the method's",
        state="the method's",
        paper="the last shared layer of Chen et al. (GradNorm), ICML 2018, arXiv 1711.02257",
        kwargs=lambda num_tasks: {"method": mtl.mgda(), "where": lambda path: True},
    ),
    Row(
        mtl.per_task,
        "task-wise",
        scale="the transformation's",
        state="K times the transformation's",
        paper="none",
        kwargs=lambda num_tasks: {"transform": optax.identity(), "num_tasks": num_tasks},
        bad=({"num_tasks": 0},),
    ),
    Row(
        mtl.dropgrad,
        "task-wise",
        scale="the gradients', on average",
        state="a random key",
        paper="Tseng et al., 2020, arXiv 2004.05859 (formulas from the official code)",
        bad=({"rate": -0.1}, {"rate": 1.0}, {"kind": "uniform"}, {"key": None}),
        randomized=True,
    ),
    Row(
        mtl.non_conflicting,
        "wrapper",
        scale="the method's, or less",
        state="the method's",
        paper="Hu, Ho & Yu, 2026, arXiv 2605.30452 (abstract only)",
        kwargs=lambda num_tasks: {"method": mtl.mean()},
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
    Row(
        mtl.gen_learning_rate,
        "learning rate",
        scale="minus the learning rate times what comes in",
        state="a learning rate, three counts",
        paper="Bu & Xu, ICLR 2025, OpenReview bI3fcTsKW4 (formulas from the official code)",
        kwargs=lambda num_tasks: {"learning_rate": 0.1},
        needs=("params", "value_fn"),
        bad=({"learning_rate": 0.0}, {"every": 0}, {"every": 1.5}, {"smoothing": 1.0}, {"smoothing": -0.1}),
    ),
)
"""Every wrapper, and what else stands before or after a method."""

ROWS = {row.name: row for row in METHODS + WRAPPERS}
"""All rows by name."""


def describe(row: Row) -> str:
    """Return what the row adds to its factory's documentation."""
    promises = ", ".join(sorted(row.promises)) or "none"
    needs = ", ".join(f"`{name}`" for name in row.needs) or "nothing beyond the gradients"
    if row.kind in ("wrapper", "perturbed"):
        needs = " and ".join(["what the method needs", *(f"`{name}`" for name in row.needs)])
    needs = "`cross_gramian` of two batches, else it is biased" if row.kind == "cross weighting" else needs
    lines = [
        f"Native scale: {row.scale}.",
        f"State: {row.state}.",
        f"Update needs: {needs}." + (f" At least {row.fewest} tasks present." if row.fewest > 1 else ""),
    ]
    if row not in WRAPPERS:
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
        promises = ", ".join(sorted(row.promises & {NON_CONFLICTING, SCALE_FREE})) or "-"
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
