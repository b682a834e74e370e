"""What a client mod does to updates, measured: known updates go in, and only what leaves is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp.typing import Mod
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from keyhole.core.told import Told, silent
from keyhole.errors import ConfigError, check_range
from keyhole.fl.bench import METRICS, NOTES, Answer, Arrays, Bench, Flat, Withheld, apart, plain, record, seed
from keyhole.fl.facts import BY_ENTRY, BY_TENSOR, SURE, TOGETHER, UNSEEN, Bias, Case, Interval, Level, ModFacts

NORMS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Of the updates that are sent, unless others are given."""
_PAIRS = 8
"""Pairs of messages in which noise is looked for that repeats."""
_MOST = 2**27
"""Numbers held at once: 1 GiB."""
_FAR = 10**6
"""Between the clients, rounds and seeds of messages that must have none in common."""


def check_mod(
    mod: Mod | Sequence[Mod],
    model: nn.Module | Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    run_config: Mapping[str, Any] | None = None,
    norms: Sequence[float] = NORMS,
    messages: int = 200,
    directions: int = 0,
    told: Told = silent,
) -> ModFacts:
    """Measure what a mod does to updates: to which norm it clips, how much noise it adds, what it lets through.

    Mods run as in ``ClientApp(mods=[...])``, around an app that returns the received weights plus an update known
    beforehand: small and large ones in one direction, beside buffers that rest or move, and in replies that are not as
    they should be. Each message has a client and a round of its own, and an empty Context. The global generators of
    Python, NumPy and torch are seeded afresh for each message, and put back at the end.

    Args:
        mod: the mod, or several in Flower's order, the first one outermost.
        model: for names, shapes and global weights; a small one will do. Of a state dict all floating-point arrays
            count as parameters.
        config: entries that the mod needs in the message's config record, such as ``{"clipping_norm": 1.0}``.
        run_config: of the Context.
        norms: of the updates, ascending, above 0, at least two; they should reach far above the clip and far below it.
        messages: of each kind, at least 10; intervals shrink with the root of their number. Their number times those of
            norms and parameters is at most 2^27: with 200 messages, 95,000 parameters.
        directions: seed of the directions of updates.
        told: is told how far it has come.

    Raises:
        ConfigError: the model has no parameters, or the mod lets no update through.

    Example::

        check_mod(LocalDpMod(1.0, 0.01, 1.0, 1e-5), Net()).expect(clip=1.0, noise_std=0.0484)
    """
    check_range("messages", messages, 10)
    if len(norms) < 2 or sorted(set(norms)) != list(norms) or not 0 < norms[0] <= norms[-1] < math.inf:
        raise ConfigError(f"norms is {tuple(norms)!r}; at least two are needed, above 0 and ascending.")
    bench = Bench([*mod] if isinstance(mod, Sequence) else [mod], model, config or {}, run_config or {})
    if messages * bench.size * len(norms) > _MOST:
        what = f"{messages} messages of {bench.size} parameters at {len(norms)} norms"
        raise ConfigError(f"{what} are too much to hold; take fewer messages or norms, or a smaller model.")
    what = f"sending {messages} updates of each of {len(norms)} norms"
    with apart():
        rng = np.random.default_rng(directions)
        facts = _measured(bench, tuple(map(float, norms)), messages, rng, lambda part: told(what, part))
    told(what, 1.0)
    return facts


