"""From an audit file to an `Experiment`: every key typed, every name known, every option resolved.

A method's signature is its schema: options are checked against the registered factory's own annotations, so that a new
method needs no entry here. A list where one value is expected means one cell for each value.
"""

from __future__ import annotations

import inspect
import itertools
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

import keyhole.attacks
import keyhole.defenses
import keyhole.metrics
import keyhole.parts.labels
import keyhole.zoo  # noqa: F401  (these imports fill the registries)
from keyhole.core.registry import ATTACKS, DEFENSES, LABELS, MODELS, Card, Registry
from keyhole.core.trial import Spec
from keyhole.errors import ConfigError, UnknownName


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataSection(_Section):
    """``[data]``: where images come from and how many go into each of four disjoint pools."""

    name: str = Field(min_length=1)
    target: int = Field(default=64, ge=1)
    tune: int = Field(default=12, ge=0)
    public: int = Field(default=24, ge=1)
    candidates: int | None = Field(default=None, ge=0)
    seed: int = 0
    size: int | None = Field(default=None, ge=1)
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


class ModelSection(BaseModel):
    """``[model]``: a registered ``name`` or a user's ``factory``, its knobs, and how its modes are set."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str | None = None
    factory: str | None = None
    normalize: bool | None = None
    batchnorm: Literal["eval"] | None = None
    dropout: Literal["off"] | None = None

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
    """``[state]``: ``train = "none"`` for fresh weights, or the path of a safetensors file."""

    train: str = "none"


class ClientSection(_Section):
    """``[client]``: what a client does before it sends something."""

    rule: Literal["gradient"] = "gradient"
    batch_size: int = Field(default=1, ge=1)


class AttackerSection(_Section):
    """``[attacker]``: what the attacker sees, and the label rule of attacks that do not name their own."""

    sees: list[Literal["weights", "update", "targets"]] = ["weights", "update"]
    labels: str | None = None


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

    def to_toml(self) -> str:
        """The resolved audit file; reading it gives an equal experiment."""
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
        return tomli_w.dumps(
            {
                "title": self.title,
                **sections,
                "run": run,
                "attacks": attacks,
                "defenses": [{"chain": c} for c in chains],
            }
        )


_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataSection,
    "model": ModelSection,
    "state": StateSection,
    "client": ClientSection,
    "attacker": AttackerSection,
    "run": RunSection,
}
_TOP = (*_SECTIONS, "title", "attacks", "defenses")


def presets() -> dict[str, str]:
    """Names of the shipped audit files and their text."""
    folder = resources.files("keyhole.experiment") / "presets"
    return {f.name.removesuffix(".toml"): f.read_text() for f in folder.iterdir() if f.name.endswith(".toml")}


def load_experiment(source: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read a preset or an audit file, apply ``key=value`` overrides, and resolve everything.

    Raises:
        ConfigError: in one sentence, what is wrong, where, and what is accepted.
    """
    path = Path(source)
    if source.endswith(".toml") or path.is_file():
        if not path.is_file():
            raise ConfigError(f"there is no audit file '{source}'.")
        text, title = path.read_text(errors="replace"), path.stem
    else:
        known = presets()
        if source not in known:
            raise UnknownName("preset", source, known, "the command (a path must end in .toml)")
        text, title = known[source], source
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"'{source}' is not valid TOML: {error}.") from error
    for override in overrides:
        _override(raw, override)
    return parse_experiment(raw, title)


