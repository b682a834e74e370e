"""Trials and outcomes: values that can be written down, and from which a report is rebuilt without running anything."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

Status = Literal["converged", "stalled", "budget", "diverged", "refused", "failed"]
"""How a trial ended: its objective reached the tolerance; stopped falling; the budget was used up; every start went
to infinity; the attack lacked something; something broke (``detail`` says what)."""


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((str(k), _freeze(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    return value


@dataclass(frozen=True)
class Spec:
    """A registered name with its options, all of them resolved."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    version: int = 1

    @classmethod
    def of(cls, name: str, options: dict[str, Any] | None = None, version: int = 1) -> Spec:
        """A spec from a dictionary of options."""
        return cls(name, _freeze(options or {}), version)

    def asdict(self) -> dict[str, Any]:
        """Options as a dictionary."""
        return dict(self.options)

    def replace(self, **options: Any) -> Spec:
        """The same method with some options changed."""
        return Spec.of(self.name, {**self.asdict(), **options}, self.version)

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v}" for k, v in self.options)
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True)
class Trial:
    """Everything that can change an outcome, and nothing else. Equal trials have equal outcomes."""

    source: str
    """Data set, its preprocessing, and a digest of the rows."""
    model: str
    state: str
    """Where the weights come from, and a digest of them."""
    rule: Spec
    """What the client does."""
    belief: Spec
    """What the attacker thinks it does."""
    sees: tuple[str, ...]
    defense: tuple[Spec, ...]
    attack: Spec
    attacker: str
    """``naive``, ``adaptive:<counter>``, ``control:<name>`` or ``check:truth``."""
    episode: tuple[int, ...]
    """Rows of the target pool, batch after batch."""
    batch_size: int
    """Images behind one update."""
    seed: int
    rounds: int = 1
    """Updates of the same images that the attacker combines."""
    fresh: bool = False
    """Whether each update of a series comes from a network of its own."""
    dtype: str = "float32"
    pool: str = "target"
    limit: int = 0
    """Most evaluations allowed for each update, all starts together; 0 leaves the attack's own budget."""

    @cached_property
    def hash(self) -> str:
        """A short digest of all fields: the trial's name on disk."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: a line of ``outcomes.jsonl``."""

    trial: Trial
    status: Status
    metrics: dict[str, list[float]]
    """For each metric one number for each secret image, in the order of the episode."""
    seconds: float
    evaluations: int
    detail: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    """Numbers about the update, such as its norm and its share of zeros."""
    history: tuple[tuple[int, float], ...] = ()
    """(evaluations, best score so far), thinned."""
    notes: dict[str, list[float]] = field(default_factory=dict)
    """What the defense put on record about itself: one number, or one for each image in the order of the episode."""
    client_seconds: float = 0.0
    """Time of the client's own work for one update, its defense included; that of a group is shared out evenly."""

    def to_json(self) -> str:
        """One line of JSON."""
        record = {"hash": self.trial.hash, **asdict(self)}
        return json.dumps({**record, "check": _checksum(record)}, sort_keys=True, allow_nan=True)

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        """The inverse of `to_json`. Raises `ValueError` for a line that is cut off or was changed."""
        record = json.loads(line)
        try:
            if record.pop("check") != _checksum(record):
                raise ValueError("its content does not fit its checksum")
            given = record.pop("hash")
            raw = record.pop("trial")
            raw["defense"] = tuple(_spec(s) for s in raw["defense"])
            raw.update({name: _spec(raw[name]) for name in ("attack", "rule", "belief")})
            raw["episode"] = tuple(raw["episode"])
            raw["sees"] = tuple(raw["sees"])
            record["history"] = tuple((int(k), float(v)) for k, v in record["history"])
            outcome = cls(trial=Trial(**raw), **record)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an outcome: {error}") from error
        if outcome.trial.hash != given:
            raise ValueError(f"the line's hash {given} does not fit its trial ({outcome.trial.hash})")
        return outcome


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=True).encode()).hexdigest()[:16]


def _spec(raw: dict[str, Any]) -> Spec:
    return Spec(raw["name"], _freeze(raw["options"]), raw["version"])
