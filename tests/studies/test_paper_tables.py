"""studies.paper_tables: all tables, what their models cost, results of ours where there are any, mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tool_runs import ROOT, call_tool, one_line

pytest.importorskip("mmdet", reason="tools: mmdet is not installed")
pytest.importorskip("mmpretrain", reason="tools: mmpretrain is not installed")

from studies.paper_tables import pages
from studies.paper_tables import rows as paper_rows

GUM = "configs/paper/table-04_upsampling/gum.py"
GENERATED = pages.pages(paper_rows.read_tables(), paper_rows.read_costs())


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert call_tool("studies.paper_tables.__main__", *arguments) == 0
    return capsys.readouterr().out


def lines_of(text: str, method: str) -> list[list[str]]:
    """The cells of the lines of a method."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip().startswith(f"{method}  ")]


def test_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    tables = paper_rows.read_tables()
    assert re.findall(r"^Table (\d+):", text, re.MULTILINE) == [str(number) for number in tables]
    assert "?" not in text, "a config has changed: run studies.paper_tables --measure"
    for row in (row for table in tables.values() for row in table.rows):
        assert any(cells[0] == row.method for cells in lines_of(text, row.method)), row
    (gum,) = [cells for cells in lines_of(text, "GUM") if cells[1] == "36.9"]  # Table 6 has one as well
    assert gum == ["GUM", "36.9", "58.9", "39.7", "21.5", "40.6", "48.1", "11.8", *gum[8:10], "not run", GUM]