def parse_experiment(raw: dict[str, Any], title: str = "audit") -> Experiment:
    """Resolve a dictionary as read from TOML."""
    for key in raw:
        if key not in _TOP:
            raise UnknownName("key", key, _TOP, "the audit file")
    for required in ("data", "model"):
        if required not in raw:
            raise ConfigError(f"the audit file has no [{required}] section.")
    sections = {name: _section(name, kind, raw.get(name, {})) for name, kind in _SECTIONS.items()}
    _check_model(sections["model"])
    attacker = sections["attacker"]
    if attacker.labels is not None:
        LABELS.card(attacker.labels, "[attacker] labels")
    entries = _entries(raw, "attacks")
    if not entries:
        raise ConfigError('the audit file names no attack; add [[attacks]] with name = "idlg".')
    attacks = tuple(_attack(e, f"[[attacks]] number {i}", attacker.labels) for i, e in enumerate(entries, 1))
    chains: list[tuple[Spec, ...]] = [()]  # the undefended case is always run
    for i, entry in enumerate(_entries(raw, "defenses"), 1):
        for chain in _chains(entry, f"[[defenses]] number {i}"):
            if chain not in chains:
                chains.append(chain)
    run, client, data = sections["run"], sections["client"], sections["data"]
    _check_sizes(run, client, data)
    _check_title(raw.get("title", title))
    if any(entry.tune for entry in attacks) and data.tune < client.batch_size:
        raise ConfigError(
            f"an attack has options to tune, but data.tune is {data.tune}, less than client.batch_size "
            f"{client.batch_size}; raise data.tune."
        )
    return Experiment(title=raw.get("title", title), attacks=attacks, defenses=tuple(chains), **sections)


def _check_title(title: Any) -> None:
    """The title names the default output folder, so it must not lead out of it."""
    if not isinstance(title, str) or not re.fullmatch(r"\w[\w .-]*", title):
        raise ConfigError(f"title is {title!r}; use letters, digits, spaces, dots, dashes and underscores.")


def _check_sizes(run: RunSection, client: ClientSection, data: DataSection) -> None:
    if len(set(run.seeds)) != len(run.seeds):
        raise ConfigError(f"run.seeds {run.seeds} repeats a seed; each seed is one network.")
    if client.batch_size > data.target:
        raise ConfigError(
            f"client.batch_size is {client.batch_size}, larger than the target pool of {data.target} images; "
            "raise data.target or lower the batch size."
        )
    if run.samples % client.batch_size:
        raise ConfigError(
            f"run.samples is {run.samples}, which is not a multiple of client.batch_size {client.batch_size}."
        )
    if run.samples > data.target:
        raise ConfigError(
            f"run.samples is {run.samples}, larger than the target pool of {data.target} images; raise data.target."
        )


def _section(name: str, kind: type[BaseModel], raw: Any) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"[{name}] must be a table of keys, not {raw!r}.")
    if kind.model_config.get("extra") == "forbid":
        for key in raw:
            if key not in kind.model_fields:
                raise UnknownName("key", key, kind.model_fields, f"[{name}]")
    try:
        return kind(**raw)
    except ValidationError as error:
        raise ConfigError(_sentence(error, name)) from error


def _sentence(error: ValidationError, where: str) -> str:
    """The first complaint of pydantic as one sentence with its path."""
    first = error.errors()[0]
    path = ".".join([where, *(str(part) for part in first["loc"] if not _union_tag(part))])
    message = first["msg"][0].lower() + first["msg"][1:]
    given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
    return f"{path}: {message}{given}."


def _union_tag(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "bool"))


