"""What of a policy goes into a file beside its weights: which of them are frozen."""

from __future__ import annotations

from typing import Any

from torch import nn


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
