"""The command line: verbs as typed functions.

Exit codes: 0 done; 1 a mod is not what was expected of it; 2 the input is wrong (one sentence on standard error says
how); 3 paused by --seconds, the same command goes on; 130 interrupted, likewise.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

import keyhole.experiment.spec  # noqa: F401  (fills the registries)
from keyhole.core import registry
from keyhole.core.registry import Card, Registry
from keyhole.errors import ConfigError, KeyholeError, UnknownName, Unmet, check_range
from keyhole.experiment.audit import SETTING, audit
from keyhole.experiment.dryrun import dry_run
from keyhole.experiment.frontier import frontier
from keyhole.experiment.invert import invert_rounds
from keyhole.experiment.layers import with_layers
from keyhole.experiment.overrides import read_value
from keyhole.experiment.plan import Group
from keyhole.experiment.prospect import in_words
from keyhole.experiment.rehearsal import rehearsal_in_words, rehearse, study_to_come
from keyhole.experiment.sections import Study
from keyhole.experiment.spec import load_study, presets
from keyhole.experiment.template import write_template
from keyhole.experiment.train import Trained, train
from keyhole.experiment.training_plan import TrainingPlan, load_training
from keyhole.experiment.work import HERE, Workers
from keyhole.zoo.models import build_model, import_own

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# A pipe or a log has no width; 80 columns would cut the tables.
# Paths and names may have brackets in them, which mean nothing here.
out = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

KINDS: dict[str, Registry] = {
    "attacks": registry.ATTACKS,
    "inversions": registry.INVERSIONS,
    "defenses": registry.DEFENSES,
    "labels": registry.LABELS,
    "controls": registry.CONTROLS,
    "metrics": registry.METRICS,
    "models": registry.MODELS,
    "data": registry.DATASETS,
}
PAUSED = 3
NAME_WIDTH = 48
"""Columns up to which the name at the head of a row is not broken."""
WIDEST = 1000
"""Columns of a table in a pipe or a log, at most."""
Ray = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Work on a Ray cluster: auto, host:port or local.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would run, and what it costs.")]
BACKENDS = ("lifted", "flower")


def _say_version(wanted: bool) -> None:
    if wanted:
        out.print(f"keyhole {version('keyhole')}", highlight=False)
        raise typer.Exit


@app.callback()
def keyhole_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Measure how much private data can be recovered from what federated-learning clients share."""


@app.command("init")
def init_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")] = Path("audit.toml"),
) -> None:
    """Write an audit file for your own model and data: two lines to edit, everything else explained."""
    write_template(path)
    out.print(f"Wrote {path}. Edit the two lines marked EDIT, then: keyhole audit {path} --dry-run", highlight=False)


