"""What a file tells of a policy beside its tensors.

Which layers it is made of, which weights are frozen, and what optimizers count in their groups.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from sbac.codec import decode, encode

_MAX_NAMED = 3  # layers that a message names


def layers(policy: nn.Module) -> dict[str, str]:
    """The layers of a policy by their names, in words: those of torch with their settings, a user's own by their class.

    Weights do not tell an activation from another. sbac's own modules are left out, which follow from the arguments.
    """
    described = {}
    for name, module in policy.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind.__module__.startswith("torch.") and next(module.children(), None) is None:
            described[name] = f"{kind.__name__}({module.extra_repr()})"
        elif name and not kind.__module__.startswith(("torch.", "sbac.")):
            described[name] = kind.__name__  # what it would say of itself may change, and hold addresses
    return described


def differing_layers(policy: nn.Module, stored: Any, with_settings: bool) -> list[str]:
    """What is to be said of layers that differ from those of a file, one line if any.

    Said and not refused: the weights fit, and whoever changed a layer by hand can change it again. torch may also come
    to name a layer otherwise.

    Args:
        policy: The policy, which has its weights already.
        stored: From a file, as `layers` gave it, or None of an earlier version.
        with_settings: Whether those of each layer count; another version of torch may word them otherwise.

    Raises:
        ValueError: It is something else.
    """
    if stored is None:
        return []
    if not isinstance(stored, dict) or not all(isinstance(words, str) for words in stored.values()):
        raise ValueError(f"the layers of its policy are {stored!r}")
    now = layers(policy)

    def what_counts(words: str | None) -> str | None:
        return words if words is None or with_settings else words.partition("(")[0]

    differing = [name for name in {**stored, **now} if what_counts(stored.get(name)) != what_counts(now.get(name))]
    if not differing:
        return []
    named = [f"{name} is {now.get(name, 'none')}, was {stored.get(name, 'none')}" for name in differing[:_MAX_NAMED]]
    more = f", and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
    return [
        f"the weights fit, but the policy has other layers than the one that was saved, and computes something else: "
        f"{'; '.join(named)}{more}. Change them as they were changed before, or let policy_kwargs make them"
    ]


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
