"""The arguments of a block's call, taken apart: its hidden states, every other tensor, and the form of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from inlay.errors import UnsupportedError


class Place:
    """Stands where a tensor was: by its number, or None for the hidden states."""

    def __init__(self, number: int | None) -> None:
        self.number = number


class Arguments:
    """A call's arguments, to be called again with other tensors in their places.

    The hidden states are the first positional argument, or else the keyword `hidden_states`, or else the first one.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = None if args else "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        self._hidden: Tensor | None = args[0] if name is None else kwargs[name]
        self._tensors: list[Tensor] = []
        self.args: list[Any] = [self._taken(value) for value in args]
        self.kwargs: dict[str, Any] = {key: self._taken(value) for key, value in kwargs.items()}
        if name is None:
            self.args[0] = Place(None)
        else:
            self.kwargs[name] = Place(None)

    def _taken(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value is self._hidden:
                return Place(None)
            self._tensors.append(value)
            return Place(len(self._tensors) - 1)
        if type(value) in (tuple, list):
            return type(value)(self._taken(one) for one in value)
        if type(value) is dict:
            return {key: self._taken(one) for key, one in value.items()}
        return value

    def take(self) -> tuple[Tensor, list[Tensor]]:
        """The hidden states and the other tensors, which are not kept here any longer."""
        hidden, tensors = self._hidden, self._tensors
        assert hidden is not None
        self._hidden, self._tensors = None, []
        return hidden, tensors

    def filled(self, hidden: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments with these tensors."""
        return [_put(value, hidden, tensors) for value in self.args], {
            key: _put(value, hidden, tensors) for key, value in self.kwargs.items()
        }


def _put(value: Any, hidden: Tensor, tensors: Sequence[Tensor]) -> Any:
    # Not a function inside the method: one that calls itself lives, with the tensors, until cycles are collected.
    if isinstance(value, Place):
        return hidden if value.number is None else tensors[value.number]
    if type(value) in (tuple, list):
        return type(value)(_put(one, hidden, tensors) for one in value)
    if type(value) is dict:
        return {key: _put(one, hidden, tensors) for key, one in value.items()}
    return value


def caches(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Caches of keys and values among the arguments."""
    return [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]


def without_caches(given: Arguments) -> Arguments:
    """The arguments with None for each cache, which must be empty: UnsupportedError where one is not."""
    for held in caches(given.args, given.kwargs):
        if held.get_seq_length() > 0:
            raise UnsupportedError(
                "MEFT: a reversible stack cannot train on keys and values of an earlier call, because its backward "
                "pass would add to them again: leave past_key_values out, or call the model in eval mode"
            )
    given.args = [None if hasattr(value, "get_seq_length") else value for value in given.args]
    given.kwargs = {key: None if hasattr(value, "get_seq_length") else value for key, value in given.kwargs.items()}
    return given
