"""A method's description of itself, which tests, tables, documentation and help() use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mtlgrad_jax._core.paper import Paper

# What a row can promise. Each promise has a property test; each missing one has a counterexample in docs/properties.md.
NON_CONFLICTING = "non-conflicting"  # no task ascends to first order: <g_i, d> >= 0
PERMUTATION = "permutation-equivariant"  # the order of the tasks does not matter
HOMOGENEOUS = "scale-equivariant"  # method(s G) = s method(G) for s > 0
SCALE_FREE = "invariant to task scaling"  # rescaling one task's gradient leaves d as it is
DESCENT = "descent direction"  # the mean loss does not ascend to first order: <g_0, d> >= 0
CONTINUOUS = "continuous"  # a change of G that tends to zero changes d by something that tends to zero
LINEAR = "linear under scaling"  # d(diag(a c1 + b c2) G) = a d(diag(c1) G) + b d(diag(c2) G), all positive


def num_tasks_only(num_tasks: int) -> dict[str, Any]:
    """Return the smallest arguments of a factory that requires K."""
    return {"num_tasks": num_tasks}


@dataclass(frozen=True)
class Row:
    """A public factory.

    Attributes:
      factory: in `mtlgrad_jax`.
      scale: native scale of the update.
      papers: where it was published.
      note: what the papers do not say: where its formula comes from, or which part of a paper it is.
      state: size of its state.
      promises: properties that hold for every input, with the default arguments.
      kwargs: smallest arguments, as a function of K.
      wraps: for a wrapper, the method inside it in tests and tables.
      around: turns that method into the wrapper's arguments; `kwargs` holds the others.
      functions: functions and stacks that the update requires besides the arguments that the method declares.
      fewest: present tasks below which it falls back to their mean.
      checked: what it was compared with.
      randomized: whether it draws random numbers; permutation, continuity and masks then hold in
        distribution.
    """

    factory: Callable[..., Any]
    scale: str
    papers: tuple[Paper, ...] = ()
    note: str = ""
    state: str = "none"
    promises: frozenset[str] = frozenset()
    kwargs: Callable[[int], dict[str, Any]] = lambda num_tasks: {}
    wraps: str = ""
    around: Callable[[Any], dict[str, Any]] = lambda method: {"method": method}
    functions: tuple[str, ...] = ()
    fewest: int = 1
    checked: str = "numpy float64 of the published formula"
    randomized: bool = False

    @property
    def name(self) -> str:
        """The factory's name."""
        return self.factory.__name__

    @property
    def reference(self) -> str:
        """The papers and the note in one line."""
        papers = "; ".join(map(str, self.papers))
        return f"{papers} ({self.note})" if papers and self.note else papers or self.note or "none"

    @property
    def folder(self) -> str:
        """The folder it is in: what a method must see, which determines its cost; "wrappers" for a wrapper."""
        return self.factory.__module__.split(".")[-2]
