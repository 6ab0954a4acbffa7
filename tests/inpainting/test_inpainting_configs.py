"""configs/inpainting: the paper's settings, and rows that differ where CARAFE++ comes in and nowhere else."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason="mmengine is not installed")

import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from carafe_plugin.inpainting import InpaintingMetric
from carafe_plugin.modules.carafe import KernelPrediction

FOLDER = Path(__file__).parents[2] / "configs" / "inpainting"
ROWS = ["global-local", "global-local-carafe", "partial-conv", "partial-conv-carafe"]
NAMES = [f"{row}_{data}" for data in ("places365-256x256", "scenes-64x64") for row in ROWS]


def load(name):
    return Config.fromfile(FOLDER / f"{name}.py")


def build(part):
    with DefaultScope.overwrite_default_scope("mmengine"):
        return MODELS.build(part)


def test_no_configuration_is_left_out():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("data", ["places365-256x256", "scenes-64x64"])
def test_rows_differ_by_one_setting(data):
    baseline = load(f"global-local_{data}").to_dict()
    carafe = dict(down=True, up=True if "places" in data else dict(compressed_channels=16))
    for row, changes in (
        ("global-local-carafe", dict(carafe_cfg=carafe)),
        ("partial-conv", dict(partial=True)),
        ("partial-conv-carafe", dict(partial=True, carafe_cfg=carafe)),
    ):
        found = load(f"{row}_{data}").to_dict()
        assert found["model"].pop("generator") == {**baseline["model"]["generator"], **changes}
        expected = {**baseline, "model": {k: v for k, v in baseline["model"].items() if k != "generator"}}
        assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_models(name):
    cfg = load(name)
    model = build(cfg.model)
    modules = [module for module in model.modules() if isinstance(module, KernelPrediction)]
    assert len(modules) == (4 if "carafe" in name else 0)
    wrappers = build_optim_wrapper(model, cfg.optim_wrapper)
    assert set(wrappers.keys()) == {"generator", "discriminator"}
    for _, wrapper in wrappers.items():
        assert type(wrapper.optimizer) is torch.optim.Adam
        assert wrapper.optimizer.defaults["betas"] == (0.5, 0.9)
    places = "places" in name
    compressed = [16, 16, 64, 64] if places else [16, 16, 16, 16]
    assert [module.compressed_channels for module in modules] == compressed[: len(modules)]
    assert wrappers.get_lr()["generator.lr"] == [1e-4 if places else 1e-3]
    assert cfg.train_dataloader.batch_size == (32 if places else 8)
    for split in ("train", "val", "test"):
        assert cfg[f"{split}_dataloader"].dataset["size"] == (256 if places else 64)
    assert cfg.test_dataloader.dataset.test_mode
    if places:  # Iizuka et al., Table 1
        assert model.generator.encoder[0].convolution.weight.shape == (64, 3 if "partial" in name else 4, 5, 5)
        assert model.generator.bottleneck[0].convolution.out_channels == 256
        assert model.generator.to_image.in_channels == 32


def test_readme_and_metafile():
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| \[([\w-]+)\.py\]\(\1\.py\) \|(.*)\|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == NAMES
    paper = {row: cells.split("|")[-2:] for row, cells in rows if "places" in row}
    figures = {name: tuple(float(cell) for cell in cells) for name, cells in paper.items()}
    assert list(figures.values()) == [(6.69, 19.58), (5.82, 20.93), (5.96, 20.78), (5.60, 21.05)]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert all((FOLDER / link).exists() for link in links), links
    root = FOLDER.parents[1]
    commands = re.findall(r"(?:bash|python) (tools/\S+)", text) + re.findall(r"configs/\S+?\.py", text)
    assert all((root / path).is_file() for path in commands), commands
    for name in InpaintingMetric().compute_metrics([dict(l1=1, psnr=1, l1_hole=1, psnr_hole=1, ssim=1)]):
        assert f"`{name}`" in text

    metafile = yaml.safe_load((FOLDER / "metafile.yml").read_text())
    assert [model["Name"] for model in metafile["Models"]] == NAMES[:4]
    (collection,) = metafile["Collections"]
    for model in metafile["Models"]:
        assert model["In Collection"] == collection["Name"]
        assert model["Config"] == f"configs/inpainting/{model['Name']}.py"
        for result in model.get("Results", ()):  # ours, once we have trained it, say so
            assert "the paper's figures (Table 10)" in result["Dataset"]
            assert tuple(result["Metrics"].values()) == figures[model["Name"]]
    assert (root / collection["README"]).is_file()
    assert (root / collection["Code"]["URL"]).is_dir()


def test_table_of_parameters_is_right():
    """The README's table of parameters of the generators, from the models themselves."""
    text = (FOLDER / "README.md").read_text()
    for name in NAMES[:4]:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build(load(name).model.generator).parameters())
        row = next(line for line in text.splitlines() if line.startswith(f"| {name.partition('_')[0]} |"))
        assert f"{parameters:,}" in row, f"{name}: {parameters:,}"
