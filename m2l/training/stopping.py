"""When a run has learned what it will: its best validation loss, and how long ago that was."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stopping:
    """How validation went so far; a value, which checkpoints carry as plain JSON.

    Attributes:
        best: The lowest validation loss; None before the first evaluation.
        best_step: The step it was found at.
        without_improvement: Evaluations since.
    """

    best: float | None = None
    best_step: int = 0
    without_improvement: int = 0

    def after(self, step: int, loss: float, minimum_improvement: float = 0.0) -> "Stopping":
        """How it stands after one more evaluation, at `step`.

        A loss counts as an improvement where it is lower by more than `minimum_improvement`.
        """
        if self.best is None or loss < self.best - minimum_improvement:
            return Stopping(loss, step, 0)
        return dataclasses.replace(self, without_improvement=self.without_improvement + 1)

    def is_over(self, patience: int) -> bool:
        """Whether a run of this patience stops; 0: it never does."""
        return 0 < patience <= self.without_improvement
