"""What importing brings along: torch alone, unless an adapter is asked for; and the docstrings' examples."""

import doctest
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import carafe_plugin

CSRC = Path(__file__).parents[1] / "csrc"
PACKAGE = Path(carafe_plugin.__file__).parent
HIDE = "import sys\nfor name in ('mmcv', 'mmengine', 'mmdet', 'mmseg', 'mmpretrain'): sys.modules[name] = None\n"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=300)


def test_modules_work_in_any_model_without_openmmlab():
    code = (
        HIDE
        + """
import torch
from carafe_plugin import CARAFEDownsample, CARAFEUpsample
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), CARAFEDownsample(8), CARAFEUpsample(8))
model(torch.rand(1, 3, 12, 12)).sum().backward()
loaded = [n for n, m in sys.modules.items() if m is not None and n.startswith(("mmcv", "mmengine", "mmdet"))]
print("loaded", loaded)
"""
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "loaded []"


def test_benchmarks_measure_where_only_what_they_name_is_installed():
    """On a machine with a GPU there is neither an OpenMMLab package nor the OpenCV that these bring."""
    code = HIDE + "sys.modules['cv2'] = None\nfrom benchmarks import gpu_check, gpu_probes, mmcv_operator, module, op\n"
    result = run(code)
    assert result.returncode == 0, result.stderr


NUMPY_2 = "torch {} was compiled for numpy 1, and numpy {} is installed: install 'numpy<2'"


@pytest.mark.parametrize(
    ("torch", "numpy", "expected"),
    [
        ("2.1.2+cu121", "2.2.6", NUMPY_2),
        ("2.2.0a0+git1", "2.0.0rc1", NUMPY_2),
        ("2.1.2", "1.26.4", None),
        ("2.3.0", "2.0.0", None),
        ("2.11.0", "2.4.1", None),
        ("2.1.2", None, None),
        (None, "2.2.6", None),
        ("2.0.1+cu118", "1.26.4", "carafe_plugin needs torch >= 2.1, found 2.0.1+cu118"),
    ],
)
def test_versions_that_do_not_go_together_are_one_line(torch, numpy, expected):
    """Before torch is imported, whose page of warnings would come first."""
    code = "import importlib.metadata as m, sys\n"
    code += "class Torch:\n    def find_spec(name, *_):\n        if name == 'torch': sys.exit('torch is imported')\n"
    code += "sys.meta_path.insert(0, Torch)\n"
    code += "def version(name):\n    if found := VERSIONS[name]: return found\n    raise m.PackageNotFoundError(name)\n"
    code += f"VERSIONS = {dict(torch=torch, numpy=numpy)}\nm.version = version\nimport carafe_plugin"
    result = run(code)
    assert result.returncode == 1
    line = f"ImportError: {expected.format(torch, numpy)}" if expected else "torch is imported"
    assert result.stderr.splitlines()[-1] == line


def test_import_brings_no_toolbox_along():
    result = run("import sys, carafe_plugin; print([n for n in sys.modules if n.startswith('mm')])")
    assert result.returncode == 0, result.stderr
    mm = [name for name in eval(result.stdout) if re.match(r"mm(cv|engine|det|seg|pretrain)\b", name)]
    assert mm == []


def test_a_missing_toolbox_is_named():
    code = """
import importlib
for adapter in ("layers", "mmdet", "mmseg", "mmpretrain", "drop_in"):
    try:
        importlib.import_module(f"carafe_plugin.openmmlab.{adapter}")
    except ImportError as error:
        print(error)
"""
    result = run(HIDE + code)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    assert all(re.search(r"\bmm(engine|cv|det|seg|pretrain)\b", line) for line in lines), lines


def test_mmseg_needs_no_working_mmdet():
    pytest.importorskip("mmseg", reason="mmseg is not installed")
    code = "import sys; sys.modules['pycocotools'] = None\n"
    code += "from carafe_plugin.openmmlab import mmseg; print(sorted(mmseg.__all__))"
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "'CARAFEUPerHead'" in result.stdout
    assert "PixelDecoder" not in result.stdout


WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text())


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_in_docstrings(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    if path.stem == "drop_in":  # importing it changes mmcv for the rest of the process
        if importlib.util.find_spec("mmdet") is None:
            pytest.skip("mmdet is not installed")
        result = run(f"import doctest, {name} as m; failed, tried = doctest.testmod(m); assert tried > failed == 0")
        assert result.returncode == 0, result.stdout + result.stderr
        return
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if not re.match(r"mm|pycocotools|skimage|cv2|PIL", error.name or ""):
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


def test_arrow_goes_down_only():
    """ops imports neither modules nor adapters, modules and models no adapters, kernels no torch."""
    adapters = r"openmmlab|mm(cv|engine|det|seg|pretrain)"
    for folder, forbidden in (("ops", r"modules|openmmlab"), ("modules", f"models|{adapters}"), ("models", adapters)):
        for source in (PACKAGE / folder).glob("*.py"):
            found = re.search(rf"^\s*(from|import)\s+[\w.]*\b({forbidden})\b", source.read_text(), re.MULTILINE)
            assert not found, f"{source.name}: {found.group(0)}"
    for header in [*(CSRC / "common").glob("*.h"), *(CSRC / "cpu").glob("*.h")]:
        assert "torch/" not in header.read_text(), header.name
