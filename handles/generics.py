"""What type checkers are told of handles: the type variables, and the kinds of methods. At run time these are only names.

A handle is generic in what it calls: `DeploymentHandle[Model]` for a class, `DeploymentHandle[Callable[[int], str]]` for a
function. An instance of a class with `__call__` is a callable, too, so the same overloads do for both.
"""

from collections.abc import AsyncIterable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault  # type checkers know it; nobody has to install it

    # With the default, `handle: DeploymentHandle` does without brackets, under `mypy --strict`, too.
    T_co = TypeVarWithDefault("T_co", covariant=True, default=Any)
else:
    T_co = TypeVar("T_co", covariant=True)

T = TypeVar("T")
R = TypeVar("R")  # what a method returns, or a generator yields
R_co = TypeVar("R_co", covariant=True)
A = TypeVar("A")  # what it takes

# Overloads in this order: to a type checker, an async method is also a plain one, which returns a coroutine.
Async: TypeAlias = Callable[..., Coroutine[Any, Any, R]]
Yields: TypeAlias = Callable[..., AsyncIterable[R] | Iterator[R]]
Plain: TypeAlias = Callable[..., R]

# The same, of what can be called with one argument: what `map` does.
Async1: TypeAlias = Callable[[A], Coroutine[Any, Any, R]]
Plain1: TypeAlias = Callable[[A], R]
