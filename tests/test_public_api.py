"""What users can name, with its signature, is a file: a change of it is a decision.

`make api` rewrites the file. It is read from the source, so that it is the same for every version of Python.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import mtlgrad_jax as mtl

ROOT = Path(mtl.__file__).parents[1]
FILE = Path(__file__).with_name("public_api.txt")
MODULES = ("", ".stacks", ".solvers", ".diagnostics", ".registry")
MODULES += (".integrations.linen", ".integrations.nnx", ".integrations.logging")


@functools.cache
def body(module: str) -> list[ast.stmt]:
    path = ROOT / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()).body


def definitions(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Names at the top level of a module, with the statements that define them."""
    for node in body(module):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node
            case ast.ImportFrom():
                yield from ((alias.asname or alias.name, node) for alias in node.names)


def resolve(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """The module and the statement where a name of the package is defined; no statement for a module."""
    node = dict(definitions(module)).get(name)
    if not (isinstance(node, ast.ImportFrom) and node.module.startswith("mtlgrad_jax")):
        return module, node
    if node.module == module:
        return f"{module}.{name}", None
    return resolve(node.module, next(alias.name for alias in node.names if name in (alias.asname, alias.name)))


def public(module: str) -> Iterator[str]:
    for name, node in definitions(module):
        reexported = isinstance(node, ast.ImportFrom) and any(name == alias.asname for alias in node.names)
        if not name.startswith("_") and (reexported or not isinstance(node, ast.ImportFrom)):
            yield from lines(f"{module}.{name}", *resolve(module, name))


def lines(path: str, module: str, node: ast.stmt | None) -> Iterator[str]:
    match node:
        case ast.FunctionDef(args=args, returns=returns):
            arguments = ast.unparse(Choices(module).visit(args))
            yield f"{path}({arguments})" + (f" -> {ast.unparse(returns)}" if returns else "")
        case ast.ClassDef(bases=bases):
            yield f"{path} = class({', '.join(map(ast.unparse, bases))})"
            for name, (owner, member) in members(module, node).items():
                yield from lines(f"{path}.{name}", owner, member)
        case ast.AnnAssign():
            yield f"{path.rpartition('.')[0]}.{ast.unparse(node)}"
        case _:
            yield f"{path} = {'value' if node else 'module'}"


def members(module: str, node: ast.ClassDef) -> dict[str, tuple[str, ast.stmt]]:
    """The public members of a class and those that it inherits from classes of the package."""
    found = {}
    for base in node.bases:
        owner, parent = resolve(module, base.id) if isinstance(base, ast.Name) else (module, None)
        found |= members(owner, parent) if isinstance(parent, ast.ClassDef) else {}
    for member in node.body:
        match member:
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.FunctionDef(name=name):
                if not name.startswith("_") or name in ("__new__", "__init__", "__call__"):
                    found[name] = module, member
    return found


class Choices(ast.NodeTransformer):
    """Writes out the names of literal types, such as `Rescale = Literal["none", "1+c"]`."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        _, found = resolve(self.module, node.id)
        literal = isinstance(found, ast.Assign) and ast.unparse(found.value).startswith("Literal[")
        return found.value if literal else node


def api() -> str:
    return "\n".join(sorted({line for module in MODULES for line in public(f"mtlgrad_jax{module}")})) + "\n"


def test_the_public_api_is_as_decided():
    assert api().splitlines() == FILE.read_text().splitlines(), "If this change is intended, run `make api`."


if __name__ == "__main__":
    FILE.write_text(api())
