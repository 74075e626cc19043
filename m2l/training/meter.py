"""How fast a run is, between two lines of its metrics."""

import time
from collections.abc import Mapping

import numpy as np


class Meter:
    """Counts tokens, steps and seconds; only the time between `run` and `pause` counts.

    Args:
        flops: Operations of a step.
        peak: Operations a second that the devices could do; None: unknown, no MFU.
        shares: In how many shares a batch is fed: this process sees one.
    """

    def __init__(self, flops: float, peak: float | None, shares: int = 1):
        self._flops, self._peak, self._shares = flops, peak, shares
        self._tokens = self._targets = self._steps = 0
        self._seconds = self._waited = 0.0
        self._since: float | None = None

    def run(self) -> None:
        """Starts the clock, if it does not run."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock, for what is no training."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def fed(self, batch: Mapping[str, np.ndarray], waited: float) -> None:
        """Counts a step on this batch, for which `waited` seconds were waited."""
        if self._since is None:
            return
        targets = int(np.count_nonzero(batch["decoder_loss_weights"]))
        if "encoder_input_tokens" in batch:
            tokens = int(np.count_nonzero(batch["encoder_input_tokens"])) + targets
        else:
            tokens = int(np.count_nonzero(batch["decoder_segment_ids"]))
        self._targets += targets * self._shares
        self._tokens += tokens * self._shares
        self._steps += 1
        self._waited += waited

    def read(self) -> dict[str, float]:
        """The figures since the last reading, none before a step was counted.

        tokens_per_second and target_tokens_per_second (no padding), mfu (the share of the peak),
        input_wait (the share of the time in which the next batch was waited for).
        """
        running = self._since is not None
        self.pause()
        seconds, steps = self._seconds, self._steps
        figures = {}
        if steps:
            figures = {
                "tokens_per_second": self._tokens / seconds,
                "target_tokens_per_second": self._targets / seconds,
                "input_wait": self._waited / seconds,
            }
            if self._peak:
                figures["mfu"] = self._flops * steps / seconds / self._peak
        self._tokens = self._targets = self._steps = 0
        self._seconds = self._waited = 0.0
        if running:
            self.run()
        return figures
