"""Bad inputs: what is wrong, the command, and files that it needs; docs/reliability.md lists them with their lines.

Commands run in a folder that :func:`write_playground` fills: ``det.py``, ``seg.py`` and ``cls.py`` are sound
configurations of the three toolboxes on ``data``, ``det.pth``, ``seg.pth`` and ``cls.pth`` their checkpoints, and
``own.py`` is ``det.py`` on an annotation file ``bad.json``. A new case is one line in ``CASES``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import write_config, write_scenes
from tool_runs import call_tool

from carafe_plugin.engine import bare_models

#: Writes what is wrong into the folder where the command runs.
Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class BadInput:
    what: str
    command: str
    prepare: Prepare = lambda folder: None


def write_playground(folder: Path) -> None:
    """Write the sound files among which every case puts its own."""
    write_scenes(folder / "data", 2)
    for name, scope in (("det", "mmdet"), ("seg", "mmseg"), ("cls", "mmpretrain")):
        config = write_config(folder / f"{name}.py", scope, Path("data"))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            model = bare_models.build_model(bare_models.read_config(config.name))
        torch.save(dict(state_dict=model.state_dict(), meta={}), folder / f"{name}.pth")
    own = "dict(dataset=dict(data_root='.', ann_file='bad.json', data_prefix=dict(img='data/images')))"
    (folder / "own.py").write_text(
        f"_base_ = 'det.py'\ntrain_dataloader = test_dataloader = {own}\ntest_evaluator = dict(ann_file='bad.json')\n"
    )
    shutil.copy(folder / "data/images/00.png", folder / "photo.png")


def run_case(case: BadInput, folder: Path) -> tuple[int, str]:
    """Run a case in the playground; returns the exit code and what it wrote on stderr, with paths from there."""
    case.prepare(folder)
    program, *arguments = shlex.split(case.command)
    name = Path(program).stem
    if program == "python":
        program = name = arguments[1]
        arguments = arguments[2:]
        if importlib.util.find_spec(name).submodule_search_locations:  # a package, which has its command in a module
            name += ".__main__"
    error, here = io.StringIO(), Path.cwd()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        for display in ("DISPLAY", "WAYLAND_DISPLAY"):
            patch.delenv(display, raising=False)
        patch.setattr("sys.argv", [program])  # what argparse calls the command
        patch.setattr("carafe_plugin.engine.processes.get_device", lambda: "cpu")
        patch.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            code = call_tool(name, *arguments)
    assert Path.cwd() == here
    return code, error.getvalue().replace(f"{folder}/", "").replace(str(folder), ".")


def line_of(output: str) -> str:
    """The one line that says what is wrong: argparse writes how to use a command before it."""
    (line,) = [line for line in output.splitlines() if line.startswith("error: ") or ": error: " in line]
    return re.sub(r"\(choose from .*\)", "(choose from ...)", line.partition("error: ")[2])  # each Python's own way


# ------------------------------------------------------------------------------------------------- what can be wrong
def text(name: str, content: str | bytes) -> Prepare:
    """A file of these bytes."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def annotations(change: Callable[[dict[str, Any]], object]) -> Prepare:
    """``bad.json``: the sound annotation file after a change."""

    def prepare(folder: Path) -> None:
        content = json.loads((folder / "data/instances.json").read_text())
        change(content)
        (folder / "bad.json").write_text(json.dumps(content))

    return prepare


def first(kind: str, **values: Any) -> Prepare:
    """``bad.json``: the sound annotation file with other values, or without (``...``), in the first of a list."""

    def change(content: dict[str, Any]) -> None:
        entry = content[kind][0]
        entry.update(values)
        for key, value in values.items():
            if value is ...:
                del entry[key]

    return annotations(change)


def cut(name: str, source: str) -> Prepare:
    """A file that ends too early."""
    return lambda folder: (folder / name).write_bytes((folder / source).read_bytes()[:250])


def weights(name: str, change: Callable[[dict[str, Any]], Any]) -> Prepare:
    """A checkpoint after a change to its weights."""

    def prepare(folder: Path) -> None:
        state = torch.load(folder / "det.pth", weights_only=False)["state_dict"]
        torch.save(change(state), folder / name)

    return prepare


