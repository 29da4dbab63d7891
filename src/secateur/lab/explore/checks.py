"""What can be told of an exploration before its network is trained: nothing here looks at trained weights."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

from secateur.core.targets import Targets, find_targets
from secateur.errors import MissingExtraError, NoEffectError, UnknownNameError, UsageError
from secateur.lab.explore.session import Session

__all__ = ["check_session"]


def check_session(session: Session) -> None:
    """Raise what would otherwise be found only after training: network, weights, layers, criteria, images, groups."""
    recipe = session.recipe
    if any(section.kind == "search" for section in recipe.explore) and find_spec("optuna") is None:
        raise MissingExtraError("a search", "search")
    session.context.check_model()
    _ = session.source, session.counts
    _targets(session)
    _check_renewing(session)
    for section in recipe.explore:
        if not (session.context.options.resume and session.stage(section).done):
            _CHECKS.get(section.kind, _nothing)(session, section)


def _targets(session: Session) -> Targets:
    network = session.context.model(session.recipe.seed)
    return find_targets(network, session.recipe.include, session.recipe.excluded)


def _check_renewing(session: Session) -> None:
    count = session.recipe.judge.recalibrate
    if count is None:
        return
    _check_images(session, "judge.recalibrate", count)
    network = session.context.model(session.recipe.seed)
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise NoEffectError("judge.recalibrate renews BatchNorm statistics, and the network has none; leave it out")


def _check_images(session: Session, what: str, count: int) -> None:
    there = len(session.context.data.train_labels)
    if count > there:
        raise UsageError(f"{what} {count}: there are {there} training images; ask for fewer")


def _nothing(session: Session, section: Any) -> None:
    pass


def _images(session: Session, section: Any) -> None:
    _check_images(session, f"{section.kind}: images", section.images)


def _oracle(session: Session, section: Any) -> None:
    recipe = session.recipe
    _images(session, section)
    find_targets(session.context.model(recipe.seed), recipe.include, (*recipe.excluded, *section.exclude))


def _search(session: Session, section: Any) -> None:
    from secateur.lab.explore.problems import units_of

    if section.vary == "units":
        units_of(session)
    if section.storage is not None:
        from secateur.search.storage import check_storage

        check_storage(section.storage)


def _analyses(session: Session, section: Any) -> None:
    from secateur.lab.explore.dependence import check_paired

    _images(session, section)
    check_paired(session, section)


def _fine_tune(session: Session, section: Any) -> None:
    if section.paper:
        _images(session, section)


def _deliver(session: Session, section: Any) -> None:
    from secateur.lab.explore.problems import units_of

    if section.vary == "units":
        known = units_of(session)
        for name in section.numbers:
            if name not in known:
                raise UnknownNameError("group of units in numbers", name, known)


def _masks(session: Session, section: Any) -> None:
    from secateur.lab.explore.masks import masked

    masked(session.context.groups, _targets(session), section.groups)


_CHECKS = {
    "analyses": _analyses,
    "deliver": _deliver,
    "fine_tune": _fine_tune,
    "masks": _masks,
    "oracle": _oracle,
    "search": _search,
}