def _measured(
    bench: Bench, norms: tuple[float, ...], count: int, rng: np.random.Generator, told: Callable[[float], None]
) -> ModFacts:
    unit = bench.direction(rng)
    runs: list[_Run] = []
    levels: list[Level] = []
    for step, norm in enumerate(norms):
        # The last part stands for what is measured beside the norms.
        told(step / (len(norms) + 1))
        try:
            runs.append(_Run(bench, norm * unit, count, runs[0] if runs else None))
            levels.append(Level(norm, runs[-1].share(), _std(runs[-1].out)[0]))
        except Withheld as error:
            levels.append(Level(norm, None, None, str(error)))
    if len(runs) < 2:
        why = next(level.withheld for level in levels if level.withheld)
        raise ConfigError(f"the mod cannot be measured: of an update as it should be there leaves {why}.")
    low, top = runs[0], runs[-1]
    noise, kurtosis = _std(low.out)
    parts = {name: _std(low.out[:, at])[0] or Interval(0.0, 0.0, 0.0) for name, at in bench.parts.items()}
    varies = tuple(name for name, at in bench.parts.items() if _other_std(low.out[:, at], low.out))
    clip, over, unclipped = _clip(bench, runs)
    # Single tensors or entries meet their clip in smaller updates.
    room = 2 if over in (TOGETHER, UNSEEN) else 100
    free = [run for run in runs if clip is None or run.norm <= clip.value / room]
    buffers, crowding = _buffers(bench, free[-1] if free else low, count)
    records, keeps_state = _others(bench, low)
    return ModFacts(
        parameters=bench.size,
        tensors=len(bench.parts),
        messages=count,
        levels=tuple(levels),
        clip=clip,
        clip_over=over,
        unclipped=unclipped,
        noise=noise,
        noise_by_tensor=parts if noise else {},
        noise_varies=varies,
        noise_follows_update=_other_std(low.out, top.out),
        kurtosis=kurtosis,
        repeats=_repeats(bench, low, rng),
        bias=_bias(bench, free[-1]) if free else None,
        zeroed=float((top.out == 0).mean()),
        weights_matter=max(_weights_matter(bench, run, count, rng) for run in (low, top)),
        buffers=buffers,
        crowding=crowding,
        records=records,
        keeps_state=keeps_state,
        cases=_cases(bench, bench.trained(top.aimed)),
    )


class _Run:
    """What left of one update, sent many times."""

    def __init__(self, bench: Bench, aimed: Flat, count: int, first: _Run | None) -> None:
        self.aimed, self.norm = aimed, float(np.linalg.norm(aimed))
        self.out = bench.updates(plain(bench.trained(aimed)), count)
        # The update as the arrays' own type holds it.
        self.sent = bench.flat(bench.trained(aimed)) - bench.flat(bench.state)
        if np.linalg.norm(self.sent - aimed) > 0.5 * self.norm:
            raise ConfigError(f"an update of norm {self.norm:g} is lost in rounding; take larger norms.")
        self.first = first or self

    def share(self, at: slice | NDArray[Any] = slice(None)) -> Interval:
        """How much of the update, or of some of its entries, leaves: its projection on itself, by Student's t."""
        sent = self.sent[at]
        best = shares = self.out[:, at] @ sent / (sent @ sent)
        if self.norm >= 100 * self.first.norm:
            # Noise that follows from what was seeded is the same on the smallest update, and can be taken off.
            same = (self.first.out - self.first.sent)[:, at] @ sent / (sent @ sent)
            best = shares - same if np.std(shares - same) < 0.5 * np.std(shares) else shares
        mean = float(best.mean())
        half = float(stats.t.ppf(0.975, len(best) - 1) * best.std(ddof=1)) / math.sqrt(len(best))
        # Equal numbers may differ from their mean in the last bit.
        half = half if half > 1e-12 * abs(mean) else 0.0
        return Interval(mean, mean - half, mean + half)


