"""What type checkers are told of `map` and `starmap`: the items, the keywords, and what comes of them."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, TypeAlias, TypedDict

from millstream.handles.arguments import Argument
from millstream.handles.generics import A, R

Several: TypeAlias = Iterable[Argument[A]]
Many: TypeAlias = Iterable[Argument[A]] | AsyncIterable[Argument[A]]
Rows: TypeAlias = Iterable[Iterable[Any]]
ManyRows: TypeAlias = Iterable[Iterable[Any]] | AsyncIterable[Iterable[Any]]

Mixed: TypeAlias = Iterator[R | Exception]
AsyncMixed: TypeAlias = AsyncIterator[R | Exception]


class Choices(TypedDict, total=False):
    """The keywords."""

    max_in_flight: int
    ordered: bool
    progress: bool


class Collecting(Choices):
    """With the one that makes values of errors."""

    return_exceptions: bool