def test_figures_have_the_papers_digits(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--table", 8, "--table", 11)
    (upernet,) = lines_of(text, "UperNet, ResNet-50")
    assert upernet[1:3] == ["40.44", "79.80"]
    (psanet,) = lines_of(text, "PSANet, ResNet-50")
    assert psanet[1:3] == ["41.92", "80.17"]
    assert float(psanet[3]) > 50
    assert psanet[4] == "-", "its FLOPs are not counted"
    assert lines_of(text, "Cm = 64")[0][1] == "37.8"


def test_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--table", 12)
    assert re.findall(r"^Table (\d+):", text, re.MULTILINE) == ["12"]


def test_costs_are_the_operators_own() -> None:
    """What Table 4's operators add to the parameters of the plain FPN, three times: weights and biases."""
    costs = paper_rows.read_costs()
    rows = {row.method: costs[row.config] for row in paper_rows.read_tables()[4].rows}
    conv = 256 * 256 * 9 + 256
    expected = {
        "Nearest": 0,
        "Bilinear": 0,
        "Nearest + Conv": conv,
        "Bilinear + Conv": conv,
        "Deconv": conv,
        "Pixel Shuffle": 4 * conv,
        "GUM": 256 * 9 * 8 + 8,
        "Spatial Attention": 256 * 9 + 1,
        "CARAFE++": 256 * 64 + 64 + 64 * 9 * 100 + 100,
    }
    plain = rows["Nearest"]["parameters"]
    assert {method: cost["parameters"] - plain for method, cost in rows.items()} == {
        k: 3 * v for k, v in expected.items()
    }
    # The maps that are upsampled: an image of 800 x 1333 is padded to 800 x 1344. Nearest costs 1 for each value.
    sources = 25 * 42 + 50 * 84 + 100 * 168
    assert rows["Deconv"]["flops"] - rows["Nearest"]["flops"] == (256 * 256 * 9 - 4 * 256) * sources
    assert rows["Nearest + Conv"]["flops"] - rows["Nearest"]["flops"] == 4 * 256 * 256 * 9 * sources
    assert {tuple(cost["shape"]) for cost in rows.values()} == {(800, 1333)}


def test_measures_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config whose text has changed, and no other; the count is the one that is kept."""
    kept = paper_rows.read_costs()
    wanted = "mmpretrain/resnet50-carafe_16xb64_in1k.py"
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(kept | {wanted: kept[wanted] | {"digest": "another", "parameters": 1}}))
    measured = []
    measure = paper_rows.measure
    monkeypatch.setattr(
        paper_rows, "measure", lambda config, counted: measured.append(config) or measure(config, counted)
    )
    assert call_tool("studies.paper_tables.__main__", "--table", 2, "--measure", "--costs", file) == 0
    assert measured == [wanted]
    assert json.loads(file.read_text()) == kept
    uncounted = paper_rows.measure("mmpretrain::resnet/resnet18_8xb32_in1k.py", counted=False)
    assert uncounted["flops"] is None
    assert uncounted["parameters"] == 11_689_512


def test_digest_follows_the_files_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_rows, "CONFIGS", tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "row.py").write_text('_base_ = ["../base.py", "mmdet::x.py"]\n')
    (tmp_path / "base.py").write_text('_base_ = __import__("mmseg").__path__[0] + "/.mim/x.py"\nvalue = 1\n')
    digest = paper_rows.digest("sub/row.py")
    assert paper_rows.digest("sub/row.py") == digest
    (tmp_path / "base.py").write_text("value = 2\n")
    assert paper_rows.digest("sub/row.py") != digest


def test_results_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = tmp_path / "logged.json"
    logged.write_text(json.dumps({"coco/bbox_mAP": 0.371, "coco/bbox_mAP_50": 0.5912, "data_time": 0.1}))
    results = tmp_path / "results"
    text = printed(capsys, "--table", 4, "--record", ROOT / GUM, logged, "--results", results)
    ours = {cells[0]: cells[10] for method in ("GUM", "Bilinear") for cells in lines_of(text, method)}
    assert ours == {"GUM": "37.10 / 59.12 / - / - / - / - / -", "Bilinear": "not run"}
    (kept,) = results.iterdir()
    assert json.loads(kept.read_text())["config"] == GUM
    # One config, several tables; and the mask's figures are not the box's.
    logged.write_text(json.dumps({"coco/bbox_mAP": 0.4, "coco/segm_mAP": 0.35}))
    config = "configs/mmdet/mask-rcnn_r50_fpn_carafe-mask-head_1x_coco.py"
    text = printed(capsys, "--table", 6, "--table", 7, "--record", ROOT / config, logged, "--results", results)
    assert "35.00 / -" in lines_of(text, "CARAFE++")[0][-2]
    assert [cells[-2].partition(" ")[0] for cells in lines_of(text, "mask head")] == ["40.00"]


def test_results_of_inpainting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = tmp_path / "logged.json"
    logged.write_text(json.dumps({"inpainting/l1": 5.914, "inpainting/psnr": 20.6, "inpainting/ssim": 0.7}))
    config = "configs/inpainting/partial-conv-carafe_places365-256x256.py"
    text = printed(capsys, "--table", 10, "--record", ROOT / config, logged, "--results", tmp_path / "results")
    (row,) = lines_of(text, "Partial Conv w/ CARAFE++")
    assert row == ["Partial Conv w/ CARAFE++", "5.60", "21.05", "5.93", "39.8", "5.91 / 20.60", config]


def test_cost_of_inpainting_is_the_generators(tmp_path: Path) -> None:
    """Parameters and FLOPs of the README's table, which leaves the discriminator out."""
    costs = paper_rows.read_costs()
    found = [costs[row.config] for row in paper_rows.read_tables()[10].rows]
    assert [cost["parameters"] for cost in found] == [6_069_155, 5_932_893, 5_780_835, 5_931_293]
    assert [f"{cost['flops'] / 1e9:.1f}" for cost in found] == ["32.6", "39.9", "37.9", "39.8"]
    wanted = paper_rows.read_tables()[10].rows[1].config
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({key: cost for key, cost in costs.items() if key != wanted}))
    assert call_tool("studies.paper_tables.__main__", "--table", 10, "--measure", "--costs", file) == 0
    assert json.loads(file.read_text()) == costs


