"""The arguments of a batch: each call's own by name, and from those of all calls one list per parameter."""

import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Any

from millstream.errors import MillstreamError

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


class Parameters:
    """What callers give to a batched function: all of its parameters, or all but `self`."""

    def __init__(self, function: Callable[..., Any], name: str, *, without_self: bool) -> None:
        self.name, self.signature = name, inspect.signature(function)
        found = list(self.signature.parameters.values())
        if without_self and found and found[0].kind is not Parameter.VAR_POSITIONAL:
            self.signature = self.signature.replace(parameters=found[1:])
        self._sole = self._find_sole()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call by the names of their parameters. Raises TypeError where a call would."""
        if self._sole and len(args) == 1 and not kwargs:
            return {self._sole: args[0]}  # the usual call; `bind` would be the most expensive part of it
        return self.signature.bind(*args, **kwargs).arguments

    def _find_sole(self) -> str:
        """The parameter to which a single positional argument goes, if a call needs no more than that; else ""."""
        found = list(self.signature.parameters.values())
        if not found or found[0].kind not in _POSITIONAL or any(map(_is_required, found[1:])):
            return ""
        return found[0].name

    def columns(self, calls: Sequence[dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments for all calls: one list per parameter that any of them gives; in the others its default stands.

        Raises MillstreamError for calls that differ in what they give to `*args` or `**kwargs`.
        """
        given = {name for call in calls for name in call}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        is_by_name = False  # after a parameter that nobody gives, others can only be named
        for parameter in self.signature.parameters.values():
            if parameter.name not in given:
                is_by_name = True
                continue
            column = [call.get(parameter.name, parameter.default) for call in calls]
            if parameter.kind is Parameter.VAR_POSITIONAL:
                args += self._positions(column)
            elif parameter.kind is Parameter.VAR_KEYWORD:
                kwargs |= self._names(column)
            elif parameter.kind is Parameter.KEYWORD_ONLY or is_by_name:
                kwargs[parameter.name] = column
            else:
                args.append(column)
        return args, kwargs

    def _positions(self, rows: list[Any]) -> list[list[Any]]:
        rows = [() if row is Parameter.empty else row for row in rows]
        if len({len(row) for row in rows}) > 1:
            raise MillstreamError(f"calls of {self.name} with different numbers of arguments cannot be one batch")
        return [list(column) for column in zip(*rows, strict=True)]

    def _names(self, rows: list[Any]) -> dict[str, list[Any]]:
        rows = [{} if row is Parameter.empty else row for row in rows]
        if len({frozenset(row) for row in rows}) > 1:
            raise MillstreamError(f"calls of {self.name} with different keyword arguments cannot be one batch")
        return {key: [row[key] for row in rows] for key in rows[0]}


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in _VARIABLE
