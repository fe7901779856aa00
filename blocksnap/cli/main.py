"""The command line: finds the command, runs it, and turns its end into an exit code.

Commands are loaded when they are named, so that ``blocksnap --version`` loads none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from typing import NoReturn

import click

import blocksnap
from blocksnap.cli.ending import Ended, end_before, ended_by_signals
from blocksnap.errors import BlocksnapError, UnforeseenError

_COMMANDS = {
    "init": "repository_commands",
    "volumes": "volume_commands",
    "backup": "volume_commands",
    "list": "repository_commands",
    "show": "repository_commands",
    "restore": "restore_commands",
    "label": "label_commands",
    "mount": "image_commands",
    "files": "image_commands",
    "serve": "serve_commands",
    "drill": "drill_commands",
    "report": "drill_commands",
    "verify": "volume_commands",
    "check": "check_commands",
    "repair": "repair_commands",
    "forget": "collection_commands",
    "prune": "collection_commands",
    "key": "key_commands",
    "doctor": "doctor_commands",
    "timers": "timer_commands",
    "config": "config_commands",
    "debug": "debug_commands",
}
EXIT_WARNINGS = 3

_EXIT_CODES = """\
\b
Exit codes:
  0  done                         12  wrong passphrase
  1  failed                       13  damage found
  2  wrong usage                  14  the volume or its snapshot cannot be backed up
  3  done with warnings           15  quiescing refused
 10  no such repository          130  interrupted (Ctrl-C)
 11  busy: another run holds it  143  terminated (SIGTERM)
Any other code means failure."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        loaded = importlib.import_module(f"blocksnap.cli.{module}")
        command: click.Command = getattr(loaded, f"{cmd_name}_command")
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXIT_CODES,
)
@click.version_option(blocksnap.__version__, "-V", "--version", message="blocksnap %(version)s")
def cli() -> None:
    """Hot, incremental, block-level backups of LVM volumes.

    Takes a snapshot, reads only the blocks that changed, and stores them deduplicated, compressed
    and encrypted in a repository. Start with: blocksnap init --repo DIR, then
    blocksnap backup --repo DIR VG/LV.
    """


def main() -> NoReturn:
    """Run the command line and exit."""
    # A name that is no text is no reason to fail when everything is done.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        with ended_by_signals():
            return _run(arguments)
    except Ended as err:
        # It arrived while another end was being told.
        return err.exit_code


def _run(arguments: list[str]) -> int:
    try:
        code = cli.main(args=arguments, prog_name="blocksnap", standalone_mode=False)
        sys.stdout.flush()
    except BlocksnapError as err:
        return _fail(err, end_before(err), arguments)
    except click.ClickException as err:
        err.show()
        _tell_json(arguments, "UsageError", err.format_message(), exit_code=err.exit_code)
        return err.exit_code
    except (Ended, KeyboardInterrupt, click.Abort) as err:
        ended = err if isinstance(err, Ended) else Ended(signal.SIGINT)
        _say_how(ended)
        _tell_json(arguments, "Ended", ended.word, exit_code=ended.exit_code)
        return ended.exit_code
    except BrokenPipeError as err:
        # Whoever read our output has gone; Python must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        before = end_before(err)
        return before.exit_code if before is not None else 1
    except (OSError, UnicodeError) as err:
        return _fail(UnforeseenError(err), end_before(err), arguments)
    return code if isinstance(code, int) else 0


def _say_how(ended: Ended) -> None:
    click.echo(f"{ended.word}: what was not reported as done was not committed", err=True)


def _fail(err: BlocksnapError, ended: Ended | None, arguments: list[str]) -> int:
    """Tell what failed; the exit code is that of the signal before it, if one had begun to end the run."""
    from blocksnap.cli.output import printable

    exit_code = err.exit_code if ended is None else ended.exit_code
    click.echo(printable(f"error: {err.brief}"), err=True)
    if err.details:
        click.echo(printable(err.details), err=True)
    if err.resolution:
        click.echo(printable(f"fix:   {err.resolution}"), err=True)
    _tell_json(
        arguments,
        type(err).__name__,
        err.brief,
        details=err.details,
        resolution=err.resolution,
        exit_code=exit_code,
    )
    if ended is not None:
        _say_how(ended)
    return exit_code


def _tell_json(arguments: list[str], error: str, message: str, **facts: object) -> None:
    if "--json" in arguments:
        from blocksnap.cli.output import print_json_line

        # Standard output itself may be what failed.
        with contextlib.suppress(OSError):
            print_json_line({"event": "error", "error": error, "message": message, **facts})
