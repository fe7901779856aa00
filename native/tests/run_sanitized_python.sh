#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Run the Python tests of the extension against a build of it with ASAN and UBSan.
#
#     native/tests/run_sanitized_python.sh [PYTEST ARGUMENT...]
#
# PYTHON chooses the interpreter (default: python3); it needs scikit-build-core, pytest, pytest-timeout and
# hypothesis. Everything is built into build/sanitized; the installed blocksnap is left alone.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
build=$root/build/sanitized
python=$(command -v "${PYTHON:-python3}")

cmake -S "$root/native" -B "$build/cmake" -G Ninja -DSKBUILD=ON -DBLOCKSNAP_SANITIZE=ON \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE="$python" >/dev/null
cmake --build "$build/cmake"

# The package beside its sanitised extension, found before any installed one.
rm -rf "$build/package"
mkdir -p "$build/package"
cp -R "$root/blocksnap" "$build/package/blocksnap"
cmake --install "$build/cmake" --prefix "$build/package" >/dev/null
# An editable install hooks itself in before any path; undo that, in child processes too.
cat >"$build/package/sitecustomize.py" <<'END'
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
END

# The interpreter itself is not sanitised, so the run-time libraries have to be there before it starts.
# Python frees little at exit: leaks are what test_module.py's loop and the ctest programs are for.
compiler=$(sed -n 's/^CMAKE_C_COMPILER:[A-Z]*=//p' "$build/cmake/CMakeCache.txt")
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
PYTHONMALLOC=malloc
PYTHONPATH=$build/package
PYTHONSAFEPATH=1
export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS PYTHONMALLOC PYTHONPATH PYTHONSAFEPATH

cd "$root"
"$python" - <<'END'
import blocksnap._native
assert "build/sanitized" in blocksnap._native.__file__, blocksnap._native.__file__
END
exec "$python" -m pytest tests/unit/native -p no:cacheprovider "$@"
