"""Campaigns: tests that draw their cases at random, a few with every run of the tests and many in ``make fuzz``.

Environment:

CARAFE_FUZZ        long for the counts of ``make fuzz``, whose figures go into docs/reliability.json; by default short.
CARAFE_FUZZ_SEED   where the draws begin, by default 0: the same seed draws the same cases.
CARAFE_FUZZ_<NAME> a count of its own for the campaign of that name, such as CARAFE_FUZZ_OPERATORS=10000.

A test takes the fixture ``campaign`` and counts what it did; a campaign's counts are summed over tests and processes:

    def test_mutations(campaign):
        tally = campaign("annotations")
        for case in range(count("annotations", short=500, long=5000)):
            tally(mutations=1)
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from carafe_plugin._version import __version__

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "reliability.json"
FORM = os.environ.get("CARAFE_FUZZ") or "short"
if FORM not in ("short", "long"):
    raise pytest.UsageError(f"CARAFE_FUZZ must be short or long, got {FORM!r}")
SEED = int(os.environ.get("CARAFE_FUZZ_SEED") or 0)
_PROPERTY = "campaign "  # before its name in the properties of a test, which xdist's processes send home


def count(name: str, short: int, long: int) -> int:
    """How many cases of the campaign to draw."""
    return int(os.environ.get(f"CARAFE_FUZZ_{name.upper()}") or (long if FORM == "long" else short))


def update_figures(name: str, figures: Mapping[str, Any]) -> None:
    """Put a campaign's figures, and what it ran on, in the place of its last ones."""
    versions = dict(carafe_plugin=__version__, torch=torch.__version__, python=platform.python_version())
    descriptor = os.open(FIGURES.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # campaigns may end at the same time
        figures = dict(figures, seed=SEED, date=time.strftime("%Y-%m-%d"), versions=versions)
        known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        unfinished = FIGURES.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps({**known, name: figures}, indent=2, sort_keys=True) + "\n")
        unfinished.replace(FIGURES)
    finally:
        os.close(descriptor)


@pytest.fixture
def campaign(record_property: Callable[[str, object], None]) -> Callable[[str], Callable[..., None]]:
    """``campaign(name)`` is a function that adds to the campaign's counts: ``tally(mutations=1, refused=1)``."""

    def begin(name: str) -> Callable[..., None]:
        counts: dict[str, int] = {}
        record_property(_PROPERTY + name, counts)  # now: a test that fails counts too

        def tally(**more: int) -> None:
            for key, number in more.items():
                counts[key] = counts.get(key, 0) + number

        return tally

    return begin


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Sum up the campaigns; in the long form, keep the figures."""
    campaigns: dict[str, dict] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, counts in report.user_properties if report.when == "call" else ():
                if not key.startswith(_PROPERTY):
                    continue
                figures = campaigns.setdefault(key.removeprefix(_PROPERTY), dict(counts={}, seconds=0.0, failed=[]))
                for item, number in counts.items():
                    figures["counts"][item] = figures["counts"].get(item, 0) + number
                figures["seconds"] = round(figures["seconds"] + report.duration, 1)
                figures["failed"] += [report.nodeid] if outcome == "failed" else []
    for name, figures in sorted(campaigns.items()):
        counts = ", ".join(f"{number} {item}" for item, number in figures["counts"].items())
        line = f"campaign {name}, seed {SEED}: {counts}; {len(figures['failed'])} failed; {figures['seconds']} s"
        terminalreporter.write_line(line)
        if FORM == "long":
            update_figures(name, figures)
