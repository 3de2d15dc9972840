"""`BaseCallback`: the moments at which something may happen beside the learning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sbac.logger import Logger

if TYPE_CHECKING:
    from sbac.base import BaseAlgorithm

Variables: TypeAlias = dict[str, Any]
T = TypeVar("T")


class BaseCallback:
    """Something that happens beside the learning. Subclass it and write the hooks that you need.

    The hooks begin with an underscore. The other methods belong to the algorithm, which calls them.

    Args:
        verbose: 0 is silent, 1 tells of what is decided, 2 also of what is written.

    Attributes:
        model: The algorithm that is trained.
        n_calls: How often `_on_step` was called: once for each step of the vector environment.
        num_timesteps: How many transitions the model has collected, over all its environments.
        locals: The local variables of the algorithm's loop, such as ``rewards``, ``dones`` and ``infos``.
        globals: The global variables there.
        parent: The callback that calls this one, if any.
    """

    model: BaseAlgorithm

    def __init__(self, verbose: int = 0) -> None:
        self.verbose = verbose
        self.n_calls = 0
        self.num_timesteps = 0
        self.locals: Variables = {}
        self.globals: Variables = {}
        self.parent: BaseCallback | None = None
        self._warned_of_none = False

    @property
    def logger(self) -> Logger:
        """The model's logger."""
        return self.model.logger

    @property
    def training_env(self) -> Any:
        """The environments that the model is trained in."""
        return self.model.get_env()

    def init_callback(self, model: BaseAlgorithm) -> None:
        """Give the callback, and those that it calls, their model."""
        self.model = model
        self._call(self._init_callback)
        for child in self._children():
            child.parent = self
            child.init_callback(model)

    def on_training_start(self, locals_: Variables, globals_: Variables) -> None:
        """Training begins: take over the variables of `learn`, and tell `_on_training_start` and the children."""
        self.locals, self.globals = locals_, globals_
        self.num_timesteps = self.model.num_timesteps
        self._call(self._on_training_start)
        for child in self._children():
            child.on_training_start(locals_, globals_)

    def on_rollout_start(self) -> None:
        """A rollout begins: tell `_on_rollout_start` and the children."""
        self._call(self._on_rollout_start)
        for child in self._children():
            child.on_rollout_start()

    def on_step(self) -> bool:
        """Count the step and act; returns whether training goes on."""
        self.n_calls += 1
        self.num_timesteps = self.model.num_timesteps
        return self._goes_on(self._on_step)

    def on_idle(self) -> bool:
        """Between two steps that take long: ask `_on_idle` and the children whether training goes on."""
        answers = [self._goes_on(self._on_idle), *(child.on_idle() for child in self._children())]
        return all(answers)

    def on_rollout_end(self) -> None:
        """A rollout is complete: tell `_on_rollout_end` and the children."""
        self._call(self._on_rollout_end)
        for child in self._children():
            child.on_rollout_end()

    def on_training_end(self) -> None:
        """Training ended: tell `_on_training_end` and the children."""
        self._call(self._on_training_end)
        for child in self._children():
            child.on_training_end()

    def update_locals(self, locals_: Variables) -> None:
        """Take over the local variables of the algorithm's loop."""
        self.locals.update(locals_)
        for child in self._children():
            child.update_locals(locals_)

    def close(self) -> None:
        """Give back what is held (a terminal, environments), also after an error; twice does no harm."""
        for child in self._children():
            child.close()

    def get_state(self) -> dict[str, Any]:
        """What the callback must not forget when a run is resumed, as plain data: numbers, texts, lists, arrays.

        A callback that counts for itself adds to this what it counts.
        """
        return {"n_calls": self.n_calls}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` returned. Called after `_on_training_start`."""
        self.n_calls = state["n_calls"]

    def everyone(self) -> Iterator[BaseCallback]:
        """This callback and all those that it calls, directly or not."""
        yield self
        for child in self._children():
            yield from child.everyone()

    def _init_callback(self) -> None: ...

    def _on_training_start(self) -> None: ...

    def _on_rollout_start(self) -> None: ...

    def _on_step(self) -> bool | None:
        return True

    def _on_idle(self) -> bool | None:
        """Returns whether training goes on.

        Asked by A3C only: some twenty times a second while its workers tell of no step, where one of them failed, and
        once a second in evaluations.
        """
        return True

    def _on_rollout_end(self) -> None: ...

    def _on_training_end(self) -> None: ...

    def _root(self) -> BaseCallback:
        """The callback that all others are called by."""
        return self if self.parent is None else self.parent._root()

    def _children(self) -> Sequence[BaseCallback]:
        """The callbacks whose `on_step` this one calls; all other moments reach them by themselves."""
        return ()

    def _goes_on(self, hook: Callable[[], bool | None]) -> bool:
        go_on = self._call(hook)
        if go_on is None and not self._warned_of_none:
            self._warned_of_none = True
            name = f"{type(self).__name__}.{hook.__name__}"
            warnings.warn(f"{name} returned None, taken for True; return True or False", stacklevel=3)
        return go_on is None or bool(go_on)

    def _call(self, hook: Callable[[], T]) -> T:
        """Call a hook; an error that it raises gets a note with the innermost callback and the step."""
        try:
            return hook()
        except Exception as error:
            if not any(note.startswith("raised by callback") for note in getattr(error, "__notes__", ())):
                name, step = f"{type(self).__name__}.{hook.__name__}", self.model.num_timesteps
                error.add_note(f"raised by callback {name} at step {step}")
            raise
