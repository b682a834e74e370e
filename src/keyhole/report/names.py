"""Defenses and attacks as the report names them: short, and different wherever they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from keyhole.core.registry import DEFENSES, Registry
from keyhole.core.trial import Spec, Trial

UNDEFENDED = "none"
"""The name of a chain without links."""


def show(value: Any) -> str:
    """A value of an option as text."""
    if isinstance(value, float):
        return f"{value:g}"
    return "[" + ", ".join(show(v) for v in value) + "]" if isinstance(value, tuple) else str(value)


def named(spec: Spec, options: Iterable[str]) -> str:
    """A method with some of its options as text; those that are `None` are left out."""
    given = spec.asdict()
    inside = ", ".join(f"{k}={show(given[k])}" for k in options if given.get(k) is not None)
    return f"{spec.name}({inside})" if inside else spec.name


def defense_name(links: tuple[Spec, ...]) -> str:
    """A chain as text: of each link its first option, which is its strength, and what is not at its default."""
    return " -> ".join(named(link, worth_showing(link)) for link in links) or UNDEFENDED


def first_option(link: Spec) -> str | None:
    """The first option of a defense in its signature, which is its strength; `None` where it has none."""
    if link.name in DEFENSES:
        return next((name for name in DEFENSES.card(link.name).signature().parameters if name in link.asdict()), None)
    return next(iter(link.asdict()), None)


def worth_showing(link: Spec) -> list[str]:
    """The options of a defense that its name must hold: the first one, and what is not at its default."""
    if link.name not in DEFENSES:
        return list(link.asdict())
    knobs = DEFENSES.card(link.name).signature().parameters
    given = link.asdict()
    known = [n for i, n in enumerate(knobs) if n in given and (i == 0 or given[n] != knobs[n].default)]
    return known + [n for n in given if n not in knobs]


def attack_names(trials: Iterable[tuple[str, Trial]]) -> dict[Spec, str]:
    """Each attack as text: its name, and options only where two of that name attack the same thing in one setting.

    Options that tuning chose for each defense also differ, but never within one cell: they do not split a row. Settings
    share names, so that rows can be compared between them.

    Args:
        trials: each with the name of its setting.
    """
    trials = list(trials)
    rivals: dict[tuple[Any, ...], set[Spec]] = defaultdict(set)
    for setting, t in trials:
        rivals[t.attack.name, setting, t.defense, t.attacker, t.seed, t.episode].add(t.attack)
    clashes: dict[str, list[set[Spec]]] = defaultdict(list)
    for (name, *_), specs in rivals.items():
        if len(specs) > 1:
            clashes[name].append(specs)
    shown = {name: _telling(groups) for name, groups in clashes.items()}
    return {t.attack: named(t.attack, shown.get(t.attack.name, ())) for _, t in trials}


def spec_names(specs: Sequence[Spec], registry: Registry) -> dict[Spec, str]:
    """Methods of a registry as text: the name, and of options in which those of one name differ what is not default."""
    rivals: dict[str, list[Spec]] = defaultdict(list)
    for spec in specs:
        rivals[spec.name].append(spec)
    short = {}
    for spec in specs:
        defaults = {name: p.default for name, p in registry.card(spec.name).signature().parameters.items()}
        given = spec.asdict()
        short[spec] = named(spec, [name for name in _varying(rivals[spec.name]) if given.get(name) != defaults[name]])
    if len(set(short.values())) == len(set(specs)):
        return short
    return {spec: named(spec, _varying(rivals[spec.name])) for spec in specs}


def _varying(specs: Iterable[Spec]) -> list[str]:
    """Options whose values differ between specs."""
    given = [spec.asdict() for spec in specs]
    names = sorted({name for options in given for name in options})
    return [name for name in names if len({repr(options.get(name)) for options in given}) > 1]


def _telling(groups: Sequence[set[Spec]]) -> list[str]:
    """The options that tell rivals apart: those the user listed have the same values in every group."""
    largest = max(len(group) for group in groups)
    groups = [group for group in groups if len(group) == largest]
    varying = sorted({option for group in groups for option in _varying(group)})
    listed = [
        option
        for option in varying
        if len({frozenset(repr(spec.asdict().get(option)) for spec in group) for group in groups}) == 1
    ]
    told = all(len({named(spec, listed) for spec in group}) == len(group) for group in groups)
    return listed if told else varying
