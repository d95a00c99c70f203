#!/usr/bin/env bash
# Tests and measures this machine, with a GPU or without one, in one call of under 10 minutes.
# Prints a card and a table; saves one JSON file. Fails when a test, a measurement or the run failed.
#
#   benchmarks/device.sh [--python PATH] [--wheels DIR] [--out DIR] [--toy] [--shape NAME] ...
#
#   --python PATH   Python to use (default: .venv/bin/python where there is one, else python3)
#   --wheels DIR    first install every wheel of DIR, then this package with its kernels, without the network
#                   and without dependencies, into build/device-venv: a venv that sees the packages of that
#                   Python, the wheels going first; else the package must be installed (make install)
#   --out DIR       folder of the JSON file (default: benchmarks/results)
#   --toy           toy sizes, to try every step in under a minute
#   --help          this text and the options that python -m benchmarks.device adds
set -euo pipefail

started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

absolute() {
  case $1 in
    /*) printf '%s' "$1" ;;
    *) printf '%s' "$started_in/$1" ;;
  esac
}

python=python3
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
wheels=
passed_on=()
while (($#)); do
  case $1 in
    --python | --wheels | --out)
      if (($# < 2)); then echo "device.sh: $1 needs a value" >&2; exit 2; fi
      case $1 in
        --python) if [[ $2 == */* ]]; then python=$(absolute "$2"); else python=$2; fi ;;
        --wheels) wheels=$(absolute "$2") ;;
        --out) passed_on+=(--out "$(absolute "$2")") ;;
      esac
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "benchmarks/device.sh"
      passed_on+=(--help)
      shift
      ;;
    *)
      passed_on+=("$1")
      shift
      ;;
  esac
done

if [[ -n $wheels ]]; then
  venv=build/device-venv
  rm -rf "$venv"
  "$python" -m venv --system-site-packages --without-pip "$venv"
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # A venv made from a venv sees the packages of the base Python, not of its parent: hand those on.
  "$python" -c 'import site
for folder in site.getsitepackages(): print(f"import site; site.addsitedir({folder!r})")' >"$site/parent.pth"
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --no-cache-dir --target "$site" "$wheels"/*.whl
  # Builds the CPU kernels too, with the wheels' scikit-build-core and nanobind and the compiler that is there.
  PYTHONPATH=$site "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --no-build-isolation --no-compile --no-cache-dir --target "$site" .
  python=$venv/bin/python
fi
exec "$python" -m benchmarks.device "${passed_on[@]}"
