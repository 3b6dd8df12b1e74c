"""Tasks that are named by where they are imported from: `--task module:name`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from hf_trak.config import TrakConfig
from hf_trak.tasks.auto import TASKS
from hf_trak.tasks.base import Task

TaskMaker = Callable[[Any, TrakConfig], Task]
"""A function `(model, config) -> Task`, for tasks that depend on the model."""

_WAYS = "a Task, or a function (model, config) -> Task"


@dataclass(frozen=True)
class NamedTaskMaker:
    """A [`TaskMaker`] that was imported.

    Args:
        function (`Callable`): `(model, config) -> Task`.
        import_path (`str`): `module:name`.
    """

    function: TaskMaker
    import_path: str

    def __call__(self, model: Any, config: TrakConfig) -> Task:
        try:
            made = self.function(model, config)
        except Exception as error:  # of the user's code
            raise ValueError(
                f"The task {self.import_path} could not be made: {type(error).__name__}: {error}. It is called as (model, config), here "
                f"({type(model).__name__}, TrakConfig), and must return a Task."
            ) from error
        if not isinstance(made, Task):
            raise ValueError(
                f"The task {self.import_path} must be {_WAYS}, but called as (model, config) it returned a {type(made).__name__}. Return "
                "`Task.custom(...)`."
            )
        return replace(made, import_path=self.import_path)


def import_task(import_path: str) -> Task | NamedTaskMaker:
    """Import a task. Modules are looked for as Python does it, and then in the working directory.

    Args:
        import_path (`str`): `module:name`; the name is that of a [`Task`], or of a function `(model, config) -> Task`.

    Raises:
        ValueError: If there is no such module or name, importing it fails, or it is something else.
    """
    module_name, _, name = import_path.partition(":")
    if not module_name or not all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")]):
        known = f" A task of this library ({', '.join(TASKS)}) follows from the model." if import_path in TASKS else ""
        raise ValueError(f"--task must be module:name, such as my_tasks:salary, but is {import_path!r}.{known}")
    module = _import(module_name, import_path)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--task {import_path}: {_place(module)} has no {name!r}.{_candidates(module, name)}")
        found = getattr(found, part)
    if isinstance(found, Task):
        return replace(found, import_path=import_path)
    if not callable(found):
        raise ValueError(f"--task {import_path} must be {_WAYS}, but {name!r} of {_place(module)} is a {type(found).__name__}.")
    _check_signature(found, import_path)
    return NamedTaskMaker(found, import_path)


def make_task(given: Task | TaskMaker, model: Any, config: TrakConfig) -> Task:
    """Return a task that was given as it is, or as a function of the model and the configuration.

    Raises:
        ValueError: If the function returns something else.
    """
    if isinstance(given, Task):
        return given
    made = given(model, config)
    if not isinstance(made, Task):
        raise ValueError(f"`task` must be {_WAYS}, but the function returned a {type(made).__name__}.")
    return made


def _import(module_name: str, import_path: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # for good: the module may import its neighbours later
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f"--task {import_path}: there is no module {module_name!r}, neither installed nor in {here}. Run the command in the folder of "
                "the module, or add that folder to PYTHONPATH."
            ) from error
        raise ValueError(f"--task {import_path}: importing {module_name} failed: {error}.") from error
    except Exception as error:  # of the user's code
        raise ValueError(f"--task {import_path}: importing {module_name} failed: {type(error).__name__}: {error}.") from error


def _place(module: ModuleType) -> str:
    return f"{module.__name__} ({getattr(module, '__file__', None) or 'built in'})"


def _candidates(module: ModuleType, name: str) -> str:
    tasks = [other for other, value in vars(module).items() if isinstance(value, Task)]
    near = difflib.get_close_matches(name, [other for other in vars(module) if not other.startswith("_")], n=3)
    names = list(dict.fromkeys([*tasks, *near]))
    return f" Did you mean {', '.join(names)}?" if names else ""


def _check_signature(function: Any, import_path: str) -> None:
    """Refuse a function that cannot be called as (model, config), before a model is loaded."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # of builtins, which have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"--task {import_path} must be {_WAYS}, but the function takes {signature}, which does not fit two arguments: {error}."
        ) from error
    if list(signature.parameters)[1:2] == ["batch"]:
        raise ValueError(
            f"--task {import_path} must be {_WAYS}, but the function takes {signature}, as an output function does. Name the task that "
            "`Task.custom` makes of it."
        )
