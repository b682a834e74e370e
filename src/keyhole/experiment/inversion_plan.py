"""``[invert]`` of a training file: whose network is inverted, with what public images, and who judges the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import keyhole.inversion  # noqa: F401  (the import fills the registry)
from keyhole.core.registry import ATTACKS, INVERSIONS, MODELS
from keyhole.core.trial import Spec
from keyhole.errors import ConfigError, UnknownName
from keyhole.experiment.options import method
from keyhole.experiment.sections import DataSection, ModelSection, _Section
from keyhole.experiment.spec import check_model, read_section, read_tables


class PublicSection(_Section):
    """One of ``[[invert.public]]``: images that the attacker has."""

    name: str | None = Field(default=None, min_length=1)
    """A data set; by default that of ``[data]``."""
    classes: list[int] | None = None
    """Only images of these classes; `None` takes all."""
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)
    seed: int = 0


class EvaluatorSection(BaseModel):
    """``[invert.evaluator]``: the classifier that judges, and how it is trained."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = "scnn"
    epochs: int = Field(default=4, ge=1)
    lr: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=32, ge=1)
    seed: int = 0

    @property
    def model(self) -> ModelSection:
        """As a model section."""
        return ModelSection(name=self.name, **(self.model_extra or {}))


class InvertSection(_Section):
    """``[invert]``, but for its tables."""

    rounds: list[int] | None = None
    """After which rounds the global network is attacked; 0 is untrained. By default after the last."""
    samples: int = Field(default=5, ge=1)
    """Images of each class."""
    controls: bool = True
    images: bool = False
    """Whether the page shows the images made, and private ones beside them."""
    seed: int = 0
    """The attackers' randomness."""
    weights: str | None = None
    """A safetensors file to attack instead of training; ``{seed}`` and ``{round}`` stand for seed and round, and
    ``{round:03}`` for the round in three digits."""

    def file(self, seed: int, number: int) -> Path:
        """The file of `weights` for a seed and a round."""
        try:
            return Path(str(self.weights).format(seed=seed, round=number))
        except (LookupError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"invert.weights is '{self.weights}'; only {{seed}} and {{round}} may stand in braces, and "
                "{round:03} for three digits."
            ) from error


class Inverting(BaseModel):
    """``[invert]``, fully resolved."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)
    settings: InvertSection
    public: tuple[PublicSection, ...]
    evaluator: EvaluatorSection
    attacks: tuple[Spec, ...]

    @property
    def rounds(self) -> tuple[int, ...]:
        """After which rounds the global network is attacked."""
        return tuple(self.settings.rounds or ())

    def asdict(self) -> dict[str, Any]:
        """As a file has it."""
        return {
            **self.settings.model_dump(exclude_none=True),
            "public": [one.model_dump(exclude_none=True) for one in self.public],
            "evaluator": self.evaluator.model_dump(exclude_none=True),
            "attacks": [{"name": spec.name, **_known(spec.asdict())} for spec in self.attacks],
        }


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def read_inverting(
    raw: dict[str, Any],
    data: DataSection,
    model: ModelSection,
    last: int | None,
    seeds: Sequence[int] = (0,),
) -> Inverting:
    """Resolve ``[invert]``.

    Args:
        raw: the table as read from TOML.
        data: the file's ``[data]``.
        model: its ``[model]``.
        last: the number of the last round; `None` where the networks come from files and nothing tells.
        seeds: of the target networks.

    Raises:
        ConfigError: in one sentence, what is wrong.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"[invert] must be a table of keys, not {raw!r}.")
    own = {key: value for key, value in raw.items() if key not in ("public", "evaluator", "attacks")}
    for key in own:
        if key not in InvertSection.model_fields:
            raise UnknownName("key", key, [*InvertSection.model_fields, "public", "evaluator", "attacks"], "[invert]")
    settings = read_section("invert", InvertSection, own)
    evaluator = read_section("invert.evaluator", EvaluatorSection, raw.get("evaluator", {}))
    check_model(evaluator.model)
    if evaluator.name == model.name:
        raise ConfigError(
            f"invert.evaluator.name is '{evaluator.name}', the attacked network's own architecture; a judge of another "
            f"one is needed, so that what only this architecture sees does not count: {', '.join(_others(model))}."
        )
    entries = read_tables(raw, "attacks")
    if not entries:
        raise ConfigError('[invert] names no attack; add [[invert.attacks]] with name = "gmi".')
    for entry in entries:
        name = entry.get("name")
        if isinstance(name, str) and name in ATTACKS:
            raise ConfigError(
                f"[[invert.attacks]] names '{name}', which attacks updates: it belongs to [[attacks]] of "
                f"keyhole audit. Accepted: {', '.join(sorted(card.name for card in INVERSIONS))}."
            )
    attacks = tuple(method(INVERSIONS, e, f"[[invert.attacks]] number {i}") for i, e in enumerate(entries, 1))
    if len(set(attacks)) < len(attacks):
        raise ConfigError("[[invert.attacks]] names one attack twice with the same options.")
    public = tuple(
        read_section(f"[[invert.public]] number {i}", PublicSection, e)
        for i, e in enumerate(read_tables(raw, "public"), 1)
    )
    if not public:
        raise ConfigError(
            "[invert] has no public images; add [[invert.public]] with a data set, or classes of it that are not "
            "private."
        )
    _check_overlap(public, data)
    rounds = _rounds(settings, last)
    settings = settings.model_copy(update={"rounds": rounds})
    if settings.weights is not None:
        files = [settings.file(seed, number) for seed in seeds for number in rounds]
        if len(set(files)) < len(files):
            raise ConfigError(
                f"invert.weights is '{settings.weights}', the same file for several seeds or rounds, so that one "
                "network would count as several; write {seed} and {round} into it."
            )
    return Inverting(settings=settings, public=public, evaluator=evaluator, attacks=attacks)


def _rounds(settings: InvertSection, last: int | None) -> list[int]:
    if settings.rounds is not None:
        rounds = settings.rounds
    elif last is not None:
        rounds = [last]
    else:
        raise ConfigError("invert.weights does not tell after which round a network is; say so with invert.rounds.")
    if not rounds or sorted(set(rounds)) != rounds or rounds[0] < 0 or (last is not None and rounds[-1] > last):
        upto = "" if last is None else f" to {last} (federation.rounds)"
        raise ConfigError(f"invert.rounds is {rounds!r}; it must be a rising list of rounds from 0 (untrained){upto}.")
    return rounds


def _check_overlap(public: tuple[PublicSection, ...], data: DataSection) -> None:
    """Private classes among the public ones would give away what the attack is to find."""
    for number, section in enumerate(public, 1):
        if section.name not in (None, data.name):
            continue
        if data.classes is None or section.classes is None:
            raise ConfigError(
                f"[[invert.public]] number {number} is the private data set '{data.name}' itself; give data.classes "
                "and the set's classes, without a class in both."
            )
        both = sorted({*data.classes} & {*section.classes})
        if both:
            raise ConfigError(
                f"[[invert.public]] number {number} has the private classes {both} of '{data.name}'; private and "
                "public classes must be disjoint."
            )


def _others(model: ModelSection) -> list[str]:
    return [card.name for card in MODELS if card.name != model.name]
