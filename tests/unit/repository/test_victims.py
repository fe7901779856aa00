"""Which packs are dropped, copied or kept, and the reasons."""

from __future__ import annotations

from blocksnap.repository.victims import Limits, PackUse, choose_victims

MIB = 1 << 20


def pack(
    name: str, size: int, needed: int, *, data: bool = True, settled: bool = True, indexed: bool = True
) -> PackUse:
    return PackUse(name, size, size, needed, data=data, settled=settled, indexed=indexed)


def fates(*packs: PackUse, limits: Limits | None = None) -> dict[str, tuple[str, str]]:
    choice = choose_victims(packs, limits or Limits())
    return {decision.pack.name: (decision.fate, decision.reason) for decision in choice.decisions}


def test_dead_packs_are_dropped_and_full_ones_kept() -> None:
    assert fates(pack("dead", 100, 0), pack("left", 100, 0, indexed=False), pack("full", 100, 100)) == {
        "dead": ("drop", "no backup needs anything of it"),
        "left": ("drop", "an interrupted run left it"),
        "full": ("keep", "0 % of it is dead"),
    }


def test_a_run_at_work_keeps_its_packs() -> None:
    assert fates(pack("new", 100, 0, settled=False, indexed=False))["new"] == (
        "keep",
        "its run may still be at work",
    )


def test_the_emptiest_are_copied_first_and_the_budget_holds() -> None:
    packs = [pack("a", 100, 70), pack("b", 100, 10), pack("c", 100, 40), pack("d", 100, 80)]
    decided = fates(*packs, limits=Limits(dead_percent=25, copy_bytes=100))
    assert decided["b"] == ("copy", "90 % of it is dead")
    assert decided["c"] == ("copy", "60 % of it is dead")
    assert decided["a"] == ("keep", "the budget for copying is spent")
    assert decided["d"] == ("keep", "20 % of it is dead")


def test_small_packs_are_put_together_when_they_fill_one() -> None:
    few = [pack(f"p{n}", 4 * MIB, 4 * MIB) for n in range(7)]
    assert {fate for fate, _ in fates(*few).values()} == {"keep"}
    many = [pack(f"p{n}", 4 * MIB, 4 * MIB) for n in range(8)]
    assert set(fates(*many).values()) == {("copy", "many small packs")}
    mixed = [pack(f"p{n}", 4 * MIB, 4 * MIB, data=n % 2 == 0) for n in range(8)]
    assert {fate for fate, _ in fates(*mixed).values()} == {"keep"}


def test_sums() -> None:
    choice = choose_victims([pack("a", 100, 0), pack("b", 100, 30), pack("c", 100, 90)], Limits())
    assert (choice.freed_bytes, choice.copied_bytes) == (170, 30)
    assert [use.name for use in choice.of("keep")] == ["c"]


def test_what_is_not_a_frame_is_not_dead() -> None:
    """A small pack is half table and trailer, and would be again after copying."""
    small = PackUse("p", 500, 220, 220, data=False, settled=True, indexed=True)
    assert choose_victims([small], Limits()).decisions[0].fate == "keep"
    assert small.dead_bytes == 0
