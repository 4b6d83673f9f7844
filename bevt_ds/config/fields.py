"""What a field of a configuration means, which values it may have, and whether it may change on resume.

All three stand with the field, as in `Annotated[int, Field("frames a clip", least=1, multiple=2)]`, and nowhere else:
validation, `--help` and the check on resume read them there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

TOO_LARGE = 1 << 63  # what reads a configuration's integers has 64 bits for them

Resume = Literal["never", "free", "override"]
"""Whether the field may differ between a run and its continuation.

never: it decides what is computed. free: it changes nothing in the result but its rounding, such as the micro-batch,
the number of workers, or where the shards are (a checkpoint's fingerprint holds what is in them). override: a user may
want to change it after a failure, such as the learning rate; what follows is then another run than the one that was
begun.
"""


@dataclass(frozen=True)
class Field:
    """The second argument of a field's `Annotated`. Plain text there is `Field(text)`.

    Every number is finite, and at least 0 unless the bounds say more; a tuple's numbers all keep to the bounds. Text,
    booleans and `Literal`s have none: their type says what they may be.
    """

    help: str
    least: float = 0
    above: float | None = None  # every value is larger than this
    most: float | None = None
    below: float | None = None  # every value is smaller than this
    multiple: int = 1
    resume: Resume = "never"

    def problem(self, number: float) -> str | None:
        """What a number of this field must be and is not, or None."""
        if not math.isfinite(number):
            return "a finite number"
        if not self._within(number):
            return self.bounds
        if isinstance(number, int) and number >= TOO_LARGE:
            return "below 2**63"
        return self.factor if self.factor and number % self.multiple else None

    @property
    def bounds(self) -> str:
        """The bounds in words: "at least 1", "positive", "in [0, 1)"."""
        upper = self.most if self.below is None else self.below
        if upper is not None:
            left = f"[{self.least:g}" if self.above is None else f"({self.above:g}"
            return f"in {left}, {upper:g}{']' if self.below is None else ')'}"
        if self.above is None:
            return f"at least {self.least:g}"
        return f"above {self.above:g}" if self.above else "positive"

    @property
    def factor(self) -> str:
        """What every value is a multiple of, in words; empty: of nothing."""
        return {1: "", 2: "even"}.get(self.multiple, f"a multiple of {self.multiple}")

    def _within(self, number: float) -> bool:
        low = number >= self.least if self.above is None else number > self.above
        return low and (self.most is None or number <= self.most) and (self.below is None or number < self.below)
