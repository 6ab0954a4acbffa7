#!/usr/bin/env bash
# Builds the environment in .venv, or completes the active one with CARAFE_ENV=current. Steps that are done are skipped,
# so it can be run again at any time.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v g++ >/dev/null; then
  echo "env: g++ is needed to compile mmcv and the extension, and is not on the PATH" >&2
  exit 1
fi
if command -v ldconfig >/dev/null && ! ldconfig -p | grep -q 'libGL\.so\.1'; then
  echo "env: warning: libGL.so.1 is not installed; OpenCV, which mmcv imports, needs it (Debian: libgl1)" >&2
fi

if [ "${CARAFE_ENV:-}" = current ]; then
  python=python3
else
  python=.venv/bin/python
  if ! "$python" -m pip --version >/dev/null 2>&1; then  # none yet, or one whose making was interrupted
    echo "env: creating .venv (a few seconds)"
    base=python3
    for candidate in python3.11 python3.12 python3.10; do
      if command -v "$candidate" >/dev/null && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
      { echo "env: Python 3.10 to 3.13 is needed, found $("$base" --version)" >&2; exit 1; }
    "$base" -m venv --clear .venv
  fi
fi

header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
if [ ! -e "$header" ]; then
  echo "env: $header is needed to compile mmcv and the extension (Debian: python3-dev)" >&2
  exit 1
fi

# have NAME==VERSION ...: whether all of these are installed (a bare NAME: in any version).
have() {
  "$python" - "$@" <<'PYTHON'
import importlib.metadata as metadata, sys
for requirement in sys.argv[1:]:
    name, _, version = requirement.partition("==")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        sys.exit(1)
    if version and found.split("+")[0] != version:
        sys.exit(1)
PYTHON
}

# step DESCRIPTION REQUIREMENT ... [-- PIP-OPTION ...]
step() {
  local description=$1 requirements=() options=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do requirements+=("$1"); shift; done
  [ $# -gt 0 ] && { shift; options=("$@"); }
  if have "${requirements[@]}"; then
    return
  fi
  echo "env: installing $description"
  local start=$SECONDS
  "$python" -m pip install --quiet --disable-pip-version-check "${requirements[@]}" ${options[@]+"${options[@]}"}
  echo "env: done in $((SECONDS - start)) s"
}

if ! "$python" -c 'import setuptools; v = int(setuptools.__version__.split(".")[0]); raise SystemExit(not 80 <= v < 82)' \
  2>/dev/null || ! have wheel ninja packaging; then
  echo "env: installing the build tools (10 s)"
  "$python" -m pip install --quiet --disable-pip-version-check 'setuptools>=80,<82' wheel ninja packaging
fi
step "torch (about 2 minutes, 5 GB)" torch==2.11.0 torchvision==0.26.0
# ninja and the compiler of this environment must be found although it need not be activated.
bin=$(cd "$(dirname "$(command -v "$python")")" && pwd)
export PATH="$bin:$PATH"
MMCV_WITH_OPS=1 step "mmcv with its compiled operators (about 9 minutes on 2 cores, once)" \
  onedl-mmcv==2.3.6 -- --no-build-isolation
if ! "$python" -c 'from importlib.util import find_spec; raise SystemExit(find_spec("mmcv._ext") is None)' 2>/dev/null &&
  "$python" -c 'import mmengine' 2>/dev/null; then
  echo "env: the mmcv that pip had kept has no compiled operators: compiling it again"
  MMCV_WITH_OPS=1 "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-cache-dir \
    --no-deps --force-reinstall onedl-mmcv==2.3.6
fi
step "mmengine, mmdet, mmsegmentation, mmpretrain (20 s)" \
  onedl-mmengine==0.10.12 onedl-mmdetection==3.5.1 onedl-mmsegmentation==1.4.2 onedl-mmpretrain==1.3.6
step "the tools for demos, tests and style (20 s)" \
  rich matplotlib pycocotools scikit-image build==1.6.1 clang-format==19.1.7 hypothesis==6.170.15 mypy==2.4.1 pytest==9.2.0 \
  pytest-xdist==3.8.0 ruff==0.17.6

# The package itself, again whenever a source of the extension is newer than the extension.
stale=$(find setup.py pyproject.toml csrc -newer carafe_plugin/_C.abi3.so -type f 2>/dev/null || echo missing)
if [ ! -e carafe_plugin/_C.abi3.so ] || [ -n "$stale" ] || ! have carafe_plugin; then
  echo "env: building carafe_plugin (about 90 s)"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  if [ -e carafe_plugin/_C.abi3.so ]; then
    touch carafe_plugin/_C.abi3.so
  fi
fi
echo "env: ready ($("$python" --version), $("$python" -c 'import sys; print(sys.prefix)'))"
