"""The whole path: an experiment and a folder in, stored outcomes and a `Setting` for the report out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from keyhole.experiment.plan import Chosen, Group, build_defense, choose, plan, plan_tuning
from keyhole.experiment.setup import Setup, find_device, prepare
from keyhole.experiment.spec import AttackEntry, Experiment
from keyhole.experiment.store import SECRETS, Store
from keyhole.experiment.work import available_cores, run_groups
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


class Silent:
    """Progress that says nothing."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Nothing."""

    def group(self, group: Group, fraction: float) -> None:
        """Nothing."""


def audit(
    experiment: Experiment,
    folder: Path,
    *,
    jobs: int = 0,
    device: str = "cpu",
    seconds: float = 0.0,
    progress: Progress | None = None,
) -> bool:
    """Run what is missing in ``folder``.

    Args:
        experiment: what to run.
        folder: the output folder; made if needed.
        jobs: worker processes on a CPU; 0 for one a core.
        device: ``cpu`` or ``cuda``.
        seconds: pause after so long; 0 for never. A pause ends no trial, it goes on with the next call.
        progress: told how far things are.

    Returns:
        Whether everything planned is done; `False` after a pause.
    """
    deadline = time.time() + seconds if seconds > 0 else None
    progress = progress or Silent()
    where = find_device(device)
    setup = prepare(experiment, where)  # before the folder is claimed: bad input must leave nothing behind
    with Store(folder) as store:
        store.claim(experiment)
        if experiment.run.images == "all":
            _keep_secrets(experiment, setup, store)

        def run_stage(name: str, groups: list[Group]) -> None:
            stored = store.outcomes()
            todo = [g for g in groups if any(t.hash not in stored for t in (*g.trials, *g.others))]
            progress.stage(name, len(groups) - len(todo), len(groups))
            if not todo:
                return
            workers = jobs or available_cores()
            for group, result in run_groups(
                experiment, setup, todo, store.checkpoints, workers, deadline, progress.group
            ):
                if experiment.run.images != "none" and group.trials[0].pool == "target" and result.reconstructions:
                    store.keep_images(group.hash, result.reconstructions)
                store.append(o for o in result.outcomes if o.trial.hash not in stored)
                progress.group(group, 1.0)

        try:
            run_stage("tuning", plan_tuning(experiment, setup))
            chosen = choose(experiment, store.outcomes().values())
            groups = plan(experiment, setup, chosen)
            # Written before the attacks, so that a report can be made of whatever an interruption leaves.
            store.write_text(SETTING, json.dumps(describe(experiment, setup, groups, chosen), indent=1))
            run_stage("attacking", groups)
        except Paused:
            return False
        store.tidy()
    return True


def describe(experiment: Experiment, setup: Setup, groups: list[Group], chosen: Chosen) -> dict[str, Any]:
    """What the report says of the experiment, as a plain dictionary: the fields of `keyhole.report.Setting`."""
    state = setup.states[experiment.run.seeds[0]].split("#")[0]
    return {
        "title": experiment.title,
        "task": f"{experiment.data.name} / {experiment.model.label}",
        "state": state,
        "threat": threat_in_words(experiment),
        "assumptions": assumptions_in_words(experiment, setup),
        "planned": [trial.hash for group in groups for trial in (*group.trials, *group.others)],
        "budget": budget_in_words(experiment, setup, chosen),
        "versions": versions(),
        "classes": setup.task.num_classes,
    }


def _keep_secrets(experiment: Experiment, setup: Setup, store: Store) -> None:
    rows = range(experiment.run.samples)
    store.keep_images(SECRETS, {str(row): setup.data.target.images[row].float().contiguous() for row in rows})


def threat_in_words(experiment: Experiment) -> str:
    """The row string of the threat model."""
    labels = ", ".join(sorted({str(e.spec.asdict().get("labels", "-")) for e in experiment.attacks}))
    sees = ", ".join(sorted(experiment.attacker.sees))
    return f"gradient of one batch, batch size {experiment.client.batch_size}; sees {sees}; labels {labels}"


_LABELS = {
    "given": "The attacker is told the labels.",
    "random": "The attacker guesses the labels at random.",
}
_FIELDS = {
    "weights": "the global weights",
    "update": "one client's own update",
    "targets": "the labels",
    "statistics": "the batch statistics",
}


def assumptions_in_words(experiment: Experiment, setup: Setup) -> tuple[str, ...]:
    """What the attacker is assumed to know and what the clients do, as sentences."""
    size = experiment.client.batch_size
    sees = set(experiment.attacker.sees)
    images = "one image" if size == 1 else f"{size} images together"
    rules = sorted({str(e.spec.asdict()["labels"]) for e in experiment.attacks if "labels" in e.spec.asdict()})
    told = " ".join(_LABELS.get(rule, f"It recovers the labels from the update (rule: {rule}).") for rule in rules)
    sentences = [
        f"Each client sends the gradient of {images}, once.",
        "The attacker is an honest-but-curious server: it follows the protocol and sees "
        + " and ".join(words for field, words in _FIELDS.items() if field in sees)
        + "; it knows the model's architecture, the loss, the batch size and how images are normalised.",
        *([told] if told else []),
        "An adaptive attacker also knows which defense is used and its settings, but never its random numbers.",
        f"The networks are {setup.states[experiment.run.seeds[0]].split('#')[0]}.",
        f"The attacker and the defender have {len(setup.data.public)} public images of the same kind; "
        f"{len(setup.data.tune)} further images serve only for tuning.",
    ]
    if setup.task.norm_params:
        sentences.append("BatchNorm runs in eval mode (running statistics): an upper bound on what train mode leaks.")
    return tuple(sentences)


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
        sentences.append(f"No trial made more than {experiment.run.budget} evaluations in all.")
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
