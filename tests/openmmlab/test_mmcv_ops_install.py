"""Where torchvision's operators take the place of MMCV's, and where not: in processes that import what users import.

Each test has an MMCV of its own: the installed one without its extension, or with one that does not load.
"""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmcv", reason="MMCV is not installed")

from carafe_plugin.openmmlab import mmcv_ops

ROOT = Path(__file__).resolve().parents[2]
MODULE = "carafe_plugin.openmmlab.mmcv_ops"
LINE = f"mmcv has no compiled operators here: torchvision's take their place ({MODULE})"
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
USES_NMS = """
import torch
from mmcv.ops import nms
def kept():
    return nms(torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([0.9, 0.8]), 0.5)[1].tolist()
"""


@pytest.fixture
def site(tmp_path):
    """A folder with MMCV, less its extension; first on the path of :func:`python`."""
    (spec,) = importlib.util.find_spec("mmcv").submodule_search_locations
    mmcv = tmp_path / "site" / "mmcv"
    mmcv.mkdir(parents=True)
    for part in Path(spec).iterdir():
        if not part.name.startswith(("_ext.", "__pycache__")):
            (mmcv / part.name).symlink_to(part)
    return mmcv.parent


def python(site, *arguments, **variables):
    """Runs Python in a process that knows nothing of this one's arrangements."""
    environment = {name: value for name, value in os.environ.items() if name not in (mmcv_ops.VARIABLE, "RANK")}
    environment |= dict(
        PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""
    )
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=300, cwd=site.parent
    )


def said(result):
    """The lines on stderr about MMCV's operators."""
    return [line for line in result.stderr.splitlines() if "compiled operators" in line and not line.startswith(" ")]


def write(site, text, name="script.py"):
    path = site.parent / name
    path.write_text(text)
    return path


def test_importing_changes_nothing(site):
    code = f"""
import os, sys
before = dict(os.environ), list(sys.meta_path), list(sys.path)
import carafe_plugin, carafe_plugin.openmmlab, {MODULE}
assert before == (dict(os.environ), list(sys.meta_path), list(sys.path))
import mmcv.ops
"""
    result = python(site, "-c", code)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'mmcv._ext'"


def test_installing_in_a_process_of_ones_own(site):
    script = f"""
import os, subprocess, sys
from {MODULE} import install
install()
before = dict(os.environ), list(sys.meta_path)
install()
assert before == (dict(os.environ), list(sys.meta_path))
assert "mmcv" not in sys.modules
{USES_NMS}
print(kept())
from mmcv.utils import collect_env
from mmcv.utils.ext_loader import check_ops_exist
print(collect_env()["MMCV Compiler"], check_ops_exist() if sys.version_info < (3, 14) else True)
sys.exit(subprocess.call([sys.executable, "-c", {USES_NMS + "print(kept())"!r}]))
"""
    result = python(site, write(site, script))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[0]", "none: torchvision's operators, by carafe_plugin True", "[0]"]
    assert said(result) == [LINE] * 2  # two commands: each says it in its own log


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_data_workers_have_it_too(site, context):
    """The script is as other people's: it imports MMCV's operators first, and knows nothing of this package."""
    script = f"""{USES_NMS}
import sys
from torch.utils.data import DataLoader, Dataset

class Boxes(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return kept()

if __name__ == "__main__":
    print(sys.argv, *DataLoader(Boxes(), batch_size=None, num_workers=2, multiprocessing_context={context!r}))
"""
    path = write(site, script)
    result = python(site, "-m", MODULE, path, "--option")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"[{str(path)!r}, '--option'] [0] [0]"
    assert said(result) == [LINE]


@pytest.mark.parametrize("order", ["torchrun starts it", "it starts torchrun"])
def test_every_rank_has_it_and_one_says_so(site, order):
    # In one write each: print() hands over piece by piece where Python does not buffer, and the ranks share the pipe.
    path = write(site, f"{USES_NMS}\nimport os\nos.write(1, f\"{{os.environ['RANK']}} {{kept()}}\\n\".encode())")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", MODULE, path] if order == "torchrun starts it" else ["-m", MODULE, *torchrun, path]
    result = python(site, *command)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["0 [0]", "1 [0]"]
    assert said(result) == [LINE]