@app.command("audit")
def audit_command(
    source: Annotated[
        str | None, typer.Argument(metavar="PRESET_OR_TOML", help="A preset's name or an audit file.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Output folder; by default audits/TITLE.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: run.samples=4.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Worker processes on a CPU; 0: one a core.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0, help="Pause after so many seconds; 0: never.")] = 0.0,
    layers: Annotated[bool, typer.Option("--layers", help="Also leave out layers: which matter?")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, its cost, what to expect.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: machine-readable.")] = False,
    transcript: Annotated[Path | None, typer.Option(help="Attack what keyhole.fl.Recorder wrote instead.")] = None,
    model: Annotated[str | None, typer.Option(help="With --transcript: package.module:factory.")] = None,
    secrets: Annotated[Path | None, typer.Option(help="With --transcript: what record_batches wrote.")] = None,
    ray: Ray = None,
) -> None:
    """Attack what clients would send, or did send, and write a report. Run again to go on after an interruption."""
    if transcript is not None:
        if source is not None or model is None or layers or dry or as_json or ray:
            raise ConfigError("--transcript goes with --model, and with --secrets, --out and --set where wanted.")
        if device != "cpu" or seconds:
            raise ConfigError("--transcript works on a CPU and never pauses; leave out --device and --seconds.")
        _audit_transcript(transcript, model, secrets, overrides or [], out_dir or Path("audits") / "transcript", jobs)
        return
    if source is None or model is not None or secrets is not None:
        raise ConfigError("name a preset or an audit file, or give --transcript with --model (and --secrets).")
    study = load_study(source, overrides or [])
    if layers:
        study = with_layers(study)
    if as_json and not dry:
        raise ConfigError("--json goes with --dry-run; an audit writes its numbers to report.json in its folder.")
    if dry and ray is not None:
        raise ConfigError("--dry-run measures this machine; leave out --ray.")
    if dry:
        prospect = dry_run(study, jobs=jobs, device=device)
        print(json.dumps(prospect.asdict(), indent=2) if as_json else in_words(prospect))
        return
    folder = out_dir or Path("audits") / study.title
    with _workers(ray, jobs, device) as workers:
        done = _interruptible(
            lambda bars: audit(study, folder, jobs=jobs, device=device, seconds=seconds, progress=bars, workers=workers)
        )
    if not done and not (folder / SETTING).exists():
        err.print(f"Paused while tuning; the same command goes on. Stored so far: {folder}", highlight=False)
        raise typer.Exit(PAUSED)
    _report(folder)
    if not done:
        err.print("Paused: the same command goes on where this stopped.")
        raise typer.Exit(PAUSED)


@app.command("train")
def train_command(
    source: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", help="A training preset's name or file.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Output folder; by default trainings/TITLE.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: federation.rounds=5.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the clients: lifted (this process) or flower.")] = "lifted",
    jobs: Annotated[int, typer.Option(min=0, help="Trainings at a time on a CPU; 0: one a core.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dry: DryRun = False,
    ray: Ray = None,
) -> None:
    """Train by federated learning under each defense: accuracy, cost, checkpoints. Run again to go on."""
    if backend not in BACKENDS:
        raise UnknownName("backend", backend, BACKENDS, "--backend")
    plan = load_training(source, overrides or [])
    if dry:
        if backend == "flower":
            raise ConfigError("--dry-run times the lifted backend; leave out --backend.")
        _rehearse(plan, None, jobs, device, ray)
        return
    folder = out_dir or Path("trainings") / plan.title
    if backend == "flower":
        if ray is not None:
            raise ConfigError("--backend flower starts its own Ray; leave out --ray, or the backend.")
        if jobs:
            raise ConfigError("--backend flower gives each client a core; leave out --jobs, or the backend.")
        run = _flower(device)
        done = _interruptible(lambda bars: run(plan, folder, told=bars.training))
    else:
        with _workers(ray, jobs, device) as workers:
            done = _interruptible(
                lambda bars: train(plan, folder, jobs=jobs, device=device, told=bars.training, workers=workers)
            )
    _print_training(plan, done, folder)


@app.command("frontier")
def frontier_command(
    source: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", help="A training preset or file with [audit].")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Output folder; by default frontiers/TITLE.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: audit.run.samples=4.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Worker processes on a CPU; 0: one a core.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dry: DryRun = False,
    ray: Ray = None,
) -> None:
    """Train under each defense, then attack updates of chosen rounds: accuracy beside leakage in one report."""
    from keyhole.report.frontier import write_frontier
    from keyhole.report.names import defense_name
    from keyhole.report.training import remarks

    plan = load_training(source, overrides or [])
    if dry:
        _rehearse(plan, study_to_come(plan, defense_name), jobs, device, ray)
        return
    folder = out_dir or Path("frontiers") / plan.title
    with _workers(ray, jobs, device) as workers:
        done = _interruptible(
            lambda bars: frontier(
                plan, folder, name=defense_name, jobs=jobs, device=device, progress=bars, workers=workers
            )
        )
    table, answer, html = write_frontier(plan, done, folder)
    _print_table([(*line[:4], *line[6:8]) for line in table])
    for said in (*remarks(done), *answer):
        out.print(said, highlight=False)
    out.print(f"\nReport: {html.resolve()}", highlight=False, soft_wrap=True)


@app.command("invert")
def invert_command(
    source: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", help="A training preset or file with [invert].")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Output folder; by default inversions/TITLE.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: invert.samples=10.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Worker processes on a CPU; 0: one a core.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train, then draw private classes from the network of chosen rounds; with an audit section, attack updates too."""
    from keyhole.report.inversion import update_leaks, write_inversions
    from keyhole.report.names import defense_name

    plan = load_training(source, overrides or [])
    folder = out_dir or Path("inversions") / plan.title
    found = _interruptible(lambda bars: invert_rounds(plan, folder, jobs=jobs, device=device, told=bars.training))
    updates = None
    if plan.audit is not None and found.trained:
        _interruptible(lambda bars: frontier(plan, folder, name=defense_name, jobs=jobs, device=device, progress=bars))
        updates = update_leaks(plan, found.trained, folder)
    overview, verdict, html = write_inversions(found, folder, updates)
    _print_table(overview)
    out.print(f"\n{verdict}", highlight=False)
    out.print(f"\nReport: {html.resolve()}", highlight=False, soft_wrap=True)


@app.command("check-mod")
def check_mod_command(
    mod: Annotated[str, typer.Argument(metavar="PACKAGE.MODULE:MOD", help="A Flower client mod, or a list of them.")],
    model: Annotated[str, typer.Option(help="package.module:factory of what clients train, or a registered name.")],
    config: Annotated[list[str] | None, typer.Option(help="What the server sends: clipping_norm=1.0.")] = None,
    run_config: Annotated[list[str] | None, typer.Option(help="An entry of the run config: KEY=VALUE.")] = None,
    messages: Annotated[int, typer.Option(help="Messages of each kind; more make intervals smaller.")] = 200,
    clip: Annotated[float | None, typer.Option(help="Expect this clip norm, and that the mod is sound.")] = None,
    noise_std: Annotated[
        float | None, typer.Option(help="Expect noise of this size, and that the mod is sound.")
    ] = None,
) -> None:
    """Measure what a Flower client mod does to updates: clip, noise, bias, and what it lets through."""
    # Read when Flower is imported. In their own apps users decide about it.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from keyhole.fl import check_mod

    if clip is not None:
        check_range("--clip", clip, 0, open_low=True)
    if noise_std is not None:
        check_range("--noise-std", noise_std, 0)
    found = import_own(mod, "mod")
    if isinstance(found, type) or not (callable(found) or isinstance(found, list | tuple)):
        raise ConfigError(f"mod '{mod}' is a {type(found).__name__}; a mod that is made already, or a list, is needed.")
    network = build_model(model, input_shape=(1, 28, 28), num_classes=10, options={}, seed=0)
    sent, run = _entries("--config", config), _entries("--run-config", run_config)
    with _Bars() as bars:
        facts = check_mod(found, network, config=sent, run_config=run, messages=messages, told=bars.training)
    print(facts)
    if clip is not None or noise_std is not None:
        try:
            facts.expect(clip=clip, noise_std=noise_std)
        except Unmet as error:
            err.print(f"Not as expected: {error}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None


def _entries(option: str, given: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE``, several times."""
    pairs = [one.partition("=") for one in given or []]
    for key, equals, text in pairs:
        if not key.strip() or not equals:
            raise ConfigError(f"{option} '{key}{equals}{text}' must be written as KEY=VALUE.")
    return {key.strip(): read_value(text) for key, _, text in pairs}


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(metavar="DIR", help="An audit's output folder.")]) -> None:
    """Rebuild the report from stored outcomes, without running anything."""
    if (folder / "train.json").exists():
        raise ConfigError(
            f"'{folder}' holds trainings: the command that made it writes its report again, and trains nothing twice; "
            f"the report of an audit in it alone is that of '{folder / 'audit'}'."
        )
    if (folder / "updates").exists():
        raise ConfigError(
            f"'{folder}' holds the audit of a transcript: the command that made it writes its report again."
        )
    _report(folder)


@app.command("list")
def list_command(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)}, presets.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List what an audit file can name."""
    kinds = [*KINDS, "presets"]
    if kind is not None and kind not in kinds:
        raise UnknownName("kind", kind, kinds)
    chosen = [kind] if kind else kinds
    listing = {k: _presets() if k == "presets" else [_card(c) for c in KINDS[k]] for k in chosen}
    if as_json:
        print(json.dumps(listing, indent=2))
        return
    for name, cards in listing.items():
        table = Table(title=name, title_justify="left", box=None, show_header=False, padding=(0, 2))
        for card in cards:
            table.add_row(Text(card["name"], style="bold"), card["summary"])
        out.print(table)


@app.command("show")
def show_command(name: Annotated[str, typer.Argument(help="The name of a method, model, data set or preset.")]) -> None:
    """Show a method's card, its knobs, and what is known to break it."""
    known = {**presets(), **presets("training")}
    cards = [card for registered in KINDS.values() for card in registered if card.name == name]
    if not cards and name not in known:
        everything = {card.name for registered in KINDS.values() for card in registered} | set(known)
        raise UnknownName("name", name, everything)
    with out.capture() as shown:
        for card in cards:
            _show(card)
    text = shown.get()
    if name in known and cards:
        # A method and a preset of one name: as comments, so that what is printed is still an audit file.
        text = indent(f"{text}\nThe preset of this name:\n", "# ", lambda line: True)
    # Written as it is: broken lines would be no TOML.
    out.file.write(text + known.get(name, ""))


def _show(card: Card) -> None:
    out.print(Text(card.name, style="bold"), f" ({card.kind}, version {card.version})")
    if card.paper:
        out.print(f"Source: {card.paper}. {card.link}", highlight=False)
    if card.kind == "defense":
        counters = ", ".join(counter.name for counter in card.factory().counters())
        out.print(f"Attackers who know it: {counters}.", highlight=False)
    for known_break in card.known_breaks:
        out.print(f"Known to break it: {known_break}.", highlight=False)
    out.print()
    out.print(inspect.getdoc(card.factory) or "", highlight=False, soft_wrap=True)
    knobs = _card(card)["knobs"]
    if knobs:
        table = Table("knob", "type", "default", box=None, padding=(0, 2))
        for knob in knobs:
            table.add_row(knob["name"], knob["type"], str(knob["default"]))
        out.print()
        out.print(table)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _card(card: Card) -> dict[str, Any]:
    knobs = [
        {
            "name": name,
            "type": _type_name(p.annotation),
            "default": None if p.default is p.empty else p.default,
        }
        for name, p in card.signature().parameters.items()
        if card.kind in ("attack", "inversion", "defense", "model") and name not in ("input_shape", "num_classes")
    ]
    return {
        "name": card.name,
        "summary": card.summary,
        "paper": card.paper,
        "link": card.link,
        "version": card.version,
        "known_breaks": list(card.known_breaks),
        "knobs": knobs,
    }


def _presets() -> list[dict[str, Any]]:
    known = {**presets(), **presets("training")}
    return [{"name": n, "summary": text.split("\n")[0].lstrip("# ")} for n, text in sorted(known.items())]


def _flower(device: str) -> Callable[..., list[Trained]]:
    """Training with Flower's simulation engine."""
    if device != "cpu":
        raise ConfigError("--backend flower trains on a CPU; leave out --device, or the backend.")
    # Read when Flower is imported. In their own apps users decide about it.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from keyhole.fl.apps import leaves_when_interrupted, train_in_flower

    return leaves_when_interrupted()(train_in_flower)


_T = TypeVar("_T")


def _workers(ray: str | None, jobs: int = 0, device: str = "cpu") -> AbstractContextManager[Workers]:
    """Who works: this machine, or a Ray cluster."""
    if ray is None:
        return nullcontext(HERE)
    if jobs or device != "cpu":
        raise ConfigError("--ray works on all CPUs that the cluster offers; leave out --jobs and --device.")
    from keyhole.experiment.cluster import cluster

    return cluster(ray)


def _interruptible(work: Callable[[_Bars], _T]) -> _T:
    """Work with progress bars; Ctrl-C leaves with a word."""
    try:
        with _Bars() as bars:
            return work(bars)
    except KeyboardInterrupt:  # caught here, as typer would end without a word
        err.print("Interrupted: what is done is stored; the same command goes on.")
        raise typer.Exit(130) from None


def _rehearse(plan: TrainingPlan, study: Study | None, jobs: int, device: str, ray: str | None) -> None:
    from keyhole.report.names import defense_name

    if ray is not None:
        raise ConfigError("--dry-run measures this machine; leave out --ray.")
    found = rehearse(plan, study, jobs=jobs, device=device)
    print("\n".join(rehearsal_in_words(found, defense_name)))


def _print_training(plan: TrainingPlan, done: list[Trained], folder: Path) -> None:
    from keyhole.report.training import remarks, write_training

    _print_table([line[:5] for line in write_training(plan, done, folder)])
    for said in remarks(done):
        out.print(said, highlight=False)
    out.print(f"\nNumbers: {(folder / 'train.json').resolve()}", highlight=False, soft_wrap=True)


def _print_table(lines: list[tuple[str, ...]]) -> None:
    # Names that were cut short would hide which strength a row is about.
    widest = min(NAME_WIDTH, max(len(row[0]) for row in lines))
    rest = [Column(name, overflow="fold") for name in lines[0][1:]]
    table = Table(Column(lines[0][0], min_width=widest, overflow="fold"), *rest, box=None, padding=(0, 1))
    for row in lines[1:]:
        table.add_row(*row)
    # Elsewhere than on a terminal a table is as wide as it has to be.
    (out if out.is_terminal else Console(width=WIDEST, markup=False, emoji=False)).print(table)


def _report(folder: Path) -> None:
    from keyhole.report.tables import verdict_table
    from keyhole.report.write import write_report

    report, html = write_report(folder)
    _print_table(verdict_table(report))
    out.print()
    out.print(report.verdict, highlight=False)
    out.print(f"\nReport: {html.resolve()}", highlight=False, soft_wrap=True)


def _audit_transcript(
    transcript: Path, model: str, secrets: Path | None, changes: list[str], folder: Path, jobs: int
) -> None:
    from keyhole.experiment.recorded import audit_transcript
    from keyhole.report.recorded import conclusion, lines, remarks, told, write_recorded

    findings = _interruptible(
        lambda bars: audit_transcript(
            transcript, model, secrets, tuple(changes), out=folder, jobs=jobs, told=bars.training
        )
    )
    html = write_recorded(findings, folder)
    head, *rows = lines(findings)
    # Wrapped rather than cut: which attacker a line is about must be there to read.
    table = Table(*(Column(name, overflow="fold") for name in head), box=None, padding=(0, 1))
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for text in (*told(findings), *remarks(findings), conclusion(findings)):
        out.print(text, highlight=False)
    out.print(f"\nReport: {html.resolve()}", highlight=False, soft_wrap=True)


class _Bars:
    """Progress on a terminal, one bar a stage; plain lines would flood a log, so elsewhere it says only the stage."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f}%"),
            TimeElapsedColumn(),
            console=err,
        )
        self.task: TaskID | None = None
        self.groups: dict[str, float] = {}
        self.trainings: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        if err.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if err.is_terminal:
            self.bars.stop()

    def stage(self, name: str, done: int, total: int) -> None:
        """A new bar, the stored part already filled."""
        if not total:
            return
        self.groups = {}
        self.done = done
        self.task = self.bars.add_task(name, total=total, completed=done)
        if not err.is_terminal:
            err.print(f"{name}: {total - done} of {total} groups of trials to do", highlight=False)

    def training(self, what: str, fraction: float) -> None:
        """A bar for each network that is trained, several at a time perhaps; it goes once it is full."""
        if what not in self.trainings:
            self.trainings[what] = self.bars.add_task(what, total=1.0)
            if not err.is_terminal:
                err.print(what, highlight=False)
        self.bars.update(self.trainings[what], completed=fraction, visible=fraction < 1.0)

    def group(self, group: Group, fraction: float) -> None:
        """Move the bar."""
        self.groups[group.hash] = fraction
        if self.task is not None:
            self.bars.update(self.task, completed=self.done + sum(self.groups.values()))


def main() -> None:
    """Run the command line; errors meant for the user become one sentence and exit code 2."""
    warnings.showwarning = lambda message, *rest, **more: err.print(f"Warning: {message}", highlight=False)
    try:
        app()
    except KeyholeError as error:
        err.print(f"Error: {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