def picture(name: str, size: tuple[int, int] = (64, 64), mode: str = "L", value: int = 0) -> Prepare:
    """A picture of one colour."""
    return lambda folder: Image.new(mode, size, value).save(folder / name)


class _Code:
    """Whoever unpickles it calls a function that is no type of numbers."""

    def __reduce__(self) -> tuple:
        return print, ("this code has run",)


def several(*steps: Prepare) -> Prepare:
    return lambda folder: [step(folder) for step in steps]


def label_map(name: str, **options: Any) -> Prepare:
    """A folder ``seg`` as ``data``, whose label map 00.png is another picture."""

    def prepare(folder: Path) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "data", folder / name)
        picture(f"{name}/labels/00.png", **options)(folder)

    return prepare


OWN, TRAIN = "tools/test.py own.py det.pth", "tools/train.py det.py --cfg-options"
DET, CLS, BAD = "tools/test.py det.py", "tools/test.py cls.py cls.pth", "tools/test.py det.py bad.pth"
INFER = "--config det.py --checkpoint det.pth --out-dir out"
PROGRAM = "--to torch-export --size"
POINTS = "--config det.py --checkpoint det.pth --out out --points"
FILL = "--config det.py --checkpoint det.pth --out"
SEG = "tools/test.py seg.py seg.pth --cfg-options test_dataloader.dataset.data_root="

