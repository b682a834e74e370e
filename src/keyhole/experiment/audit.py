"""The whole path: an experiment and a folder in, stored outcomes and a `Setting` for the report out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from keyhole.core.belief import Belief
from keyhole.core.keys import new_key
from keyhole.core.registry import ATTACKS, BELIEFS, RULES
from keyhole.core.task import fit_weights
from keyhole.core.threat import ThreatModel, observe
from keyhole.errors import Refused
from keyhole.experiment.plan import Chosen, Group, build_defense, choose, compose, plan, plan_tuning
from keyhole.experiment.probe import public_batch
from keyhole.experiment.run import public_images
from keyhole.experiment.setup import Setup, find_device, prepare
from keyhole.experiment.spec import AttackEntry, Experiment, Study
from keyhole.experiment.store import SECRETS, Store
from keyhole.experiment.work import HERE, Workers, available_cores
from keyhole.solve.drive import Paused

SETTING = "setting.json"
"""What the report says of the experiment, so that it can be rebuilt from the folder alone."""


class Progress(Protocol):
    """Follows an audit; see the command line for one that draws bars."""

    def stage(self, name: str, done: int, total: int) -> None:
        """A stage begins: so many of its groups are already stored."""
        ...

    def group(self, group: Group, fraction: float) -> None:
        """How far one group is, in [0, 1]."""
        ...

    def training(self, what: str, fraction: float) -> None:
        """How far the training of a network is, in [0, 1]."""
        ...


class Silent:
    """Progress that says nothing."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Nothing."""

    def group(self, group: Group, fraction: float) -> None:
        """Nothing."""

    def training(self, what: str, fraction: float) -> None:
        """Nothing."""


def audit(
    what: Study | Experiment,
    folder: Path,
    *,
    jobs: int = 0,
    device: str = "cpu",
    seconds: float = 0.0,
    progress: Progress | None = None,
    workers: Workers = HERE,
) -> bool:
    """Run what is missing in ``folder``.

    Args:
        what: a study, or one experiment, to run.
        folder: the output folder; made if needed.
        jobs: worker processes on a CPU; 0 for one a core.
        device: ``cpu`` or ``cuda``.
        seconds: pause after so long; 0 for never. A pause ends no trial, it goes on with the next call.
        progress: told how far things are.
        workers: who runs the groups.

    Returns:
        Whether everything planned is done; `False` after a pause.
    """
    study = Study.of(what) if isinstance(what, Experiment) else what
    deadline = time.time() + seconds if seconds > 0 else None
    progress = progress or Silent()
    where = find_device(device)
    # Before the folder is claimed: bad input must leave nothing behind.
    setups = [prepare(experiment, where, progress.training) for experiment in study.experiments]
    both = list(zip(study.experiments, setups, strict=True))
    for experiment, setup in both:
        compose(setup.data.target.labels.tolist(), experiment)
        _try_defenses(experiment, setup)
    with Store(folder) as store:
        store.claim(study)
        _keep_secrets(both, store)

        wanted: set[str] = set()
        """Groups whose pictures some setting stores."""

        def run_stage(name: str, groups: list[Group]) -> None:
            stored = store.outcomes()
            todo = [g for g in groups if any(t.hash not in stored for t in (*g.trials, *g.others))]
            progress.stage(name, len(groups) - len(todo), len(groups))
            if not todo:
                return
            many = jobs or available_cores()
            results = workers.groups(study, setups, todo, store.checkpoints, many, deadline, progress.group)
            for group, result in results:
                pictured = group.hash in wanted and group.trials[0].pool == "target"
                if pictured and result.reconstructions:
                    store.keep_images(group.hash, result.reconstructions)
                new = {o.trial.hash: o for o in result.outcomes if o.trial.hash not in stored}
                store.append(new.values())
                stored |= new
                progress.group(group, 1.0)

        def groups_of(make: Callable[[Experiment, Setup], list[Group]]) -> list[Group]:
            """Groups of all settings; what two of them have in common is run once."""
            numbered = [replace(g, setting=i) for i, pair in enumerate(both) for g in make(*pair)]
            wanted.update(g.hash for g in numbered if study.experiments[g.setting].run.images != "none")
            return list({group.hash: group for group in reversed(numbered)}.values())[::-1]

        try:
            run_stage("tuning", groups_of(plan_tuning))
            outcomes = store.outcomes().values()
            plans = [(e, s, chosen := choose(e, s, outcomes), plan(e, s, chosen)) for e, s in both]
            # Written before the attacks, so that a report can be made of whatever an interruption leaves.
            described = [describe(e, s, groups, chosen) for e, s, chosen, groups in plans]
            store.write_text(SETTING, json.dumps({"title": study.title, "settings": described}, indent=1))
            planned = iter([groups for *_, groups in plans])
            run_stage("attacking", groups_of(lambda e, s: next(planned)))
        except Paused:
            return False
        store.tidy()
    return True


