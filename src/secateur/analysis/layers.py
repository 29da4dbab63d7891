"""The layers that an analysis looks at."""

from __future__ import annotations

from torch import nn

from secateur.core.targets import Targets, find_targets, unwrap
from secateur.errors import UnknownNameError

__all__ = ["layers_of"]


def layers_of(model: nn.Module, targets: Targets | None) -> tuple[nn.Module, Targets, dict[str, nn.Parameter]]:
    """The network inside its wrappers, the targets (default: every prunable weight), and their parameters by name.

    Raises: `UnknownNameError` for a target that the network does not have.
    """
    network = unwrap(model)
    targets = find_targets(network) if targets is None else targets
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for target in targets:
        if target.name not in parameters:
            raise UnknownNameError("layer", target.name, parameters, "the targets belong to another network")
    return network, targets, {t.name: parameters[t.name] for t in targets}
