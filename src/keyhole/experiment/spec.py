"""From an audit file to a `Study`: every key typed, every name known, every option resolved.

A method's signature is its schema: options are checked against the registered factory's own annotations, so that a new
method needs no entry here. A list where one value is expected means one cell for each value.
"""

from __future__ import annotations

import itertools
import os
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

import keyhole.attacks
import keyhole.defenses
import keyhole.metrics
import keyhole.parts.labels
import keyhole.zoo  # noqa: F401  (these imports fill the registries)
from keyhole.core.registry import ATTACKS, BELIEFS, DEFENSES, INVERSIONS, LABELS, MODELS, RULES
from keyhole.core.rule import LocalSGD
from keyhole.core.trial import Spec
from keyhole.errors import ConfigError, UnknownName, cause
from keyhole.experiment.options import knobs, method, resolve, sentence
from keyhole.experiment.overrides import override
from keyhole.experiment.sections import (
    TRAINED,
    AttackEntry,
    AttackerSection,
    ClientSection,
    DataSection,
    Experiment,
    ModelSection,
    RunSection,
    StateSection,
    Study,
)

__all__ = ["AttackEntry", "Experiment", "Study", "load_experiment", "load_study", "parse_experiment", "parse_study"]

_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataSection,
    "model": ModelSection,
    "state": StateSection,
    "client": ClientSection,
    "attacker": AttackerSection,
    "run": RunSection,
}
_TOP = (*_SECTIONS, "title", "attacks", "defenses", "settings")


def presets(kind: str = "") -> dict[str, str]:
    """Names of the shipped audit files and their text; of kind ``training``, those of `keyhole train`."""
    folder = resources.files("keyhole.experiment") / "presets" / kind
    return {f.name.removesuffix(".toml"): f.read_text() for f in folder.iterdir() if f.name.endswith(".toml")}


def load_study(source: str, overrides: Sequence[str] = ()) -> Study:
    """Read a preset or an audit file, apply ``key=value`` overrides, and resolve everything.

    Raises:
        ConfigError: in one sentence, what is wrong, where, and what is accepted.
    """
    if source in presets("training"):
        raise ConfigError(f"'{source}' is a preset of keyhole train, frontier and invert, not of this command.")
    return parse_study(*read_source(source, presets(), overrides))


