"""What a check found, as a line of text."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        check: What was looked at.
        state: `FAIL` means that a search cannot run, `warn` that something is worse than it could be.
        found: What there is.
        remedy: What to do about it.
    """

    check: str
    state: State
    found: str
    remedy: str = ""

    def line(self) -> str:
        """Return it as a line of text.

        >>> Finding("artifacts", "FAIL", "/data/a: no space.", "Free some.").line()
        'FAIL  artifacts    /data/a: no space. Free some.'
        """
        return f"{self.state:4}  {self.check:11}  {self.found} {self.remedy}".rstrip()
