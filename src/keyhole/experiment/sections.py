"""The sections of an audit file, typed; an `Experiment` is all of them resolved, a `Study` one or several of these."""

from __future__ import annotations

from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field

from keyhole.core.registry import BELIEFS, RULES
from keyhole.core.rule import SingleGradient
from keyhole.core.trial import Spec
from keyhole.experiment.options import method


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataSection(_Section):
    """``[data]``: where images come from and how many go into each of four disjoint pools."""

    name: str = Field(min_length=1)
    target: int = Field(default=64, ge=1)
    tune: int = Field(default=12, ge=0)
    public: int = Field(default=24, ge=1)
    candidates: int | None = Field(default=None, ge=0)
    train: int | None = Field(default=None, ge=0)
    seed: int = 0
    size: int | None = Field(default=None, ge=1)
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: list[int] | None = Field(default=None, min_length=2)
    """Only images of these classes, numbered in this order."""


class ModelSection(BaseModel):
    """``[model]``: a registered ``name`` or a user's ``factory``, its knobs, and how its modes are set."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str | None = None
    factory: str | None = None
    normalize: bool | None = None
    batchnorm: Literal["eval", "train_shared", "train_hidden"] | None = None
    dropout: Literal["off", "active"] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The model's own knobs."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """How the report names the model."""
        knobs = ", ".join(f"{k}={v}" for k, v in sorted(self.options.items()))
        return f"{self.name or self.factory}({knobs})" if knobs else str(self.name or self.factory)


class StateSection(_Section):
    """``[state]``: fresh weights, weights after some rounds of a federation trained here, or a safetensors file."""

    train: str = "none"
    """``none``, ``early``, ``late``, or the path of a safetensors file, in which ``{seed}`` stands for the seed."""
    clients: int | None = Field(default=None, ge=1)
    rounds: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch_size: int | None = Field(default=None, ge=1)
    alpha: float | None = Field(default=None, ge=1e-3, le=1e6)
    seen: int | None = Field(default=None, ge=0)
    """Gradients of each target that already went into a file's weights, under the same defense: they add to those of
    the update in the bound on any attack."""

    @property
    def trained(self) -> bool:
        """Whether Keyhole trains the networks itself."""
        return self.train in TRAINED


TRAINED = ("early", "late")


class ClientSection(_Section):
    """``[client]``: what a client does before it sends something, and how often the attacker sees it."""

    rule: Literal["gradient", "sgd"] = "gradient"
    batch_size: int = Field(default=1, ge=1)
    """Images of one gradient: all of an update, or those of one local step."""
    images: int | None = Field(default=None, ge=1)
    """Images behind one update, for ``sgd``; by default ``batch_size``."""
    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    order: Literal["fixed", "shuffled"] | None = None
    labels: Literal["any", "distinct", "equal"] = "any"
    """Which images come together: as they lie in the pool, of distinct classes, or all of one class."""
    rounds: int = Field(default=1, ge=1)
    """Updates of the same images, from the same weights, that the attacker sees and combines."""
    series: int = Field(default=1, ge=1)
    """Updates of different images, one after another, that one attacker sees."""
    fresh_weights: bool = False
    """Whether each update of a series comes from a network of its own."""

    @property
    def size(self) -> int:
        """Private images behind one update."""
        return self.images or self.batch_size

    @property
    def spec(self) -> Spec:
        """The client rule with all its options."""
        if self.rule == "gradient":
            return method(RULES, {"name": "gradient"}, "[client]")
        given = {"epochs": self.epochs, "lr": self.lr, "order": self.order, "batch_size": self.batch_size}
        return method(RULES, {"name": "sgd", **{k: v for k, v in given.items() if v is not None}}, "[client]")


class AttackerSection(_Section):
    """``[attacker]``: what the attacker sees and believes, and the label rule of attacks that do not name their own."""

    sees: list[Literal["weights", "update", "targets", "masks", "hints"]] = ["weights", "update"]
    labels: str | None = None
    belief: str | dict[str, Any] = "exact"
    """What it thinks the client does: a name, or a table with a name and options."""

    @property
    def spec(self) -> Spec:
        """The belief with all its options."""
        raw = {"name": self.belief} if isinstance(self.belief, str) else self.belief
        return method(BELIEFS, raw, "attacker.belief", given={"rule": SingleGradient()})


class RunSection(_Section):
    """``[run]``: how much of it, and what is kept."""

    seeds: list[int] = Field(default=[0], min_length=1)
    samples: int = Field(default=16, ge=1)
    budget: int = Field(default=0, ge=0)
    group: int = Field(default=0, ge=0)
    images: Literal["none", "reconstructions", "all"] = "none"
    dtype: Literal["float32", "float64"] = "float32"


class AttackEntry(BaseModel):
    """One of ``[[attacks]]``, resolved: a spec, and the grid of options to tune on the tune pool."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)
    spec: Spec
    tune: dict[str, list[Any]] = {}


class Experiment(BaseModel):
    """An audit, fully resolved: equal experiments plan equal trials."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)
    title: str
    data: DataSection
    model: ModelSection
    state: StateSection = StateSection()
    client: ClientSection = ClientSection()
    attacker: AttackerSection = AttackerSection()
    attacks: tuple[AttackEntry, ...]
    defenses: tuple[tuple[Spec, ...], ...]
    run: RunSection = RunSection()
    setting: str = ""
    """Name of this setting among several of one audit."""
    against: str = ""
    """The setting that the report compares it with."""

    @property
    def sees(self) -> tuple[str, ...]:
        """What the attacker sees; clients that share batch statistics share them with it too."""
        shared = {"statistics"} if self.model.batchnorm == "train_shared" else set()
        return tuple(sorted({*self.attacker.sees, *shared}))

    def to_toml(self) -> str:
        """The resolved audit file; reading it gives an equal experiment."""
        return tomli_w.dumps({"title": self.title, **self.asdict()})

    def asdict(self) -> dict[str, Any]:
        """All sections as an audit file has them."""
        attacks = []
        for entry in self.attacks:
            attack = {"name": entry.spec.name, **entry.spec.asdict()}
            attacks.append({**attack, "tune": entry.tune} if entry.tune else attack)
        chains = [[{"name": s.name, **s.asdict()} for s in chain] for chain in self.defenses]
        sections = {
            name: getattr(self, name).model_dump(exclude_none=True)
            for name in ("data", "model", "state", "client", "attacker")
        }
        run = self.run.model_dump(exclude_none=True)
        return {**sections, "run": run, "attacks": attacks, "defenses": [{"chain": c} for c in chains]}


class Study(BaseModel):
    """An audit file: one experiment, or several that share a report."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)
    title: str
    experiments: tuple[Experiment, ...]

    @classmethod
    def of(cls, experiment: Experiment) -> Study:
        """One experiment as a study."""
        return cls(title=experiment.title, experiments=(experiment,))

    def to_toml(self) -> str:
        """The resolved audit file; reading it gives an equal study."""
        first = self.experiments[0]
        if len(self.experiments) == 1 and not first.setting:
            return first.to_toml()
        settings = [
            {"name": e.setting, **({"against": e.against} if e.against else {}), **e.asdict()} for e in self.experiments
        ]
        return tomli_w.dumps({"title": self.title, "settings": settings})
