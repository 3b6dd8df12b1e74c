"""An import hook: shapes and dtypes of a module's functions and dataclasses are checked.

jaxtyping's own hook decorates every function, those that are defined inside others too, which are then compiled anew at each call of
the outer one, and checks every call: it made tests several times slower. This one takes functions and methods that name a shape, and
dataclasses, and checks the first calls of a function in each test.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype import beartype
from jaxtyping import jaxtyped

_SHAPE = re.compile(r"\b(Shaped|Num|Real|Inexact|Bool|Float|Int|UInt|Complex)\d*\[")
_DECORATOR = f"__import__('{__name__}').checked"
_CHECKED_CALLS = 20  # of one function in one test
_test = 0


def begin_test() -> None:
    """Check the next calls of every function again."""
    global _test
    _test += 1


def checked(made: Any) -> Any:
    """Decorate a function or a dataclass."""
    with_checks = jaxtyped(made, typechecker=beartype)
    if isinstance(made, type):
        return with_checks
    test, n_calls = -1, 0

    @functools.wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, n_calls
        n_calls = n_calls + 1 if test == _test else 1
        test = _test
        function: Callable[..., Any] = with_checks if n_calls <= _CHECKED_CALLS else made
        return function(*args, **kwargs)

    return call


def names_a_shape(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether an annotation of the function's arguments or result is of an array."""
    arguments = [node.annotation for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    return any(_SHAPE.search(ast.unparse(annotation)) for annotation in [*arguments, function.returns] if annotation)


class _Decorating(ast.NodeTransformer):
    """Decorate functions and methods, and no functions inside them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if names_a_shape(node):
            node.decorator_list.append(_decorator_at(node))  # next to the function, whose annotations other decorators drop
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            node.decorator_list.insert(0, _decorator_at(node))
        return node


def _decorator_at(node: ast.stmt) -> ast.expr:
    decorator = ast.parse(_DECORATOR, mode="eval").body
    for part in ast.walk(decorator):
        ast.copy_location(part, node)
    return decorator


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compile the file, with no cache: Python's is of the file as it is."""
        path = self.get_filename(fullname)
        tree = _Decorating().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = tuple(modules)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(fullname == module or fullname.startswith(f"{module}.") for module in self.modules):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def check_shapes(modules: Sequence[str]) -> None:
    """Check the shapes of some modules and of what is in them, none of which may have been imported.

    Raises:
        RuntimeError: If one has been.
    """
    if early := [name for name in modules if name in sys.modules]:
        raise RuntimeError(f"{', '.join(early)} were imported before their shapes could be checked.")
    sys.meta_path.insert(0, _Finder(modules))