def describe(experiment: Experiment, setup: Setup, groups: list[Group], chosen: Chosen) -> dict[str, Any]:
    """What the report says of a setting, as a plain dictionary: the fields of `keyhole.report.Setting`."""
    state = setup.states[experiment.run.seeds[0]].split("#")[0]
    return {
        "title": experiment.title,
        "name": experiment.setting,
        "against": experiment.against,
        "task": f"{experiment.data.name} / {experiment.model.label}",
        "state": state,
        "threat": threat_in_words(experiment),
        "assumptions": assumptions_in_words(experiment, setup),
        "planned": [trial.hash for group in groups for trial in (*group.trials, *group.others)],
        "budget": budget_in_words(experiment, setup, chosen),
        "versions": versions(),
        "classes": setup.task.num_classes,
    }


def _try_defenses(experiment: Experiment, setup: Setup) -> None:
    """Every defense once, on public images: options that do not fit the model end the audit before it begins.

    What a defense refuses is no error: its trials will say so.
    """
    weights = setup.weights[experiment.run.seeds[0]][0]
    client = experiment.client
    threat = ThreatModel(RULES.build(client.rule, **client.spec.asdict()), batch_size=client.size)
    batch, public = public_batch(setup, client), public_images(setup)
    for specs in experiment.defenses:
        # One step of an inner loop is enough to see that it runs.
        short = tuple(spec.replace(steps=1) if "steps" in spec.asdict() else spec for spec in specs)
        defense = build_defense(short)
        try:
            task = defense.on_task(setup.task)
            observe(task, threat, defense, fit_weights(task, weights), (batch,), new_key(0, setup.device), public)
        except Refused:
            continue


def _keep_secrets(both: Sequence[tuple[Experiment, Setup]], store: Store) -> None:
    """The secrets of all settings that ask for it, each pool once."""
    kept: dict[str, Tensor] = {}
    for experiment, setup in both:
        if experiment.run.images == "all":
            rows = compose(setup.data.target.labels.tolist(), experiment)
            images = setup.data.target.images
            kept |= {f"{setup.source}/{row}": images[row].float().contiguous() for row in rows}
    if kept:
        store.keep_images(SECRETS, kept)


def threat_in_words(experiment: Experiment) -> str:
    """The row string of the threat model."""
    client = experiment.client
    labels = ", ".join(_label_rules(experiment)) or "-"
    rule = RULES.build(client.rule, **client.spec.asdict())
    parts = [f"{rule.describe()}, {client.size} image{'s' * (client.size != 1)}"]
    if client.labels != "any":
        parts[0] += f" of {'one class' if client.labels == 'equal' else 'distinct classes'}"
    if client.rounds > 1:
        parts.append(f"{client.rounds} updates of the same images")
    if client.series > 1:
        networks = "a network each" if client.fresh_weights else "one network"
        parts.append(f"series of {client.series} updates, {networks}")
    if experiment.attacker.spec.name != "exact":
        parts.append(f"believes {_belief(experiment).describe()}")
    return f"{'; '.join(parts)}; sees {', '.join(experiment.sees)}; labels {labels}"


def _belief(experiment: Experiment) -> Belief:
    client, spec = experiment.client, experiment.attacker.spec
    rule = RULES.build(client.rule, **client.spec.asdict())
    belief: Belief = BELIEFS.build(spec.name, rule=rule, **spec.asdict())
    return belief


def _label_rules(experiment: Experiment) -> list[str]:
    """Where the attacks have labels from, of the inner attack where there is one."""
    attacks = [ATTACKS.build(entry.spec.name, **entry.spec.asdict()) for entry in experiment.attacks]
    found = {getattr(getattr(attack, "inner", attack), "labels", None) for attack in attacks}
    return sorted(str(rule) for rule in found if rule is not None)


_LABELS = {
    "optimised": "The attacker optimises the labels beside the images.",
    "given": "The attacker is told the labels.",
    "random": "The attacker guesses the labels at random.",
}
_FIELDS = {
    "weights": "the global weights",
    "update": "one client's own update",
    "targets": "the labels",
    "statistics": "the batch statistics of BatchNorm",
    "masks": "what layers drew (dropout masks, noise)",
    "hints": "what an insider knows of the defense's own choices",
}