def read_source(source: str, known: dict[str, str], overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The tables of a preset, one of ``known``, or of a TOML file, changed by ``overrides``; and its name.

    Raises:
        ConfigError: there is no such file or preset, or it is not TOML.
    """
    path = Path(source)
    if source.endswith(".toml") or os.path.isfile(path):
        if not os.path.isfile(path):
            raise ConfigError(f"there is no file '{source}'.")
        try:
            text, title = path.read_text(errors="replace"), path.stem
        except OSError as error:
            raise ConfigError(f"'{source}' cannot be read ({cause(error)}).") from error
    else:
        if source not in known:
            raise UnknownName("preset", source, known, "the command (a path must end in .toml)")
        text, title = known[source], source
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"'{source}' is not valid TOML: {error}.") from error
    for change in overrides:
        override(raw, change)
    return raw, title


def load_experiment(source: str, overrides: Sequence[str] = ()) -> Experiment:
    """The one experiment of an audit file that has no settings; see `load_study`."""
    study = load_study(source, overrides)
    if len(study.experiments) != 1:
        raise ConfigError(f"'{source}' has {len(study.experiments)} settings; one experiment is needed.")
    return study.experiments[0]


def parse_study(raw: dict[str, Any], title: str = "audit") -> Study:
    """Resolve what TOML gave; each of ``[[settings]]`` is the rest of the file with some keys changed."""
    entries = read_tables(raw, "settings")
    base = {key: value for key, value in raw.items() if key != "settings"}
    if not entries:
        return Study.of(parse_experiment(base, title))
    names = [entry.get("name") for entry in entries]
    for number, (name, entry) in enumerate(zip(names, entries, strict=True), 1):
        where = f"[[settings]] number {number}"
        if not isinstance(name, str) or not name.strip() or names.count(name) > 1:
            raise ConfigError(f'{where} needs a name of its own, such as name = "batch of 4".')
        for key in ("settings", "title"):
            if key in entry:
                raise ConfigError(f"{where} has '{key}', which belongs to the whole audit file.")
        against = entry.get("against", "")
        if against and (against == name or against not in names):
            raise UnknownName("setting", str(against), [str(n) for n in names if n != name], f"{where} against")
    experiments = []
    for entry in entries:
        changes = {key: value for key, value in entry.items() if key not in ("name", "against")}
        try:
            one = parse_experiment(_merged(base, changes), title)
        except ConfigError as error:
            raise ConfigError(f"setting '{entry['name']}': {error}") from error
        experiments.append(one.model_copy(update={"setting": entry["name"], "against": entry.get("against", "")}))
    return Study(title=experiments[0].title, experiments=tuple(experiments))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Tables key by key; everything else, lists too, is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def parse_experiment(raw: dict[str, Any], title: str = "audit") -> Experiment:
    """Resolve a dictionary as read from TOML, without settings."""
    for key in raw:
        if key not in _TOP:
            raise UnknownName("key", key, _TOP, "the audit file")
    for required in ("data", "model"):
        if required not in raw:
            raise ConfigError(f"the audit file has no [{required}] section.")
    sections = {name: read_section(name, kind, raw.get(name, {})) for name, kind in _SECTIONS.items()}
    check_model(sections["model"])
    attacker = sections["attacker"]
    if attacker.labels is not None:
        LABELS.card(attacker.labels, "[attacker] labels")
    entries = read_tables(raw, "attacks")
    if not entries:
        raise ConfigError('the audit file names no attack; add [[attacks]] with name = "idlg".')
    attacks = tuple(_attack(e, f"[[attacks]] number {i}", attacker.labels) for i, e in enumerate(entries, 1))
    chains = read_defenses(raw)
    run, client, data = sections["run"], sections["client"], sections["data"]
    _check_sizes(run, client, data)
    _check_client(client, attacker, sections["model"], sections["state"])
    check_title(raw.get("title", title))
    if any(entry.tune for entry in attacks) and data.tune < client.size:
        raise ConfigError(
            f"an attack has options to tune, but data.tune is {data.tune}, less than the {client.size} images of an "
            "update; raise data.tune."
        )
    return Experiment(title=raw.get("title", title), attacks=attacks, defenses=chains, **sections)


def _check_client(client: ClientSection, attacker: AttackerSection, model: ModelSection, state: StateSection) -> None:
    """Combinations of keys that would not mean anything, each refused in a sentence."""
    if client.rule == "gradient":
        for key in ("epochs", "lr", "order", "images"):
            if getattr(client, key) is not None:
                raise ConfigError(f'client.{key} is for local training; set client.rule = "sgd", or remove it.')
    rule = RULES.build(client.rule, **client.spec.asdict())
    belief = attacker.spec
    try:
        BELIEFS.build(belief.name, rule=rule, **belief.asdict())
    except ConfigError as error:
        raise ConfigError(f"attacker.belief '{belief.name}': {error}") from error
    several = isinstance(rule, LocalSGD) and rule.steps(client.size) > 1
    if model.batchnorm == "train_shared" and several:
        raise ConfigError(
            'model.batchnorm = "train_shared" is about one local step, whose batch statistics the upload gives away; '
            'use "train_hidden" or "eval" with several steps.'
        )
    if model.dropout == "active" and client.rule != "gradient":
        raise ConfigError('model.dropout = "active" draws one mask a step; use it with client.rule = "gradient".')
    if model.dropout == "active" and client.rounds > 1:
        raise ConfigError(
            'model.dropout = "active" draws other masks for every update, so that several cannot be combined; set '
            "client.rounds = 1."
        )
    if "masks" in attacker.sees and model.dropout != "active":
        raise ConfigError('attacker.sees has "masks", which exist with model.dropout = "active" only.')
    if client.series > 1 and client.rounds > 1:
        raise ConfigError(
            "client.series (different images) and client.rounds (the same images) cannot both be above 1."
        )
    if client.fresh_weights and (client.series == 1 or state.train != "none"):
        raise ConfigError('client.fresh_weights needs client.series above 1 and state.train = "none".')
    if client.labels == "distinct" and client.size == 1:
        raise ConfigError('client.labels = "distinct" is about updates of several images.')
    if state.train not in ("none", *TRAINED) and not Path(state.train).suffix and not Path(state.train).exists():
        raise UnknownName("training", state.train, ("none", *TRAINED), "state.train (a file ends in .safetensors)")
    if state.seen is not None and state.train in ("none", *TRAINED):
        raise ConfigError("state.seen is about a file of weights; set state.train to its path, or remove it.")
    if not state.trained:
        for key in ("clients", "rounds", "epochs", "lr", "batch_size", "alpha"):
            if getattr(state, key) is not None:
                raise ConfigError(f'state.{key} is about training; set state.train = "early" or "late", or remove it.')


def check_title(title: Any) -> None:
    """The title names the default output folder, so it must not lead out of it."""
    if not isinstance(title, str) or not re.fullmatch(r"\w[\w .-]*", title):
        raise ConfigError(f"title is {title!r}; use letters, digits, spaces, dots, dashes and underscores.")


def _check_sizes(run: RunSection, client: ClientSection, data: DataSection) -> None:
    if len(set(run.seeds)) != len(run.seeds):
        raise ConfigError(f"run.seeds {run.seeds} repeats a seed; each seed is one network.")
    if client.size > data.target:
        raise ConfigError(
            f"client.{'batch_size' if client.images is None else 'images'} is {client.size}, larger than the target "
            f"pool of {data.target} images; raise data.target or lower it."
        )
    if run.samples % (client.size * client.series):
        what = f"client.{'batch_size' if client.images is None else 'images'} {client.size}"
        raise ConfigError(
            f"run.samples is {run.samples}, which is not a multiple of {what}"
            + (f" times client.series {client.series}." if client.series > 1 else ".")
        )
    if run.samples > data.target:
        raise ConfigError(
            f"run.samples is {run.samples}, larger than the target pool of {data.target} images; raise data.target."
        )


def read_section(name: str, kind: type[BaseModel], raw: Any) -> Any:
    """A section as its class, every key known and of its type."""
    if not isinstance(raw, dict):
        raise ConfigError(f"[{name}] must be a table of keys, not {raw!r}.")
    if kind.model_config.get("extra") == "forbid":
        for key in raw:
            if key not in kind.model_fields:
                raise UnknownName("key", key, kind.model_fields, f"[{name}]")
    try:
        return kind(**raw)
    except ValidationError as error:
        raise ConfigError(sentence(error, name)) from error


def read_tables(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The tables of ``[[name]]``, or none."""
    entries = raw.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(f"{name} must be written as [[{name}]] tables.")
    return entries


def check_model(model: ModelSection) -> None:
    """A name or a factory, and no option that the named model has not."""
    if (model.name is None) == (model.factory is None):
        raise ConfigError('[model] needs either a name or a factory ("package.module:function"), and not both.')
    if model.name is not None:
        card = MODELS.card(model.name, "[model]")
        given = ("input_shape", "num_classes")
        accepted = [*knobs(card, given), *(k for k in ModelSection.model_fields if k != "factory")]
        for key in model.options:
            if key not in accepted:
                raise UnknownName("key", key, accepted, f"[model] of '{model.name}'")
        resolve(card, model.options, "[model]", given)
    elif model.factory is not None and ":" not in model.factory:
        raise ConfigError(f"model.factory is '{model.factory}'; write it as \"package.module:function\".")


def _attack(raw: dict[str, Any], where: str, labels: str | None) -> AttackEntry:
    raw = dict(raw)
    tune = raw.pop("tune", {})
    if not isinstance(tune, dict) or not all(isinstance(v, list) and v for v in tune.values()):
        raise ConfigError(f"{where} tune must be a table of lists, such as tune = {{ tv = [0.0, 1e-4] }}.")
    name = raw.get("name")
    if isinstance(name, str) and name in INVERSIONS:
        raise ConfigError(
            f"{where} names '{name}', which attacks the network itself: it belongs to [[invert.attacks]] of keyhole "
            "invert."
        )
    if labels is not None and isinstance(name, str) and name in ATTACKS and "labels" in knobs(ATTACKS.card(name)):
        raw = _with_labels(raw, labels, where)
    spec = method(ATTACKS, raw, where)
    grid = {
        option: [method(ATTACKS, {**raw, option: value}, f"{where} tune").asdict()[option] for value in values]
        for option, values in tune.items()
    }
    return AttackEntry(spec=spec, tune=grid)


def _with_labels(raw: dict[str, Any], labels: str, where: str) -> dict[str, Any]:
    """The file's label rule for an attack that names none and takes one; some optimise labels under other options."""
    if "labels" in raw:
        return raw
    method(ATTACKS, raw, where)
    try:
        method(ATTACKS, {**raw, "labels": labels}, where)
    except ConfigError:
        return raw
    return {**raw, "labels": labels}


def read_defenses(raw: dict[str, Any]) -> tuple[tuple[Spec, ...], ...]:
    """The chains of ``[[defenses]]``, each once; the undefended case is always the first."""
    chains: list[tuple[Spec, ...]] = [()]
    for i, entry in enumerate(read_tables(raw, "defenses"), 1):
        for chain in _chains(entry, f"[[defenses]] number {i}"):
            if chain not in chains:
                chains.append(chain)
    return tuple(chains)


def _chains(raw: dict[str, Any], where: str) -> list[tuple[Spec, ...]]:
    for key in raw:
        if key != "chain":
            raise UnknownName("key", key, ["chain"], where)
    links = raw.get("chain", [])
    if not isinstance(links, list) or not all(isinstance(link, dict) for link in links):
        raise ConfigError(f'{where} chain must be a list of tables, such as chain = [{{ name = "clip" }}].')
    return list(itertools.product(*([method(DEFENSES, one, where) for one in _cells(link, where)] for link in links)))


def _cells(link: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A list means one cell for each value."""
    choices = [value if isinstance(value, list) else [value] for value in link.values()]
    for option, values in zip(link, choices, strict=True):
        if not values:
            raise ConfigError(f"{where} gives '{option}' an empty list; a list means one cell for each value.")
    return [dict(zip(link, values, strict=True)) for values in itertools.product(*choices)]
