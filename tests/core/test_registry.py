"""Registries and errors: what a wrong name or number tells the user."""

from __future__ import annotations

import math

import pytest

from keyhole.core.registry import ATTACKS, Registry
from keyhole.errors import ConfigError, KeyholeError, UnknownName, check_range


def filled() -> Registry:
    registry = Registry("fruit")

    @registry.add(name="apple", arxiv="1234.56789", version=3, facts={"sweet": True})
    def apple(*, size: int = 2, colour: str = "red") -> tuple[int, str]:
        """A round fruit.

        More words.
        """
        return size, colour

    @registry.add(name="pear", url="https://example.org/pear", arxiv="1")
    def pear() -> str:
        return "pear"

    return registry


def test_a_registered_factory_is_built_with_its_options() -> None:
    assert filled().build("apple", size=5) == (5, "red")
    assert filled().build("pear") == "pear"
    with pytest.raises(TypeError):
        filled().build("apple", weight=1)


def test_the_card_tells_what_is_known() -> None:
    registry = filled()
    card = registry.card("apple")
    assert (card.kind, card.name, card.version, card.facts) == ("fruit", "apple", 3, {"sweet": True})
    assert card.summary == "A round fruit."
    assert card.link == "https://arxiv.org/abs/1234.56789"
    assert registry.card("pear").link == "https://example.org/pear"
    assert registry.card("pear").summary == ""


def test_the_signature_has_real_types() -> None:
    parameters = filled().card("apple").signature().parameters
    assert {name: (p.annotation, p.default) for name, p in parameters.items()} == {
        "size": (int, 2),
        "colour": (str, "red"),
    }


def test_iteration_keeps_the_order_of_registration() -> None:
    registry = filled()
    assert [card.name for card in registry] == ["apple", "pear"]
    assert "apple" in registry
    assert "plum" not in registry


def test_a_name_can_be_registered_once() -> None:
    registry = filled()
    with pytest.raises(ValueError, match="'apple' is registered twice"):
        registry.add(name="apple")(lambda: None)


def test_an_unknown_name_is_answered_with_the_nearest_and_with_all() -> None:
    with pytest.raises(UnknownName) as caught:
        filled().card("aple", "[basket]")
    assert str(caught.value) == "unknown fruit 'aple' in [basket]; did you mean 'apple'? Accepted: apple, pear."
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, KeyholeError)


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    with pytest.raises(UnknownName) as caught:
        filled().card("xyzzy")
    assert str(caught.value) == "unknown fruit 'xyzzy'. Accepted: apple, pear."


def test_the_designs_own_example() -> None:
    with pytest.raises(UnknownName, match="unknown attack 'invertgrad'; did you mean 'inverting_gradients'"):
        ATTACKS.card("invertgrad")


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_closed_ends_belong_to_a_range(value: float) -> None:
    check_range("rate", value, 0, 1)


@pytest.mark.parametrize(
    ("value", "kwargs", "words"),
    [
        (-0.1, {}, "at least 0 and at most 1"),
        (1.1, {}, "at least 0 and at most 1"),
        (1.0, {"open_high": True}, "at least 0 and below 1"),
        (0.0, {"open_low": True}, "above 0 and at most 1"),
        (math.nan, {}, "at least 0 and at most 1"),
        (math.inf, {}, "at least 0 and at most 1"),
    ],
)
def test_a_number_out_of_range_is_named_with_what_is_accepted(value: float, kwargs: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_range("rate", value, 0, 1, **kwargs)
    assert str(caught.value) == f"rate is {value!r}; it must be {words}."


def test_one_sided_ranges() -> None:
    check_range("norm", 1e300, 0, open_low=True)
    with pytest.raises(ConfigError, match=r"norm is 0; it must be above 0\."):
        check_range("norm", 0, 0, open_low=True)
    with pytest.raises(ConfigError, match="a number"):
        check_range("norm", math.nan)