def assumptions_in_words(experiment: Experiment, setup: Setup) -> tuple[str, ...]:
    """What the attacker is assumed to know and what the clients do, as sentences."""
    client = experiment.client
    sees = set(experiment.sees)
    images = "one image" if client.size == 1 else f"{client.size} images together"
    told = " ".join(
        _LABELS.get(rule, f"It recovers the labels from the update (rule: {rule}).")
        for rule in _label_rules(experiment)
    )
    what = RULES.build(client.rule, **client.spec.asdict()).describe()
    often = "once" if client.rounds == 1 else f"{client.rounds} times, each from the same weights"
    sentences = [
        f"Each client sends the gradient of {images}, {often}."
        if client.rule == "gradient"
        else f"Each client trains on {images} ({what}) and sends how far its weights moved, {often}.",
        "The attacker is an honest-but-curious server: it follows the protocol and sees "
        + " and ".join(words for field, words in _FIELDS.items() if field in sees)
        + "; it knows the model's architecture, the loss, the batch size and how images are normalised.",
        *([told] if told else []),
    ]
    if client.rule != "gradient" or experiment.attacker.spec.name != "exact":
        belief = _belief(experiment).describe()
        sentences.append(f"The attacker takes the update for: {belief}.")
    sentences += [
        "An adaptive attacker also knows which defense is used and its settings, but never its random numbers.",
        *_state_in_words(experiment, setup),
        f"The attacker and the defender have {len(setup.data.public)} public images of the same kind; "
        f"{len(setup.data.tune)} further images serve only for tuning.",
    ]
    if setup.task.batchnorm:
        sentences.append(_BATCHNORM[setup.task.batchnorm])
    if setup.task.drops:
        masks = "is told the masks" if "masks" in sees else "optimises the masks beside the images"
        sentences.append(f"Dropout is active; the attacker {masks}.")
    if setup.task.noises:
        sentences.append("The networks have noise inside, as a defense under which they were trained put there.")
    return tuple(sentences)


_BATCHNORM = {
    "eval": "BatchNorm runs in eval mode (running statistics): an upper bound on what train mode leaks.",
    "train_shared": "BatchNorm runs in train mode, and clients upload the batch's statistics.",
    "train_hidden": "BatchNorm runs in train mode; the batch's statistics stay with the client.",
}


def _state_in_words(experiment: Experiment, setup: Setup) -> Iterator[str]:
    name = setup.states[experiment.run.seeds[0]].split("#")[0]
    yield f"The networks are {name}."
    if known := [setup.facts[seed] for seed in experiment.run.seeds if setup.facts.get(seed)]:
        accuracy = ", ".join(f"{100 * facts['accuracy']:.0f} %" for facts in known)
        yield (
            f"They were trained for {known[0]['rounds']:g} rounds of federated averaging over "
            f"{known[0]['clients']:g} clients with {known[0]['images']:g} images, the targets among them; "
            f"accuracy on these: {accuracy}."
        )


def budget_in_words(experiment: Experiment, setup: Setup, chosen: Chosen) -> tuple[str, ...]:
    """How much every attacker was allowed and what was tuned, as sentences."""
    sentences = []
    for index, entry in enumerate(experiment.attacks):
        options = entry.spec.asdict()
        sentences.append(
            f"{entry.spec.name}: at most {options.get('steps', 1)} evaluations of the objective in a start, "
            f"{options.get('restarts', 1)} start(s), for every defense and attacker alike"
            + (", but for what is tuned." if {"steps", "restarts"} & entry.tune.keys() else ".")
        )
        if entry.tune:
            sentences.append(_grid_in_words(entry, len(setup.data.tune)))
            sentences += _tuned_in_words(experiment, index, chosen)
    if experiment.run.budget:
        sentences.append(f"No update was given more than {experiment.run.budget} evaluations in all.")
    return tuple(sentences)


def _grid_in_words(entry: AttackEntry, images: int) -> str:
    grid = "; ".join(f"{name} from {', '.join(map(str, values))}" for name, values in entry.tune.items())
    return (
        f"{entry.spec.name}: {grid}, chosen by mean SSIM on the {images} images of the tune pool, separately for every "
        "defense and counter."
    )


def _tuned_in_words(experiment: Experiment, index: int, chosen: Chosen) -> Iterator[str]:
    for specs in experiment.defenses:
        defense = build_defense(specs)
        cell = " -> ".join(str(spec) for spec in specs) or "no defense"
        for attacker in ("naive", *(f"adaptive:{counter.name}" for counter in defense.counters())):
            options = chosen(specs, index, attacker).asdict()
            values = ", ".join(f"{name}={options[name]}" for name in experiment.attacks[index].tune)
            yield f"Tuned for {cell}, {attacker}: {values}."


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"keyhole": metadata.version("keyhole"), "python": platform.python_version()}
    for name in ("torch", "numpy", "scipy", "torchmetrics"):
        found[name] = metadata.version(name)
    return {**found, "machine": f"{platform.system()} {platform.machine()}"}
