"""What users install: the sdist, the wheel built from it, its contents and binary interface, and old versions of torch.

The wheel is built once, from the sdist, and the operator's tests run against it in a folder of its own.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from toolkit import reason_for_no_cuda_half

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"

# Undefined symbols that any torch from 2.10 on, Python from 3.10 on and Linux provides: torch's stable C interface,
# CPython's limited interface, the C and C++ runtimes (versioned, or in namespace std), and cudart in the CUDA half.
COMMON = r"(aoti_torch_|torch_|Py|_Py|__gmon_start__$|_ITM_|_ZN?K?St)|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"
ALLOWED = {"_C.abi3.so": COMMON, "_C_cuda.abi3.so": rf"{COMMON}|(cuda|__cuda)"}

OPERATOR_TESTS = [f"test_{name}.py" for name in ("reference", "carafe", "errors", "autograd", "autocast")]


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
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source], cwd=folder)
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
    launchers = {f"carafe_plugin/tools/{kind}_{tool}.sh" for kind in ("dist", "slurm") for tool in ("train", "test")}
    assert {name for name in names if name.endswith(".sh")} == {*launchers, "carafe_plugin/tools/launch.sh"}
    assert {"carafe_plugin/py.typed", "carafe_plugin/_C.abi3.so"} <= set(names)
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
    where = "import carafe_plugin.tools.train as train; print(train.__file__)"
    found = call([sys.executable, "-c", where], installed, tmp_path)
    assert found.stdout.strip() == str(installed / "carafe_plugin/tools/train.py"), found.stderr

    run_module = [sys.executable, "-m", "carafe_plugin.tools.train"]
    done = call([*run_module, "--help"], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--auto-scale-lr" in done.stdout
    error = f"error: no such configuration file: {tmp_path}/absent.py\n"
    for command in (run_module, [sys.executable, installed / "bin/carafe-train"]):
        done = call([*command, "absent.py"], installed, tmp_path)
        assert (done.returncode, done.stderr) == (2, error)
    launcher = installed / "carafe_plugin/tools/dist_train.sh"
    assert os.access(launcher, os.X_OK)
    done = call([launcher, "absent.py", "1"], installed, tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith(error), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_wheel_has_help(name, installed, tmp_path):
    pytest.importorskip("mmdet", reason="the commands run on the toolboxes")
    done = call([sys.executable, installed / "bin" / f"carafe-{name.replace('_', '-')}", "--help"], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: carafe-{name.replace('_', '-')} ")


def test_wheel_has_the_cuda_half_where_there_is_a_toolkit(wheel):
    if reason := reason_for_no_cuda_half():
        pytest.skip(reason)
    assert "carafe_plugin/_C_cuda.abi3.so" in zipfile.ZipFile(wheel).namelist()


def test_binaries_need_only_stable_symbols(installed):
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    libraries = sorted((installed / "carafe_plugin").glob("*.so"))
    assert libraries
    for library in libraries:
        symbols = [line.split()[-1] for line in run(["nm", "-D", "--undefined-only", library]).splitlines()]
        assert "torch_call_dispatcher" in symbols  # the list is really that of an extension of torch
        foreign = [s for s in symbols if not re.match(ALLOWED[library.name], s)]
        assert not foreign, f"{library.name}: {foreign}"


def test_wheel_passes_the_operator_tests_without_openmmlab(installed, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), str(TESTS), str(TESTS / "support")]),
        "CARAFE_EXPECTED_FOLDER": str(installed),
    }
    files = [TESTS / "ops" / name for name in OPERATOR_TESTS]
    files.append(TESTS / "modules" / "test_modules.py")
    output = run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "hide_openmmlab",
            "-p",
            "no:cacheprovider",
            "-o",
            "pythonpath=",
            *files,
        ],
        cwd=tmp_path,
        env=environment,
    )
    assert re.search(r"\d{3} passed", output), output[-500:]


def test_installed_configs_are_found(installed):
    import carafe_plugin

    names = {p.name for p in (Path(carafe_plugin.__file__).parents[1] / "configs").rglob("*.py")}
    assert names
    assert {p.name for p in (installed / "carafe_plugin" / "configs").rglob("*.py")} == names


@pytest.mark.parametrize("version", ["2.1.0", "2.9.1+cu128", None])
def test_older_torch_gets_a_pure_package(version, tmp_path):
    """setup.py beside a torch that is too old, or none, builds no extension and succeeds."""
    shadow = tmp_path / "shadow"
    (shadow / "torch").mkdir(parents=True)
    text = "raise ImportError('no torch here')" if version is None else f"__version__ = {version!r}"
    (shadow / "torch" / "__init__.py").write_text(text)
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
    assert "CARAFE_CUDA must be 0 or 1, got 'yes'" in result.stderr
