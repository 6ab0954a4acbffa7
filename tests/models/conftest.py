"""The table of other libraries' models: printed, and written into the file that CARAFE_LIBRARIES_TABLE names."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

_PROPERTY = "libraries "  # before a row in the properties of a test, which xdist's processes send home
COLUMNS = {
    "places": "CARAFE++",
    "difference": "outputs change by",
    "training": "trains",
    "saved": "saved and loaded",
    "compiled": "torch.compile",
    "onnx": "ONNX differs by",
}
BEGIN, END = "<!-- begin: make test-libraries -->", "<!-- end: make test-libraries -->"


@pytest.fixture(scope="session", autouse=True)
def no_network(tmp_path_factory):
    """Ultralytics neither asks for newer versions nor installs anything, and keeps its settings out of the home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def cell(record_property):
    """``cell(row, column=text)`` fills cells of the table, of tests that pass."""

    def fill(row, **cells):
        record_property(_PROPERTY + f"{row.library} | {row.name}", {"part": row.part_name, **cells})

    return fill


def pytest_terminal_summary(terminalreporter):
    rows = {}
    for report in terminalreporter.stats.get("passed", []):
        for key, cells in report.user_properties if report.when == "call" else ():
            if key.startswith(_PROPERTY):
                rows.setdefault(key.removeprefix(_PROPERTY), {}).update(cells)
    if not rows:
        return
    table = table_of(rows)
    terminalreporter.section("models of other libraries")
    terminalreporter.write_line(table)
    path = os.environ.get("CARAFE_LIBRARIES_TABLE")
    if path and not terminalreporter.stats.get("failed") and not terminalreporter.stats.get("error"):
        write(Path(path), table)


def table_of(rows):
    from library_models import MODELS  # in their order, whoever ran first

    lines = ["| library | model | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for model in MODELS:
        cells = rows.get(f"{model.library} | {model.name}")
        if cells is not None:
            name = f"{model.name} ({cells['part']})" if cells["part"] else model.name
            values = [str(cells.get(column, "not run")) for column in COLUMNS]
            lines.append(" | ".join([f"| {model.library} {version(model.library)}", name, *values]) + " |")
    return "\n".join([f"With torch {torch.__version__}:", "", *lines])


def write(path, table):
    """Into the file's marked part, at once or not at all."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{path} must have {BEGIN} and {END}"
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    unfinished.replace(path)
