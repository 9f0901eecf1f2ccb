"""Names for the loops and conditionals of a function, in the program it is compiled to and when it runs.

    jax.jit(named(f, "cuda")).lower(...)            # op_name of a loop in the compiled text holds "at:<place>"
    jax.jit(named(f, "cuda", runs.update))(...)     # runs: Counter of (place, branch), 0 for the body of a loop

A place is the position of an operation in the traced function. What `lax.platform_dependent` chooses is what it chooses
for the platform given, so that a CPU counts the iterations of the program for another device.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

INLINED = ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call")
INSIDE = {"while": ("body_jaxpr",), "scan": ("jaxpr",), "cond": ("branches",)}  # what a primitive runs or not

Report = Callable[[Iterable[tuple[str, int]]], Any]


def named(function: Callable[..., Any], platform: str, report: Report | None = None) -> Callable[..., Any]:
    """The same function with names, which calls `report` with each body and branch that runs."""

    def call(*args: Any) -> Any:
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        values = _Names(platform, report).run(traced, "", jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return call


def place(op_name: str) -> str:
    """The place in an op_name of a compiled program."""
    found = re.findall(r"at:([\d.]+)", op_name)
    if not found:
        raise ValueError(f"`op_name` must hold a place, got {op_name!r}: the function that was compiled is not named.")
    return found[-1]


@dataclass(frozen=True)
class _Names:
    platform: str
    report: Report | None

    def run(self, closed: ClosedJaxpr, prefix: str, args: Iterable[Any]) -> list[Any]:
        jaxpr = closed.jaxpr
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            here, params = f"{prefix}{i}", eqn.params
            operands = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in INLINED:
                with jax.named_scope(params.get("name", eqn.primitive.name)):
                    out = self.run(params.get("jaxpr") or params["call_jaxpr"], f"{here}.", operands)
            elif params.get("branches_platforms"):
                out = self.run(self.chosen(**params), f"{here}.", operands[1:])
            else:
                inside = {key: self.inside(params[key], here) for key in INSIDE.get(eqn.primitive.name, ())}
                with jax.named_scope(f"at:{here}"), eqn.ctx.manager:
                    out = eqn.primitive.bind(*operands, **params | inside)
            values |= zip(eqn.outvars, out if isinstance(out, (list, tuple)) else [out], strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def chosen(self, branches: Sequence[ClosedJaxpr], branches_platforms: Sequence[Any], **_: Any) -> ClosedJaxpr:
        fits = (platforms is None or self.platform in platforms for platforms in branches_platforms)
        return next(branch for branch, here in zip(branches, fits, strict=True) if here)

    def inside(self, closed: Any, here: str) -> Any:
        if isinstance(closed, tuple):
            return tuple(self.traced(branch, here, i) for i, branch in enumerate(closed))
        return self.traced(closed, here, 0)

    def traced(self, closed: ClosedJaxpr, here: str, branch: int) -> ClosedJaxpr:
        def body(*args: Any) -> list[Any]:
            if self.report:
                jax.debug.callback(partial(self.report, [(here, branch)]))
            return self.run(closed, f"{here}.{branch}.", args)

        shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in closed.in_avals)
        return jax.make_jaxpr(body)(*shapes)
