"""debug: what the engines of the extent diff see, without a repository or a snapshot."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blocksnap.cli.output import print_json_streaming

if TYPE_CHECKING:
    from blocksnap.operations.inspection import Report

_Command = TypeVar("_Command", bound=Callable[..., Any])


# Each engine's commands are in a module of their own, loaded when one of them is named.
_COMMANDS = {
    "compare": "debug_files",
    "fiemap-diff": "debug_files",
    "btrfs-diff": "debug_btrfs",
    "cow-extents": "debug_cow",
    "thin-diff": "debug_thin",
    "thin-extents": "debug_thin",
}


class _Engines(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            importlib.import_module(f"blocksnap.cli.{_COMMANDS[cmd_name]}")
        return super().get_command(ctx, cmd_name)


@click.group("debug", cls=_Engines)
def debug_command() -> None:
    """Show what the extent diff sees.

    Every command prints a line `begin length`, in bytes, for each extent that may differ; with --json
    also which engine answered, why, and how many seconds it took.
    """


def inspection_command(name: str) -> Callable[[_Command], click.Command]:
    """Make a command of a function that returns a Report; it gets the options of all of them."""

    def decorate(function: _Command) -> click.Command:
        @debug_command.command(name)
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
        @click.option("-q", "--quiet", is_flag=True, help="Print no extents, only what goes wrong.")
        @click.option("-v", "--verbose", is_flag=True, help="Say which engine answered, and why.")
        @functools.wraps(function)
        def wrapped(*, as_json: bool, quiet: bool, verbose: bool, **arguments: object) -> None:
            show_inspection(function(**arguments), as_json=as_json, quiet=quiet, verbose=verbose)

        return wrapped

    return decorate


def show_inspection(found: Report, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print what an engine answered."""
    if as_json:
        print_json_streaming(found.document())
        return
    if verbose:
        click.echo(f"{found.engine}: {found.reason}; {found.seconds:.3f} s", err=True)
    if not quiet:
        for line in found.lines():
            click.echo(line)
