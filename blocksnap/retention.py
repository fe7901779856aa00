"""Which backups to keep and which to forget, with a reason for each: pure, no clock and no storage in it.

A policy is a list of rules. A rule says which backups it is about (volumes, tags) and what of them to
keep. The first rule that is about a backup decides; what no rule is about is kept. The backups that one host
made of one volume are a lineage, those of a lineage under one rule a group, and everything is counted inside
a group:

    last = 7          the newest seven
    daily = 14        the last backup of each of the newest fourteen days that have one; likewise
                      hourly, weekly (ISO 8601, from Monday), monthly and yearly
    within = "90d"    what is younger than that: h, d, w, m (calendar months) and y, as in "1y6m"

A backup stays if any of these keeps it. ``"all"`` stands for any number. Days without a backup do not count,
so a host that was off for a month loses nothing by it. Periods are those of UTC unless the policy names a
time zone: the answer must not depend on which host asks, and a UTC day always has 24 hours.

Machines made from one template have volumes with the same key, so the host belongs to the lineage: its id
and its name, as clones often share the id. A host that was renamed or installed anew begins another lineage:
to part what belongs together costs space, to join what does not costs backups.

Whatever the rules say, the newest backup of each lineage stays, because the next one builds on it: the
newest by date, and the newest by its own clock, should they not be the same.

A backup is dated by its snapshot. Where the storage knows when the manifest arrived and the two are more
than an hour apart, it is dated by its arrival: either the host's clock was wrong, or somebody who may
write, but not delete, hopes that bogus backups push out the real ones, or storing it took that long, and
then a policy of days does not mind. Or the repository was copied without the times of its objects, and the
arrival says nothing. So where the two differ everything is counted a second time, by the hosts' clocks
alone, and a backup stays that either of the two counts keeps. Against a flood, ``require_modest`` refuses to
let most of a lineage go at once, as many against what the better of the two counts keeps.

Laws (tests/unit/test_retention.py): the order of the input is of no account; applied to what it kept, a
policy keeps all of it; larger numbers never forget more; each period that counts keeps a backup; what a
host's clock says makes nothing go that would stay by the arrivals.
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta, tzinfo
from fnmatch import fnmatchcase
from zoneinfo import ZoneInfo

from blocksnap.errors import BlocksnapError, UsageError

ALL = 1 << 62
"""As a number of backups or periods: every one."""
CLOCK_TOLERANCE = timedelta(hours=1)
MOST_PERCENT = 80
"""Of a volume's backups in one run. A weekly ``forget`` of hourly backups stays below it."""
_SPAN = re.compile(r"(?:(\d+)y)?(?:(\d+)m)?(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?")


class PolicyError(UsageError):
    """A rule that cannot be understood, or that would keep nothing."""

    def __init__(self, key: str, value: object, problem: str) -> None:
        self.key, self.value, self.problem = key, value, problem
        super().__init__(
            f"retention: {key} = {value!r}: {problem}", resolution="see: blocksnap forget --help"
        )


class TooMuchForgottenError(BlocksnapError):
    """A policy would drop most of the backups at once that a host made of a volume."""

    def __init__(self, volume: str, host: str, forgotten: int, total: int, most_percent: int) -> None:
        self.volume, self.host, self.forgotten, self.total = volume, host, forgotten, total
        of = f"{volume} on {host}" if host else volume
        super().__init__(
            f"{forgotten} of {total} backups of {of} would go at once, more than {most_percent} %",
            resolution="look at what goes, with --dry-run; if it is meant, add --force",
        )


