"""Parts of modules that are asked for at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import nn

T = TypeVar("T", bound=nn.Module)


class Part(Generic[T]):
    """A part of a module, found where torch keeps it; to be set as any other.

    Without it Python looks through the class and the instance and makes an error, before torch is asked: that takes as
    long as a small matrix product.
    """

    def __set_name__(self, owner: type[nn.Module], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, module: None, owner: Any = None) -> Part[T]: ...
    @overload
    def __get__(self, module: nn.Module, owner: Any = None) -> T: ...
    def __get__(self, module: nn.Module | None, owner: Any = None) -> Part[T] | T:
        if module is None:
            return self
        parts: Any = module.__dict__["_modules"]
        try:
            return parts[self._name]
        except KeyError:
            raise AttributeError(self._name) from None

    if TYPE_CHECKING:  # nn.Module takes it, as all parts

        def __set__(self, module: nn.Module, part: T) -> None: ...
