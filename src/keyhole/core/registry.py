"""Registries: the names a user can write in an audit file, each with the card that documents it.

Importing a package fills its registry (`keyhole.attacks` fills `ATTACKS`, and so on). Tests, docs, the command line and
the report all iterate over the same registries, so a new method is one file and one import line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from keyhole.errors import UnknownName

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Card:
    """What is known about a registered method.

    ``version`` enters every trial's hash: raise it when the same options would give another result.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    paper: str = ""
    arxiv: str = ""
    url: str = ""
    version: int = 1
    known_breaks: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """Extra facts that a kind needs, such as whether a model expects normalised inputs."""

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").strip().split("\n")[0]

    @property
    def link(self) -> str:
        """Where to read the source."""
        return self.url or (f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else "")

    def signature(self) -> inspect.Signature:
        """The factory's signature with evaluated annotations: it is the schema of the method's options."""
        return inspect.signature(self.factory, eval_str=True)


class Registry:
    """Named factories of one kind, in order of registration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._cards: dict[str, Card] = {}

    def add(self, name: str, **card: Any) -> Callable[[T], T]:
        """Decorator that registers a factory (a function or a dataclass) under ``name``."""

        def register(factory: T) -> T:
            if name in self._cards:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._cards[name] = Card(self.kind, name, factory, **card)
            return factory

        return register

    def card(self, name: str, where: str = "") -> Card:
        """The card of ``name``; raises `UnknownName` with a suggestion."""
        if name not in self._cards:
            raise UnknownName(self.kind, name, self._cards, where)
        return self._cards[name]

    def build(self, name: str, **options: Any) -> Any:
        """The method ``name`` with these options, the rest at their defaults."""
        return self.card(name).factory(**options)

    def __iter__(self) -> Iterator[Card]:
        return iter(self._cards.values())

    def __contains__(self, name: str) -> bool:
        return name in self._cards


ATTACKS = Registry("attack")
INVERSIONS = Registry("inversion")
DEFENSES = Registry("defense")
LABELS = Registry("label rule")
METRICS = Registry("metric")
MODELS = Registry("model")
DATASETS = Registry("data set")
CONTROLS = Registry("control")
RULES = Registry("client rule")
BELIEFS = Registry("belief")
