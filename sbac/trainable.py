"""A module whose parameters lie end to end in one tensor, and its steps along their gradient.

A small network has a dozen parameter tensors, and most of the time of clipping, stepping and copying them goes into
handling each. Laid flat, each of these is one operation on one tensor.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sbac.guards import NotFiniteError
from sbac.look import Look, forget
from sbac.optimization import initial_state, without_compiler
from sbac.perceptron import Gradient

# Layers that do the same in training and in evaluation. Any other, and any of a user's own, counts as one that may not.
_MODELESS = (
    nn.Linear,
    nn.Conv2d,
    nn.LSTMCell,
    nn.LayerNorm,
    nn.Flatten,
    nn.Identity,
    nn.Sequential,
    nn.ModuleList,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
)


class Trainable(nn.Module):
    """A module whose trainable parameters are views of one flat tensor.

    Others may replace a parameter's storage or gradient (`zero_grad`, `vector_to_parameters`, `double().float()`),
    freeze it or thaw it: `gradient`, `step` and `follow` notice, and lay the values into the same flat tensor again.

    Attributes:
        flat: All trainable parameters, (n_parameters,), with `flat.grad` likewise; set by `flatten`.
        optimizer: Steps along `flat.grad`; set by `set_optimizer`. Target networks have none.
    """

    flat: nn.Parameter
    optimizer: torch.optim.Optimizer

    def flatten(self) -> None:
        """Lay the parameters out in one tensor. To be called after construction and the move to a device.

        Raises:
            ValueError: There is none that requires a gradient, or they are of several dtypes or devices.
        """
        self._known = list(self.parameters())
        self._leaves = [parameter for parameter in self._known if parameter.requires_grad]
        self._left_out = [parameter for parameter in self._known if not parameter.requires_grad]
        self._frozen_versions: list[int] = []  # of those that a target network follows
        kinds = {(leaf.dtype, leaf.device) for leaf in self._leaves}
        if len(kinds) != 1:
            raise ValueError(
                f"{type(self).__name__} needs trainable parameters of one dtype on one device, "
                f"got {sorted(map(str, kinds))}"
            )
        # Not registered as a parameter of the module: it would appear twice in its state.
        object.__setattr__(self, "flat", nn.Parameter(torch.cat([leaf.detach().reshape(-1) for leaf in self._leaves])))
        self._lay()

    def _lay(self) -> None:
        """Make the leaves views of `flat`, which takes over their values."""
        flat = self.flat.detach()
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for leaf in self._leaves:
            if (leaf.dtype, leaf.device) != (flat.dtype, flat.device):
                raise ValueError(
                    f"{type(self).__name__} was made with parameters of {flat.dtype} on {flat.device}, but "
                    f"{names.get(id(leaf))} is now of {leaf.dtype} on {leaf.device}: move it back before it learns on"
                )
        for parameter in self._left_out:
            if parameter.requires_grad:
                raise ValueError(
                    f"{type(self).__name__}: {names.get(id(parameter))} was frozen when the network was made, and "
                    "cannot learn now: make it with requires_grad=True, and freeze it afterwards"
                )

        flat.copy_(torch.cat([leaf.detach().reshape(-1) for leaf in self._leaves]))
        self._bind()

    def take_additions(self) -> None:
        """Lay out also what a derived class added after `flatten`; before there is an optimizer."""
        if hasattr(self, "flat") and [*map(id, self._known)] != [*map(id, self.parameters())]:
            self.flatten()

    def take_changes(self) -> None:
        """Learn, from now on, those parameters that somebody put in place of others of their shape.

        Whole layers may have been replaced, or parameters by ``load_state_dict(assign=True)``.

        Raises:
            ValueError: Those that stand there now are of other shapes, or there are more of them.
        """
        if not hasattr(self, "flat") or self._look.is_still_so():
            return
        now = dict(self.named_parameters())
        known = {*map(id, self._known)}
        if known <= {*map(id, now.values())}:
            added = [name for name, parameter in now.items() if parameter.requires_grad and id(parameter) not in known]
            if added:
                raise ValueError(
                    f"{type(self).__name__}: {', '.join(added)} came after the network was made, and cannot learn: "
                    "add layers in a policy class of your own, or freeze them with requires_grad_(False)"
                )
        elif [parameter.shape for parameter in now.values()] != [parameter.shape for parameter in self._known]:
            raise ValueError(
                f"{type(self).__name__}: its parameters are others than those that it was made with, and cannot learn: "
                "change its layers in a policy class of your own, before flatten()"
            )
        else:
            instead = {id(before): after for before, after in zip(self._known, now.values(), strict=True)}
            self._leaves = [instead[id(leaf)] for leaf in self._leaves]
            self._left_out = [instead[id(parameter)] for parameter in self._left_out]
            self._known = list(now.values())
        self._lay()

    def _bind(self) -> None:
        """Make the leaves views of `flat`, whose values they take over."""
        forget()
        flat = self.flat.detach()
        self._before = flat.clone()
        self._gradient = self.flat.grad = torch.zeros_like(flat)
        self._gradient_address = self._gradient.data_ptr()
        self._layout: list[tuple[nn.Parameter, Tensor, bool]] = []
        self._frozen: list[slice] = []
        start = 0
        for leaf in self._leaves:
            span = slice(start, start + leaf.numel())
            leaf.data = flat[span].view_as(leaf)
            view = leaf.grad = self._gradient[span].view_as(leaf)
            self._layout.append((leaf, view, leaf.requires_grad))
            if not leaf.requires_grad:
                self._frozen.append(span)
            start = span.stop
        self._learning = [leaf for leaf in self._leaves if leaf.requires_grad]
        self._in_place = {
            id(leaf): Gradient(view, view.numpy() if view.device.type == "cpu" else None)
            for leaf, view, learns in self._layout
            if learns
        }
        modules = list(self.modules())
        self._has_modes = any(
            type(module) not in _MODELESS and not type(module).__module__.startswith("sbac.") for module in modules
        )
        self._buffers_of = [module._buffers for module in modules]
        self._look = Look(modules, [])

    def _buffers_now(self) -> list[Tensor]:
        """Its buffers, which a module may replace at each step by others."""
        there = filter(None, self._buffers_of)
        return [buffer for buffers in there for buffer in buffers.values() if buffer is not None]

    def _lay_if_moved(self) -> None:
        """As `_lay`, where somebody replaced what it made, or froze or thawed a parameter."""
        self.take_changes()
        moved = self.flat.grad is not self._gradient or self._gradient.data_ptr() != self._gradient_address
        for leaf, view, learns in self._layout:
            if leaf.grad is not view or leaf.requires_grad is not learns:
                moved = True
        if moved or (self._left_out and any(parameter.requires_grad for parameter in self._left_out)):
            self._lay()

    def __getstate__(self) -> dict[str, Any]:
        # Views become tensors of their own in a copy or a pickle: leave out what `_lay` makes anew.
        made = (
            "_before",
            "_gradient",
            "_gradient_address",
            "_layout",
            "_frozen",
            "_learning",
            "_in_place",
            "_buffers_of",
            "_look",
        )
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "flat" in state:
            self._lay()

    def set_optimizer(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        learning_rate: float,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        **defaults: Any,
    ) -> None:
        """Give the module its optimizer, fused where torch has such a kernel.

        Args:
            optimizer_class: Such as `torch.optim.Adam`.
            learning_rate: Step size.
            optimizer_kwargs: Its further arguments.
            **defaults: Arguments that `optimizer_kwargs` may override.

        Raises:
            ValueError: No class of an optimizer, one that needs a closure, or arguments that it does not take.
        """
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise ValueError(
                "optimizer_class (an argument, or in policy_kwargs) must be a subclass of torch.optim.Optimizer, such "
                f"as torch.optim.Adam, not {optimizer_class!r}"
            )
        closure = inspect.signature(optimizer_class.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"optimizer_class: {optimizer_class.__name__} computes the loss again within a step, for which it "
                "gets no function; choose one that steps along a gradient, such as torch.optim.Adam"
            )
        if not (optimizer_kwargs is None or isinstance(optimizer_kwargs, Mapping)):
            raise ValueError(
                f"policy_kwargs: optimizer_kwargs must be a dict of the optimizer's arguments, not {optimizer_kwargs!r}"
            )
        kwargs = {**defaults, **(optimizer_kwargs or {})}
        if "lr" in kwargs:
            raise ValueError("policy_kwargs: optimizer_kwargs must not hold lr, which learning_rate sets")
        if optimizer_class in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
            kwargs.setdefault("fused", True)
        make: Callable[..., torch.optim.Optimizer] = optimizer_class
        try:
            with without_compiler():
                self.optimizer = make([self.flat], lr=learning_rate, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"policy_kwargs: optimizer_kwargs {kwargs}: {error}") from error

    def set_learning_rate(self, learning_rate: float) -> None:
        """The step size from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def set_training_mode(self, mode: bool) -> None:
        """As `nn.Module.train`, but only for networks with layers to which the mode matters."""
        if self._has_modes and self.training is not mode:
            self.train(mode)

    def descend(
        self, loss: Tensor, max_grad_norm: float | None = None, back: Callable[[], None] | None = None
    ) -> Tensor:
        """One optimizer step down the gradient of a loss: `gradient` and `step`.

        Args:
            loss: A scalar.
            max_grad_norm: The gradient is scaled down to this Euclidean norm where it is longer; None leaves it.
            back: Adds the gradient of the loss to those of the parameters; None leaves it to autograd.

        Returns:
            The norm of the gradient before clipping, a scalar.

        Raises:
            NotFiniteError: The loss, its gradient or the parameters after the step are NaN or infinite. The parameters
                are as they were.
        """
        norm = self.gradient(loss, max_grad_norm, back)
        self.step()
        return norm

    def gradient(
        self, loss: Tensor, max_grad_norm: float | None = None, back: Callable[[], None] | None = None
    ) -> Tensor:
        """Compute the gradient of a loss with respect to this module's parameters only, for `step`.

        Args:
            loss: A scalar.
            max_grad_norm: The gradient is scaled down to this Euclidean norm where it is longer; None leaves it.
            back: Adds the gradient of the loss to those of the parameters; None leaves it to autograd.

        Returns:
            The norm of the gradient before clipping, a scalar.

        Raises:
            NotFiniteError: The loss or its gradient is NaN or infinite.
        """
        self._lay_if_moved()
        gradient = self._gradient
        gradient.zero_()
        for place in self._in_place.values():
            place.is_zero = True
        if self._learning:
            if back is None:
                loss.backward(inputs=self._learning)
            else:
                back()
        norm = torch.linalg.vector_norm(gradient)
        length = float(norm)
        if not math.isfinite(length + float(loss.detach())):
            raise NotFiniteError(
                f"{type(self).__name__}: the loss is {loss.item()} and the norm of its gradient {length}; the "
                "weights are those of before this update: try a smaller learning rate, max_grad_norm, or rewards of a "
                "smaller scale"
            )
        if max_grad_norm is not None and max_grad_norm < length + 1e-6:
            gradient.mul_(max_grad_norm / (length + 1e-6))
        return norm

    def back_by_autograd(self, outputs: Sequence[Tensor], *gradients: Tensor) -> None:
        """Add to the gradients of the parameters, from those of a loss with respect to what the network gave."""
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__} cannot learn while gradients are turned off: let it learn outside of "
                "torch.no_grad() and torch.inference_mode()"
            )
        # What only frozen parts had a hand in has no way back.
        learned = [i for i, output in enumerate(outputs) if output.requires_grad]
        if learned:
            asked = [outputs[i] for i in learned], [gradients[i] for i in learned]
            torch.autograd.backward(*asked, inputs=self._learning)

    def step(self) -> None:
        """One optimizer step along the gradient that `gradient` computed. Frozen parameters stay.

        Raises:
            NotFiniteError: A parameter would be NaN or infinite. The parameters are as they were.
        """
        flat = self.flat.detach()
        self._before.copy_(flat)
        if self._learning:
            _step(self.optimizer)
        for span in self._frozen:
            # Momentum and weight decay move what has no gradient.
            flat[span] = self._before[span]
        # A sum is finite only if every element is; where it overflows, the elements are looked at after all.
        if not math.isfinite(flat.sum()) and not flat.isfinite().all():
            self.undo_step()
            raise NotFiniteError(
                f"{type(self).__name__}: the optimizer's step leads to weights that are NaN or infinite; the weights "
                "are those of before this update: try a smaller learning rate"
            )

    def undo_step(self) -> None:
        """Give the parameters the values that they had before the last `step`. The optimizer's moments stay."""
        self.flat.detach().copy_(self._before)

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """If what follows this network's last step within the same update fails, the step is taken back."""
        try:
            yield
        except NotFiniteError:
            self.undo_step()
            raise

    def follow(self, source: Trainable, tau: float) -> None:
        """Soft update of a target network: theta' <- tau theta + (1 - tau) theta'. `tau=1` copies.

        What does not learn is copied: buffers (running statistics of normalisation layers), and weights that have been
        frozen from the beginning, where somebody changed them.
        """
        self.take_changes()
        source.take_changes()
        self.flat.data.lerp_(source.flat.data, tau)
        versions = [frozen._version for frozen in source._left_out]
        if versions != self._frozen_versions:  # somebody loaded others
            for own_frozen, its in zip(self._left_out, source._left_out, strict=True):
                own_frozen.data.copy_(its.data)
            self._frozen_versions = versions
        for own, other in zip(self._buffers_now(), source._buffers_now(), strict=True):
            own.data.copy_(other.data)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a network in training consists of: ``flat``, what is frozen, buffers, the optimizer's statistics.

        Raises:
            ValueError: The optimizer's statistics cannot be shared; see `initial_state`.
        """
        self._lay_if_moved()
        if self.flat not in self.optimizer.state:
            self.optimizer.state[self.flat] = initial_state(self.optimizer)
        statistics = self.optimizer.state[self.flat]
        return {
            "flat": self.flat.data,
            **{f"frozen/{index}": parameter.data for index, parameter in enumerate(self._left_out)},
            **{f"buffer/{index}": buffer for index, buffer in enumerate(self._buffers_now())},
            **{f"optimizer/{name}": value for name, value in statistics.items() if isinstance(value, Tensor)},
        }

    def live_in(self, tensors: Mapping[str, Tensor]) -> None:
        """Be made of the given tensors from now on, with their values.

        Args:
            tensors: Of the names, shapes and dtypes of `state_tensors`; in shared memory, say.
        """
        self.flat.data = tensors["flat"]
        for index, parameter in enumerate(self._left_out):
            parameter.data = tensors[f"frozen/{index}"]
        self._bind()
        for index, buffer in enumerate(self._buffers_now()):
            buffer.data = tensors[f"buffer/{index}"]
        statistics = self.optimizer.state[self.flat] = initial_state(self.optimizer)
        statistics.update({name: tensors[f"optimizer/{name}"] for name in statistics if f"optimizer/{name}" in tensors})

    @torch.no_grad()
    def step_along(self, other: Trainable) -> None:
        """`step` along the gradient that a network of the same form computed, and take in its buffers.

        The step is made on a copy, so that those who share the parameters never see numbers that are not finite, and
        what they wrote in the meantime is kept.

        Raises:
            NotFiniteError: As `step`.
        """
        shared = self.flat.data
        before = shared.clone()
        self.flat.data = before.clone()
        self._gradient.copy_(other._gradient)
        try:
            self.step()
            after = self.flat.data
        finally:
            self.flat.data = shared
        if torch.equal(shared, before):
            shared.copy_(after)  # exactly the numbers of the optimizer
        else:
            shared.add_(after - before)
        self.take_in_buffers(other)

    def take_in_buffers(self, other: Trainable) -> None:
        """Copy the buffers of a network of the same form that has seen other data."""
        for own, theirs in zip(self._buffers_now(), other._buffers_now(), strict=True):
            own.copy_(theirs)


def _step(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` of one parameter, without what torch does around it, which takes longer than the step.

    The short way is for the usual forms of `torch.optim.RMSprop` and fused `torch.optim.Adam` on the CPU, and gives the
    same numbers to the last bit. Others, and what somebody hooked into, go through ``optimizer.step()``.

    Args:
        optimizer: Of one parameter, which has a gradient.
    """
    kind = type(optimizer)
    unusual = _UNUSUAL.get(kind)
    group = optimizer.param_groups[0]
    parameter = group["params"][0]
    is_usual = unusual is not None and not any(map(group.get, unusual)) and group.get("fused", True)
    is_only = len(group["params"]) == len(optimizer.param_groups) == 1  # else somebody put another optimizer in place
    if not (is_usual and is_only) or parameter.device.type != "cpu" or _is_watched(optimizer):
        memory = [(p, p.detach()) for group in optimizer.param_groups for p in group["params"]]
        forget()
        optimizer.step()
        for parameter, before in memory:
            if parameter.data_ptr() != before.data_ptr():  # as of optimizers that write `p.data = p.data - ...`
                before.copy_(parameter.detach())
                parameter.data = before
        return
    state = optimizer.state[parameter]
    if not state:
        state.update(initial_state(optimizer))
    gradient, values = parameter.grad, parameter.detach()
    state["step"].add_(_ONE)
    if kind is torch.optim.RMSprop:
        if group["weight_decay"]:
            gradient = gradient.add(values, alpha=group["weight_decay"])
        square_avg = state["square_avg"]
        square_avg.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
        values.addcdiv_(gradient, square_avg.sqrt().add_(group["eps"]), value=-group["lr"])
    else:
        torch._fused_adam_(
            [values],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


_ONE = torch.ones(())  # added sooner than a number, of which torch first makes a tensor
_ALSO_UNUSUAL = ("maximize", "foreach", "capturable", "differentiable")
_UNUSUAL: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.RMSprop: ("momentum", "centered", *_ALSO_UNUSUAL),
    torch.optim.Adam: ("amsgrad", "decoupled_weight_decay", *_ALSO_UNUSUAL),
}


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody asked to be called with each step, as schedulers of learning rates do."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or "step" in optimizer.__dict__
    )