def _entries(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = raw.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(f"{name} must be written as [[{name}]] tables.")
    return entries


def _check_model(model: ModelSection) -> None:
    if (model.name is None) == (model.factory is None):
        raise ConfigError('[model] needs either a name or a factory ("package.module:function"), and not both.')
    if model.name is not None:
        card = MODELS.card(model.name, "[model]")
        given = ("input_shape", "num_classes")
        accepted = [*_knobs(card, given), *(k for k in ModelSection.model_fields if k != "factory")]
        for key in model.options:
            if key not in accepted:
                raise UnknownName("key", key, accepted, f"[model] of '{model.name}'")
        _resolve(card, model.options, "[model]", given)
    elif model.factory is not None and ":" not in model.factory:
        raise ConfigError(f"model.factory is '{model.factory}'; write it as \"package.module:function\".")


def _knobs(card: Card, given: Sequence[str] = ()) -> list[str]:
    return [name for name in card.signature().parameters if name not in given]


def _resolve(card: Card, options: dict[str, Any], where: str, given: Sequence[str] = ()) -> dict[str, Any]:
    """Options checked against the factory's signature, defaults filled in, and tried out once."""
    parameters = {n: p for n, p in card.signature().parameters.items() if n not in given}
    for key in options:
        if key not in parameters:
            raise UnknownName("option", key, parameters, f"{where} '{card.name}'")
    fields: dict[str, Any] = {
        name: (p.annotation, ... if p.default is inspect.Parameter.empty else p.default)
        for name, p in parameters.items()
    }
    schema = create_model(card.name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
    try:
        resolved = {name: getattr(schema(**options), name) for name in parameters}
    except ValidationError as error:
        raise ConfigError(_sentence(error, f"{where} {card.name}")) from error
    # TOML writes 1 and 1.0 apart, but they are one value and must give one hash.
    as_float = {n for n, p in parameters.items() if p.annotation is float}
    return {name: float(value) if name in as_float else value for name, value in resolved.items()}


def _method(registry: Registry, raw: dict[str, Any], where: str) -> Spec:
    name = raw.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{where} needs a name.")
    card = registry.card(name, where)
    options = _resolve(card, {k: v for k, v in raw.items() if k != "name"}, where)
    try:
        card.factory(**options)
    except UnknownName:
        raise
    except ConfigError as error:
        raise ConfigError(f"{where} '{name}': {error}") from error
    return Spec.of(name, options, card.version)


def _attack(raw: dict[str, Any], where: str, labels: str | None) -> AttackEntry:
    raw = dict(raw)
    tune = raw.pop("tune", {})
    if not isinstance(tune, dict) or not all(isinstance(v, list) and v for v in tune.values()):
        raise ConfigError(f"{where} tune must be a table of lists, such as tune = {{ tv = [0.0, 1e-4] }}.")
    name = raw.get("name")
    if labels is not None and isinstance(name, str) and name in ATTACKS and "labels" in _knobs(ATTACKS.card(name)):
        raw.setdefault("labels", labels)
    spec = _method(ATTACKS, raw, where)
    grid = {
        option: [_method(ATTACKS, {**raw, option: value}, f"{where} tune").asdict()[option] for value in values]
        for option, values in tune.items()
    }
    return AttackEntry(spec=spec, tune=grid)


def _chains(raw: dict[str, Any], where: str) -> list[tuple[Spec, ...]]:
    for key in raw:
        if key != "chain":
            raise UnknownName("key", key, ["chain"], where)
    links = raw.get("chain", [])
    if not isinstance(links, list) or not all(isinstance(link, dict) for link in links):
        raise ConfigError(f'{where} chain must be a list of tables, such as chain = [{{ name = "clip" }}].')
    return list(itertools.product(*([_method(DEFENSES, one, where) for one in _cells(link, where)] for link in links)))


def _cells(link: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A list means one cell for each value."""
    choices = [value if isinstance(value, list) else [value] for value in link.values()]
    for option, values in zip(link, choices, strict=True):
        if not values:
            raise ConfigError(f"{where} gives '{option}' an empty list; a list means one cell for each value.")
    return [dict(zip(link, values, strict=True)) for values in itertools.product(*choices)]


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply ``section.key=value``; numbers in the path index lists, and the value is TOML or else a plain string."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set '{override}' must be written as key=value, such as run.samples=4.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    here: Any = raw
    *parents, last = path.strip().split(".")
    for part in parents:
        here = _enter(here, part, override)
    if isinstance(here, list):
        here[_index(here, last, override)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise ConfigError(f"--set '{override}': there is no table at '{'.'.join(parents)}'.")


def _enter(here: Any, part: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, override)]
    if isinstance(here, dict):
        return here.setdefault(part, {})
    raise ConfigError(f"--set '{override}': '{part}' is inside a value that is no table.")


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set '{override}': '{part}' must be a number below {len(items)} here.")
    return int(part)
