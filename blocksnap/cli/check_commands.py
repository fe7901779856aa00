"""check."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from blocksnap.cli.context import EXIT_WARNINGS, Settings, common_options
from blocksnap.cli.output import format_size, print_json, printable
from blocksnap.errors import UsageError
from blocksnap.quantities import parse_size

if TYPE_CHECKING:
    from blocksnap.repository.findings import CheckResult
    from blocksnap.repository.scrubbing import Budget

EXIT_DAMAGE = 13
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|min|h|d)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_budget(text: str) -> Budget:
    """Return how much is to be read: bytes like ``500G``, or time like ``90m`` or ``2h``.

    A lower-case m is a minute. Raises UsageError.
    """
    from blocksnap.repository.scrubbing import Budget

    duration = _DURATION.fullmatch(text)
    if duration:
        return Budget(seconds=float(duration[1]) * _SECONDS[duration[2]])
    try:
        return Budget(size_bytes=parse_size(text))
    except UsageError as err:
        raise UsageError(
            f"{text!r} is neither a size nor a time",
            resolution="write it like 500G (bytes), or like 90m or 2h (time)",
        ) from err


@click.command("check")
@click.option(
    "--level",
    type=click.IntRange(1, 4),
    help="1: index against packs. 2 (default): and walk all maps. 3: and every pack's hash. "
    "4: and open every frame.",
)
@click.option("--read-data", is_flag=True, help="Read and verify every stored byte: --level 4.")
@click.option("--scrub", is_flag=True, help="Compare every pack with the hash in its name: --level 3.")
@click.option(
    "--keyless", is_flag=True, help="Only that, without opening the repository: takes no passphrase."
)
@click.option(
    "--budget", metavar="SIZE|TIME", help="Read packs up to 500G or for 90m; the rest is left for next time."
)
@click.option(
    "--max-age", metavar="AGE", help="Leave out packs that were found good within 36h, 14d, 8w, 6m."
)
@common_options
def check_command(
    settings: Settings,
    *,
    level: int | None,
    read_data: bool,
    scrub: bool,
    keyless: bool,
    budget: str | None,
    max_age: str | None,
) -> None:
    """Check that the repository is sound and every backup can be restored.

    What was read is remembered, on this host and in the repository: with --budget, what was not read for the
    longest time comes first. Backups, restores and prune may go on meanwhile.
    """
    from blocksnap.operations.check import CheckOptions, check_repository, check_without_key
    from blocksnap.operations.reporting import Quiet
    from blocksnap.repository.scrubbing import Budget
    from blocksnap.retention import Span

    options = CheckOptions(
        level=_level(level, read_data=read_data, scrub=scrub, keyless=keyless),
        budget=parse_budget(budget) if budget else Budget(),
        good_since=Span.parse(max_age).before(datetime.now(UTC)) if max_age else None,
    )
    if options.level < 3 and (budget or max_age):
        raise UsageError(
            "--budget and --max-age say what of the packs to read, and this level reads none",
            resolution="add --scrub or --read-data",
        )
    reporter = Quiet(settings.warnings) if settings.json else settings.reporter
    if keyless:
        result = check_without_key(settings.open_backend(), settings.state_directory, options, reporter)
    else:
        repository = settings.open_repository()
        result = check_repository(repository, settings.state_directory, options, reporter)
    _show_check(settings, result)
    if result.damaged:
        click.get_current_context().exit(EXIT_DAMAGE)
    if not result.complete:
        click.get_current_context().exit(EXIT_WARNINGS)


def _level(level: int | None, *, read_data: bool, scrub: bool, keyless: bool) -> int:
    named = {4} if read_data else set[int]()
    named |= {3} if scrub or keyless else set[int]()
    named |= {level} if level is not None else set[int]()
    if len(named) > 1:
        raise UsageError(
            "several levels are asked for", resolution="give one of --level, --read-data and --scrub"
        )
    return named.pop() if named else 2


def _show_check(settings: Settings, result: CheckResult) -> None:
    if settings.json:
        print_json(
            {
                "damaged": result.damaged,
                "level": result.level,
                "backups": result.backups,
                "nodes": result.nodes,
                "chunks": result.chunks,
                "packs": result.packs,
                "packs_read": result.packs_read,
                "packs_left": result.packs_left,
                "read_bytes": result.read_bytes,
                "findings": [
                    {"severity": f.severity, "object": f.object, "message": f.message}
                    for f in result.findings
                ],
                "losses": [{"backup": x.backup, "volume": x.volume, **x.extent} for x in result.losses],
                "harmed": [each.figures for each in result.harmed],
            }
        )
    elif settings.verbosity < 0:
        for finding in result.findings:
            if finding.severity != "garbage":
                click.echo(printable(f"{finding.severity}: {finding.object}: {finding.message}"), err=True)
    else:
        looked = f"{result.packs} packs"
        if result.backups:
            looked = f"{result.backups} backups, {result.nodes} nodes, {result.chunks} chunks, {looked}"
        read = f", {format_size(result.read_bytes)} read" if result.level > 2 else ""
        left = f", {result.packs_left} packs left for next time" if result.packs_left else ""
        click.echo(f"{'DAMAGED' if result.damaged else 'sound'}: {looked}{read}{left}")
