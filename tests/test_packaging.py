"""What users install: the sdist, the wheel built from it, its contents, its audits, and old versions of torch.

The wheel is built once, from the sdist, and the operator's tests run against it in a folder of its own.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from toolkit import TORCH, reason_for_no_cuda_half

import release.wheel
from carafe_plugin import _version
from release.wheel import ALLOWED, PLATFORM, ReleaseError, audit, repair, run_tests

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
STABLE = TORCH >= (2, 10)  # else built for this torch alone
LIBRARY = "_C{}.abi3.so" if STABLE else f"_C{{}}_torch{TORCH[0]}_{TORCH[1]}.abi3.so"


def run(command, **options):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with the sdist and the wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split("\n") if tracked.returncode == 0 else []
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    if not names:  # an unpacked sdist has no git
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv*", "build", "work_dirs", "*.so"))
    # The checkout's own library is compiled as everybody's; what is looked at here is compiled in a hurry: hardly
    # optimised, and without a GPU, of the CUDA half what runs on the host alone.
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "c++"} "$@" -O1\n')
    compiler.chmod(0o755)
    device = "" if torch.cuda.is_available() else "-fdevice-syntax-only"
    hurry = {"CXX": str(compiler), "NVCC_APPEND_FLAGS": device, "TORCH_CUDA_ARCH_LIST": "9.0"}
    environment = {**os.environ, **hurry}
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source], cwd=folder, env=environment)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel])
    return target


def test_sdist_holds_the_sources(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    code = dict(csrc=("*.h", "*.cpp", "*.cu"), configs=("*.py",), tools=("*.py", "*.sh"), carafe_plugin=("*.py",))
    for folder, patterns in code.items():
        for pattern in patterns:
            for source in (ROOT / folder).rglob(pattern):
                assert str(source.relative_to(ROOT)) in names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_wheel_serves_every_python(wheel):
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", wheel.name), wheel.name


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    code = {n for n in names if n.startswith("carafe_plugin/") and n.endswith(".py")}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "carafe_plugin").rglob("*.py")}
    beside = {
        f"carafe_plugin/{p.relative_to(ROOT)}" for name in ("configs", "tools") for p in (ROOT / name).rglob("*.py")
    }
    assert code == sources | beside
    with zipfile.ZipFile(wheel) as archive:
        for name in code:
            source = ROOT / (name if name in sources else name.split("/", 1)[1])
            assert archive.read(name) == source.read_bytes(), name
    launchers = {f"carafe_plugin/tools/{kind}_{tool}.sh" for kind in ("dist", "slurm") for tool in ("train", "test")}
    assert {name for name in names if name.endswith(".sh")} == {*launchers, "carafe_plugin/tools/launch.sh"}
    assert {"carafe_plugin/py.typed", f"carafe_plugin/{LIBRARY.format('')}"} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "tools", "csrc"))]


def test_model_index_lies_beside_the_configs_that_it_names(installed):
    """Where mim looks: in the package, or in its .mim."""
    index = installed / "carafe_plugin" / "model-index.yml"
    imported = re.findall(r"- (\S+)", index.read_text().split("Import:")[1])
    assert len(imported) >= 5
    for metafile in imported:
        configs = re.findall(r"Config: (\S+)", (index.parent / metafile).read_text())
        assert configs, metafile
        assert not [config for config in configs if not (index.parent / config).is_file()]


COMMANDS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")


def call(command, installed, folder):
    """Run a command of the installed wheel, in a folder with nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SLURM"))}
    environment |= dict(
        PYTHONPATH=str(installed), PYTHON=sys.executable, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="-1"
    )
    return subprocess.run([str(c) for c in command], cwd=folder, env=environment, capture_output=True, text=True)


