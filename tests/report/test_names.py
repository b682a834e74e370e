"""Names of methods in reports."""

from __future__ import annotations

from typing import Any

from keyhole.core.registry import INVERSIONS
from keyhole.core.trial import Spec
from keyhole.report.names import spec_names


def test_attacks_of_one_name_are_told_apart_by_what_is_not_default() -> None:
    def made(**options: Any) -> Spec:
        whole = {name: p.default for name, p in INVERSIONS.card("gmi").signature().parameters.items()}
        return Spec.of("gmi", {**whole, **options}, 1)

    plain, strong, vmi = made(), made(final=2, identity="logit"), Spec.of("ked_mi", {"steps": 7}, 1)
    names = spec_names([plain, strong, vmi], INVERSIONS)
    assert [names[s] for s in (plain, strong, vmi)] == ["gmi", "gmi(final=2, identity=logit)", "ked_mi"]
    same = made(steps=9), made(steps=9, lr=0.5)
    assert [*spec_names(same, INVERSIONS).values()] == ["gmi", "gmi(lr=0.5)"]