def _clip(bench: Bench, runs: list[_Run]) -> tuple[Interval | None, str, tuple[str, ...]]:
    """The norm that is not exceeded, over what it is taken, and which parameters are not clipped."""
    top = runs[-1]
    shares = {name: top.share(at) for name, at in bench.parts.items()}
    # Many are compared: 95 % are not enough.
    halves, sure = {name: share.high - share.value for name, share in shares.items()}, _sure(len(top.out))
    lows = {name: [2 * one.low - one.value for one in (r.share(at) for r in runs)] for name, at in bench.parts.items()}
    # Of a small update noise may seem to let any share through; of the largest less than half must leave.
    surely = [n for n, share in shares.items() if share.value + sure * halves[n] < min(1.0, max(lows[n])) / 2]
    if not surely:
        return None, "", ()
    joint = top.share(bench.entries(surely))
    # On the others noise may hide it; they are taken for clipped unless they leave clearly larger.
    least = 2 * max(joint.high, 0.0)
    unclipped = tuple(n for n, share in shares.items() if n not in surely and share.value - sure * halves[n] > least)
    clipped = {name: share for name, share in shares.items() if name not in unclipped}
    where = bench.entries(clipped)
    joint, size = top.share(where), float(np.linalg.norm(top.sent[where]))
    norm = Interval(joint.value * size, joint.low * size, joint.high * size)
    kept = np.concatenate([share.value * top.sent[bench.parts[name]] for name, share in clipped.items()])
    inside, chance = _excess(top.out[:, where] - kept, bench.rounding(top.sent)[where])
    if chance < SURE and inside > 0.01 * np.linalg.norm(kept):
        return norm, BY_ENTRY, unclipped
    sizes = {name: float(np.linalg.norm(top.sent[bench.parts[name]])) for name in clipped}
    if any(abs(one.value - joint.value) > sure * halves[name] + 1e-3 * joint.value for name, one in clipped.items()):
        value = math.hypot(*(one.value * sizes[name] for name, one in clipped.items()))
        half = math.hypot(*(one.value * halves[name] * sizes[name] ** 2 for name, one in clipped.items())) / value
        return Interval(value, value - half, value + half), BY_TENSOR, unclipped
    # Would it have shown if each tensor had been clipped, to one norm that makes up the same whole?
    each = {name: norm.value / math.sqrt(len(sizes)) / size for name, size in sizes.items()}
    clear = len(sizes) == 1 or any(abs(each[name] - joint.value) > (sure + 1) * halves[name] for name in sizes)
    return norm, TOGETHER if clear else UNSEEN, unclipped


def _sure(count: int) -> float:
    """How many half-widths of a 95 % interval, by Student's t, chance surely does not reach."""
    return float(stats.t.isf(SURE, count - 1) / stats.t.ppf(0.975, count - 1))


def _bias(bench: Bench, run: _Run) -> Bias:
    size, chance = _excess(run.out - run.sent, bench.rounding(run.sent))
    return Bias(run.norm, size / math.sqrt(bench.size), size / run.norm, chance)


def _weights_matter(bench: Bench, run: _Run, count: int, rng: np.random.Generator) -> float:
    """How much what is added to an update changes with the global weights, as a share of the update."""
    weights = bench.trained(rng.standard_normal(bench.size))
    trained = bench.trained(run.aimed, weights)
    try:
        out = bench.updates(plain(trained), count, weights)
    except Withheld:
        return 1.0
    sent = bench.flat(trained) - bench.flat(weights)
    rounding = bench.rounding(run.aimed) + bench.rounding(run.aimed, weights)
    size, chance = _excess((out - sent) - (run.out - run.sent), rounding)
    moved = size / run.norm if chance < SURE else 0.0
    # Noise in proportion to the weights has the same mean, but another size.
    before, after = (((one - one.mean(0)) ** 2).sum(1) for one in (run.out, out))
    other, doubt = abs(float(after.mean() - before.mean())), math.sqrt((before.var() + after.var()) / count)
    noisier = math.sqrt(other) / run.norm if other > 7 * doubt + 0.05 * float(before.mean()) else 0.0
    return max(moved, noisier)


def _excess(errors: Flat, rounding: Flat) -> tuple[float, float]:
    """Norm of the mean of vectors, less what chance makes of it, and the chance of one so large around zero.

    With entries that vary by s_i^2, R |mean|^2 / sum s_i^2 has an F law, by Satterthwaite's degrees of freedom.
    """
    count, mean, spread = len(errors), errors.mean(0), errors.var(0, ddof=1)
    mean = np.sign(mean) * np.maximum(np.abs(mean) - rounding, 0)
    squared, total = float(mean @ mean), float(spread.sum())
    if squared == 0:
        return 0.0, 1.0
    if total / count < 1e-12 * squared:
        return math.sqrt(squared), 0.0
    # The mean square of an estimated variance is too large, by a known factor.
    freedom = max(1.0, total**2 * (1 + 2 / (count - 1)) / float(spread @ spread))
    chance = float(stats.f.sf(count * squared / total, freedom, freedom * (count - 1)))
    return math.sqrt(max(squared - total / count, 0.0)), chance


