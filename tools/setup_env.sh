#!/usr/bin/env bash
# Builds an environment, or completes the active one with CARAFE_ENV=current. Steps that are done are skipped, so it can
# be run again at any time: it resumes where it was interrupted.
#   FAMILY=openmmlab   in .venv-openmmlab, the upstream packages of OpenMMLab on the torch that they were made for;
#                      without (or FAMILY=onedl), in .venv, their maintained successors on a current one
#   LIBRARIES=yes      makes .venv-libraries as well: that environment with the libraries whose models convert() is
#                      tested on, which want other versions of what the toolboxes use
#   MMCV=compiled      compiles mmcv's own operators; without, torchvision's stand in for them (carafe_plugin's mmcv_ops)
set -euo pipefail
unset PYTHONOPTIMIZE  # what is asked of Python below, it answers by assertions
cd "$(dirname "$0")/.."

# fail MESSAGE: one line, and the end.
fail() {
  echo "env: error: $1" >&2
  exit 1
}

# newest: the last Python 3 that this torch is made for; library: what is compiled for it (setup.py). mmcv 2.1 is compiled
# with what setuptools left out in 70. The toolboxes' versions are in pyproject.toml, under the family's name.
family=${FAMILY:-onedl}
case $family in
  onedl)
    venv=.venv other=openmmlab newest=13 setuptools='80 82' torch='torch==2.11.0 torchvision==0.26.0' library=_C
    ;;
  openmmlab)
    venv=.venv-openmmlab other=onedl newest=11 setuptools='64 70' torch='torch==2.1.2 torchvision==0.16.2'
    library=_C_torch2_1
    ;;
  *) fail "FAMILY must be 'onedl' or 'openmmlab', got '$family'" ;;
esac
log=build/env${venv#.venv}.log
mkdir -p build

[ -z "${MMCV:-}" ] || [ "$MMCV" = compiled ] || fail "MMCV must be 'compiled' or unset, got '$MMCV'"
if command -v ldconfig >/dev/null && ! ldconfig -p | grep -q 'libGL\.so\.1'; then
  echo "env: warning: libGL.so.1 is not installed; OpenCV, which mmcv imports, needs it (Debian: libgl1)" >&2
fi

# supported PYTHON: whether its version is one that all packages are made for.
supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, '"$newest"'))' 2>/dev/null
}

if [ "${CARAFE_ENV:-}" = current ]; then
  python=python3
  command -v "$python" >/dev/null || fail "CARAFE_ENV=current: no python3 on the PATH"
else
  python=$venv/bin/python
  # None yet, or one that was interrupted before it had pip, or was made without.
  if ! "$python" -m pip --version >/dev/null 2>&1 && ! "$python" -m ensurepip >/dev/null 2>&1; then
    base=python3
    for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
      if supported "$candidate" && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    command -v "$base" >/dev/null || fail "Python 3.10 to 3.$newest is needed, and no python3 was found"
    supported "$base" || fail "Python 3.10 to 3.$newest is needed, found $("$base" --version 2>&1) as $base"
    echo "env: creating $venv (about 5 s)"
    "$base" -m venv --clear "$venv" >"$log" 2>&1 ||
      fail "$base -m venv does not work (Debian: python3-venv): $(tail -n 1 "$log")"
  fi
