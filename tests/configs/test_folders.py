"""Each folder's files agree with one another: configurations, metafile, README. No toolbox is needed for this."""

import re

import pytest
import yaml
from config_table import CONFIGS, MODULES, in_folder

ROOT = CONFIGS.parent
TOOLBOX_FOLDERS = ["mmdet", "mmpretrain", "mmseg"]
LISTED_FOLDERS = [*TOOLBOX_FOLDERS, "real"]


def test_no_configuration_is_left_out():
    folders = [*LISTED_FOLDERS, "demo"]  # test_paper.py has paper; the inpainting networks are no toolbox's
    found = {path for folder in folders for path in (CONFIGS / folder).glob("*.py")}
    assert {str(path.relative_to(CONFIGS).with_suffix("")) for path in found} == MODULES.keys()


def test_counts_are_the_papers():
    """Sec. 4: three in an FPN, one in a mask head, seven in a ResNet-50; with PPM and FUSE, UperNet has seventeen."""
    count = {name: len(modules) for name, modules in MODULES.items()}
    assert count["mmdet/faster-rcnn_r50_carafe-fpn_1x_coco"] == 3
    assert count["mmdet/mask-rcnn_r50_fpn_carafe-mask-head_1x_coco"] == 1
    assert count["mmpretrain/resnet50-carafe_16xb64_in1k"] == 7
    assert count["mmdet/mask-rcnn_r50-carafe_carafe-fpn_carafe-mask-head_1x_coco"] == 11
    assert count["mmseg/r50-carafe_carafe-upernet_20e_ade20k"] == 17


@pytest.mark.parametrize("folder", LISTED_FOLDERS)
def test_metafile_lists_every_configuration(folder):
    metafile = yaml.safe_load((CONFIGS / folder / "metafile.yml").read_text())
    collections = {collection["Name"] for collection in metafile["Collections"]}
    names = [model["Name"] for model in metafile["Models"]]
    assert sorted(names) == sorted(in_folder(folder))
    for model in metafile["Models"]:
        assert model["In Collection"] in collections
        assert model["Config"] == f"configs/{folder}/{model['Name']}.py"
        assert "Weights" not in model  # until we have trained it; test_paper.py compares the paper's figures
        assert all("the paper's figures (Table" in result["Dataset"] for result in model.get("Results", ()))
    for collection in metafile["Collections"]:
        assert (ROOT / collection["README"]).is_file()
        assert (ROOT / collection["Code"]["URL"]).exists()


@pytest.mark.parametrize("folder", LISTED_FOLDERS)
def test_readme_has_a_row_for_every_configuration(folder):
    text = (CONFIGS / folder / "README.md").read_text()
    rows = re.findall(r"^\| \[([\w-]+)\.py\]\(\1\.py\) \|(.*)\|$", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(in_folder(folder))
    column = {"mmdet": 1, "mmseg": 4}.get(folder)  # "modules"
    for name, row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        if column is not None:
            at_the_papers_settings = folder == "mmdet" or "_20e_" in name
            assert int(cells[column if at_the_papers_settings else 0]) == len(in_folder(folder)[name]), name


@pytest.mark.parametrize("folder", [*LISTED_FOLDERS, "demo", "paper"])
def test_readme_links_and_commands_name_files_that_exist(folder):
    text = (CONFIGS / folder / "README.md").read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert all((CONFIGS / folder / link).exists() for link in links), links
    paths = re.findall(r"(?:bash|python) (tools/\S+)", text) + re.findall(r"configs/\S+?\.py", text)
    assert all((ROOT / path).is_file() for path in paths), paths
