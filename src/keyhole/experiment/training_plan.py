"""The file of `keyhole train` and `keyhole frontier`: sections in the style of an audit file, typed and resolved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field

from keyhole.core.registry import ATTACKS
from keyhole.core.trial import Spec
from keyhole.errors import ConfigError, UnknownName
from keyhole.experiment.inversion_plan import Inverting, read_inverting
from keyhole.experiment.options import method
from keyhole.experiment.sections import DataSection, Experiment, ModelSection, _Section
from keyhole.experiment.spec import (
    check_model,
    check_title,
    parse_experiment,
    presets,
    read_defenses,
    read_section,
    read_source,
)
from keyhole.federation.partitioners import PARTITIONERS, PartitionedByFlower
from keyhole.federation.states import Federation
from keyhole.federation.strategies import FedAdam, FedAvg, FedProx


class TrainingData(DataSection):
    """``[data]``: as in an audit file, and images held out to measure accuracy on."""

    test: int = Field(default=400, ge=1)

    @property
    def audited(self) -> DataSection:
        """The same data as an audit of the trained networks names it."""
        return DataSection(**self.model_dump(exclude={"test", "train"}))


class FederationSection(_Section):
    """``[federation]``: who trains on what, how, and what the server does."""

    clients: int = Field(default=10, ge=1)
    rounds: int = Field(default=20, ge=1)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=16, ge=1)
    lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Largest norm of a step's gradient; 0 does not clip."""
    partition: str = "iid"
    alpha: float | None = Field(default=None, ge=1e-3, le=1e6)
    balanced: bool | None = None
    min_size: int | None = Field(default=None, ge=1)
    class_assignment: Literal["random", "deterministic", "first-deterministic"] | None = None
    classes_per_client: int | None = Field(default=None, ge=1)
    shard_size: int | None = Field(default=None, ge=1)
    shards_per_client: int | None = Field(default=None, ge=1)
    strategy: Literal["fedavg", "fedprox", "fedadam"] = "fedavg"
    mu: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    server_lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    beta_1: float | None = Field(default=None, ge=0, lt=1)
    beta_2: float | None = Field(default=None, ge=0, lt=1)
    tau: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def federation(self) -> Federation:
        """As `keyhole.federation` takes it."""
        given: dict[str, Any] = {
            "rounds": self.rounds,
            "clients": self.clients,
            "epochs": self.epochs,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "clip": self.clip or None,
        }
        if self.partition in PARTITIONERS:
            options = {name: getattr(self, name) for name in PARTITIONERS[self.partition]}
            return PartitionedByFlower(**given, partitioner=self.partition, options=options)
        return Federation(**given, alpha=self.alpha)

    def server(self) -> FedAvg:
        """The strategy with its options."""
        given = {name: getattr(self, name) for name in _OPTIONS[self.strategy]}
        given = {name: value for name, value in given.items() if value is not None}
        if self.strategy == "fedprox":
            return FedProx(**given)
        if self.strategy == "fedadam":
            return FedAdam(**{"lr" if name == "server_lr" else name: value for name, value in given.items()})
        return FedAvg()

    def check(self) -> None:
        """Refuse options that would not mean anything."""
        if self.partition not in _PARTITIONS:
            raise UnknownName("partition", self.partition, _PARTITIONS, "[federation]")
        own = _PARTITIONS[self.partition]
        for option in sorted({option for options in _PARTITIONS.values() for option in options}):
            if getattr(self, option) is not None and option not in own:
                owners = " or ".join(f'"{name}"' for name, options in _PARTITIONS.items() if option in options)
                raise ConfigError(f"federation.{option} belongs to partition = {owners}; set it, or remove the option.")
        needed = _NEEDED.get(self.partition, ())
        if needed and all(getattr(self, option) is None for option in needed):
            raise ConfigError(f'partition = "{self.partition}" needs federation.{" or federation.".join(needed)}.')
        for strategy, options in _OPTIONS.items():
            for option in options:
                if strategy != self.strategy and getattr(self, option) is not None:
                    raise ConfigError(f'federation.{option} belongs to strategy = "{strategy}"; set it, or remove it.')


_PARTITIONS = {"iid": (), "dirichlet": ("alpha",), **PARTITIONERS}
_NEEDED = {
    "dirichlet": ("alpha",),
    "flower_dirichlet": ("alpha",),
    "inner_dirichlet": ("alpha",),
    "pathological": ("classes_per_client",),
    "shard": ("shards_per_client", "shard_size"),
}
_OPTIONS = {"fedavg": (), "fedprox": ("mu",), "fedadam": ("server_lr", "beta_1", "beta_2", "tau")}


class TrainingRun(_Section):
    """``[run]``: one training for each defense and seed."""

    seeds: list[int] = Field(default=[0], min_length=1)


class SentSection(_Section):
    """``[audit.sent]``: also attack what clients themselves sent in the audited rounds."""

    clients: int = Field(default=1, ge=1)
    """The first so many."""
    attacks: list[dict[str, Any]] | None = None
    """By default those of a transcript."""


