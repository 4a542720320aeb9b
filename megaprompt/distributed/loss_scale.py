"""The loss scale of float16: gradients that would be too small for it are multiplied, and divided afterwards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class LossScale:
    """A loss scale and its state, with the meaning that DeepSpeed's `fp16` section gives these words.

    After an overflow the step is skipped, and the scale halved once `hysteresis` overflows have been seen; after
    `window` steps without one it is doubled.
    """

    scale: float = 2.0**16
    dynamic: bool = True
    window: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    good_steps: int = 0  # since the last overflow or growth
    tolerated: int = 0  # overflows that did not lower the scale yet

    def after_step(self, overflow: bool) -> LossScale:
        """The loss scale for the next step."""
        if not self.dynamic:
            return self
        if overflow:
            if self.tolerated + 1 < self.hysteresis:
                return dataclasses.replace(self, good_steps=0, tolerated=self.tolerated + 1)
            return dataclasses.replace(self, good_steps=0, scale=max(self.minimum, self.scale / 2))
        if self.good_steps + 1 < self.window:
            return dataclasses.replace(self, good_steps=self.good_steps + 1)
        return dataclasses.replace(self, good_steps=0, tolerated=0, scale=self.scale * 2)


NO_SCALING = LossScale(scale=1.0, dynamic=False)
