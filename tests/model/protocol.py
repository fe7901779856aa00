"""A model of commit, fence and condemn (docs/design.md, 3.9), small enough to try every order of events.

Two writers and two collectors work on one repository, step by step, in every interleaving. A process may stop
for ever before any of its steps, which is what a crash is; a collector may also begin anew. Backups may be
forgotten at any time, and any writer that a collector waits for may be shut out at any time, so no clock
is trusted. The storage holds two blobs in one pack, each needed by one backup: so a pack can be dead, half
dead, copied, condemned, kept, and swept. In another beginning a harmed copy of one lies in a pack that a
repair has set aside, and the other was once given up as lost, and has turned up since.

``Rules`` has the parts of the protocol that can be left out; each of them is needed, as the tests show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

Ids = frozenset[str]
Rows = frozenset[tuple[str, str]]
FENCE: Ids = frozenset({"fence"})
WRITERS, COLLECTORS = ("w1", "w2"), ("c1", "c2")


@dataclass(frozen=True)
class Rules:
    """What the protocol demands; False breaks it on purpose."""

    announce_first: bool = True
    """A writer announces itself before it reads ``gc/``."""
    wait_for_writers: bool = True
    """A collector waits until every writer is settled."""
    fences_win_once: bool = True
    """A manifest is not created where a fence stands."""
    mark_again: bool = True
    """What was committed since the first mark is marked before the sweep."""
    freeze_forgotten: bool = True
    """Forgotten backups count as of ``condemned``, not as of the sweep."""
    one_sweep: bool = True
    """There is one sweep an epoch: whoever is late takes that of the first."""
    heed_condemned: bool = True
    """A writer drops the rows of condemned packs."""
    copy_first: bool = True
    """What is needed of a half-dead pack is copied before the pack is condemned."""
    find_nothing_aside: bool = True
    """A writer does not rely on a pack that was set aside."""
    copy_past_aside: bool = True
    """What a pack has that was set aside is copied from elsewhere all the same."""
    keep_past_aside: bool = True
    """A condemned pack is kept where the only other copy was set aside."""
    keep_given_up: bool = True
    """What was once given up as lost is kept where a backup needs it again."""


class Epoch(NamedTuple):
    """The objects ``gc/<epoch>/...``."""

    condemned: frozenset[str]
    marked: frozenset[str]
    forgotten: frozenset[str]
    sweep: tuple[frozenset[str], frozenset[str]] | None
    done: bool


class Storage(NamedTuple):
    """Everything that is stored. ``manifests`` maps a slot to the blobs it needs, or to a fence."""

    packs: frozenset[tuple[str, Ids]]
    rows: Rows
    manifests: frozenset[tuple[str, Ids]]
    forgotten: frozenset[str]
    announced: frozenset[str]
    seen: frozenset[tuple[str, int]]
    epochs: tuple[Epoch, ...]
    aside: frozenset[str] = frozenset()
    given_up: Ids = frozenset()


class Writer(NamedTuple):
    """A run of ``backup``; what it knows is of the moment at which it looked."""

    step: str = "start"
    dropped: frozenset[str] = frozenset()
    banned: frozenset[str] = frozenset()
    refs: Ids = frozenset()
    view: Rows = frozenset()


class Collector(NamedTuple):
    """A run of ``prune``."""

    step: str = "start"
    epoch: int = 0
    marked: frozenset[str] = frozenset()
    forgotten: frozenset[str] = frozenset()
    victims: frozenset[str] = frozenset()
    copies: Ids = frozenset()
    waits_for: frozenset[str] = frozenset()
    needed: Ids = frozenset()
    kept: frozenset[str] = frozenset()
    lives: int = 0


@dataclass(frozen=True)
class Bounds:
    """How far a search goes."""

    writers: int = 2
    collectors: int = 2
    epochs: int = 2
    forgets: int = 1
    restarts: int = 1


def first_storage() -> Storage:
    """Return a repository of two backups, whose blobs lie in one pack."""
    return Storage(
        packs=frozenset({("P", frozenset("az"))}),
        rows=frozenset({("a", "P"), ("z", "P")}),
        manifests=frozenset({("m1", frozenset("a")), ("m2", frozenset("z"))}),
        forgotten=frozenset(),
        announced=frozenset(),
        seen=frozenset(),
        epochs=(),
    )


def repaired_storage() -> Storage:
    """Return the same after a repair: what it has set aside is listed, and harmed."""
    first = first_storage()
    return first._replace(
        packs=first.packs | {("H", frozenset("a"))},
        rows=first.rows | {("a", "H")},
        aside=frozenset("H"),
        given_up=frozenset("z"),
    )


def lost_blobs(storage: Storage) -> set[tuple[str, str]]:
    """Return what backups need and no row leads to: there must never be any."""
    packs = dict(storage.packs)
    there = {id_ for id_, pack in storage.rows if id_ in packs.get(pack, ()) and pack not in storage.aside}
    return {
        (slot, id_)
        for slot, refs in storage.manifests
        if refs != FENCE and slot not in storage.forgotten
        for id_ in refs - there
    }


def forget_events(storage: Storage, bounds: Bounds) -> Iterator[tuple[str, None, Storage]]:
    if len(storage.forgotten) < bounds.forgets:
        for slot, refs in storage.manifests:
            if refs != FENCE and slot not in storage.forgotten:
                yield f"{slot} is forgotten", None, storage._replace(forgotten=storage.forgotten | {slot})


def writer_events(
    name: str, writer: Writer, storage: Storage, rules: Rules
) -> Iterator[tuple[str, Writer, Storage]]:
    step = writer.step
    if step == ("start" if rules.announce_first else "read"):
        after = writer._replace(step="announced" if rules.announce_first else "ready")
        yield "announces itself", after, storage._replace(announced=storage.announced | {name})
    elif step == ("announced" if rules.announce_first else "start"):
        open_epochs = [epoch for epoch in storage.epochs if not epoch.done]
        after = writer._replace(step="ready" if rules.announce_first else "read")
        if open_epochs and rules.heed_condemned:
            condemned = open_epochs[-1]
            after = after._replace(dropped=condemned.condemned, banned=condemned.forgotten)
            if rules.announce_first:
                after = after._replace(step="saw")
        yield "reads gc/", after, storage
    elif step == "saw":
        seen = storage.seen | {(name, len(storage.epochs) - 1)}
        # What it says is what it read; an epoch that has begun since is another one.
        for epoch, each in enumerate(storage.epochs):
            if (each.condemned, each.forgotten) == (writer.dropped, writer.banned):
                seen = storage.seen | {(name, epoch)}
        yield "says what it saw", writer._replace(step="ready"), storage._replace(seen=seen)
    else:
        yield from _work(name, writer, storage, rules)


def _work(name: str, writer: Writer, storage: Storage, rules: Rules) -> Iterator[tuple[str, Writer, Storage]]:
    step = writer.step
    if step == "ready":
        yield "takes no parent", writer._replace(step="listed"), storage
        for slot, refs in storage.manifests:
            if refs != FENCE and slot not in storage.forgotten | writer.banned:
                yield f"takes parent {slot}", writer._replace(step="listed", refs=refs), storage
    elif step == "listed":
        dropped = writer.dropped | (storage.aside if rules.find_nothing_aside else frozenset())
        view = frozenset(row for row in storage.rows if row[1] not in dropped)
        yield "reads the index", writer._replace(step="indexed", view=view), storage
    elif step == "indexed":
        packs = dict(storage.packs)
        view = frozenset(row for row in writer.view if row[1] in packs)
        yield "lists the packs", writer._replace(step="working", view=view), storage
    elif step == "working":
        yield from _store(name, writer, storage)
    elif step == "packed":
        rows = storage.rows | {(id_, name) for id_ in dict(storage.packs).get(name, ())}
        yield "indexes its pack", writer._replace(step="stored"), storage._replace(rows=rows)
    elif step == "stored":
        taken = name in dict(storage.manifests) and rules.fences_win_once
        after = Writer(step="ended")
        if taken:
            yield "finds a fence", after, storage
        else:
            others = frozenset(each for each in storage.manifests if each[0] != name)
            yield "commits", after, storage._replace(manifests=others | {(name, writer.refs)})


def _store(name: str, writer: Writer, storage: Storage) -> Iterator[tuple[str, Writer, Storage]]:
    for id_ in "az":
        refs = writer.refs | {id_}
        if any(row[0] == id_ for row in writer.view):
            yield f"finds {id_}", writer._replace(step="stored", refs=refs, view=frozenset()), storage
        elif id_ not in writer.refs:
            packs = storage.packs | {(name, frozenset(id_))}
            after = writer._replace(step="packed", refs=refs, view=frozenset())
            yield f"stores {id_}", after, storage._replace(packs=packs)


def collector_events(
    name: str, collector: Collector, storage: Storage, rules: Rules, bounds: Bounds
) -> Iterator[tuple[str, Collector, Storage]]:
    if collector.step != "start" and collector.lives < bounds.restarts:
        yield "begins anew", Collector(lives=collector.lives + 1), storage
    step = collector.step
    if step == "start":
        last = len(storage.epochs) - 1
        if storage.epochs and not storage.epochs[last].done:
            yield "takes an epoch up", collector._replace(step="condemned", epoch=last), storage
        elif last + 1 < bounds.epochs:
            yield "begins an epoch", collector._replace(step="begun", epoch=last + 1), storage
    else:
        yield from _prepare(name, collector, storage, rules)


def _prepare(
    name: str, collector: Collector, storage: Storage, rules: Rules
) -> Iterator[tuple[str, Collector, Storage]]:
    step = collector.step
    if step == "begun":
        marked = frozenset(slot for slot, refs in storage.manifests if refs != FENCE)
        after = collector._replace(step="marked", marked=marked, forgotten=storage.forgotten)
        yield "marks", after, storage
    elif step == "marked":
        yield from _choose(collector, storage, rules)
    elif step == "chosen":
        # A second life has packs of its own.
        pack = f"{name}.{collector.lives}"
        packs = storage.packs | {(pack, collector.copies)}
        yield "copies", collector._replace(step="copied"), storage._replace(packs=packs)
    elif step == "copied":
        rows = storage.rows | {(id_, f"{name}.{collector.lives}") for id_ in collector.copies}
        yield "indexes the copies", collector._replace(step="ready"), storage._replace(rows=rows)
    elif step == "ready":
        epochs = storage.epochs
        if len(epochs) == collector.epoch:
            new = Epoch(collector.victims, collector.marked, collector.forgotten, sweep=None, done=False)
            epochs = (*epochs, new)
        after = Collector(step="condemned", epoch=collector.epoch, lives=collector.lives)
        yield "condemns", after, storage._replace(epochs=epochs)
    else:
        yield from _finish(collector, storage, rules)


def _choose(collector: Collector, storage: Storage, rules: Rules) -> Iterator[tuple[str, Collector, Storage]]:
    needed = {
        id_
        for slot, refs in storage.manifests
        if slot in collector.marked and slot not in collector.forgotten
        for id_ in refs
    }
    packs = dict(storage.packs)
    listed = {pack for _, pack in storage.rows}
    chosen = {pack for pack in listed if pack in packs and packs[pack] - needed}
    no_home = storage.aside if rules.copy_past_aside else frozenset()
    # A pack that was set aside goes when nothing in it is needed, which may be seen so or so.
    for aside in dict.fromkeys((Ids(), storage.aside.intersection(packs))):
        victims = frozenset(chosen - storage.aside | aside)
        elsewhere = {id_ for id_, pack in storage.rows if pack in packs and pack not in victims | no_home}
        sources = victims - storage.aside
        copies = frozenset(id_ for pack in sources for id_ in packs[pack] & needed if id_ not in elsewhere)
        step = "chosen" if copies and rules.copy_first else "ready"
        yield "chooses victims", collector._replace(step=step, victims=victims, copies=copies), storage


def _finish(collector: Collector, storage: Storage, rules: Rules) -> Iterator[tuple[str, Collector, Storage]]:
    step, epoch = collector.step, storage.epochs[collector.epoch]
    if step == "condemned":
        writers = storage.announced if rules.wait_for_writers else frozenset()
        yield "lists the writers", collector._replace(step="waiting", waits_for=writers), storage
    elif step == "waiting":
        yield from _settle(collector, storage)
    elif step in ("settled", "half listed"):
        # A listing is no instant: what is created or deleted while it goes on may be in it or not.
        yield from _mark_again(collector, storage, rules)
    elif step == "decided":
        forgotten = epoch.forgotten if rules.freeze_forgotten else storage.forgotten
        sweep = (epoch.condemned - collector.kept, forgotten)
        after = collector._replace(step="sweeping", kept=frozenset())
        if epoch.sweep is None or not rules.one_sweep:
            yield "decides the sweep", after, _with_epoch(collector, storage, epoch._replace(sweep=sweep))
        else:
            yield "finds a sweep", after, storage
    elif step == "sweeping" and epoch.sweep:
        gone = epoch.sweep[1]
        manifests = frozenset(each for each in storage.manifests if each[0] not in gone)
        yield "deletes manifests", collector._replace(step="hidden"), storage._replace(manifests=manifests)
    elif step == "hidden" and epoch.sweep:
        rows = frozenset(row for row in storage.rows if row[1] not in epoch.sweep[0])
        yield "replaces segments", collector._replace(step="unlisted"), storage._replace(rows=rows)
    elif step == "unlisted" and epoch.sweep:
        packs = frozenset(each for each in storage.packs if each[0] not in epoch.sweep[0])
        yield "deletes packs", collector._replace(step="swept"), storage._replace(packs=packs)
    elif step == "swept":
        after = Collector(step="ended", lives=collector.lives)
        yield "is done", after, _with_epoch(collector, storage, epoch._replace(done=True))


def _settle(collector: Collector, storage: Storage) -> Iterator[tuple[str, Collector, Storage]]:
    slots = dict(storage.manifests)
    waits_for = frozenset(
        name
        for name in collector.waits_for
        if name not in slots and (name, collector.epoch) not in storage.seen
    )
    if not waits_for:
        yield "has waited", collector._replace(step="settled", waits_for=frozenset()), storage
    for name in waits_for:
        fenced = storage._replace(manifests=storage.manifests | {(name, FENCE)})
        yield f"fences {name}", collector, fenced


def _mark_again(
    collector: Collector, storage: Storage, rules: Rules
) -> Iterator[tuple[str, Collector, Storage]]:
    epoch = storage.epochs[collector.epoch]
    passed_over = epoch.marked | (epoch.forgotten if rules.freeze_forgotten else storage.forgotten)
    late = collector.step == "half listed"
    needed = collector.needed | {
        id_
        for slot, refs in storage.manifests
        if (slot != WRITERS[-1]) == late and rules.mark_again and refs != FENCE and slot not in passed_over
        for id_ in refs - (frozenset() if rules.keep_given_up else storage.given_up)
    }
    if not late:
        yield "lists manifests", collector._replace(step="half listed", needed=needed), storage
        return
    packs = dict(storage.packs)
    no_home = epoch.condemned | (storage.aside if rules.keep_past_aside else frozenset())
    elsewhere = {id_ for id_, pack in storage.rows if pack in packs and pack not in no_home}
    kept = frozenset(
        pack for id_, pack in storage.rows if pack in epoch.condemned and id_ in needed - elsewhere
    )
    after = collector._replace(step="decided", needed=frozenset(), kept=kept)
    yield "marks again" + (", and keeps a pack" if kept else ""), after, storage


def _with_epoch(collector: Collector, storage: Storage, epoch: Epoch) -> Storage:
    epochs = list(storage.epochs)
    epochs[collector.epoch] = epoch
    return storage._replace(epochs=tuple(epochs))
