"""repair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import format_size, print_json
from blocksnap.errors import UsageError

if TYPE_CHECKING:
    from blocksnap.operations.heal import Healed
    from blocksnap.operations.reporting import Reporter
    from blocksnap.repository.repair_plan import RepairPlan
    from blocksnap.repository.repairing import Repaired
    from blocksnap.repository.repository import Repository

EXIT_DAMAGE = 13


@click.command("repair")
@click.option(
    "--read-data", is_flag=True, help="Read every pack first, and not only those that a check has found bad."
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="Give up what cannot be brought back, so that prune goes on: it may delete what hangs on it.",
)
@click.option(
    "--heal-from",
    metavar="VOLUME",
    help="Then read what is lost from this volume (VG/LV, device, file) and store what is still the same.",
)
@click.option("--dry-run", is_flag=True, help="Say what is damaged and what can be brought back; do nothing.")
@common_options
def repair_command(
    settings: Settings, *, read_data: bool, accept_loss: bool, heal_from: str | None, dry_run: bool
) -> None:
    """Bring back what can be: list lost packs again, copy unharmed frames out of damaged packs.

    Nothing is deleted and no backup is changed. What is lost is named by backup and byte range (exit code
    13). Backups, restores and prune may go on meanwhile; what is interrupted is finished by the next repair.

    With a key of role backup, --heal-from stores what an earlier repair has found lost, and that is all.
    """
    from blocksnap.operations.repair import RepairOptions, find_suspects, plan_repair, repair
    from blocksnap.operations.reporting import Quiet
    from blocksnap.repository.keys import Right

    if dry_run and heal_from:
        raise UsageError(
            "--heal-from reads and stores, and --dry-run does nothing", resolution="leave one out"
        )
    repository = settings.open_repository()
    reporter = Quiet(settings.warnings) if settings.json else settings.reporter
    acts = not dry_run and (repository.keys.may(Right.COLLECT) or not heal_from)
    if acts:
        repository.keys.require(Right.COLLECT)
    suspects = find_suspects(repository, settings.state_directory, reporter, read_data=read_data)
    done, healed = None, None
    if acts:
        result = repair(repository, suspects, RepairOptions(accept_loss=accept_loss), reporter)
        plan, done = result.plan, result.done
    else:
        plan = plan_repair(repository, suspects)
    if heal_from and plan.harmed:
        healed = _heal(settings, repository, heal_from, suspects, reporter)
    _show(settings, plan, done, healed, dry_run=dry_run)
    left = healed.left if healed else plan
    if left.lost and not repository.keys.may(Right.READ):
        click.echo(
            f"note: a {repository.keys.role} key cannot open data, so some of what counts as lost may be "
            "unharmed: run repair with the passphrase of an admin",
            err=True,
        )
    # What was repaired is no reason for a warning at the end.
    repository.damage.clear()
    if not left.is_whole or (left.acts and not done):
        click.get_current_context().exit(EXIT_DAMAGE)


def _heal(
    settings: Settings, repository: Repository, name: str, suspects: frozenset[str], reporter: Reporter
) -> Healed:
    from blocksnap.operations.heal import heal_from
    from blocksnap.volumes.resolve import resolve_volume

    return heal_from(repository, resolve_volume(name), suspects, settings.state_directory, reporter)


def _show(
    settings: Settings, plan: RepairPlan, done: Repaired | None, healed: Healed | None, *, dry_run: bool
) -> None:
    left = healed.left if healed else plan
    if settings.json:
        print_json(_document(plan, done, healed, dry_run=dry_run))
        return
    bad = (*plan.segments, *plan.packs, *plan.manifests, *plan.documents)
    for each in bad if settings.verbosity >= 0 else (*plan.manifests, *plan.documents):
        click.echo(f"damaged: {each.name}: {each.reason}", err=True)
    _show_losses(left)
    if settings.verbosity >= 0:
        would = "would be " if dry_run else ""
        if dry_run or done:
            click.echo(
                f"{format_size(plan.rescued_bytes)} of unharmed frames {would}copied, "
                f"{len(plan.listed)} packs {would}listed again, "
                f"{len(plan.packs)} packs and {len(plan.segments)} index segments {would}set aside"
            )
        if healed:
            click.echo(_describe_healed(healed))
        if left.is_whole:
            click.echo(f"{left.backups} backups are whole" if not left.acts or done else "nothing is lost")
        else:
            click.echo(_describe_losses(left))


def _show_losses(plan: RepairPlan) -> None:
    for harmed in plan.harmed:
        for loss in harmed.first:
            click.echo(f"lost: {harmed.who}: {loss.place}", err=True)
        if harmed.left_out:
            click.echo(f"lost: {harmed.who}: {harmed.left_out}", err=True)
    for who in plan.unmapped:
        click.echo(
            f"lost: backup {who}: its set of mapped chunks; the next one compares everything", err=True
        )


def _describe_healed(healed: Healed) -> str:
    waiting = f"; {healed.waiting} wait for a repair by an admin or gc key" if healed.waiting else ""
    return (
        f"{healed.chunks} chunks and {healed.nodes} map nodes came back, "
        f"for {format_size(healed.read_bytes)} read{waiting}"
    )


def _describe_losses(plan: RepairPlan) -> str:
    lost = format_size(sum(each.size_bytes for each in plan.harmed))
    ranges = sum(each.ranges for each in plan.harmed)
    unreadable = f"; {len(plan.manifests)} manifests cannot be read" if plan.manifests else ""
    return f"LOST: {lost} of {len(plan.harmed)} backups in {ranges} ranges{unreadable}"


def _document(
    plan: RepairPlan, done: Repaired | None, healed: Healed | None, *, dry_run: bool
) -> dict[str, object]:
    left = healed.left if healed else plan

    def named(kind: str) -> list[dict[str, str]]:
        return [{"object": each.name, "reason": each.reason} for each in getattr(plan, kind)]

    return {
        "dry_run": dry_run,
        "done": done is not None,
        "whole": left.is_whole,
        "healed": _healed_document(healed),
        "backups": plan.backups,
        "copied_bytes": plan.rescued_bytes,
        "listed_packs": list(plan.listed),
        "bad_packs": named("packs"),
        "bad_segments": named("segments"),
        "bad_manifests": named("manifests"),
        "bad_documents": named("documents"),
        "losses": [{"backup": x.backup, "volume": x.volume, **x.extent} for x in left.losses],
        "harmed": [each.figures for each in left.harmed],
        "unmapped": list(left.unmapped),
    }


def _healed_document(healed: Healed | None) -> dict[str, int] | None:
    if healed is None:
        return None
    return {
        "chunks": healed.chunks,
        "nodes": healed.nodes,
        "read_bytes": healed.read_bytes,
        "waiting": healed.waiting,
    }
