"""What `check_mod` measured of a mod: plain facts, as text, and held against what was expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from keyhole.errors import Unmet, check_range

SURE = 1e-7
"""A chance below which something is no accident; so small as many questions are asked at once."""

TOGETHER, BY_TENSOR, BY_ENTRY = "all parameters together", "each tensor by itself", "single entries"
UNSEEN = "what, the noise does not show"


class Interval(NamedTuple):
    """A measured number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (f"{number:.4g}" for number in self)
        return value if low == high else f"{value} ({low} to {high})"

    def within(self, low: float, high: float) -> bool:
        """Whether all of the interval lies between two numbers."""
        return low <= self.low and self.high <= high


class Level(NamedTuple):
    """Updates of one norm."""

    norm: float
    """Of the update that the app made."""
    share: Interval | None
    """How much of it leaves, measured along itself; none where nothing left."""
    noise: Interval | None
    """Standard deviation of an entry between messages."""
    withheld: str = ""
    """Why nothing left."""


class Bias(NamedTuple):
    """The mean of what the mod adds to an update that it does not clip."""

    norm: float
    """Of the update at which it was measured."""
    entry: float
    """Root mean square of an entry, without what chance makes of it."""
    share: float
    """Of the update's norm."""
    chance: float
    """Of a mean at least as large without any bias."""

    @property
    def seen(self) -> bool:
        """Whether there is one."""
        return self.entry > 0 and self.chance < SURE


class Case(NamedTuple):
    """Something out of the ordinary, and what left the client."""

    leaves: str
    bare: bool
    """Whether part of the update left without what the mod does to others, or with values that are not finite."""