@dataclass(frozen=True, slots=True)
class Span:
    """A length of time as people say it; months have the length they have in the calendar."""

    months: int = 0
    hours: int = 0

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read ``14d`` or ``1y6m``; raises PolicyError."""
        match = _SPAN.fullmatch(text)
        if match is None or not text:
            raise PolicyError("within", text, "write it like 36h, 14d, 8w, 6m or 1y6m")
        years, months, weeks, days, hours = (int(number or 0) for number in match.groups())
        span = cls(years * 12 + months, (weeks * 7 + days) * 24 + hours)
        if not span.months and not span.hours:
            raise PolicyError("within", text, "give it a length")
        return span

    def before(self, moment: datetime) -> datetime:
        """Return the moment that lies a span earlier; the beginning of time where there is none."""
        months = moment.year * 12 + moment.month - 1 - self.months
        if months < 12:
            return datetime.min.replace(tzinfo=UTC)
        year, month = divmod(months, 12)
        # 31 March less one month is the last of February.
        day = min(moment.day, monthrange(year, month + 1)[1])
        try:
            return moment.replace(year=year, month=month + 1, day=day) - timedelta(hours=self.hours)
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)

    def __str__(self) -> str:
        days, hours = divmod(self.hours, 24)
        parts = ((self.months // 12, "y"), (self.months % 12, "m"), (days, "d"), (hours, "h"))
        return "".join(f"{number}{unit}" for number, unit in parts if number)


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep of a group; at least one of these is set."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Span | None = None

    def __post_init__(self) -> None:
        # A forgotten line in a file must not mean: forget everything.
        if not any(getattr(self, one.name) for one in fields(self)):
            raise PolicyError(
                "keep", "", "it would keep nothing but the newest backup; to mean that, say last = 1"
            )

    @classmethod
    def parse(cls, table: Mapping[str, object]) -> Keep:
        """Read the spellings of the command line and the configuration; raises PolicyError."""
        known = {one.name for one in fields(cls)}
        for key, value in table.items():
            if key not in known:
                raise PolicyError(key, value, f"what can be kept is {', '.join(sorted(known))}")
        within = table.get("within")
        counts = {key: parse_count(key, value) for key, value in table.items() if key != "within"}
        return cls(**counts, within=None if within is None else Span.parse(str(within)))


def parse_count(key: str, value: object) -> int:
    """Read a number of backups or periods, or ``all``; raises PolicyError."""
    if value == "all":
        return ALL
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    raise PolicyError(key, value, "write a number, or all")


def parse_zone(name: str) -> tzinfo:
    """Read the name of a time zone, such as ``Europe/Berlin``; raises PolicyError."""
    if name.upper() == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError) as err:
        raise PolicyError("zone", name, "there is no such time zone on this host") from err


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backup as a policy sees it. Times know their zone."""

    id: str
    volume: str
    """Key of the volume: the same as long as it is the same volume."""
    name: str
    time: datetime
    """Of the snapshot, by the clock of the host that took it."""
    received: datetime | None = None
    """When the manifest reached the storage, by the storage's clock, if it has one."""
    tags: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    """Id of the host that made it."""
    hostname: str = ""

    @property
    def origin(self) -> tuple[str, str]:
        """The host that made it, by id and name."""
        return self.host, self.hostname

    @property
    def lineage(self) -> tuple[str, str, str]:
        """The volume and the host: the same for what one host made of one volume."""
        return self.volume, *self.origin

    @property
    def dated_by_arrival(self) -> bool:
        """Whether the two clocks are too far apart to believe the host's."""
        return self.received is not None and abs(self.received - self.time) > CLOCK_TOLERANCE

    @property
    def moment(self) -> datetime:
        """When it was taken, as far as policies are concerned."""
        return self.received if self.received is not None and self.dated_by_arrival else self.time

    def moment_by_clock(self, now: datetime) -> datetime:
        """When it was taken by its host's clock alone, unless that is still to come: it was wrong."""
        return self.time if self.time <= now + CLOCK_TOLERANCE else self.moment