fi
supported "$python" || fail "Python 3.10 to 3.$newest is needed, found $("$python" --version 2>&1) as $python"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# What an interrupted pip has left of a package looks like the package. pip writes INSTALLER when all files are there.
if [ "${CARAFE_ENV:-}" != current ]; then
  for information in "$venv"/lib/python3.*/site-packages/*.dist-info; do
    if [ -d "$information" ] && [ ! -e "$information/INSTALLER" ]; then
      echo "env: installing again what was interrupted: $(basename "$information" .dist-info)"
      rm -rf "$information"
    fi
  done
fi

# have NAME==VERSION ...: whether all of these are installed (a bare NAME: in any version).
have() {
  "$python" - "$@" 2>/dev/null <<'PYTHON'
import importlib.metadata, sys
for requirement in sys.argv[1:]:
    name, _, version = requirement.partition("==")
    assert version in ("", importlib.metadata.version(name).split("+")[0])
PYTHON
}

# extra NAME: the packages of one of the extras in pyproject.toml for this Python, on a line.
extra() {
  "$python" - "$1" <<'PYTHON'
import pathlib, re, sys
(packages,) = re.findall(rf"^{sys.argv[1]} = \[(.*?)\]", pathlib.Path("pyproject.toml").read_text(), re.M | re.S)
for requirement in re.findall('"(.+?)"', packages):
    package, _, marker = requirement.partition("; python_version ")
    comparison, minor = re.fullmatch(r"(<|>=) '3\.(\d+)'", marker or ">= '3.0'").groups()
    if (sys.version_info >= (3, int(minor))) == (comparison == ">="):
        print(package, end=" ")
PYTHON
}

# reason: why pip has failed, from its log, in a few words.
reason() {
  local left
  left=$(df -Pk . "${TMPDIR:-/tmp}" 2>/dev/null | awk 'NR > 1 {print $4}' | sort -n | head -n 1)
  if grep -q 'No space left on device' "$log" || [ "${left:-999999}" -lt 10000 ]; then
    echo "the disk is full (6 GB are needed here, 3 GB in ${TMPDIR:-/tmp} or TMPDIR)"
  elif grep -qE 'Failed (building|to build)' "$log"; then  # whatever the network did before
    grep -iE '(^|[^a-z])error' "$log" | head -n 1
  elif grep -qE 'from versions: none|Max retries|NewConnectionError|NameResolutionError|ProxyError|Connection (broken|reset|aborted|refused)|ConnectionResetError|RemoteDisconnected|IncompleteRead|[Tt]imed out|ConnectTimeout|SSLError|DO NOT MATCH THE HASHES' "$log"; then
    echo "the package index cannot be reached, or a download broke off"
  else
    grep -iE '(^|[^a-z])error' "$log" | tail -n 1 | grep . || tail -n 1 "$log"
  fi
}

# The families' packages import under the same names: pip would write one over the other.
for package in $(extra "$other"); do
  case ${package%%=*} in
    mm* | onedl-*)
      if have "${package%%=*}"; then
        fail "${package%%=*} is of the other family than FAMILY=$family: use another environment, or FAMILY=$other"
      fi
      ;;
  esac
done

# The family's packages, in the versions that everything else has to keep to (numpy, which torchvision asks for, say).
packages=$(extra "$family")
tools=$(extra tools)
dev=$(extra dev)
export=
[ "$family" = openmmlab ] || export=$(extra export)  # torch.export has what it takes from torch 2.6 on

# install DESCRIPTION PIP-ARGUMENT ...
install() {
  local description=$1 start=$SECONDS
  shift
  echo "env: installing $description"
  "$python" -m pip install --progress-bar off --constraint <(printf '%s\n' $packages) "$@" >"$log" 2>&1 ||
    fail "installing ${description%% (*} failed: $(reason); pip's output is in $log; make env resumes from here"
  echo "env: done in $((SECONDS - start)) s"
}

# step DESCRIPTION REQUIREMENT ...
step() {
  local description=$1
  shift
  have "$@" || install "$description" "$@"
}

# compiles: whether there is what a C++ extension takes; says what is missing.
compiles() {
  local compiler=${CXX:-c++} header
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
  if ! command -v "${compiler%% *}" >/dev/null; then
    echo "no C++ compiler ($compiler) on the PATH (Debian: g++)"
    return 1
  elif [ ! -e "$header" ]; then
    echo "no $header (Debian: python3-dev)"
    return 1
  fi
}

read -r lowest below <<<"$setuptools"
in_range="import setuptools; exit(not $lowest <= int(setuptools.__version__.split('.')[0]) < $below)"
if ! "$python" -c "$in_range" 2>/dev/null || ! have wheel ninja packaging; then
  install "the build tools (about 10 s)" "setuptools>=$lowest,<$below" wheel ninja packaging
fi
step "torch (about 2 minutes, 5 GB)" $torch  # not quoted: a word for each package, here and below

# ninja and the compiler of this environment must be found although it need not be activated.
bin=$(cd "$(dirname "$(command -v "$python")")" && pwd)
export PATH="$bin:$PATH"

# mmcv compiles its operators wherever its build sees torch. pip builds a package apart from what is installed, so it
# sees none there; and what pip has kept of an earlier build may be either, so it is not asked.
read -r mmcv toolboxes <<<"$packages"
compiled_mmcv=${mmcv/-lite/}  # upstream's has another name when it is compiled
# Whether there are compiled operators, and whether they load; -E: without what stands in for them.
is_compiled() {
  "$python" -E - 2>/dev/null <<'PYTHON'
import importlib.machinery, importlib.util
mmcv = importlib.util.find_spec("mmcv")
assert importlib.machinery.PathFinder.find_spec("mmcv._ext", mmcv.submodule_search_locations)
PYTHON
}
has_operators() {
  is_compiled && "$python" -E -c 'import torch, mmcv._ext' >"$log" 2>&1
}
if ! have "$mmcv" && ! have "$compiled_mmcv"; then
  if is_compiled && [ "${MMCV:-}" != compiled ]; then
    fail "another mmcv is installed here, with its operators, and $mmcv would replace it: MMCV=compiled compiles that one"
  fi
  unset PIP_NO_BUILD_ISOLATION
  install "mmcv, not compiled (about 30 s)" --no-cache-dir "$mmcv"
fi
if [ "${MMCV:-}" = compiled ] && ! has_operators; then
  missing=$(compiles) || fail "mmcv cannot be compiled: $missing"
  "$python" -E -c 'import mmcv' >"$log" 2>&1 || fail "mmcv does not import: $(tail -n 1 "$log")"
  [ "$mmcv" = "$compiled_mmcv" ] || "$python" -m pip uninstall --yes "${mmcv%%=*}" >"$log" 2>&1  # these files, in its name
  again=(--no-deps --no-build-isolation --force-reinstall "$compiled_mmcv")
  install "mmcv with its compiled operators (10 to 25 minutes on 2 cores, once)" "${again[@]}"
  has_operators ||  # pip had kept one that was not compiled, or for another torch
    install "mmcv with its compiled operators, again (10 to 25 minutes on 2 cores, once)" --no-cache-dir "${again[@]}"
  has_operators || fail "mmcv was compiled, and its operators do not load: $(tail -n 1 "$log")"
fi
step "mmengine, mmdet, mmsegmentation, mmpretrain (about 30 s)" $toolboxes
step "the tools for demos, tests and style (about 20 s)" $tools $dev
[ -z "$export" ] || step "the runtimes of exported models (about 20 s)" $export

# built: whether the environment has this package from this folder, built after its sources; pip writes RECORD last.
built() {
  local record
  record=$("$python" - 2>/dev/null <<'PYTHON'
import importlib.metadata, json, pathlib
package = importlib.metadata.distribution("carafe_plugin")
assert json.loads(package.read_text("direct_url.json"))["url"] == pathlib.Path.cwd().as_uri()
print(next(path.locate() for path in package.files if path.name == "RECORD"))
PYTHON
  ) && [ -z "$(find setup.py pyproject.toml csrc -newer "$record" -type f)" ] &&
    { [ -e "carafe_plugin/$library.abi3.so" ] || ! compiles >/dev/null; }
}

built || install "carafe_plugin (about 5 minutes)" --no-deps --no-build-isolation -e .
if [ ! -e "carafe_plugin/$library.abi3.so" ]; then
  echo "env: carafe_plugin is not compiled and runs on its slower PyTorch reference: $(compiles)"
fi

if [ -n "${LIBRARIES:-}" ]; then
  [ "$family" = onedl ] || fail "LIBRARIES=yes needs FAMILY=onedl, got '$family'"
  libraries=$(extra libraries)
  base=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  [ -x .venv-libraries/bin/python ] || "$python" -m venv .venv-libraries
  # Its packages come first, and behind them those of the environment, with what its own .pth files say.
  below=$(.venv-libraries/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/zz_below.pth
  echo "import site; site.addsitedir('$base')" >"$below"
  python=.venv-libraries/bin/python
  step "the libraries whose models are converted (about 40 s)" $libraries
fi
echo "env: ready ($("$python" --version), $("$python" -c 'import sys; print(sys.prefix)'))"
