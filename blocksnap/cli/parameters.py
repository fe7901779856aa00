"""Kinds of parameters that several commands have."""

from __future__ import annotations

import math

import click


class NumberRange(click.FloatRange):
    """A number between two bounds; "nan", which no comparison finds outside of any, is none."""

    name = "number"

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number