def test_digest_follows_a_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``_base_`` in the same folder has no dot in front."""
    monkeypatch.setattr(paper_rows, "CONFIGS", tmp_path)
    (tmp_path / "row.py").write_text('_base_ = "neighbour.py"\n')
    (tmp_path / "neighbour.py").write_text("value = 1\n")
    digest = paper_rows.digest("row.py")
    (tmp_path / "neighbour.py").write_text("value = 2\n")
    assert paper_rows.digest("row.py") != digest


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_files_have_the_figures(path: Path) -> None:
    """READMEs, metafiles and docs/paper_tables.md are what ``--write`` makes of the tables."""
    assert path.read_text() == GENERATED[path], "run python -m studies.paper_tables --write"


def test_every_repeated_figure_is_written_from_the_tables() -> None:
    """With all figures of the paper changed in the tables, every file that repeats them changes, and nothing else."""
    tables = paper_rows.read_tables()
    figures = 0
    for table in tables.values():
        for row in table.rows:
            row.paper[:] = [[12.34 if isinstance(value, float) else value for value in line] for line in row.paper]
    for path, text in pages.pages(tables, paper_rows.read_costs()).items():
        if path.name == "metafile.yml":
            quoted = [number for number in re.findall(r"^          .+: ([\d.]+)$", text, re.MULTILINE)]
        elif path == pages.PAGE:
            continue
        else:
            blocks = re.findall(f"{pages.START}(.*?){pages.END}", text, re.DOTALL)
            quoted = re.findall(r"\d+\.\d+", re.sub(r"\S+\.py\S*", "", "".join(blocks)))
        assert set(quoted) <= {"12.3", "12.34"}, path
        figures += len(quoted)
    assert figures > 150


def test_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what differs is written; notes behind figures and the text around the tables stay."""
    readme = tmp_path / "mmseg" / "README.md"
    readme.parent.mkdir()
    link = "[r50_carafe-upernet-ppm-fpn_20e_ade20k.py](r50_carafe-upernet-ppm-fpn_20e_ade20k.py)"
    table = "| configuration | PPM | mIoU, paper |\n|---|---|---|\n| {link} | x | {cell}|"
    text = f"Words, 40.44.\n\n{{start}}\n{table}\n\n{{end}}\nMore.\n"
    values = dict(start=pages.START, end=pages.END, link=link)
    readme.write_text(text.format(cell="99.9 * ", **values))
    metafile = tmp_path / "mmseg" / "metafile.yml"
    metafile.write_text("Models: []\n")
    monkeypatch.setattr(pages, "CONFIGS", tmp_path)
    monkeypatch.setattr(pages, "PAGE", tmp_path / "page.md")
    out = printed(capsys, "--write")
    assert "README.md" in out
    assert "metafile.yml" not in out
    assert readme.read_text() == text.format(cell="41.55 * ", **values)
    assert "## Table 10: Image inpainting" in (tmp_path / "page.md").read_text()
    assert "Written" not in printed(capsys, "--write")
    readme.write_text(text.format(cell="", **(values | {"link": "MMSegmentation's `absent.py`"})))
    assert call_tool("studies.paper_tables.__main__", "--write") == 2
    assert "expected the name of one config of configs/paper/tables.yml, got MMSegmentation's" in one_line(capsys)


def test_page_of_all_tables(tmp_path: Path) -> None:
    page = tmp_path / "tables.md"
    assert call_tool("studies.paper_tables.__main__", "--markdown", page) == 0
    assert page.read_text() == pages.PAGE.read_text()
    links = re.findall(r"\]\(\.\./(\S+?)\)", page.read_text())
    assert len(links) > 60
    assert all((ROOT / link).exists() for link in links)


def test_unknown_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_tool("studies.paper_tables.__main__", "--table", "15") == 2
    expected = r"error: argument --table: invalid choice: 15 \(choose from 1, 2, .*14\)"
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--table", "10", "--write"], r"--write writes all tables into docs/paper_tables\.md: leave out --table"),
        (["--markdown", "nowhere/page.md"], r"--markdown: no folder nowhere to write page\.md into"),
        (["--record", "configs/demo/upernet_r18_scenes.py", "{good}"], r"--record: .* is not the config of a row"),
        (
            ["--record", GUM, "{broken}"],
            r"cannot read .*broken\.json .9 bytes; .*: line 1 column 2",
        ),
        (["--record", GUM, "{foreign}"], r"--record: .*foreign\.json has none of the metrics"),
        (["--record", GUM, "absent.json"], r"cannot read absent\.json: No such file"),
    ],
)
def test_mistakes(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    for name, text in (("good", '{"mIoU": 40}'), ("broken", '{"coco/bb'), ("foreign", '{"mIoU": 40}')):
        (tmp_path / f"{name}.json").write_text(text)
    files = {name: str(tmp_path / f"{name}.json") for name in ("good", "broken", "foreign")}
    arguments = [argument.format(**files) for argument in arguments]
    assert call_tool("studies.paper_tables.__main__", *arguments, "--results", tmp_path) == 2
    assert re.fullmatch(f"error: {expected}.*", one_line(capsys))