def test_wheel_brings_its_commands(installed, tmp_path):
    """As modules, as console entry points, and with the launchers of a run on several GPUs."""
    pytest.importorskip("mmdet", reason="the commands run on the toolboxes")
    scripts = {f"carafe-{name.replace('_', '-')}" for name in COMMANDS}
    assert {path.name for path in (installed / "bin").iterdir()} == scripts
    run_module = [sys.executable, "-m", "carafe_plugin.tools.train"]
    error = f"error: no such configuration file: {tmp_path}/absent.py\n"
    for command in (run_module, [sys.executable, installed / "bin/carafe-train"]):
        done = call([*command, "absent.py"], installed, tmp_path)
        assert (done.returncode, done.stderr) == (2, error)
    launcher = installed / "carafe_plugin/tools/dist_train.sh"
    assert os.access(launcher, os.X_OK)
    done = call([launcher, "absent.py", "1"], installed, tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith(error), done.stderr


# Each command in a process forked from one that has imported what is slow, with its output in a file of its own.
HELP = """
import os, runpy, sys
import mmengine.runner, torch
print(__import__("carafe_plugin").__file__, flush=True)
for script in sys.argv[1:]:
    if (child := os.fork()) == 0:
        file = os.open(os.path.basename(script) + ".txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = [script, "--help"]
        runpy.run_path(script, run_name="__main__")
    os.waitpid(child, 0)
"""


def test_every_command_of_the_wheel_has_help(installed, tmp_path):
    pytest.importorskip("mmdet", reason="the commands run on the toolboxes")
    names = [f"carafe-{name.replace('_', '-')}" for name in COMMANDS]
    done = call([sys.executable, "-c", HELP, *(installed / "bin" / name for name in names)], installed, tmp_path)
    assert done.stdout.strip() == str(installed / "carafe_plugin/__init__.py"), done.stderr
    assert done.returncode == 0, done.stderr
    for name in names:
        said = (tmp_path / f"{name}.txt").read_text()
        assert said.startswith(f"usage: {name} "), said
        assert "\n  -h, --help" in said, said


def test_wheel_has_the_cuda_half_where_there_is_a_toolkit(wheel):
    if reason := reason_for_no_cuda_half():
        pytest.skip(reason)
    assert f"carafe_plugin/{LIBRARY.format('_cuda')}" in zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def repaired(wheel, tmp_path_factory):
    """The wheel as ``make wheel`` gives it to people, with the CUDA half where there is one."""
    if not STABLE:
        pytest.skip(f"torch {torch.__version__}: the wheel that serves every torch is built with 2.10 or later")
    missing = [name for name in ("nm", "strip") if shutil.which(name) is None]
    if missing or platform.libc_ver()[0] != "glibc":
        pytest.skip(f"needs glibc and binutils ({', '.join(missing)})")
    return repair(wheel, tmp_path_factory.mktemp("repaired"))


def test_wheel_serves_glibc_2_28_every_python_and_every_torch(repaired):
    assert repaired.name.endswith(f"-cp310-abi3-{PLATFORM}.whl")
    audits = "\n".join(audit(repaired))
    assert re.search(r"0 ABI version mismatches\s+and\s+0\s+ABI\s+violations", audits), audits
    assert re.search(r"libtorch_cpu\.so.* which are torch's and stay outside", audits)


def test_the_library_of_this_checkout_passes_the_audits(repaired, tmp_path):
    """Which is optimised as a released one."""
    built = {path.stem: path.read_bytes() for path in (ROOT / "carafe_plugin").glob("*.so") if path.name in ALLOWED}
    if not built:
        pytest.skip("there is no library in this checkout")
    assert list(audit(repacked(repaired, tmp_path, **built)))


def test_a_wheel_for_one_torch_is_not_released(tmp_path, monkeypatch):
    """What a build beside torch 2.1 to 2.9 makes has the same name."""

    def build_beside_old_torch(*_, **__):
        (tmp_path / "carafe_plugin-1.tar.gz").touch()
        with zipfile.ZipFile(tmp_path / "carafe_plugin-1-cp310-abi3-linux_x86_64.whl", "w") as archive:
            archive.writestr("carafe_plugin/_C_torch2_1.abi3.so", "")
        return ""

    monkeypatch.setattr(release.wheel, "module", build_beside_old_torch)
    with pytest.raises(ReleaseError, match=r"the wheel for everybody is built beside torch 2\.10 or later"):
        release.wheel.build(tmp_path)


def repacked(wheel, folder, **changes):
    """A copy of a wheel in which files, named by their stem, have another content, or are added."""
    names = {f"carafe_plugin/{name}.so": content for name, content in changes.items()}
    copy = folder / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            if name not in names:
                target.writestr(name, source.read(name))
        for name, content in names.items():
            target.writestr(name, content)
    return copy


@pytest.mark.parametrize(
    ("needed", "reason"),
    [
        ("__libc_single_threaded", "its symbols need manylinux_2_34"),
        ("_ZN2at4_ops5empty", "needs what torch's stable interface does not provide: _ZN2at4_ops5empty"),
        ("PyUnicode_New", "abi3audit"),
    ],
)
def test_audits_refuse_what_does_not_serve_all(needed, reason, repaired, tmp_path):
    """The symbol of a newer glibc, of torch's C++ interface, of CPython's unlimited one."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not on the PATH")
    source, library = tmp_path / "_C.c", tmp_path / "_C.abi3.so"
    symbols = ("torch_call_dispatcher", needed)
    source.write_text("".join(f"extern char {name}; void *use_{name} = &{name};\n" for name in symbols))
    run(["gcc", "-shared", "-fPIC", source, "-o", library])
    with pytest.raises(ReleaseError, match=re.escape(reason)):
        list(audit(repacked(repaired, tmp_path, **{"_C.abi3": library.read_bytes()})))


def test_a_wheel_with_a_library_of_torch_is_refused(repaired, tmp_path):
    extension = zipfile.ZipFile(repaired).read("carafe_plugin/_C.abi3.so")
    wheel = repacked(repaired, tmp_path, **{"_C.abi3": extension, "libtorch_cpu": extension})
    with pytest.raises(ReleaseError, match="must hold the extension and no other library"):
        list(audit(wheel))


def pip_beside(torch_version, wheel, folder):
    """What pip would do with a wheel, offline and without a configuration, beside a torch of that version."""
    information = folder / f"torch-{torch_version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n")
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--no-index", "--dry-run", "--quiet"]
    return subprocess.run(
        [*command, "--report", "-", str(wheel)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("version", ["2.1.2", "2.11.0+cu130"])
def test_installing_the_wheel_leaves_torch_alone(version, wheel, tmp_path):
    result = pip_beside(version, wheel, tmp_path)
    assert result.returncode == 0, result.stderr
    planned = [each["metadata"]["name"].replace("-", "_") for each in json.loads(result.stdout)["install"]]
    assert set(planned) <= {"carafe_plugin"}  # none where it is installed from this very wheel


def test_a_torch_that_is_too_old_would_have_to_go(wheel, tmp_path):
    result = pip_beside("2.0.1", wheel, tmp_path)
    assert result.returncode != 0
    assert re.search(r"conflicting dependencies|No matching distribution found for torch>=2\.1", result.stderr)


def test_building_with_isolation_fetches_no_torch():
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^\[build-system\]$.*?^requires = (\[.*?\])$", text, re.M | re.S)
    assert {re.match(r"[\w-]+", each)[0] for each in json.loads(requires)} == {"setuptools", "wheel"}


def test_a_wheel_for_another_platform_is_refused_by_pip(wheel, tmp_path):
    other = tmp_path / re.sub(r"linux_\w+(?=\.whl$)", "manylinux_2_28_s390x", wheel.name)
    shutil.copy(wheel, other)
    result = pip_beside("2.11.0", other, tmp_path)
    assert result.returncode != 0
    assert f"{other.name} is not a supported wheel on this platform." in result.stderr


def test_wheel_passes_the_operator_tests_without_openmmlab(installed, tmp_path):
    files = [TESTS / "ops" / f"test_{name}.py" for name in ("reference", "carafe", "errors", "autograd", "autocast")]
    files.append(TESTS / "modules" / "test_modules.py")
    last = run_tests([*files, "--every=3"], sys.executable, installed, tmp_path, dict(os.environ))
    assert re.search(r"\d{3} passed", last), last


def test_installed_configs_are_found(installed):
    import carafe_plugin

    names = {p.name for p in (Path(carafe_plugin.__file__).parents[1] / "configs").rglob("*.py")}
    assert names
    assert {p.name for p in (installed / "carafe_plugin" / "configs").rglob("*.py")} == names


def test_no_torch_gets_a_pure_package(tmp_path):
    shadow = tmp_path / "shadow"
    (shadow / "torch").mkdir(parents=True)
    (shadow / "torch" / "__init__.py").write_text("raise ImportError('no torch here')")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("carafe_plugin", "configs", "csrc", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "model-index.yml"):
        shutil.copy(ROOT / name, source)
    environment = {**os.environ, "PYTHONPATH": str(shadow)}
    output = run([sys.executable, "setup.py", "bdist_wheel"], cwd=source, env=environment)
    assert "no extension, the PyTorch reference serves" in output
    (built,) = (source / "dist").glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(built).namelist() if n.endswith(".so")]


def test_sources_refuse_a_torch_that_the_package_does_not_run_on(tmp_path):
    """In place of building, after which pip would fetch another torch."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.0.1+cu118'")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    expected = "carafe_plugin needs torch >= 2.1, found 2.0.1+cu118; install a newer torch first"
    assert result.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("library", "line"),
    [
        (None, r"It was not built; where there is a C\+\+ compiler, pip install .* builds it"),
        (
            "_C.so: undefined symbol: torch_list_size",
            r"It was built for another torch than .*; pip install .* builds it",
        ),
        ("_C.so: cannot open shared object file", r"pip install .* builds it anew"),
    ],
    ids=["none", "of another torch", "broken"],
)
def test_a_library_that_does_not_load_leaves_the_reference_and_says_what_to_do(library, line, installed, tmp_path):
    package = tmp_path / "carafe_plugin"
    shutil.copytree(installed / "carafe_plugin", package, ignore=shutil.ignore_patterns("*.so"))
    if library:
        (package / "_C.py").write_text(f"raise ImportError({library!r})")
    hide = "" if library else "sys.modules['carafe_plugin._C'] = None"  # an editable installation would lend its own
    code = f"""
import sys
{hide}
import torch, carafe_plugin
print(carafe_plugin.is_compiled(), carafe_plugin.CARAFEUpsample(8)(torch.rand(1, 8, 3, 3)).shape)
"""
    done = call([sys.executable, "-W", "always::UserWarning", "-c", code], tmp_path, tmp_path)
    assert done.stdout == "False torch.Size([1, 8, 6, 6])\n", done.stderr
    said = [text for text in done.stderr.splitlines() if "carafe_plugin: " in text]
    assert len(said) == 1
    assert re.search(rf"the slower PyTorch reference serves, because .* does not load: .*\. {line}", said[0]), said
    assert f"carafe_plugin-{_version.__version__}.tar.gz" in said[0]


def test_wrong_cuda_wish_is_an_error(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {**os.environ, "CARAFE_CUDA": "yes"}
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "CARAFE_CUDA must be 0, 1 or only, got 'yes'" in result.stderr
