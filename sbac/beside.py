"""What of a policy goes into a file beside tensors: which weights are frozen, what optimizers count in their groups."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from sbac.codec import decode, encode


def frozen_parameters(policy: nn.Module) -> list[str]:
    """The names of the parameters that do not learn."""
    return [name for name, parameter in policy.named_parameters() if not parameter.requires_grad]


def freeze(policy: nn.Module, names: Any) -> None:
    """Let the parameters of these names not learn, and the others as they are.

    Args:
        policy: The policy.
        names: From a file; a name may be that of a buffer, which never learns.

    Raises:
        ValueError: They are no names of the policy.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the names of the frozen parameters are {names!r}")
    unknown = sorted(set(names) - policy.state_dict().keys())
    if unknown:
        raise ValueError(f"its frozen parameters {unknown} are none of the policy's")
    parameters = dict(policy.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(False)


def changed_settings(name: str, optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """What of an optimizer's group is no longer as it was made, as data: those that count steps there, say.

    The step size is left out, which a schedule sets.

    Args:
        name: What a warning calls the network.
        optimizer: Of one group.

    Returns:
        By key, with what the optimizer was made with, and what is there now.
    """
    changed: dict[str, list[Any]] = {}
    left_out = []
    for key, value in optimizer.param_groups[0].items():
        if key in ("params", "lr"):
            continue
        made, (now, objects) = _made_with(optimizer, key), encode(value)
        if objects and value is not optimizer.defaults.get(key):
            left_out.append(key)
        elif not objects and now != made:
            changed[key] = [made, now]
    if left_out:
        warnings.warn(
            f"the optimizer of the {name} keeps {', '.join(map(repr, left_out))} in its param_groups, which is no "
            "plain data (numbers, texts, lists, arrays) and will begin anew when the file is loaded",
            stacklevel=4,
        )
    return changed


def settings_to_restore(optimizer: torch.optim.Optimizer, changed: Any) -> dict[str, Any]:
    """What of `changed_settings` an optimizer's group takes over: all but what it is made with otherwise on purpose.

    Args:
        optimizer: As it was made, of one group.
        changed: From a file.

    Raises:
        ValueError: It is something else.
    """
    restored = {}
    for key, pair in changed.items() if isinstance(changed, dict) else [("", changed)]:
        if not isinstance(pair, list) or len(pair) != 2 or key in ("params", "lr"):
            raise ValueError(f"what changed in its group is {changed!r}")
        made, now = pair
        # Where it is made with another value now, that one was asked for: load(path, weight_decay=0.1), say.
        if made == _made_with(optimizer, key):
            restored[key] = decode(now)
    return restored


def _made_with(optimizer: torch.optim.Optimizer, key: str) -> Any:
    """The value of a key that the optimizer's group began with, as data."""
    return encode(optimizer.defaults.get(key))[0]
