"""Four calls for anyone's training loop: attach, penalty, after_step, finalize."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from torch import Tensor, nn

from secateur.core.duration import Progress
from secateur.core.masks import Masks
from secateur.core.targets import Targets
from secateur.errors import UsageError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.base import Regularizer
from secateur.sparsify.arguments import expect_regularizer, expect_targets

__all__ = ["Sparsifier"]


class Sparsifier:
    """A regularizer at work in a training loop of known length.

    Args:
        model: the object the loop calls (the compiled or wrapped one, if there is one).
        regularizer: what to train under.
        steps: optimizer steps of the whole run, for schedules.
        steps_per_epoch: for schedules that move once an epoch; default: one epoch is the whole run.
        targets: what it acts on; default: all targets the regularizer acts on.
        seed: root seed of the noise.

    In the loop, with `with Sparsifier(...) as sparsifier:` around it: add `sparsifier.penalty()` to the loss, and
    call `sparsifier.after_step()` after `optimizer.step()`.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizer: Regularizer,
        *,
        steps: int,
        steps_per_epoch: int | None = None,
        targets: Targets | None = None,
        seed: int = 0,
    ) -> None:
        expect_regularizer("Sparsifier", regularizer)
        expect_targets("Sparsifier", targets)
        if steps < 1:
            raise UsageError(f"Sparsifier: steps is the length of the run, at least 1, got {steps}")
        self.model, self.regularizer, self.targets, self.seed = model, regularizer, targets, seed
        self.progress = Progress(0, steps, steps_per_epoch or steps)
        self._attachment: Attachment | None = None

    def attach(self) -> Sparsifier:
        """Start acting on the model. Also done by entering the `with` block."""
        if self._attachment is not None:
            raise UsageError("Sparsifier: already attached; call finalize() first")
        self._attachment = self.regularizer.attach(self.model, self.targets, seed=self.seed)
        if self.progress.step:
            self._attachment.progress = self.progress
        return self

    @property
    def attachment(self) -> Attachment:
        """The regularizer's handle, for scores and state."""
        if self._attachment is None:
            raise UsageError("Sparsifier: not attached; call attach() or use it in a with block")
        return self._attachment

    def penalty(self) -> Tensor | float:
        """What to add to the loss."""
        return self.attachment.penalty()

    def learned(self) -> list[str]:
        """Names of the parameters the method has added to the model; build the optimizer after attaching."""
        return list(self.attachment.learned)

    def scores(self) -> dict[str, Tensor]:
        """What the method has learned about each target, higher = keep; empty if nothing."""
        return self.attachment.scores()

    def after_step(self) -> None:
        """Call after every optimizer step."""
        done = self.progress
        self.progress = Progress(done.step + 1, done.steps, done.steps_per_epoch)
        self.attachment.after_step(self.progress)

    def finalize(self) -> Masks | None:
        """Stop acting; plain weights remain. Returns the masks the method decided on, if it decides."""
        masks = self.attachment.finalize()
        self._attachment = None
        return masks

    def state_dict(self) -> dict[str, Tensor]:
        """Enough, with the model's and the optimizer's state, to resume bitwise."""
        return self.attachment.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.attachment.load_state_dict(state)
        self.progress = self.attachment.progress

    def __enter__(self) -> Sparsifier:
        return self if self._attachment is not None else self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