def test_a_checkout_that_is_not_installed_is_found_in_other_folders(site):
    """The process that is started has neither this package's folder on its path nor an installed copy of it."""
    hide = f"""
import sys
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""
    result = python(site, "-m", MODULE, write(site, f"{hide}{USES_NMS}print(kept())"))
    assert (result.returncode, result.stdout) == (0, "[0]\n"), result.stderr


def test_a_hidden_sitecustomize_runs_as_well(site):
    write(site, "print('the other one')", "site/sitecustomize.py")
    result = python(site, "-m", MODULE, "-c", f"{USES_NMS}print(kept())")
    assert (result.returncode, result.stdout.splitlines()) == (0, ["the other one"] * 2 + ["[0]"]), result.stderr


def test_python_runs_on_as_it_was_asked_to(site):
    """Its options, and the current folder that an empty entry of PYTHONPATH means (OpenMMLab's launchers leave one)."""
    write(site, "", "mine.py")
    (site.parent / "elsewhere").mkdir()
    path = write(site, "import sys, mine; print(sys.flags.optimize, sys.flags.utf8_mode)", "elsewhere/script.py")
    variables = dict(PYTHONPATH=f"{site}{os.pathsep}{ROOT}{os.pathsep}")
    result = python(site, "-O", "-X", "utf8", "-m", MODULE, path, **variables)
    assert (result.returncode, result.stdout) == (0, "1 1\n"), result.stderr


def test_two_copies_of_the_startup_folder_do_not_run_each_other(site):
    second = site.parent / "second"
    shutil.copytree(mmcv_ops.FOLDER, second)
    code = f"{USES_NMS}import sys\nprint(kept(), len([f for f in sys.meta_path if 'Extension' in str(f)]))"
    variables = dict(PYTHONPATH=os.pathsep.join([str(mmcv_ops.FOLDER), str(second), str(site), str(ROOT)]))
    result = python(site, "-c", code, **variables)
    assert (result.returncode, result.stdout) == (0, "[0] 1\n"), result.stderr
    assert "sitecustomize" not in result.stderr


@pytest.mark.parametrize("found_by", ["path", "finder"])
def test_a_compiled_extension_is_never_replaced(site, found_by):
    """Nor where the variable asks for torchvision's: a module that stands for the compiled one tells them apart."""
    compiled = site / "mmcv" / "_ext.py" if found_by == "path" else site.parent / "built.py"
    compiled.write_text("def __getattr__(name):\n    return 'compiled'\n")
    code = "from mmcv.ops.nms import ext_module; print(ext_module.softnms)"
    if found_by == "finder":  # as editable installations have it
        code = f"""
import importlib.util, sys
class Editable:
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {str(compiled)!r}) if name == "mmcv._ext" else None
sys.meta_path.append(Editable)
{code}
"""
    for variables in ({}, {mmcv_ops.VARIABLE: "torchvision"}):
        result = python(site, "-m", MODULE, "-c", code, **variables)
        assert (result.returncode, result.stdout, said(result)) == (0, "compiled\n", []), result.stderr


def test_an_extension_that_does_not_load_is_an_offer(site):
    (site / "mmcv" / f"_ext{SUFFIX}").write_bytes(b"built for another torch")
    result = python(site, "-m", MODULE, "-c", "import mmcv.ops")
    assert result.returncode == 1
    line, last = said(result)
    assert line.startswith("error: mmcv's compiled operators do not load here (")
    offer = "install an mmcv built for this torch, or set CARAFE_MMCV_OPS=torchvision to run on torchvision's"
    assert line.endswith(f": {offer}")
    assert last == line.replace("error: ", "ImportError: ")

    result = python(site, "-m", MODULE, "-c", f"{USES_NMS}print(kept())", CARAFE_MMCV_OPS="torchvision")
    assert (result.returncode, result.stdout) == (0, "[0]\n"), result.stderr
    (line,) = said(result)
    assert line.endswith(f", and CARAFE_MMCV_OPS asks for it: torchvision's take their place ({MODULE})")


def test_an_extension_that_does_not_load_is_not_taken_for_one_that_does(site):
    """What stands in for it calls this package's operator, which must not take it for MMCV's and call it back."""
    (site / "mmcv" / f"_ext{SUFFIX}").write_bytes(b"built for another torch")
    code = "from mmcv import _ext; print(_ext.is_stand_in, hasattr(_ext, '__file__'))"
    result = python(site, "-m", MODULE, "-c", code, CARAFE_MMCV_OPS="torchvision")
    assert (result.returncode, result.stdout) == (0, "True False\n"), result.stderr


def test_an_extension_for_another_python_is_not_replaced_unasked(site):
    (site / "mmcv" / "_ext.cpython-38-x86_64-linux-gnu.so").write_bytes(b"built for another Python")
    result = python(site, "-m", MODULE, "-c", "import mmcv.ops")
    assert result.returncode == 1
    assert said(result)[0].startswith("error: mmcv's compiled operators do not load here (")


TOOLS = ["browse_model.py", "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "--shape", "64", "64"]


def test_tools_use_it_and_say_so(site):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    result = python(site, ROOT / "tools" / TOOLS[0], *TOOLS[1:])
    assert result.returncode == 0, result.stderr
    assert said(result) == [LINE]


@pytest.mark.parametrize("stray", [{}, {"SLURM_PROCID": "3"}], ids=["alone", "in a Slurm job's shell"])
def test_tools_end_where_the_extension_does_not_load(stray, site):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    (site / "mmcv" / f"_ext{SUFFIX}").write_bytes(b"built for another torch")
    result = python(site, ROOT / "tools" / TOOLS[0], *TOOLS[1:], **stray)
    assert result.returncode == 2, result.stderr
    (line,) = said(result)
    assert line.startswith("error: mmcv's compiled operators do not load here (")
    assert "Traceback" not in result.stderr


def test_no_torchvision_is_an_error_that_says_so(site):
    write(site, "raise ImportError('no torchvision here')", "site/torchvision.py")
    result = python(site, "-m", MODULE, "-c", "import mmcv.ops")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: mmcv has no compiled operators, and torchvision, whose operators would take")
    assert last.endswith("cannot be imported: no torchvision here")
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    result = python(site, ROOT / "tools" / TOOLS[0], *TOOLS[1:])
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line == last.replace("ImportError", "error")


def test_too_late_is_a_warning(site):
    code = f"import sys, types; sys.modules['mmdet'] = types.ModuleType('mmdet'); import {MODULE} as m; m.install()"
    result = python(site, "-c", code)
    assert "mmdet was imported before mmcv's operators were there, and may do without them" in result.stderr


def test_wrong_wishes(site):
    for arguments, variables, code, expected in (
        ([], {}, 2, mmcv_ops.USAGE),
        (["no_such_script.py"], {}, 2, "can't open file"),
        (["-c", ""], {mmcv_ops.VARIABLE: "mine"}, 2, "error: the environment variable CARAFE_MMCV_OPS must be"),
    ):
        result = python(site, "-W", "ignore", "-m", MODULE, *arguments, **variables)
        assert result.returncode == code
        (line,) = result.stderr.splitlines()
        assert expected in line
    result = python(site, "-m", MODULE, "--help")
    assert (result.returncode, result.stdout) == (0, f"{mmcv_ops.USAGE}\n")
    result = python(site, ROOT / "tools" / TOOLS[0], *TOOLS[1:], CARAFE_MMCV_OPS="mine")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the environment variable CARAFE_MMCV_OPS must be")
