"""How the lab tells whoever watches what it is doing, and asks whether to stop. Prints nothing itself."""

from __future__ import annotations

from secateur.errors import SecateurError

__all__ = ["Interrupted", "Listener"]


class Interrupted(SecateurError):
    """The caller asked to stop; what was done is saved and resumes."""

    exit_code = 130


class Listener:
    """Override what you want to hear. The command line's listener draws progress bars.

    Setting `stop` (from a signal handler, say) makes training save its state at the next step and raise
    `Interrupted`.
    """

    stop: bool = False

    def stage_started(self, title: str, steps: int) -> None:
        """A stage begins; `steps` is its length, 0 if unknown."""

    def advanced(self, step: int, note: str) -> None:
        """The current stage stands at `step`."""

    def stage_finished(self, title: str, cached: bool) -> None:
        """A stage is complete; `cached` if it had been before."""

    def message(self, text: str) -> None:
        """Something worth telling."""

    def check_stop(self) -> None:
        """Raise `Interrupted` if asked to stop."""
        if self.stop:
            raise Interrupted("interrupted; what was finished is saved, run the same command again to continue")