@dataclass(frozen=True, slots=True)
class Rule:
    """What to keep of the backups that match.

    A backup matches if its volume's name or key is like one of ``volumes`` (``*`` and ``?`` as in a shell;
    none means any) and it has all ``tags`` (``*`` stands for any value).
    """

    keep: Keep
    volumes: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    def is_about(self, candidate: Candidate) -> bool:
        """Tell whether this rule decides about a backup."""
        if self.volumes and not any(
            fnmatchcase(word, pattern)
            for pattern in self.volumes
            for word in (candidate.name, candidate.volume)
        ):
            return False
        return all(
            name in candidate.tags and fnmatchcase(candidate.tags[name], wanted)
            for name, wanted in self.tags.items()
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules, of which the first that is about a backup decides, and the zone whose calendar counts."""

    rules: tuple[Rule, ...]
    zone: tzinfo = UTC


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a backup, and the reasons for it."""

    candidate: Candidate
    keep: bool
    reasons: tuple[str, ...]
    by_date: bool = False
    """Whether the count by the dates keeps it."""
    by_clock: bool = False
    """Whether that by the hosts' clocks does: in one of so many places, if the other count does not."""

    @property
    def only_by_clock(self) -> bool:
        """Whether it stays by its host's clock alone, against its arrival."""
        return self.keep and not self.by_date


def apply_policy(candidates: Iterable[Candidate], policy: Policy, now: datetime) -> tuple[Decision, ...]:
    """Decide about every backup; in the order of lineage and time, whatever the order of the input."""
    # What is dated by one arrival, as after a copy, was made in the order that the hosts' clocks say.
    ordered = sorted(candidates, key=lambda one: (one.lineage, one.moment, one.time, one.id))
    verdicts = {one.id: _Verdict() for one in ordered}
    by_clock: dict[str, _Verdict] = {}
    groups: dict[tuple[tuple[str, str, str], int], list[Candidate]] = {}
    for one in ordered:
        number = next((n for n, rule in enumerate(policy.rules) if rule.is_about(one)), None)
        if number is None:
            verdicts[one.id].kept.append("no rule is about it")
        else:
            groups.setdefault((one.lineage, number), []).append(one)
    for (_, number), group in groups.items():
        keep = policy.rules[number].keep
        _judge([(one.moment, one) for one in reversed(group)], keep, now, policy.zone, verdicts)
        by_host = [(one.moment_by_clock(now), one) for one in group]
        if any(moment != one.moment for moment, one in by_host):
            by_host.sort(key=lambda dated: (dated[0], dated[1].time, dated[1].id), reverse=True)
            by_clock |= {one.id: _Verdict() for one in group}
            _judge(by_host, keep, now, policy.zone, by_clock)
    _keep_newest(ordered, verdicts)
    return tuple(_decide(one, verdicts[one.id], by_clock.get(one.id)) for one in ordered)


def require_modest(decisions: Iterable[Decision], *, most_percent: int = MOST_PERCENT) -> None:
    """Raise TooMuchForgottenError when more than so many percent of a lineage would go.

    Of what stays, as much counts as one of the two counts keeps by itself: backups with bogus times fill
    the places of a count that was empty, and never add to one that was full.
    """
    lineages: dict[tuple[str, str, str], list[Decision]] = {}
    for decision in decisions:
        lineages.setdefault(decision.candidate.lineage, []).append(decision)
    for group in lineages.values():
        forgotten = sum(not decision.keep for decision in group)
        stay = max(sum(decision.by_date for decision in group), sum(decision.by_clock for decision in group))
        if forgotten * 100 > (forgotten + stay) * most_percent:
            one = group[0].candidate
            raise TooMuchForgottenError(one.name, one.hostname, forgotten, forgotten + stay, most_percent)


_Dated = tuple[datetime, Candidate]
"""A backup with its date in one of the two counts."""


@dataclass(slots=True)
class _Verdict:
    kept: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    numbered: bool = False
    """Whether it has one of so many places: bogus backups can have any number of the others."""


def _decide(candidate: Candidate, verdict: _Verdict, by_clock: _Verdict | None) -> Decision:
    """Put the two counts together: ``by_clock`` is None where the hosts' clocks say nothing else."""
    if by_clock and by_clock.kept and not verdict.kept:
        reasons = [f"{reason}, by its host's clock" for reason in by_clock.kept]
        if candidate.dated_by_arrival:
            reasons.append(f"it arrived {candidate.moment:%Y-%m-%d %H:%M %Z}")
        return Decision(candidate, keep=True, reasons=tuple(reasons), by_clock=by_clock.numbered)
    reasons = list(verdict.kept or verdict.against)
    if by_clock and not verdict.kept:
        others = [reason for reason in by_clock.against if reason not in reasons]
        reasons += [f"{reason}, by its host's clock" for reason in others]
    if candidate.dated_by_arrival:
        said = f"{candidate.time:%Y-%m-%d %H:%M %Z}"
        reasons.append(f"dated by its arrival: its host's clock said {said}")
    keep = bool(verdict.kept)
    also = keep and bool((by_clock or verdict).kept)
    return Decision(candidate, keep=keep, reasons=tuple(reasons), by_date=keep, by_clock=also)


def _keep_newest(ordered: list[Candidate], verdicts: Mapping[str, _Verdict]) -> None:
    by_date = {one.lineage: one for one in ordered}
    by_clock = {one.lineage: one for one in sorted(ordered, key=lambda one: (one.time, one.id))}
    for lineage, one in by_date.items():
        verdicts[one.id].kept.insert(0, "the newest of its volume")
        if by_clock[lineage] != one:
            verdicts[by_clock[lineage].id].kept.insert(0, "the newest of its volume by its own clock")


def _judge(
    group: list[_Dated], keep: Keep, now: datetime, zone: tzinfo, verdicts: Mapping[str, _Verdict]
) -> None:
    """Judge a group, newest first."""
    if keep.last:
        for place, (_, one) in enumerate(group, 1):
            if place <= keep.last:
                verdicts[one.id].kept.append(f"last: {place} of {_count(keep.last)}")
                verdicts[one.id].numbered |= keep.last != ALL
            else:
                verdicts[one.id].against.append(f"last: not among the newest {keep.last}")
    for name in _PERIODS:
        count: int = getattr(keep, name)
        if count:
            _judge_by_calendar(group, name, count, zone, verdicts)
    if keep.within:
        limit = keep.within.before(now.astimezone(UTC))
        for moment, one in group:
            if moment >= limit:
                verdicts[one.id].kept.append(f"within: younger than {keep.within}")
            else:
                verdicts[one.id].against.append(f"within: older than {keep.within}")


def _judge_by_calendar(
    group: list[_Dated], name: str, count: int, zone: tzinfo, verdicts: Mapping[str, _Verdict]
) -> None:
    period = _PERIODS[name]
    newest: dict[tuple[str, timedelta | None], str] = {}
    for moment, one in group:
        at = period(moment.astimezone(zone))
        verdict = verdicts[one.id]
        if at in newest:
            verdict.against.append(f"{name}: {newest[at][:8]} is the last of {at[0]}")
        elif len(newest) < count:
            newest[at] = one.id
            verdict.kept.append(f"{name}: {len(newest)} of {_count(count)}, the last of {at[0]}")
            verdict.numbered |= count != ALL
        else:
            verdict.against.append(f"{name}: {at[0]} lies before the {count} that are kept")


def _count(number: int) -> str:
    return "all" if number == ALL else str(number)


def _hour(moment: datetime) -> tuple[str, timedelta | None]:
    # An hour that the clocks go through twice is two.
    return f"{moment:%Y-%m-%d %H:00}", moment.utcoffset()


def _week(moment: datetime) -> tuple[str, timedelta | None]:
    year, week, _ = moment.isocalendar()
    return f"{year}-W{week:02}", None


_PERIODS: Mapping[str, Callable[[datetime], tuple[str, timedelta | None]]] = {
    "hourly": _hour,
    "daily": lambda moment: (f"{moment:%Y-%m-%d}", None),
    "weekly": _week,
    "monthly": lambda moment: (f"{moment:%Y-%m}", None),
    "yearly": lambda moment: (f"{moment:%Y}", None),
}
