#!/usr/bin/env bash
# Everything there is to do on a machine with an NVIDIA GPU, which may have no network.  From the repository's root:
#
#     bench/on_gpu.sh check    is it right?  Ops, models and compute-sanitizer: within 6 minutes
#     bench/on_gpu.sh bench    is it fast?  Kernels, and training beside PyTorch: within 9 minutes
#
# What else is on the command line goes to bench/on_gpu.py (--help shows it).
#
# Wanted there: an NVIDIA driver, CUDA 13 with nvcc or NVRTC, a C compiler, CMake, and a Python with its headers, NumPy,
# PyTorch, Cython and pytest.  What else it lacks is carried as wheels: PyCUDA (.ci/pycuda FOLDER builds one), and what
# PyCUDA requires.
#
#     WHEELS=FOLDER    the wheels that were carried (.gpu/wheels)
#     OUT=FOLDER       where check.json, bench.json and the logs go, written as results come (.gpu/out)
#     PYTHON=NAME      the interpreter (python3)
#
# Nothing is installed but in .gpu, which may be deleted.
set -euo pipefail
cd "$(dirname "$0")/.."
exec < /dev/null
began=$(date +%s)

case ${1:-} in
check | bench) ;;
*) sed -n '2,18s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.gpu/wheels}
export OUT=${OUT:-$PWD/.gpu/out}
SITE=$PWD/.gpu/site
LOG=$OUT/$1-setup.log
mkdir -p "$OUT" .gpu
# Tools that came with the interpreter's packages (cmake, ninja) need not be on the PATH.
PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH

rm -rf "$SITE"
mkdir -p "$SITE"
: > "$LOG"
if compgen -G "$WHEELS/*.whl" > /dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$SITE" "$WHEELS"/*.whl >> "$LOG" 2>&1 || echo "the wheels in $WHEELS could not be installed: see $LOG"
else
    echo "no wheels in $WHEELS: using what is installed"
fi
export PYTHONPATH=$SITE PYTHONDONTWRITEBYTECODE=1

# By CMake alone: neither pip's isolated builds, which need a network, nor this project's pins hold here.
build() {
    local python
    python=$("$PYTHON" -c 'import sys; print(sys.executable)')
    if command -v ninja > /dev/null; then export CMAKE_GENERATOR=Ninja; fi
    cmake -S . -B .gpu/build -DPython_EXECUTABLE="$python" &&
        cmake --build .gpu/build --parallel "$(nproc)" &&
        cmake --install .gpu/build --prefix "$SITE"
}
cp -R llmc "$SITE/"
rm -f "$SITE"/llmc/_cpu/*.so # another Python's
if ! build >> "$LOG" 2>&1; then
    # The CUDA ops need no extension; the models' references do, and the first part says so.
    tail -n 20 "$LOG"
    echo "the CPU extensions could not be built: see $LOG"
fi

exec "$PYTHON" bench/on_gpu.py "$@" --began "$began"
