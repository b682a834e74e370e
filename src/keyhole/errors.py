"""Every error that Keyhole raises on purpose.

::

    KeyholeError            one clear sentence; the command line prints it and leaves with code 2
    |-- ConfigError         the audit file, an option or a command-line value is wrong
    |   `-- UnknownName     a name that no registry or schema knows; carries a suggestion
    |-- DataError           images or labels cannot be read, or are not what they should be
    |-- ModelError          the model cannot be loaded or cannot be audited as it is
    |-- StoreError          the output folder cannot be used
    |-- Unmet               a client mod does not do what was expected of it; an `AssertionError` too, for test-suites
    `-- Refused             this attack cannot run on what it was given; becomes a trial's status, not an exit
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class KeyholeError(Exception):
    """Base of all errors whose message is written for the user."""


class ConfigError(KeyholeError):
    """The audit file, an option or a command-line value is wrong."""


class UnknownName(ConfigError):
    """A name that is not among the accepted ones.

    The message says what was given, suggests the nearest accepted name and lists all of them.
    """

    def __init__(self, kind: str, given: str, accepted: Iterable[str], where: str = "") -> None:
        names = sorted(accepted)
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        place = f" in {where}" if where else ""
        listing = f" Accepted: {', '.join(names)}." if names else ""
        super().__init__(f"unknown {kind} '{given}'{place}{hint}{listing}")


class DataError(KeyholeError):
    """Images or labels cannot be read, or are not what they should be."""


class ModelError(KeyholeError):
    """The model cannot be loaded, or cannot be audited as it is."""


class StoreError(KeyholeError):
    """The output folder cannot be used."""


class Unmet(KeyholeError, AssertionError):
    """A client mod does not do what was expected of it: one sentence for each expectation."""


class Refused(KeyholeError):
    """An attack cannot run on what it was given. The runner records it as the trial's status."""


def check_range(
    name: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise `ConfigError` unless ``low <= value <= high`` (strict at an open end, and never NaN)."""
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        left = "" if low == -math.inf else f"{'above' if open_low else 'at least'} {low:g}"
        right = "" if high == math.inf and not open_high else f"{'below' if open_high else 'at most'} {high:g}"
        accepted = " and ".join(part for part in (left, right) if part) or "a number"
        raise ConfigError(f"{name} is {value!r}; it must be {accepted}.")


def cause(error: BaseException) -> str:
    """The first line of an error, for a sentence that must stay one."""
    first = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