def _other_std(one: Flat, two: Flat) -> bool:
    """Whether noise is more than a tenth larger or smaller, by an F test.

    Its chance of error is `SURE`, as many tensors are asked about, some of a single number: of a few messages the 95 %
    intervals of one in a hundred of these lie apart from those of the rest.
    """
    (first, kurtosis), (second, other) = _std(one), _std(two)
    if first is None or second is None:
        return (first is None) is not (second is None)
    # What a few numbers seem to lack in tails is chance: at the least as a Gaussian's.
    excess = max(0.0, *(law.value for law in (kurtosis, other) if law is not None))
    freedom = [(len(out) - 1) * out.shape[1] * 2 / (2 + excess) for out in (one, two)]
    ratio = (first.value / second.value) ** 2
    more, less = stats.f.sf(ratio / 1.1**2, *freedom), stats.f.sf(1 / ratio / 1.1**2, *reversed(freedom))
    return float(min(more, less)) < SURE


def _std(out: Flat) -> tuple[Interval | None, Interval | None]:
    """Standard deviation between messages, pooled over entries, and its excess kurtosis; none where none differ.

    A chi-square interval, whose degrees of freedom n shrink to 2 n / (2 + k) with the excess kurtosis k.
    """
    count = len(out)
    centred = out - out.mean(0)
    squares, fourths = (centred**2).mean(1), (centred**4).mean(1)
    if squares.mean() <= 1e-24 * np.abs(out).mean() ** 2:
        return None, None
    variance, ratio = float(squares.mean()) * count / (count - 1), float(fourths.mean() / squares.mean() ** 2)
    # What is left once the mean is taken off is less peaked.
    excess = (ratio - 3) / (1 - 1 / count) ** 2
    each = fourths / squares.mean() ** 2 - 2 * ratio * squares / squares.mean()
    around = float(stats.t.ppf(0.975, count - 1) * each.std(ddof=1)) / math.sqrt(count)
    # Few messages may look too much alike; no law is told from a Gaussian more closely than a Gaussian from itself.
    around = max(around, 1.96 * math.sqrt(24 / out.size))
    freedom = (count - 1) * out.shape[1] * 2 / (2 + max(excess, -1.5))
    low, high = (math.sqrt(freedom * variance / stats.chi2.ppf(p, freedom)) for p in (0.975, 0.025))
    return Interval(math.sqrt(variance), low, high), Interval(excess, excess - around, excess + around)


def _repeats(bench: Bench, low: _Run, rng: np.random.Generator) -> tuple[str, ...]:
    """Where two messages get the same noise, or noise that goes together."""
    centre, spread = low.out.mean(0), low.out.std(0, ddof=1)
    varies = spread > 0
    if not varies.any():
        # One vector for all: then it comes with other weights and an update in another direction, too.
        weights = bench.trained(rng.standard_normal(bench.size))
        trained = bench.trained(low.norm * bench.direction(rng), weights)
        other = bench.updates(plain(trained), 1, weights)[0] - (bench.flat(trained) - bench.flat(weights))
        added = low.out[0] - low.sent
        rounding = np.linalg.norm(bench.rounding(low.sent) + bench.rounding(low.sent, weights))
        same = min(np.linalg.norm(added), np.linalg.norm(other)) > rounding and _alike(added, other)
        return ("in every message",) if same else ()
    answer, pairs = plain(bench.trained(low.aimed)), min(_PAIRS, len(low.out))
    states = [RecordDict() for _ in range(pairs)]

    def seeding(message: Message) -> Message:
        seed(0)
        return answer(message)

    def noise(made: Answer = answer, **numbers: Any) -> Flat:
        return ((bench.updates(made, pairs, **numbers) - centre) / np.where(varies, spread, 1))[:, varies]

    first = noise(states=states)
    found = {
        "when a message comes again": _alike(first, noise(draws=_FAR, states=states)),
        "in a client's next round": _alike(first, noise(draws=2 * _FAR, turn=_FAR, states=states)),
        "on another client": _alike(first, noise(draws=3 * _FAR, client=_FAR)),
        "when the app seeds the global generators": _alike(
            noise(seeding, draws=4 * _FAR, client=2 * _FAR, turn=2 * _FAR),
            noise(seeding, draws=5 * _FAR, client=3 * _FAR, turn=3 * _FAR),
        ),
    }
    drawn = np.where(varies, (low.out - centre) / np.where(varies, spread, 1), 0)
    ordered = sorted(bench.parts.values(), key=lambda at: at.stop - at.start)
    found["in two tensors of a message"] = any(
        _alike(drawn[:, one], drawn[:, two][:, : one.stop - one.start])
        for one, two in zip(ordered, ordered[1:], strict=False)
    )
    return tuple(name for name, same in found.items() if same)