class TrainingPlan(BaseModel):
    """A training file, fully resolved."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)
    title: str
    data: TrainingData
    model: ModelSection
    federation: FederationSection
    defenses: tuple[tuple[Spec, ...], ...]
    run: TrainingRun
    rounds: tuple[int, ...] = ()
    """After which rounds updates are audited; empty where there is no ``[audit]``."""
    audit: Experiment | None = None
    """The audit of untrained networks, with all defenses."""
    sent: SentSection | None = None
    """Attacks on what clients themselves sent, where the file has ``[audit.sent]``."""
    invert: Inverting | None = None
    """Inversion of the global network, where the file has ``[invert]``."""

    @property
    def recorded(self) -> tuple[int, ...]:
        """Rounds whose updates are written down: those that begin at an audited network, and the last."""
        if self.sent is None:
            return ()
        return tuple(dict.fromkeys(min(number + 1, self.federation.rounds) for number in self.rounds))

    def to_toml(self) -> str:
        """The resolved file; reading it gives an equal plan."""
        chains = [{"chain": [{"name": s.name, **s.asdict()} for s in chain]} for chain in self.defenses]
        sections: dict[str, Any] = {
            name: getattr(self, name).model_dump(exclude_none=True) for name in ("data", "model", "federation", "run")
        }
        if self.audit is not None:
            whole = self.audit.asdict()
            audit = {name: whole[name] for name in ("client", "attacker", "attacks", "run")}
            del audit["run"]["seeds"]
            sections["audit"] = {"rounds": list(self.rounds), **audit}
        if self.sent is not None:
            sections["audit"]["sent"] = self.sent.model_dump(exclude_none=True)
        if self.invert is not None:
            sections["invert"] = self.invert.asdict()
        return tomli_w.dumps({"title": self.title, **sections, "defenses": chains})


_TOP = ("title", "data", "model", "federation", "defenses", "run", "audit", "invert")
_AUDIT = ("rounds", "client", "attacker", "attacks", "run", "sent")


def load_training(source: str, overrides: Sequence[str] = ()) -> TrainingPlan:
    """Read a training preset or file, apply ``key=value`` overrides, and resolve everything.

    Raises:
        ConfigError: in one sentence, what is wrong, where, and what is accepted.
    """
    if source in presets():
        raise ConfigError(f"'{source}' is a preset of keyhole audit, not of this command.")
    return parse_training(*read_source(source, presets("training"), overrides))


def parse_training(raw: dict[str, Any], title: str = "training") -> TrainingPlan:
    """Resolve a dictionary as read from TOML."""
    for key in raw:
        if key not in _TOP:
            raise UnknownName("key", key, _TOP, "the training file")
    invert = raw.get("invert")
    given = isinstance(invert, dict) and "weights" in invert
    for required in ("data", "model", *(() if given else ("federation",))):
        if required not in raw:
            raise ConfigError(f"the training file has no [{required}] section.")
    data = read_section("data", TrainingData, raw["data"])
    model = read_section("model", ModelSection, raw["model"])
    federation = read_section("federation", FederationSection, raw.get("federation", {}))
    run = read_section("run", TrainingRun, raw.get("run", {}))
    title = raw.get("title", title)
    check_model(model)
    check_title(title)
    federation.check()
    federation.federation()
    federation.server()
    if len(set(run.seeds)) != len(run.seeds):
        raise ConfigError(f"run.seeds {run.seeds} repeats a seed; each seed is one training.")
    plan = TrainingPlan(
        title=title, data=data, model=model, federation=federation, defenses=read_defenses(raw), run=run
    )
    if "invert" in raw:
        last = federation.rounds if "federation" in raw else None
        plan = plan.model_copy(update={"invert": read_inverting(raw["invert"], data, model, last, run.seeds)})
    if given:
        if len(plan.defenses) > 1:
            raise ConfigError(
                "invert.weights names networks that are trained already, and a defense acts in training: remove "
                "[[defenses]], and give defended networks as they are."
            )
        if "audit" in raw:
            raise ConfigError("[audit] attacks what is trained here, and invert.weights takes its place; remove one.")
    return _with_audit(plan, raw) if "audit" in raw else plan


def _with_audit(plan: TrainingPlan, raw: dict[str, Any]) -> TrainingPlan:
    own = raw["audit"]
    if not isinstance(own, dict):
        raise ConfigError(f"[audit] must be a table of keys, not {own!r}.")
    for key in own:
        if key not in _AUDIT:
            raise UnknownName("key", key, _AUDIT, "[audit]")
    last = plan.federation.rounds
    rounds = own.get("rounds", [0, last])
    if (
        not isinstance(rounds, list)
        or not rounds
        or not all(type(number) is int and 0 <= number <= last for number in rounds)
        or sorted(set(rounds)) != rounds
    ):
        raise ConfigError(
            f"audit.rounds is {rounds!r}; it must be a rising list of rounds from 0 (untrained) to {last} "
            "(federation.rounds)."
        )
    run = own.get("run", {})
    if isinstance(run, dict) and "seeds" in run:
        raise ConfigError("audit.run.seeds are those of the training; set run.seeds.")
    whole = {
        "title": plan.title,
        "data": plan.data.audited.model_dump(exclude_none=True),
        "model": raw["model"],
        **{key: own[key] for key in ("client", "attacker", "attacks") if key in own},
        "defenses": raw.get("defenses", []),
        "run": {**run, "seeds": plan.run.seeds} if isinstance(run, dict) else run,
    }
    try:
        audit = parse_experiment(whole, plan.title)
    except ConfigError as error:
        raise ConfigError(f"[audit]: {error}") from error
    sent = _sent(own["sent"], plan) if "sent" in own else None
    return plan.model_copy(update={"rounds": tuple(rounds), "audit": audit, "sent": sent})


def _sent(raw: Any, plan: TrainingPlan) -> SentSection:
    sent = read_section("audit.sent", SentSection, raw)
    if plan.invert is not None:
        raise ConfigError("[audit.sent] is of keyhole frontier; remove it, or [invert].")
    if sent.clients > plan.federation.clients:
        raise ConfigError(
            f"audit.sent.clients is {sent.clients}, of {plan.federation.clients} clients (federation.clients)."
        )
    for attack in sent.attacks or []:
        method(ATTACKS, attack, "[[audit.sent.attacks]]")
    return sent