CASES: dict[str, list[tuple]] = {
    "Configurations": [
        ("no such file", "tools/train.py absent.py"),
        ("a folder", "tools/train.py data"),
        ("a syntax error", "tools/train.py bad.py", text("bad.py", "model = dict(\n")),
        ("an error in its code", "tools/train.py bad.py", text("bad.py", "scale = 1 / 0\n")),
        ("an unknown name in its code", "tools/train.py bad.py", text("bad.py", "model = dict(type=MaskRCNN)\n")),
        ("not Python", "tools/train.py photo.png"),
        ("another ending", "tools/train.py bad.txt", text("bad.txt", "")),
        ("JSON that is cut off", "tools/train.py bad.json", text("bad.json", '{"model": ')),
        ("JSON that is a list", "tools/train.py bad.json", text("bad.json", "[1]")),
        ("a base that is missing", "tools/train.py bad.py", text("bad.py", "_base_ = 'absent.py'\n")),
        (
            "a module that is missing",
            "tools/train.py bad.py",
            text("bad.py", "custom_imports = dict(imports=['absent'])\n"),
        ),
        ("empty", "tools/train.py bad.py", text("bad.py", "")),
        ("no test data", "tools/test.py bad.py det.pth", text("bad.py", "_base_ = 'det.py'\ntest_dataloader = None\n")),
        ("an unknown toolbox", f"{TRAIN} default_scope=mmdett"),
        ("an unknown type", f"{TRAIN} model.neck.type=CARAFEFPM"),
        ("a misspelt option of CARAFE++", f"{TRAIN} model.neck.carafe_cfg.up_kernell=5"),
        ("a kernel of an even size", f"{TRAIN} model.neck.carafe_cfg.up_kernel=4"),
        ("a text for a number", f"{TRAIN} model.neck.carafe_cfg.up_kernel=five"),
        ("a negative number of channels", f"{TRAIN} model.neck.carafe_cfg.compressed_channels=-8"),
        ("groups that do not divide the channels", f"{TRAIN} model.neck.carafe_cfg.up_group=5"),
        ("an unknown normaliser", f"{TRAIN} model.neck.carafe_cfg.normalizer=softmaxx"),
        ("an unknown start", f"{TRAIN} model.neck.carafe_cfg.init=nearesst"),
        (
            "a start that the window is too small for",
            f"{TRAIN} model.neck.carafe_cfg.init=bilinear model.neck.carafe_cfg.up_kernel=1",
        ),
        ("a start that spreads nothing", f"{TRAIN} model.neck.carafe_cfg.init_spread=0"),
        ("an operator in a missing module", f"{TRAIN} model.neck.carafe_cfg.type=absent.Upsample"),
        ("an unknown operator", f"{TRAIN} model.neck.carafe_cfg.type=Absent"),
        ("a misspelt option of a toolbox's type", f"{TRAIN} model.neck.out_chanels=32"),
        ("an unknown dataset", f"{TRAIN} train_dataloader.dataset.type=CocoDatasett"),
        ("an unknown transform", f"{TRAIN} train_dataloader.dataset.pipeline.0.type=LoadImage"),
        ("an unknown optimiser", f"{TRAIN} optim_wrapper.optimizer.type=Adamm"),
        ("a text for a learning rate", f"{TRAIN} optim_wrapper.optimizer.lr=fast"),
        ("a batch of nothing", f"{TRAIN} train_dataloader.batch_size=0"),
        ("a text for a number of epochs", f"{TRAIN} train_cfg.max_epochs=many"),
        ("nothing that says how long to train", f"{TRAIN} train_cfg=None"),
        (
            "an unknown hook",
            "tools/train.py bad.py",
            text("bad.py", "_base_ = 'det.py'\ncustom_hooks = [dict(type='Absent')]\n"),
        ),
        ("an unknown runner", f"{TRAIN} runner_type=Walker"),
        ("an unknown strategy", f"{TRAIN} runner_type=FlexibleRunner strategy.type=Plan"),
        ("a strategy of several processes in one", f"{TRAIN} runner_type=FlexibleRunner strategy.type=DDPStrategy"),
        ("boxes for a panoptic dataset", f"{TRAIN} train_dataloader.dataset.type=CocoPanopticDataset"),
        ("an option without a value", f"{TRAIN} model.neck"),
        ("an option below a text", f"{TRAIN} model.neck.type.name=x"),
        ("an index beyond a list", f"{TRAIN} train_dataloader.dataset.pipeline.9.type=Resize"),
    ],
    "Options": [
        ("no configuration", "tools/train.py"),
        ("an unknown option", "tools/train.py det.py --ampp"),
        ("mixed precision without a GPU", "tools/train.py det.py --amp"),
        ("nothing to scale the learning rate from", "tools/train.py det.py --auto-scale-lr"),
        ("a launcher that did not start it", "tools/train.py det.py --launcher pytorch"),
        ("an unknown launcher", "tools/train.py det.py --launcher horovod"),
        ("a work dir that is a file", "tools/train.py det.py --work-dir photo.png"),
        ("predictions in a format that is not written", "tools/test.py det.py det.pth --out found.json"),
        ("an option of another toolbox", "tools/test.py det.py det.pth --out found.pkl --out-item metrics"),
        ("an option without what it is about", "tools/test.py cls.py cls.pth --out-item metrics"),
        ("label maps into a file", "tools/test.py seg.py seg.pth --out photo.png"),
        ("a window without a display", "tools/test.py det.py det.pth --show"),
        ("augmentation that cannot be merged", "tools/test.py det.py det.pth --tta"),
        ("pictures into a file", "tools/test.py det.py det.pth --show-dir photo.png"),
        ("a threshold beyond 1", f"tools/infer.py photo.png {INFER} --score-thr 2"),
        ("an unknown device", f"tools/infer.py photo.png {INFER} --device tpu9"),
        ("results into a file", "tools/infer.py photo.png --config det.py --checkpoint det.pth --out-dir photo.png"),
        ("a segmenter to detect with", "tools/infer.py photo.png --config seg.py --checkpoint seg.pth --out-dir out"),
        ("a size of nothing", "tools/browse_model.py det.py --shape 0 64"),
        ("a file in a folder that is missing", "tools/browse_model.py det.py --json absent/model.json"),
        ("a toolbox that is unknown", "tools/browse_model.py mmdett::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"),
    ],
    "Annotations in COCO's format": [
        ("no such file", OWN, lambda folder: (folder / "bad.json").unlink(missing_ok=True)),
        ("empty", OWN, text("bad.json", "")),
        ("cut off", OWN, cut("bad.json", "data/instances.json")),
        ("a byte order mark", OWN, text("bad.json", b"\xef\xbb\xbf{}")),
        ("UTF-16", OWN, text("bad.json", "{}".encode("utf-16"))),
        ("a list", OWN, text("bad.json", "[]")),
        ("no list of images", OWN, annotations(lambda content: content.pop("images"))),
        ("nothing to measure", OWN, annotations(lambda content: content["annotations"].clear())),
        ("no image", OWN, annotations(lambda content: [content[kind].clear() for kind in ("images", "annotations")])),
        (
            "nothing to train on",
            "tools/train.py own.py --cfg-options train_dataloader.dataset.filter_cfg.filter_empty_gt=True",
            annotations(lambda content: content["annotations"].clear()),
        ),
        ("an object that is no dictionary", OWN, annotations(lambda content: content["annotations"].insert(0, 7))),
        ("a box that is missing", OWN, first("annotations", bbox=...)),
        ("a box of three numbers", OWN, first("annotations", bbox=[1, 2, 3])),
        ("a box of texts", OWN, first("annotations", bbox=["1", "2", "3", "4"])),
        ("a box that is not a number", OWN, first("annotations", bbox=[1, 2, float("nan"), 4])),
        ("a box without an area", OWN, first("annotations", bbox=[1, 2, 3, 0])),
        ("a box beyond any image", OWN, first("annotations", bbox=[1, 2, 1e30, 4])),
        ("a negative area", OWN, first("annotations", area=-1)),
        ("an id of 0", OWN, first("annotations", id=0)),
        ("an id twice", OWN, first("annotations", id=2)),
        ("an image that is not listed", OWN, first("annotations", image_id=70)),
        ("a category that is not listed", OWN, first("annotations", category_id=99)),
        ("a flag that is a text", OWN, first("annotations", iscrowd="0")),
        ("ids of two kinds", OWN, first("categories", id="7")),
        ("a class that is missing", OWN, first("categories", name="green")),
        ("a class twice", OWN, annotations(lambda content: content["categories"].append(dict(id=9, name="red")))),
        ("classes in another order", OWN, annotations(lambda content: content["categories"].reverse())),
        ("a width that is no integer", OWN, first("images", width=64.5)),
        ("a width that is not its file's", OWN, first("images", width=60)),
        ("a box beside its image", OWN, first("annotations", bbox=[70, 1, 5, 5])),
        ("an area larger than its box", OWN, first("annotations", area=4096)),
        ("a polygon beside its image", OWN, first("annotations", segmentation=[[70, 1, 79, 1, 79, 9]])),
        ("run lengths of nothing", OWN, first("annotations", segmentation=dict(size=[64, 64], counts=[4096]))),
        ("an image that is missing", OWN, first("images", file_name="gone.png")),
        ("a name that no file can have", OWN, first("images", file_name="a\0b.png")),
        ("a mask that is missing", OWN, first("annotations", segmentation=...)),
        ("a polygon of two points", OWN, first("annotations", segmentation=[[1, 1, 9, 9]])),
        ("a polygon of seven numbers", OWN, first("annotations", segmentation=[[1, 1, 9, 1, 9, 9, 1]])),
        ("run lengths of another size", OWN, first("annotations", segmentation=dict(size=[9, 30], counts=[200, 70]))),
        ("run lengths that are too short", OWN, first("annotations", segmentation=dict(size=[64, 64], counts=[9, 30]))),
        (
            "run lengths that are no integers",
            OWN,
            first("annotations", segmentation=dict(size=[64, 64], counts=[9.5, 4086.5])),
        ),
        ("a training with a mask that is missing", "tools/train.py own.py", first("annotations", segmentation=...)),
    ],
    "Label maps and images": [
        ("no such folder", f"{SEG}absent"),
        ("a label map of another size", f"{SEG}size", label_map("size", size=(32, 64))),
        ("a label map in colours", f"{SEG}colours", label_map("colours", mode="RGB")),
        (
            "a label map that is no image",
            f"{SEG}page",
            several(label_map("page"), text("page/labels/00.png", "<html>")),
        ),
        (
            "a label map that is missing",
            f"{SEG}gone",
            several(label_map("gone"), lambda folder: (folder / "gone/labels/00.png").unlink()),
        ),
        (
            "an image that is missing",
            f"{SEG}gone",
            several(label_map("gone"), lambda folder: (folder / "gone/images/00.png").unlink()),
        ),
        (
            "no image",
            f"{SEG}none",
            lambda folder: [
                (folder / "none" / part).mkdir(parents=True, exist_ok=True) for part in ("images", "labels")
            ],
        ),
        (
            "an image of nothing",
            "tools/test.py det.py det.pth --cfg-options test_dataloader.dataset.data_root=void",
            several(label_map("void"), text("void/images/00.png", "")),
        ),
        ("no folder of classes", f"{CLS} --cfg-options test_dataloader.dataset.data_root=absent"),
        ("a list of labels that is missing", f"{CLS} --cfg-options test_dataloader.dataset.ann_file=absent.txt"),
        (
            "a list of labels that are no numbers",
            f"{CLS} --cfg-options test_dataloader.dataset.ann_file=bad.txt",
            text("data/bad.txt", "red/00.png red\n"),
        ),
        (
            "a list without labels",
            f"{CLS} --cfg-options test_dataloader.dataset.ann_file=bad.txt",
            text("data/bad.txt", "red/00.png\n"),
        ),
        ("a label beyond the classes", f"{SEG}beyond", label_map("beyond", value=7)),
        (
            "a class beyond the classes",
            f"{CLS} --cfg-options test_dataloader.dataset.ann_file=bad.txt",
            text("data/bad.txt", "red/00.png 9\n"),
        ),
        ("a detector of fewer classes", f"{DET} det.pth --cfg-options model.roi_head.bbox_head.num_classes=1"),
        ("a detector of more classes", f"{TRAIN} model.roi_head.mask_head.num_classes=3"),
        ("a segmenter of fewer classes", "tools/train.py seg.py --cfg-options model.decode_head.num_classes=2"),
        ("a classifier of fewer classes", "tools/train.py cls.py --cfg-options model.head.num_classes=1"),
        ("no such picture", f"tools/infer.py absent.png {INFER}"),
        ("a picture that is none", f"tools/infer.py page.png {INFER}", text("page.png", "<html>404</html>")),
        (
            "pictures of which none can be read",
            f"tools/infer.py pages {INFER}",
            several(
                lambda folder: (folder / "pages").mkdir(exist_ok=True),
                text("pages/a.png", "<html>"),
                text("pages/b.pgm", ""),
            ),
        ),
        (
            "a folder without pictures",
            f"tools/infer.py empty {INFER}",
            lambda folder: (folder / "empty").mkdir(exist_ok=True),
        ),
    ],
    "Checkpoints": [
        ("no such file", "tools/test.py det.py absent.pth"),
        ("a folder", "tools/test.py det.py data"),
        ("cut off", BAD, cut("bad.pth", "det.pth")),
        ("a page", BAD, text("bad.pth", "<html>404</html>")),
        ("empty", BAD, text("bad.pth", "")),
        ("a number", BAD, weights("bad.pth", lambda state: 7)),
        (
            "a file that would run code",
            BAD,
            lambda folder: torch.save(dict(state_dict={}, meta=_Code()), folder / "bad.pth"),
        ),
        ("another model", BAD, weights("bad.pth", lambda state: dict(state_dict=dict(other=torch.zeros(1))))),
        ("another toolbox's model", "tools/test.py det.py seg.pth"),
        (
            "a part that is missing",
            BAD,
            weights(
                "bad.pth",
                lambda state: {name: value for name, value in state.items() if not name.startswith("rpn_head.")},
            ),
        ),
        (
            "a shape that differs",
            BAD,
            weights("bad.pth", lambda state: {**state, "neck.fpn_convs.0.conv.bias": torch.zeros(16)}),
        ),
        (
            "another model, to detect with",
            "tools/infer.py photo.png --config det.py --checkpoint seg.pth --out-dir out",
        ),
        ("weights alone, to resume from", "tools/train.py det.py --resume det.pth"),
        (
            "a folder of damaged checkpoints, to resume from",
            "tools/train.py det.py --work-dir damaged --resume",
            several(lambda folder: (folder / "damaged").mkdir(exist_ok=True), cut("damaged/epoch_1.pth", "det.pth")),
        ),
        ("a checkpoint to start from that is missing", f"{TRAIN} load_from=absent.pth"),
        (
            "a backbone to start from that is missing",
            f"{TRAIN} model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=absent.pth",
        ),
        ("no backbone", "tools/convert_backbone.py seg.pth new.pth --to mmdet"),
        ("no such backbone", "tools/convert_backbone.py absent.pth new.pth --to mmdet"),
        ("itself", "tools/convert_backbone.py cls.pth cls.pth --to mmdet --stock"),
        ("another depth", "tools/convert_backbone.py cls.pth new.pth --to mmdet --stock --depth 50"),
        ("no CARAFE module", "tools/convert_checkpoint.py cls.pth new.pth --to conv-bn"),
        ("a file that exists", "tools/convert_checkpoint.py det.pth seg.pth --to conv-bn"),
        ("no new name", "tools/convert_checkpoint.py det.pth new.pth --to conv-bn --rename neck"),
        ("an unknown layout", "tools/convert_checkpoint.py det.pth new.pth --to yolo"),
    ],
    "Other commands": [
        ("no such folder", "tools/prepare_data.py coco absent"),
        ("an unknown dataset", "tools/prepare_data.py voc ."),
        ("a file to lay out in", "tools/prepare_data.py coco . --out photo.png"),
        ("no such checkpoint", f"tools/export.py det.py absent.pth {PROGRAM} 64 96"),
        ("a checkpoint of another model", f"tools/export.py det.py seg.pth {PROGRAM} 64 96"),
        ("a size that is filled up", f"tools/export.py det.py det.pth {PROGRAM} 64 72"),
        ("another ending", f"tools/export.py cls.py cls.pth {PROGRAM} 64 64 --out cls.onnx"),
        ("classes of a dataset that is known", "tools/prepare_data.py bccd . --classes"),
        ("a place for a folder of one's own", "tools/prepare_data.py coco-folder . --out data"),
        ("no configuration to write", "tools/prepare_data.py coco-folder . --classes classes.txt"),
        ("a point outside", f"tools/visualize_reassembly.py photo.png {POINTS} 64,9"),
        ("a point that is none", f"tools/visualize_reassembly.py photo.png {POINTS} 9"),
        (
            "a model without CARAFE++",
            "tools/visualize_reassembly.py photo.png --config seg.py --checkpoint seg.pth --out out --points 9,9",
        ),
        ("an unknown module", f"tools/visualize_reassembly.py photo.png {POINTS} 9,9 --modules neck.up"),
        ("no inpainting model", f"tools/inpaint.py photo.png photo.png {FILL} new.png"),
        (
            "a mask of another size",
            f"tools/inpaint.py photo.png mask.png {FILL} new.png",
            picture("mask.png", (32, 32), value=255),
        ),
        ("a format that is not written", f"tools/inpaint.py photo.png photo.png {FILL} new.gif"),
        ("a shape of two numbers", "python -m benchmarks.op --shapes 256x50"),
        ("a kernel of an even size", "python -m benchmarks.op --kernel-size 4"),
        ("a format that is not drawn", "python -m benchmarks.op --plot plot.txt"),
        ("an unknown peer", "python -m benchmarks.module --peers absent"),
        ("a device that is unknown", "python -m benchmarks.model det.py --device tpu"),
        ("a model twice", "python -m benchmarks.model det.py det.py"),
        ("an unknown step", "python -m benchmarks.gpu_check --only absent"),
        ("no budget", "python -m benchmarks.gpu_check --budget 0"),
        ("an unknown table", "python -m studies.paper_tables --table 15"),
        ("options that contradict", "python -m studies.paper_tables --table 4 --write"),
        ("an unknown ablation", "python -m studies.ablation --table 99"),
        ("scenes into a file", "python -m studies.demo.generate_scenes --out photo.png"),
    ],
}


def cases() -> Iterator[BadInput]:
    for group in CASES.values():
        for what, command, *prepare in group:
            yield BadInput(what, command, *prepare)