def _alike(one: Flat, two: Flat) -> bool:
    """Whether two draws go together more than chance lets them."""
    scale = float(np.sqrt((one**2).mean() * (two**2).mean()))
    return scale > 0 and float((one * two).mean()) / scale > 0.1 + 6 / math.sqrt(one.size)


def _buffers(bench: Bench, run: _Run, count: int) -> tuple[dict[str, str], Interval | None]:
    """What becomes of buffers that move, and of the parameters beside them."""
    floats = [name for name in bench.buffers if np.issubdtype(bench.state[name].dtype, np.floating)]
    others = [name for name in bench.buffers if name not in floats]
    kinds = {kind: names for kind, names in (("floating-point", floats), ("integer", others)) if names}
    arrays, far = bench.trained(run.aimed), 100 * run.norm
    for name in bench.buffers:
        value = bench.state[name]
        step = far / math.sqrt(sum(bench.state[one].size for one in floats)) if name in floats else math.ceil(far)
        arrays[name] = ~value if value.dtype == np.bool_ else (value + step).astype(value.dtype)
    if not kinds:
        return {}, None
    left: list[Arrays] = []
    try:
        for i in range(count):
            left.append(bench.arrays(bench.ask(plain(arrays), client=i, turn=i, draws=i)))
    except Withheld as error:
        return dict.fromkeys(kinds, f"once they move there leaves {error}"), None
    words = {
        kind: _fate([([one.get(n, np.empty(0)) for one in left], arrays[n], bench.state[n]) for n in names])
        for kind, names in kinds.items()
    }
    rest = np.stack([bench.flat(one) for one in left]) - bench.flat(bench.state)
    sent, share = run.sent, run.share().value
    # With the same client, round and seeds as in the run before, of which any noise may be the same.
    beside = 1 + (rest - run.out) @ sent / (sent @ sent * share)
    mean, half = float(beside.mean()), float(stats.t.ppf(0.975, count - 1) * beside.std(ddof=1)) / math.sqrt(count)
    return words, Interval(mean, mean - half, mean + half) if mean + _sure(count) * half < 0.95 else None


def _fate(buffers: list[tuple[list[NDArray[Any]], NDArray[Any], NDArray[Any]]]) -> str:
    """In words, what became of arrays: (those that left, what the app returned, what the server sent)."""
    every = [(one, made, sent) for left, made, sent in buffers for one in left]
    if any(one.shape != made.shape for one, made, _ in every):
        return "dropped, or of another shape"
    if all(np.array_equal(one, made) for one, made, _ in every):
        return "as the app made them"
    if all(np.array_equal(one, sent) for one, _, sent in every):
        return "as the server sent them"
    moves = [
        (
            np.stack([np.asarray(one, np.float64).ravel() for one in left]) - sent.ravel(),
            (made.astype(np.float64) - sent).ravel(),
        )
        for left, made, sent in buffers
    ]
    kept, made = np.concatenate([one for one, _ in moves], 1), np.concatenate([one for _, one in moves])
    std = _std(kept)[0]
    noise = f", with noise of standard deviation {std}" if std else ""
    return f"changed; {kept.mean(0) @ made / (made @ made):.3g} of how they moved leaves{noise}"