@dataclass(frozen=True)
class ModFacts:
    """What a mod does, as far as its replies to known updates tell.

    It is a test of a mechanism, not a proof of privacy: no epsilon follows from it. It does not see what a mod keeps in
    itself between messages, a generator that begins anew with each process, noise that only repeats after more messages
    than were sent, what a mod does at norms that were not tried, or what it sends elsewhere.
    """

    parameters: int
    tensors: int
    messages: int
    """Of each kind."""
    levels: tuple[Level, ...]
    clip: Interval | None
    """Largest norm that leaves, along the update and noise apart; none where none was reached."""
    clip_over: str
    """What is scaled by one factor: all parameters together, each tensor by itself, or single entries."""
    unclipped: tuple[str, ...]
    """Parameters that leave as large as they were, though others are clipped."""
    noise: Interval | None
    """Standard deviation of an entry, in the smallest updates; none where messages do not differ."""
    noise_by_tensor: dict[str, Interval]
    noise_varies: tuple[str, ...]
    """Tensors whose noise is not that of all."""
    noise_follows_update: bool
    """Whether noise on large updates is another than on small ones."""
    kurtosis: Interval | None
    """Excess kurtosis of the noise: Gaussian 0, Laplace 3, uniform -1.2."""
    repeats: tuple[str, ...]
    """Where the same noise is met twice."""
    bias: Bias | None
    """None where every norm that was tried is clipped."""
    zeroed: float
    """Share of entries that leave as exactly the weights received, in the largest updates."""
    weights_matter: float
    """How much what leaves changes when the global weights do and the update does not, as a share of the update."""
    buffers: dict[str, str]
    """By kind, what becomes of what is not a parameter."""
    crowding: Interval | None
    """How much of what else leaves of the parameters is left once buffers move a hundred times as far; none: all."""
    records: str
    """What becomes of metrics and config in the reply."""
    keeps_state: bool
    """Whether something is left in Flower's Context.state."""
    cases: dict[str, Case]

    def expect(
        self,
        *,
        clip: float | None = None,
        noise_std: float | None = None,
        within: float = 0.1,
        on_delta: bool = True,
        fresh: bool = True,
        unbiased: bool = True,
        closed: bool = True,
    ) -> None:
        """Raise unless the mod does what it should; for a test-suite.

        Args:
            clip: norm that no update exceeds, taken over all parameters together. By default not asked.
            noise_std: standard deviation of the noise on each parameter, whatever the update; 0: none. By default not
                asked.
            within: how far both may be off, as a share, above 0 and below 1.
            on_delta: ask that the global weights make no difference.
            fresh: ask that no noise is met twice.
            unbiased: ask that updates that are not clipped leave unchanged on average.
            closed: ask that nothing leaves bare from replies that are not as they should be.

        Raises:
            Unmet: one sentence for each expectation that is not met.
        """
        check_range("within", within, 0, 1, open_low=True, open_high=True)
        wrong = [] if clip is None else self._clip_unmet(clip, within)
        wrong += [] if noise_std is None else self._noise_unmet(noise_std, within)
        if on_delta and self.weights_matter:
            wrong.append(
                f"What leaves depends on the global weights: it changes by {self.weights_matter:.2g} of the update."
            )
        if fresh and self.repeats:
            wrong.append(f"The same noise is met again {' and '.join(self.repeats)}.")
        if unbiased and self.bias is not None and self.bias.seen:
            wrong.append(f"Updates below the clip are changed on average, by {self.bias.share:.2g} of their norm.")
        if closed:
            wrong += [f"With {name} there leaves {case.leaves}." for name, case in self.cases.items() if case.bare]
        if wrong:
            raise Unmet(" ".join(wrong))

    def _clip_unmet(self, clip: float, within: float) -> list[str]:
        if self.clip is None:
            return [f"No clip is seen; {clip:g} was expected."]
        wrong = []
        if self.clip.high < clip * (1 - within) or self.clip.low > clip * (1 + within):
            wrong.append(f"Updates are clipped to a norm of {self.clip}; {clip:g} was expected.")
        elif not self.clip.within(clip * (1 - within), clip * (1 + within)):
            wrong.append(f"The clip norm, {self.clip}, cannot be told from {clip:g} or from others; try more messages.")
        if self.clip_over != TOGETHER:
            wrong.append(f"The clip is over {self.clip_over}, not over {TOGETHER}.")
        if self.unclipped:
            wrong.append(f"These are not clipped: {_some(self.unclipped)}.")
        return wrong

    def _noise_unmet(self, std: float, within: float) -> list[str]:
        wrong = []
        if self.noise is None:
            wrong += [f"There is no noise; a standard deviation of {std:g} was expected."] if std > 0 else []
        elif self.noise.high < std * (1 - within) or self.noise.low > std * (1 + within):
            wrong.append(f"The noise has a standard deviation of {self.noise}; {std:g} was expected.")
        elif not self.noise.within(std * (1 - within), std * (1 + within)):
            wrong.append(f"The noise, {self.noise}, cannot be told from {std:g} or from others; try more messages.")
        if self.noise_varies:
            wrong.append(f"Noise is not the same in {_some(self.noise_varies)}.")
        if self.noise_follows_update:
            wrong.append("Noise is not the same on large updates as on small ones.")
        return wrong

    def __str__(self) -> str:
        lines = [
            f"{self.parameters:,} parameters in {self.tensors} tensors; {self.messages} messages of each kind.",
            f"Acts on: {self._acts_on()}",
            f"Clip: {self._clip()}",
            f"Noise: {self._noise()}",
            f"The same noise again: {', '.join(self.repeats) or 'not met'}.",
            f"Bias: {self._bias()}",
            f"Entries that do not leave: {100 * self.zeroed:.3g} %.",
            *(f"Buffers, {kind}: {words}." for kind, words in self.buffers.items()),
            *(f"Buffers that move crowd parameters out: a share of {one} is left." for one in [self.crowding] if one),
            f"Metrics and config of the reply: {self.records}.",
            f"Kept in Context.state: {'something' if self.keeps_state else 'nothing'}.",
            "",
            f"{'norm in':>10}  {'share that leaves':<34}  noise of an entry",
        ]
        for level in self.levels:
            said = f"{level.share!s:<34}  {level.noise or 'none'}" if level.share else level.withheld
            lines.append(f"{level.norm:>10g}  {said}")
        lines += ["", "What leaves with"]
        lines += [f"  {name}: {case.leaves}" for name, case in self.cases.items()]
        lines += ["", "A test of a mechanism, not a proof of privacy; what is kept inside the mod is not seen."]
        return "\n".join(lines)

    def _acts_on(self) -> str:
        if not self.weights_matter:
            return "the update; the global weights make no difference."
        return f"weights; other global weights change what leaves by {self.weights_matter:.2g} of the update."

    def _clip(self) -> str:
        if self.clip is None:
            *_, last = [one for one in self.levels if one.share is not None]
            return f"none seen; of an update of norm {last.norm:g} a share of {last.share} leaves."
        but = f", but not {_some(self.unclipped)}" if self.unclipped else ""
        return f"at a norm of {self.clip}, over {self.clip_over}{but}."

    def _noise(self) -> str:
        if self.noise_follows_update:
            return f"follows the update; standard deviation {self.noise or 0} on the smallest."
        if self.noise is None:
            return "none."
        alike = f"not the same in {_some(self.noise_varies)}" if self.noise_varies else "alike in all tensors"
        return f"standard deviation {self.noise}, {alike}; excess kurtosis {self.kurtosis} (Gaussian 0, Laplace 3)."

    def _bias(self) -> str:
        if self.bias is None:
            return "not known, as every update was clipped."
        if not self.bias.seen:
            return f"none seen in updates of norm {self.bias.norm:g} (chance {self.bias.chance:.2g})."
        size = f"{self.bias.entry:.2g} an entry, {self.bias.share:.2g} of the update's norm"
        return f"{size}, in updates of norm {self.bias.norm:g} (chance {self.bias.chance:.2g})."


def _some(names: tuple[str, ...]) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:4])
    return listed if len(names) <= 4 else f"{listed} and {len(names) - 4} more"
