"""What :func:`carafe_plugin.convert` did to a model, or would do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """A place where CARAFE++ is now.

    Attributes:
        name (str): of the module that stands there.
        was (str): what was there.
        becomes (str): what is there.
        init (str): what it starts as.
        keeps (bool): whether that is what was there, so that outputs stay the same.
        parameters (int): how many more there are.
        flops (int): how many more multiply-adds the example inputs take.
    """

    name: str
    was: str
    becomes: str
    init: str
    keeps: bool
    parameters: int
    flops: int


@dataclass(frozen=True)
class Kept:
    """Places that resize and were left as they are.

    Attributes:
        names (tuple[str, ...]): of all places in one module that were left for one reason.
        was (str): what is there.
        reason (str): why it stays.
    """

    names: tuple[str, ...]
    was: str
    reason: str

    def __str__(self) -> str:
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return f"{self.names[0]}{more} ({self.was}): {self.reason}"


@dataclass(frozen=True)
class Report:
    """What was replaced, what was not and why; as a string, a table.

    Attributes:
        replaced (tuple[Replaced, ...]): in the order of the model's modules.
        kept (tuple[Kept, ...]): likewise.
        difference (float | None): the largest between the outputs on the example inputs before and after, relative to
            the largest output or 1. None after a dry run, and where shapes differ, as those of a detector's boxes may.
        dry_run (bool): whether the model was left as it was.
    """

    replaced: tuple[Replaced, ...]
    kept: tuple[Kept, ...]
    difference: float | None
    dry_run: bool

    @property
    def parameters(self) -> int:
        """How many more parameters the model has."""
        return sum(place.parameters for place in self.replaced)

    @property
    def flops(self) -> int:
        """How many more multiply-adds the example inputs take."""
        return sum(place.flops for place in self.replaced)

    def __str__(self) -> str:
        rows = [("place", "was", "becomes", "starts as", "parameters", "multiply-adds")]
        for place in self.replaced:
            start = place.init if place.keeps else f"{place.init} (changes outputs)"
            counts = (f"{place.parameters:+,}", _millions(place.flops))
            rows.append((place.name, place.was, place.becomes, start, *counts))
        rows.append(
            ("together", "", f"{len(self.replaced)} CARAFE++", "", f"{self.parameters:+,}", _millions(self.flops))
        )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.dry_run:
            lines.append("dry run: the model is as it was")
        elif self.difference is not None:
            lines.append(f"largest change of the outputs on the example inputs: {self.difference:.1e}")
        lines += [f"kept {place}" for place in self.kept]
        return "\n".join(lines)


def _millions(flops: int) -> str:
    return f"{flops / 1e6:+,.1f} M"
