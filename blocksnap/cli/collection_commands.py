"""forget and prune."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import format_size, format_time, print_json, print_table, printable
from blocksnap.cli.parameters import NumberRange
from blocksnap.errors import UsageError
from blocksnap.quantities import parse_size

if TYPE_CHECKING:
    from blocksnap.operations.forget import ForgetPlan
    from blocksnap.repository.collector import Outcome, Plan
    from blocksnap.repository.fencing import Run
    from blocksnap.retention import Policy

EXIT_BUSY = 11


@click.command("forget")
@click.argument("backups", nargs=-1, metavar="[BACKUP]...")
@click.option(
    "--job", metavar="NAME", help="What this host backed up for a configured job, by its retention."
)
@click.option("--keep-last", metavar="N", help="Keep the newest N.")
@click.option("--keep-hourly", metavar="N", help="Keep the last of each of the newest N hours that have one.")
@click.option("--keep-daily", metavar="N", help="Likewise of days.")
@click.option("--keep-weekly", metavar="N", help="Likewise of ISO weeks.")
@click.option("--keep-monthly", metavar="N", help="Likewise of months.")
@click.option("--keep-yearly", metavar="N", help="Likewise of years.")
@click.option("--keep-within", metavar="SPAN", help="Keep what is younger than 36h, 14d, 8w, 6m, 1y6m.")
@click.option("--volume", "volumes", multiple=True, help="Only backups of volumes like this; * and ? match.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Only backups with this tag.")
@click.option("--zone", metavar="NAME", help="Time zone whose hours and days count; UTC if none is named.")
@click.option("--dry-run", is_flag=True, help="Say what would be forgotten, and why, and do nothing.")
@click.option("--force", is_flag=True, help="Also the newest of a volume, or most of its backups at once.")
@common_options
def forget_command(
    settings: Settings,
    *,
    backups: tuple[str, ...],
    job: str | None,
    volumes: tuple[str, ...],
    tags: tuple[str, ...],
    zone: str | None,
    dry_run: bool,
    force: bool,
    **keep: str | None,
) -> None:
    """Give up backups: those that are named, or those that no rule keeps.

    They are hidden at once. Their space comes back with the next: blocksnap prune
    """
    from datetime import UTC, datetime

    from blocksnap.operations.catalogue import this_origin
    from blocksnap.operations.forget import backups_arriving, execute_forget, plan_by_name, plan_by_policy
    from blocksnap.operations.reporting import Quiet

    rules = {name.removeprefix("keep_"): value for name, value in keep.items() if value is not None}
    if sum(map(bool, (backups, rules, job))) != 1:
        raise UsageError(
            "forget needs either backups, or rules, or a job",
            resolution="name backups, or say what to keep, as in: --keep-daily 14 --keep-monthly 12",
        )
    if not rules and (volumes or tags or zone):
        # Passed over, they would make somebody believe that they narrow what is forgotten.
        raise UsageError(
            "--volume, --tag and --zone say what the rules of --keep-... are about",
            resolution="leave them out: a job has all of this in its retention"
            if job
            else "leave them out, or say what to keep instead of naming backups",
        )
    if job:
        settings, policy = _policy_of_job(settings, job)
    elif rules:
        policy = _policy_of_rules(rules, volumes, tags, zone or "UTC")
    repository = settings.open_repository()
    report = Quiet(settings.warnings) if settings.json else settings.reporter
    arriving = backups_arriving(settings.state_directory)
    if backups:
        plan = plan_by_name(repository, backups, arriving=arriving, force=force)
    else:
        origin, now = this_origin() if job else None, datetime.now(UTC)
        plan = plan_by_policy(
            repository, policy, now, origin=origin, arriving=arriving, force=force, report=report
        )
    if not dry_run:
        execute_forget(repository, plan)
    _show_forget(settings, plan, dry_run=dry_run)


@click.command("prune")
@click.option(
    "--max-dead",
    type=NumberRange(min=0, max=100),
    default=25.0,
    show_default=True,
    metavar="PERCENT",
    help="Rewrite packs with more garbage.",
)
@click.option("--max-repack", default="64G", show_default=True, help="Bytes to read and write again at most.")
@click.option(
    "--wait",
    type=NumberRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for backups that are being taken.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and why, and do nothing.")
@common_options
def prune_command(
    settings: Settings, *, max_dead: float, max_repack: str, wait: float, dry_run: bool
) -> None:
    """Give back the space of forgotten backups and of interrupted runs.

    Backups and restores may go on meanwhile. What cannot be finished now, because a backup is being taken
    that may need it, is finished by the next prune (exit code 11).
    """
    from blocksnap.operations.prune import plan_prune, prune
    from blocksnap.repository.victims import Limits

    limits = Limits(dead_percent=max_dead, copy_bytes=parse_size(max_repack))
    repository = settings.open_repository()
    if dry_run:
        _show_plan(settings, plan_prune(repository, limits))
        return
    outcome = prune(repository, limits, settings.reporter, wait_seconds=wait)
    _show_outcome(settings, outcome)
    if outcome.state == "waiting":
        click.get_current_context().exit(EXIT_BUSY)


def _policy_of_rules(
    rules: dict[str, str], volumes: tuple[str, ...], tags: tuple[str, ...], zone: str
) -> Policy:
    from blocksnap.retention import Keep, Policy, Rule, parse_zone

    rule = Rule(Keep.parse(rules), volumes, dict(map(_parse_tag, tags)))
    return Policy((rule,), parse_zone(zone))


def _policy_of_job(settings: Settings, name: str) -> tuple[Settings, Policy]:
    """Return the policy of a job, and the settings with its repository; raises UsageError."""
    from blocksnap.config import JOB_TAG
    from blocksnap.retention import Policy, Rule, parse_zone

    settings, job = settings.of_job(name)
    if job.retention is None:
        raise UsageError(
            f"job {name} has no retention: all of its backups are kept",
            resolution=f"configure [jobs.{name}.retention], as in: daily = 14",
        )
    rule = Rule(job.retention.keep, tags={JOB_TAG: name})
    return settings, Policy((rule,), parse_zone(job.retention.zone))


def _parse_tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is not a tag", resolution="write it like --tag purpose=weekly")
    return key, value


def _show_forget(settings: Settings, plan: ForgetPlan, *, dry_run: bool) -> None:
    if settings.json:
        print_json(
            {
                "dry_run": dry_run,
                "forgotten": list(plan.forgotten),
                "warnings": settings.warnings,
                "decisions": [
                    {
                        "id": decision.candidate.id,
                        "volume": decision.candidate.name,
                        "host": decision.candidate.hostname,
                        "time": decision.candidate.time.isoformat(),
                        "keep": decision.keep,
                        "reasons": list(decision.reasons),
                    }
                    for decision in plan.decisions
                ],
            }
        )
        return
    if settings.verbosity < 0:
        return
    hosts = plan.hosts()
    rows = [
        (
            decision.candidate.id[:8],
            decision.candidate.name,
            hosts[decision.candidate.origin],
            format_time(decision.candidate.time),
            "keep" if decision.keep else "forget",
            "; ".join(decision.reasons),
        )
        for decision in plan.decisions
    ]
    without = () if len(hosts) > 1 else (2,)
    print_table(("ID", "VOLUME", "HOST", "TIME", "", "WHY"), rows, without=without)
    word = "would be forgotten" if dry_run else "forgotten"
    click.echo(f"{len(plan.forgotten)} of {len(plan.decisions)} {word}")


def _plan_document(plan: Plan) -> dict[str, object]:
    return {
        "backups": plan.backups,
        "nodes": plan.nodes,
        "manifests": list(plan.manifests),
        "freed_bytes": plan.choice.freed_bytes,
        "copied_bytes": plan.choice.copied_bytes,
        "packs": [
            {
                "name": decision.pack.name,
                "size": decision.pack.size,
                "needed_bytes": decision.pack.needed_bytes,
                "fate": decision.fate,
                "reason": decision.reason,
            }
            for decision in plan.choice.decisions
        ],
    }


def _show_plan(settings: Settings, plan: Plan) -> None:
    if settings.json:
        print_json({"dry_run": True, **_plan_document(plan)})
        return
    if settings.verbosity > 0:
        rows = [
            (d.pack.name.rpartition("-")[2][:12], format_size(d.pack.size), d.fate, d.reason)
            for d in plan.choice.decisions
        ]
        print_table(("PACK", "SIZE", "", "WHY"), rows, right=(1,))
    click.echo(f"{len(plan.manifests)} manifests and {_describe(plan)} would go")


def _describe(plan: Plan) -> str:
    choice = plan.choice
    return (
        f"{format_size(choice.freed_bytes)} in {len(choice.of('drop'))} packs whole and "
        f"{len(choice.of('copy'))} in part, for {format_size(choice.copied_bytes)} to copy"
    )


def _show_outcome(settings: Settings, outcome: Outcome) -> None:
    if settings.json:
        print_json(
            {
                "state": outcome.state,
                "plan": _plan_document(outcome.plan) if outcome.plan else None,
                "deleted_packs": list(outcome.sweep.packs) if outcome.sweep else [],
                "deleted_manifests": list(outcome.sweep.manifests) if outcome.sweep else [],
                "waiting_for": [run.writer for run in outcome.waiting],
            }
        )
        return
    if outcome.state == "waiting":
        names = ", ".join(_name_run(run) for run in outcome.waiting)
        click.echo(printable(f"nothing is deleted yet: a backup is being taken by {names}"), err=True)
        click.echo("fix:     run prune again when it is done, or with --wait SECONDS", err=True)
    elif settings.verbosity < 0:
        return
    elif outcome.sweep:
        freed = f"; {_describe(outcome.plan)}" if outcome.plan else ""
        click.echo(
            f"deleted {len(outcome.sweep.manifests)} manifests and {len(outcome.sweep.packs)} packs{freed}"
        )
    else:
        click.echo("nothing to prune")


def _name_run(run: Run) -> str:
    if run.record is None:
        return "a run that cannot be read"
    return f"{run.record.hostname} (pid {run.record.pid}, since {format_time(run.record.time)})"
