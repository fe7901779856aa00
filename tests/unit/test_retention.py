"""What a policy keeps, as tables to read and as laws that hold for any backups."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.errors import UsageError
from blocksnap.retention import (
    ALL,
    Candidate,
    Decision,
    Keep,
    Policy,
    Rule,
    Span,
    TooMuchForgottenError,
    apply_policy,
    parse_count,
    parse_zone,
    require_modest,
)

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


def backup(when: str, *, volume: str = "v", received: str | None = None, **tags: str) -> Candidate:
    return Candidate(
        id=f"{when} {volume}",
        volume=volume,
        name=f"vg0/{volume}",
        time=datetime.fromisoformat(when).replace(tzinfo=UTC),
        received=datetime.fromisoformat(received).replace(tzinfo=UTC) if received else None,
        tags=tags,
    )


def decide(candidates: Iterable[Candidate], *rules: Rule, now: datetime = NOW) -> dict[str, Decision]:
    return {one.candidate.id: one for one in apply_policy(candidates, Policy(rules), now)}


def kept(decisions: Iterable[Decision]) -> list[Candidate]:
    return [decision.candidate for decision in decisions if decision.keep]


# Each line: when, what keeps it under the policy of the first line (L last, H hourly, D daily, W weekly, M
# monthly, Y yearly, < within), or - if nothing does. 2026-11-22 was a Sunday.
GOLDEN = """
2024-03-31 23:59   Y
2025-06-01 00:00   -
2025-12-31 10:00   Y
2026-08-31 23:59   -
2026-09-01 00:00   -
2026-09-30 08:00   M
2026-10-15 08:00   -
2026-10-31 23:00   M
2026-11-01 00:30   -
2026-11-14 02:00   -
2026-11-15 02:00   W
2026-11-16 02:00   -
2026-11-21 02:00   -
2026-11-22 02:00   W
2026-11-23 02:00   -
2026-11-24 02:00   D
2026-11-25 02:00   -
2026-11-25 23:00   D<
2026-11-26 00:00   <
2026-11-26 09:10   <
2026-11-26 09:50   H<
2026-11-26 10:30   LH<
2026-11-26 11:59   LHDWMY<
"""
POLICY = Keep(last=2, hourly=3, daily=3, weekly=3, monthly=3, yearly=3, within=Span.parse("13h"))
LETTERS = {
    "last": "L",
    "hourly": "H",
    "daily": "D",
    "weekly": "W",
    "monthly": "M",
    "yearly": "Y",
    "within": "<",
}


def test_a_table_to_read() -> None:
    lines = [line.rsplit(maxsplit=1) for line in GOLDEN.strip().splitlines()]
    decisions = decide([backup(when.strip()) for when, _ in lines], Rule(POLICY))
    for when, expected in lines:
        decision = decisions[f"{when.strip()} v"]
        letters = "".join(LETTERS.get(reason.split(":")[0], "") for reason in decision.reasons)
        assert (letters if decision.keep else "-") == expected, (when, decision.reasons)


def test_every_decision_has_its_reasons() -> None:
    ids = ["2026-11-20 01:00", "2026-11-25 01:00", "2026-11-26 01:00", "2026-11-26 02:00"]
    decisions = decide(map(backup, ids), Rule(Keep(last=1, daily=2, within=Span.parse("1d"))))
    assert [decisions[f"{when} v"].reasons for when in ids] == [
        (
            "last: not among the newest 1",
            "daily: 2026-11-20 lies before the 2 that are kept",
            "within: older than 1d",
        ),
        ("daily: 2 of 2, the last of 2026-11-25",),
        ("within: younger than 1d",),
        (
            "the newest of its volume",
            "last: 1 of 1",
            "daily: 1 of 2, the last of 2026-11-26",
            "within: younger than 1d",
        ),
    ]
    (reason, *_) = decide([backup("2026-11-26 01:00"), backup("2026-11-26 02:00")], Rule(Keep(daily=ALL)))[
        "2026-11-26 01:00 v"
    ].reasons
    assert reason == "daily: 2026-11- is the last of 2026-11-26"


def test_days_without_a_backup_do_not_count() -> None:
    days = ["2026-01-01", "2026-02-01", "2026-03-01", "2026-11-26"]
    decisions = decide(map(backup, days), Rule(Keep(daily=3)))
    assert [decisions[f"{day} v"].keep for day in days] == [False, True, True, True]


def test_the_newest_of_each_volume_stays_whatever_the_rules_say() -> None:
    old = [
        backup("2001-01-01", volume="a"),
        backup("2001-01-02", volume="a"),
        backup("2001-01-01", volume="b"),
    ]
    decisions = decide(old, Rule(Keep(within=Span.parse("1h"))))
    assert {one.volume: one.time.day for one in kept(decisions.values())} == {"a": 2, "b": 1}


def test_a_renamed_volume_is_the_same_volume() -> None:
    older = replace(backup("2026-11-01"), name="vg0/zzz")
    newer = replace(backup("2026-11-02"), name="vg0/aaa")
    decisions = apply_policy([older, newer], Policy((Rule(Keep(last=1)),)), NOW)
    assert kept(decisions) == [newer]


def test_the_first_rule_that_is_about_a_backup_decides() -> None:
    night = [backup(f"2026-11-{day:02} 01:00", job="night") for day in range(1, 8)]
    hours = [backup(f"2026-11-07 {hour:02}:30", job="hours") for hour in range(2, 9)]
    release = [backup("2026-10-01", release="1.0"), backup("2026-10-02", release="2.0", job="night")]
    other = [backup("2026-11-01", volume="other"), backup("2026-11-02", volume="other")]
    decisions = decide(
        [*night, *hours, *release, *other],
        Rule(Keep(last=ALL), tags={"release": "*"}),
        Rule(Keep(daily=3), volumes=("vg0/v",), tags={"job": "night"}),
        Rule(Keep(last=2), volumes=("vg?/*",), tags={"job": "hours"}),
    )
    assert kept(decisions.values()) == sorted(
        [*release, *night[-3:], *hours[-2:], *other], key=lambda one: (one.volume != "other", one.time)
    )
    assert decisions["2026-11-01 other"].reasons == ("no rule is about it",)
    assert decisions["2026-10-01 v"].reasons == ("last: 2 of all",)


def test_a_clock_that_disagrees_with_the_storage_is_not_believed() -> None:
    real = [backup(f"2026-11-{day} 01:00", received=f"2026-11-{day} 01:40") for day in range(20, 26)]
    bogus = backup("2031-01-01 00:00", received="2026-11-25 00:30")
    decisions = decide([*real, bogus], Rule(Keep(daily=2)))
    assert [one.time.day for one in kept(decisions.values())] == [24, 1, 25]
    assert decisions[bogus.id].reasons[0] == "the newest of its volume by its own clock"
    assert (
        decisions[bogus.id].reasons[-1].startswith("dated by its arrival: its host's clock said 2031-01-01")
    )
    # Within an hour the host's own clock counts: storing takes its time.
    assert backup("2026-11-25 23:59", received="2026-11-26 00:59").moment.day == 25
    assert backup("2026-11-25 23:58", received="2026-11-26 00:59").moment.day == 26


def copied_weekly(days: int) -> list[Candidate]:
    """Return daily backups that came here each week, with a copy that keeps no times."""
    found = []
    for day in range(days):
        time = datetime(2026, 10, 1, 2, tzinfo=UTC) + timedelta(days=day)
        received = datetime(2026, 10, 8, 20, tzinfo=UTC) + timedelta(days=day - day % 7)
        # Ids say nothing of the order.
        found.append(Candidate(f"{97 * day % 64:032x}", "v", "vg0/v", time, received))
    return found


def test_what_was_copied_without_times_stays_by_its_hosts_clock() -> None:
    days = copied_weekly(49)
    decisions = apply_policy(days, Policy((Rule(Keep(daily=10)),)), NOW)
    # The last of each week by its arrival, and the last ten by their own times.
    assert [one.time for one in kept(decisions)] == [
        one.time for place, one in enumerate(days) if place % 7 == 6 or place >= 39
    ]
    reasons = {decision.candidate.time.day: decision.reasons for decision in decisions[21:]}
    arrived = "it arrived 2026-11-12 20:00 UTC"
    assert reasons[9] == ("daily: 10 of 10, the last of 2026-11-09, by its host's clock", arrived)
    assert reasons[8][1:] == (
        "daily: 2026-11-08 lies before the 10 that are kept, by its host's clock",
        "dated by its arrival: its host's clock said 2026-11-08 02:00 UTC",
    )
    said = "dated by its arrival: its host's clock said 2026-11-11 02:00 UTC"
    assert reasons[11] == ("daily: 2 of 10, the last of 2026-11-12", said)
    assert {d.candidate.time.day for d in decisions[39:] if d.only_by_clock} == {
        9,
        10,
        12,
        13,
        14,
        15,
        16,
        17,
    }


def test_of_what_arrived_in_one_copy_the_newest_is_the_newest_by_its_time() -> None:
    days = [replace(one, received=NOW) for one in copied_weekly(7)]
    decisions = apply_policy(days, Policy((Rule(Keep(last=1)),)), NOW)
    assert kept(decisions) == days[-1:]
    assert decisions[-1].reasons[0] == "the newest of its volume"


def test_times_to_come_push_out_nothing_in_either_count() -> None:
    copied = copied_weekly(42)
    years = [f"{year}-01-01 00:00" for year in range(2030, 2060)]
    bogus = [backup(when, received="2026-11-12 21:00") for when in years]
    policy = Policy((Rule(Keep(daily=10)),))
    without = kept(apply_policy(copied, policy, NOW))
    stay = kept(apply_policy([*copied, *bogus], policy, NOW))
    # All of them have the place of one, that of the day when they came.
    assert len(set(map(str, without)) - set(map(str, stay))) == 1
    assert [one.time.year for one in stay if one.time > NOW] == [2059]


def test_bogus_times_do_not_make_most_of_a_volume_few() -> None:
    real = [backup(f"2026-{month}-{day:02} 01:00") for month in ("09", "10") for day in range(1, 21)]
    flood = [backup(f"2026-11-20 {hour:02}:00") for hour in range(7)]
    policy = Policy((Rule(Keep(last=7)),))
    with pytest.raises(TooMuchForgottenError, match="40 of 47"):
        require_modest(apply_policy([*real, *flood], policy, NOW))
    earlier = [backup(f"2026-11-25 {hour:02}:00", received="2026-11-19 00:00") for hour in range(7)]
    decisions = apply_policy([*real, *earlier, *flood], policy, NOW)
    assert len(kept(decisions)) == 14
    # One of them is the newest by its own clock, and counts as it did.
    with pytest.raises(TooMuchForgottenError, match="40 of 48"):
        require_modest(decisions)


@pytest.mark.parametrize("more", [Keep(last=7, yearly=ALL), Keep(last=7, within=Span(hours=9 * 24))])
def test_places_without_a_number_count_by_the_date_only(more: Keep) -> None:
    """Years as far back as one likes; and what came long ago from a clock that was ahead."""
    real = [backup(f"2026-{month:02}-{day:02} 01:00") for month in range(6, 11) for day in range(1, 21)]
    flood = [backup(f"2026-11-20 {hour:02}:00") for hour in range(7)]
    years = [backup(f"{year}-01-01 00:00", received="2026-11-19 00:00") for year in range(1900, 2026)]
    ahead = [backup(f"2026-11-2{n % 4} 00:{n:02}", received="2026-10-20 02:00") for n in range(60)]
    decisions = apply_policy([*real, *flood, *(years if more.yearly else ahead)], Policy((Rule(more),)), NOW)
    assert sum(one.only_by_clock for one in decisions) > 50
    with pytest.raises(TooMuchForgottenError):
        require_modest(decisions)


@pytest.mark.parametrize("keep", [Keep(daily=14), Keep(daily=14, weekly=8, monthly=12), Keep(daily=30)])
@pytest.mark.parametrize("a_day", [24, 48])
@pytest.mark.parametrize("before", [0, 14])
def test_after_a_copy_without_times_no_night_is_refused(keep: Keep, a_day: int, before: int) -> None:
    """One a day was left of what came by the copies. Now many come each day, and a policy each night."""
    copied = NOW.replace(hour=0)
    candidates = [
        # What a first copy brought keeps its own dates.
        replace(backup(f"{copied - timedelta(days=day - 1, hours=2):%Y-%m-%d %H:%M}"), received=received)
        for first, last, received in ((before + 14, 14, None), (14, 0, copied))
        for day in range(first, last, -1)
    ]
    for night in range(7):
        midnight = copied + timedelta(days=night)
        candidates += [
            backup(f"{midnight + timedelta(days=n / a_day, minutes=1):%Y-%m-%d %H:%M}") for n in range(a_day)
        ]
        decisions = apply_policy(candidates, Policy((Rule(keep),)), midnight + timedelta(days=1, hours=1))
        require_modest(decisions)
        candidates = kept(decisions)
        days = {one.time.date() for one in candidates}
        assert days >= {(midnight - timedelta(days=day)).date() for day in range(14)}


def test_periods_are_those_of_the_zone() -> None:
    times = ["2026-11-24 22:30", "2026-11-24 23:30", "2026-11-25 22:30"]
    for zone, expected in ((UTC, [1, 2]), (BERLIN, [0, 2])):
        decisions = apply_policy(map(backup, times), Policy((Rule(Keep(daily=2)),), zone), NOW)
        assert [place for place, one in enumerate(decisions) if one.keep] == expected


def test_the_hour_that_comes_twice_is_two() -> None:
    times = ["2026-10-24 23:30", "2026-10-25 00:30", "2026-10-25 01:30", "2026-10-25 02:30"]
    decisions = apply_policy(map(backup, times), Policy((Rule(Keep(hourly=9)),), BERLIN), NOW)
    assert len(kept(decisions)) == 4


def test_weeks_at_the_turn_of_the_year() -> None:
    # 2026-12-28 to 2027-01-03 is one week, 2026-W53.
    times = ["2026-12-27", "2026-12-28", "2027-01-01", "2027-01-03", "2027-01-04"]
    decisions = apply_policy(map(backup, times), Policy((Rule(Keep(weekly=3)),)), NOW)
    assert [one.time.day for one in kept(decisions)] == [27, 3, 4]
    assert decisions[3].reasons == ("weekly: 2 of 3, the last of 2026-W53",)


def test_most_of_a_volume_does_not_go_at_once() -> None:
    flood = [backup(f"2026-11-25 {n // 60:02}:{n % 60:02}") for n in range(1000)]
    calm = [backup(f"2026-11-{n}", volume="calm") for n in range(10, 20)]
    decisions = apply_policy([*flood, *calm], Policy((Rule(Keep(last=7)),)), NOW)
    with pytest.raises(TooMuchForgottenError, match="993 of 1000 backups of vg0/v") as caught:
        require_modest(decisions)
    assert "--force" in str(caught.value.resolution)
    require_modest(decisions, most_percent=100)
    only_calm = [one for one in decisions if one.candidate.volume == "calm"]
    require_modest(only_calm)
    require_modest(only_calm, most_percent=30)
    with pytest.raises(TooMuchForgottenError):
        require_modest(only_calm, most_percent=29)
    require_modest([])


@pytest.mark.parametrize(
    ("text", "moment", "expected"),
    [
        ("36h", "2026-11-26 12:00", "2026-11-25 00:00"),
        ("14d", "2026-11-26 12:00", "2026-11-12 12:00"),
        ("2w", "2026-11-26 12:00", "2026-11-12 12:00"),
        ("1m", "2026-03-31 12:00", "2026-02-28 12:00"),
        ("1m", "2024-03-31 12:00", "2024-02-29 12:00"),
        ("1m", "2026-01-31 12:00", "2025-12-31 12:00"),
        ("11m", "2026-12-15 12:00", "2026-01-15 12:00"),
        ("12m", "2026-12-31 12:00", "2025-12-31 12:00"),
        ("1y6m", "2026-11-26 12:00", "2025-05-26 12:00"),
        ("1y", "2024-02-29 12:00", "2023-02-28 12:00"),
        ("1y1m1w1d1h", "2026-11-26 12:00", "2025-10-18 11:00"),
        ("9999y", "2026-11-26 12:00", "0001-01-01 00:00"),
        ("2025y11m9999w", "2026-11-26 12:00", "0001-01-01 00:00"),
    ],
)
def test_spans(text: str, moment: str, expected: str) -> None:
    at, then = (datetime.fromisoformat(word).replace(tzinfo=UTC) for word in (moment, expected))
    assert Span.parse(text).before(at) == then
    assert Span.parse(str(Span.parse(text))) == Span.parse(text)


@pytest.mark.parametrize("text", ["", "14", "d", "14 d", "1d1w", "-1d", "0d", "14days", "1.5d", "0h", "1h2h"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(UsageError, match="within") as caught:
        Span.parse(text)
    assert caught.value.resolution


def test_spellings() -> None:
    assert Keep.parse({"daily": 7, "weekly": "4", "yearly": "all", "within": "14d"}) == Keep(
        daily=7, weekly=4, yearly=ALL, within=Span(0, 14 * 24)
    )
    for wrong in (
        {},
        {"daily": 0},
        {"dayly": 7},
        {"daily": -1},
        {"daily": "-1"},
        {"daily": True},
        {"daily": 1.5},
        {"daily": "²"},
        {"daily": ""},
        {"within": 14},
        {"within": "fortnight"},
    ):
        with pytest.raises(UsageError, match="retention: "):
            Keep.parse(wrong)
    assert parse_count("daily", "0") == 0
    assert parse_zone("utc") is UTC
    assert parse_zone("Europe/Berlin") == BERLIN
    for name in ("Nowhere/Atall", "", "../../etc/passwd", "/etc/localtime"):
        with pytest.raises(UsageError, match="zone"):
            parse_zone(name)


# --- laws ---

counts = st.integers(0, 5) | st.just(ALL)
keeps = st.builds(
    lambda numbers, hours: Keep(*numbers, within=Span(0, hours) if hours else None),
    st.lists(counts, min_size=6, max_size=6).filter(any),
    st.integers(0, 5000),
)
scarce = st.builds(
    lambda name, count, hours: Keep(**{name: count}, within=Span(0, hours) if hours else None),
    st.sampled_from(["last", "hourly", "daily", "weekly", "monthly", "yearly"]),
    st.integers(1, 3),
    st.just(0) | st.integers(1, 500),
)
"""That let most go, so that it shows who takes whose place."""
moments = st.integers(0, 30_000).map(lambda hours: NOW - timedelta(hours=hours, minutes=hours % 60))


@st.composite
def groups(draw: st.DrawFn) -> list[Candidate]:
    found = []
    for number, time in enumerate(draw(st.lists(moments, max_size=25))):
        received = draw(st.none() | st.just(time) | moments)
        volume = draw(st.sampled_from("ab"))
        tags = draw(st.sampled_from([{}, {"job": "night"}, {"job": "day"}]))
        found.append(Candidate(f"{number:032x}", volume, f"vg0/{volume}", time, received, tags))
    return found


@st.composite
def policies(draw: st.DrawFn, keeps: st.SearchStrategy[Keep] = keeps) -> Policy:
    rules = [
        Rule(draw(keeps), tags=draw(st.sampled_from([{}, {"job": "night"}])))
        for _ in range(draw(st.integers(0, 2)))
    ]
    return Policy(tuple(rules), draw(st.sampled_from([UTC, BERLIN])))


laws = settings(max_examples=50, deadline=None)


@laws
@given(groups(), policies(), st.randoms(use_true_random=False))
def test_the_order_of_the_input_is_of_no_account(
    candidates: list[Candidate], policy: Policy, dice: random.Random
) -> None:
    shuffled = list(candidates)
    dice.shuffle(shuffled)
    assert apply_policy(candidates, policy, NOW) == apply_policy(shuffled, policy, NOW)


@laws
@given(groups(), policies())
def test_a_policy_keeps_all_that_it_kept(candidates: list[Candidate], policy: Policy) -> None:
    stay = kept(apply_policy(candidates, policy, NOW))
    again = apply_policy(stay, policy, NOW)
    assert kept(again) == stay
    require_modest(again, most_percent=0)


@laws
@given(groups(), keeps, keeps)
def test_larger_numbers_never_forget_more(candidates: list[Candidate], one: Keep, other: Keep) -> None:
    spans = [keep.within for keep in (one, other) if keep.within]
    names = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    both = Keep(
        *(max(getattr(one, name), getattr(other, name)) for name in names),
        within=max(spans, key=lambda span: span.hours, default=None),
    )

    def ids(keep: Keep) -> set[str]:
        return {c.id for c in kept(apply_policy(candidates, Policy((Rule(keep),)), NOW))}

    assert ids(one) | ids(other) == ids(both)


FORMS = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m", "yearly": "%Y"}


@laws
@given(groups(), st.integers(1, 5), st.sampled_from(sorted(FORMS)))
def test_each_period_that_counts_keeps_its_last_backup(
    candidates: list[Candidate], count: int, name: str
) -> None:
    decisions = apply_policy(candidates, Policy((Rule(Keep(**{name: count})),)), NOW)
    volumes: dict[str, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for one in sorted(candidates, key=lambda one: (one.moment, one.time, one.id)):
        volumes[one.volume][one.moment.strftime(FORMS[name])].append(one)
    stay = {one.id for one in kept(decisions)}
    for periods in volumes.values():
        newest = sorted(periods, reverse=True)[:count]
        assert all(periods[period][-1].id in stay for period in newest)
        extra = stay & {one.id for period in periods for one in periods[period]}
        by_clock = {
            one.moment_by_clock(NOW).strftime(FORMS[name]) for found in periods.values() for one in found
        }
        assert len(extra) <= len(newest) + min(count, len(by_clock)) + 1  # and the newest by its own clock


@laws
@given(groups(), policies())
def test_nothing_is_decided_without_a_reason(candidates: list[Candidate], policy: Policy) -> None:
    decisions = apply_policy(candidates, policy, NOW)
    assert sorted(one.candidate.id for one in decisions) == sorted(one.id for one in candidates)
    assert all(one.reasons and all(one.reasons) for one in decisions)
    for volume in {one.volume for one in candidates}:
        of_volume = [one for one in candidates if one.volume == volume]
        stay = {one.candidate.id for one in decisions if one.keep}
        assert max(of_volume, key=lambda one: (one.moment, one.time, one.id)).id in stay
        assert max(of_volume, key=lambda one: (one.time, one.id)).id in stay


@laws
@given(groups(), policies(scarce))
def test_what_either_count_keeps_stays_and_nothing_else(candidates: list[Candidate], policy: Policy) -> None:
    def by_rules(dating: Callable[[Candidate], datetime]) -> set[str]:
        """Return what a policy keeps where there is no other time than this, but for the newest."""
        ids = [one.id for one in sorted(candidates, key=lambda one: (one.time, one.id))]
        renamed = [
            replace(one, id=f"{ids.index(one.id):032x}", time=dating(one), received=None)
            for one in candidates
        ]
        return {
            ids[int(one.candidate.id, 16)]
            for one in apply_policy(renamed, policy, NOW)
            if one.keep and not all(reason.startswith("the newest") for reason in one.reasons)
        }

    newest = {
        max(
            (one for one in candidates if one.volume == volume),
            key=lambda one: (dating(one), one.time, one.id),
        ).id
        for volume in {one.volume for one in candidates}
        for dating in DATINGS
    }
    either = by_rules(lambda one: one.moment) | by_rules(lambda one: one.moment_by_clock(NOW))
    decisions = apply_policy(candidates, policy, NOW)
    assert {one.candidate.id for one in decisions if one.keep} == either | newest
    by_arrival = by_rules(lambda one: one.moment) | newest
    assert all(one.only_by_clock == (one.keep and one.candidate.id not in by_arrival) for one in decisions)


DATINGS: tuple[Callable[[Candidate], datetime], ...] = (lambda one: one.moment, lambda one: one.time)
lies = st.integers(-9000, 9000).filter(lambda hours: abs(hours) > 1)


@laws
@given(
    st.lists(moments, max_size=15, unique=True),
    st.lists(st.tuples(moments, lies), min_size=1, max_size=15),
    policies(scarce),
)
def test_a_clock_that_lies_makes_nothing_go(
    made: list[datetime], bogus: list[tuple[datetime, int]], policy: Policy
) -> None:
    """What somebody else stores for a volume may take places by when it came, never by what it says."""
    real = [
        Candidate(f"{number:032x}", "v", "vg0/v", time, time + timedelta(minutes=9))
        for number, time in enumerate(made)
    ]
    came = [
        Candidate(
            f"{number:031x}f", "v", "vg0/v", arrival + timedelta(seconds=30), arrival + timedelta(seconds=30)
        )
        for number, (arrival, _) in enumerate(bogus)
    ]
    lying = [
        replace(one, time=one.time + timedelta(hours=hours))
        for one, (_, hours) in zip(came, bogus, strict=True)
    ]
    honest = {one.id for one in kept(apply_policy([*real, *came], policy, NOW))}
    assert honest & {one.id for one in real} <= {
        one.id for one in kept(apply_policy([*real, *lying], policy, NOW))
    }
