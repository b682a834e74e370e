"""What a report of model inversions says in words: the verdict, the assumptions, and what the columns mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keyhole.experiment.inversion_judge import Inversions
from keyhole.report.inversion_summary import Cell, floor, lift
from keyhole.report.text import share
from keyhole.report.training import accuracy_in_words
from keyhole.report.verdict import percent

NETWORKS = 5
"""Target networks that a ranking needs: two undefended networks of one recipe can differ more than a defense does."""
NOTE = (
    "Recognised: share of the images made that the evaluator, a network of another architecture which no attack sees, "
    "takes for the class they were made to show; interval over target networks. Distances: squared, in the evaluator's "
    "features, to the nearest private image and to the mean of the class. FID: Frechet distance to all private images "
    "in those features{pca}. Diversity: mean pixel distance between two images of a class. By the target: share that "
    "the attacked network itself recognises; far above the evaluator's, the images please that network alone. "
    "control:other_round: the images of the nearest other round, shown to this round's network; control:untrained has "
    "the test accuracy of the untrained network that was attacked; control:private_images are held-out private images."
)


def verdict(found: Sequence[Cell]) -> str:
    """The result in a few sentences."""
    attacks = [c for c in found if c.is_attack and c.by_seed]
    if not attacks:
        return "No attack came to an end; the table says why."
    said = []
    for defense in dict.fromkeys(c.defense for c in attacks):
        own = [c for c in attacks if c.defense == defense]
        worst = max(own, key=lambda c: _above(found, c))
        control = floor(found, worst)
        under = "Without a defense" if defense == "none" else f"Under {defense}"
        against = (
            "" if control is None else f", against {share(control.attack_accuracy.value)} for the best control "
            f"({control.attacker.removeprefix('control:').replace('_', ' ')})"
        )  # fmt: skip
        said.append(
            f"{under}, {accuracy_in_words(worst.attack_accuracy)} of the images that {worst.attack} made from the "
            f"global network of round {worst.round} (test accuracy {percent(worst.accuracy)} %) are recognised as the "
            f"private class they were made to show{against}."
        )
    broken = [c for c in attacks if c.failed]
    if broken:
        names = ", ".join(dict.fromkeys(c.attack for c in broken))
        said.append(f"On some networks {names} failed ({broken[0].failed.rstrip('.')}); shares are of the others.")
    networks = min(len(c.by_seed) for c in attacks)
    if networks < NETWORKS and len(attacks) > 1:
        said.append(
            f"With {networks} target network{'s' * (networks != 1)} in a cell nothing is ranked: {NETWORKS} are needed."
        )
    return " ".join(said)


def _above(found: Sequence[Cell], attack: Cell) -> float:
    above = lift(found, attack).value
    return attack.attack_accuracy.value if math.isnan(above) else above


def assumptions(found: Inversions) -> list[str]:
    """What the attacker has, and who judges."""
    plan = found.plan
    classes = "all classes" if plan.data.classes is None else f"classes {', '.join(map(str, plan.data.classes))}"
    public = "; ".join(
        f"{one.name or plan.data.name}"
        + ("" if one.classes is None else f", classes {', '.join(map(str, one.classes))}")
        + ("" if one.split is None else f", {one.split}")
        for one in found.inverting.public
    )
    origin = (
        f"{plan.federation.clients} clients, {plan.federation.strategy}"
        if found.inverting.settings.weights is None
        else "weights from a file"
    )
    top5 = " With so few classes, being among its top 5 says little." if found.evaluator_classes <= 10 else ""
    return [
        f"Private: {plan.data.name}, {classes}; target {plan.model.label}, {origin}.",
        "Attacker: a participant who follows the protocol and holds the global network of a round, its architecture "
        "and its class numbers, and no private image, no update and no other client's data.",
        f"Public images: {found.public}, without labels: {public}. They resemble the private ones, which helps the "
        "attacker.",
        f"Evaluator: {found.inverting.evaluator.name}, {found.evaluator_classes} classes, "
        f"{share(found.evaluator_accuracy)} right on held-out private images.{top5}",
        f"Images: {found.inverting.settings.samples} of each class from each of {len(plan.run.seeds)} target "
        f"network{'s' * (len(plan.run.seeds) != 1)}. The result is about classes, not about single records.",
    ]


def note(found: Inversions) -> str:
    """What the columns mean."""
    few = f", on their first {found.components} principal components: compare equal numbers of images only"
    return NOTE.format(pca=few if found.components else "")
