"""docs/reliability.md: the campaigns' figures and the bad inputs with their lines, between marks.

``python tests/support/reliability.py --write`` brings both up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bad_inputs import CASES, BadInput, line_of, run_case, write_playground  # noqa: E402

from carafe_plugin.engine.console import markdown_table  # noqa: E402

PAGE, FIGURES = ROOT / "docs" / "reliability.md", ROOT / "docs" / "reliability.json"
Line = tuple[str, BadInput, str]


def run_all(folder: Path) -> list[Line]:
    """Every bad input of the playground `folder`: its group, the case, its line. Other exit codes than 2 fail."""
    lines = []
    for group, entries in CASES.items():
        for entry in entries:
            case = BadInput(*entry)
            code, output = run_case(case, folder)
            assert code == 2, f"exit code {code}: {case.command}: {output[-2000:]}"
            assert "Traceback" not in output, output
            lines.append((group, case, line_of(output)))
    return lines


def page(old: str, lines: Iterable[Line]) -> str:
    """The page's text with both marked parts filled."""
    return _fill(_fill(old, "figures", figures()), "bad inputs", bad_inputs(lines))


def _fill(text: str, name: str, content: str) -> str:
    return re.sub(
        f"(<!-- {name}.*?-->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL
    )


def figures() -> str:
    """What the last long campaigns counted."""
    rows = []
    for name, campaign in sorted(json.loads(FIGURES.read_text()).items()):
        counts = ", ".join(f"{number:,} {item}" for item, number in campaign["counts"].items())
        rows.append([name, counts, str(len(campaign["failed"])), f"{campaign['seconds']:,.0f}", campaign["date"]])
    return markdown_table(["campaign", "what it did", "tests failed", "seconds", "date"], rows)


def bad_inputs(lines: Iterable[Line]) -> str:
    """A table of all bad inputs."""
    rows, last = [], ""
    for group, case, line in lines:
        rows.append([group if group != last else "", case.what, _code(case.command), _code(line)])
        last = group
    return markdown_table(["", "what is wrong", "command", "line"], rows)


def _code(text: str) -> str:
    marks = "``" if "`" in text else "`"
    return f"{marks}{text}{marks}".replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    from carafe_plugin.openmmlab import mmcv_ops

    mmcv_ops.install()
    with TemporaryDirectory() as folder:
        write_playground(Path(folder))
        PAGE.write_text(page(PAGE.read_text(), run_all(Path(folder))))
