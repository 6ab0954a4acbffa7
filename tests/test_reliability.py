"""docs/reliability.md: its bad inputs give the lines that it shows, its figures are those of the campaigns."""

import re

import pytest
from tool_runs import run

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
pytest.importorskip("mmseg", reason="tools: mmseg is not installed")
pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")

import reliability
from bad_inputs import BadInput, annotations, write_playground


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground")
    write_playground(folder)
    return folder


def test_the_page_shows_what_comes(playground):
    lines = reliability.run_all(playground)
    assert len(lines) >= 70
    commands = {case.command for _, case, _ in lines}
    assert len({(case.what, case.command) for _, case, _ in lines}) == len(lines)
    for name in ("train", "test", "infer", "inpaint", "browse_model", "prepare_data", "visualize_reassembly", "export"):
        assert any(f"tools/{name}.py" in command for command in commands), name
    text = reliability.PAGE.read_text()
    # What torch itself says, and which of its files, differs between its versions.
    of_torch = r"\(raised in torch\..*?\)|(?<=truncated or damaged\): ).*?(?=` \|$)"
    shown, come = (re.sub(of_torch, "", each, flags=re.M) for each in (text, reliability.page(text, lines)))
    assert come == shown, "run python tests/support/reliability.py --write"


def test_what_is_marked_is_written_anew():
    text = reliability.PAGE.read_text()
    page = reliability.page(text, [("group", BadInput("what", "command"), "a | line")])
    assert "| group | what | `command` | `a \\| line` |\n<!-- end -->" in page
    assert page.partition("<!-- bad inputs")[0] == text.partition("<!-- bad inputs")[0]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["train.py", "absent.py"], "no such configuration file: {folder}/absent.py"),
        (
            ["test.py", "own.py", "det.pth"],
            "test_dataloader (CocoDataset): {folder}/bad.json is not an annotation file in ",
        ),
    ],
)
def test_processes_of_their_own(command, line, playground):
    """Nothing but libraries' warnings comes before the line, and nothing after it."""
    annotations(lambda content: content.pop("images"))(playground)
    done = run(*command, cwd=playground)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"error: {line.format(folder=playground)}")
    assert not any(other.startswith("error") for other in before)