def _others(bench: Bench, run: _Run) -> tuple[str, bool]:
    """What becomes of metrics and config in a reply, and whether anything is kept in the Context."""
    state = RecordDict()
    content = bench.ask(plain(bench.trained(run.aimed)), state=state).content
    left: dict[str, Any] = {}
    for records in (content.metric_records, content.config_records):
        for one in records.values():
            left |= {key: one[key] for key in one}
    made = METRICS | NOTES
    told = {
        "added": left.keys() - made.keys(),
        "dropped": made.keys() - left.keys(),
        "changed": {key for key in made.keys() & left.keys() if made[key] != left[key]},
    }
    words = [f"{', '.join(map(repr, sorted(keys)))} {what}" for what, keys in told.items() if keys]
    return "; ".join(words) or "as the app made them", len(state) > 0


_IN_PART, _MANY = ", some of it as the app made it", 8
"""Of so few numbers noise may leave all as they were."""


def _cases(bench: Bench, arrays: Arrays) -> dict[str, Case]:
    """What leaves of replies that are not as they should be, with a large update."""
    name = next(iter(bench.parts))

    def spoilt(value: float) -> Arrays:
        array = arrays[name].copy()
        array.reshape(-1)[0] = value
        return arrays | {name: array}

    def second(message: Message) -> Message:
        reply = plain(arrays)(message)
        reply.content["more"] = record({name: arrays[name]})
        return reply

    def without(message: Message) -> Message:
        return Message(RecordDict({"metrics": MetricRecord(dict(METRICS))}), reply_to=message)

    def fails(message: Message) -> Message:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the app's own"), reply_to=message)

    def case(answer: Answer, kind: str = MessageType.TRAIN, made: Arrays = arrays) -> Case:
        asked = []
        for i in (1, 2, 3):
            try:
                asked.append(_left(bench, made, bench.ask(answer, kind=kind, client=i, turn=i, draws=i)))
            except Withheld as error:
                asked.append(Case(str(error), False))
        # Noise on a single number may be too small to be seen; not in each of three messages.
        surely = [one for one in asked if one.bare and not one.leaves.endswith(_IN_PART)]
        return surely[0] if surely else min(asked, key=lambda one: one.bare)

    return {
        "an update of zero": case(plain(bench.state), made=bench.state)._replace(bare=False),
        "NaN in the update": case(plain(spoilt(math.nan))),
        "infinity in the update": case(plain(spoilt(math.inf))),
        "an array that the server did not send": case(plain(arrays | {"unknown": arrays[name]})),
        "parameters in a second record": case(second),
        "no arrays": case(without),
        "an error from the app": case(fails),
        # Whether arrays may leave here is for the app to say.
        "arrays in an evaluation": case(plain(arrays), MessageType.EVALUATE)._replace(bare=False),
        "an evaluation without arrays": case(without, MessageType.EVALUATE),
    }


def _left(bench: Bench, made: Arrays, reply: Message) -> Case:
    """In words, what is in a reply of an app that made these arrays."""
    if reply.has_error():
        return Case(f"an error ({str(reply.error.reason).strip().rstrip('.')})", False)
    found = [(key, array.numpy()) for one in reply.content.array_records.values() for key, array in one.items()]
    if not found:
        return Case("the reply, without arrays", False)
    known = [(key, one) for key, one in found if key in bench.parts and one.shape == made[key].shape]
    moved = [(one.astype(np.float64) - bench.state[key]).ravel() for key, one in known]
    given = [(made[key].astype(np.float64) - bench.state[key]).ravel() for key, _ in known]
    rounding = bench.rounding(bench.flat(made) - bench.flat(bench.state))
    finite = [one[np.isfinite(one)] for one in moved]
    size = f"an update of norm {math.sqrt(sum(float(one @ one) for one in finite)):.4g}"
    if any(one.size < whole.size for one, whole in zip(finite, moved, strict=True)):
        return Case(f"{size}, besides values that are not finite", True)
    if len(known) < len(found) - sum(key in bench.buffers for key, _ in found):
        return Case(f"{size}, and that array", True)
    spared = [
        np.abs(one - app) <= rounding[bench.parts[key]] for (key, _), one, app in zip(known, moved, given, strict=True)
    ]
    if any(one.all() for one in spared):
        every = np.concatenate(spared)
        return Case(f"{size}{', as the app made it' if every.all() and every.size > _MANY else _IN_PART}", True)
    return Case(f"{size}, as changed by the mod", False)
