# shellcheck shell=bash
# Shared by launch/quickstart, launch/local and tests/run: makes .venv, for the tests Slurm too, then sets up a run's surroundings.
# To be sourced. Variables a user may set:
#   MOEDIST_PYTHON       the interpreter to make .venv with (default: the first python3 that is 3.10 or newer)
#   MOEDIST_TORCH_INDEX  the package index to take torch from (default: chosen for this machine's GPU)

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python
CONSTRAINTS=$ROOT/launch/constraints.txt
STAMP=$VENV/moedist-setup # line 1: what was installed from, then one extra a line; written last

# Both go to stderr: stdout belongs to the program that is started.
say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# find_python: prints an interpreter that is new enough and can make virtual environments.
find_python() {
    local candidate version
    local candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    if [[ -n ${MOEDIST_PYTHON:-} ]]; then candidates=("$MOEDIST_PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        die "Python $version is here without its venv module; on Debian or Ubuntu: sudo apt install python$version-venv"
    done
    version=$("${candidates[0]}" --version 2>&1) || version="nothing that runs"
    die "moedist needs Python 3.10 or newer, and ${candidates[0]} is $version; set MOEDIST_PYTHON=/path/to/python3"
}

# make_venv: makes .venv, or makes it anew where it is broken, half made or moved from another folder.
make_venv() {
    local python
    if "$PYTHON" -m pip --version >/dev/null 2>&1 &&
        grep -qF -e "VIRTUAL_ENV=$VENV" -e "VIRTUAL_ENV=\"$VENV" -e "VIRTUAL_ENV='$VENV" "$VENV/bin/activate"; then
        return
    fi
    python=$(find_python) || exit 1
    say "making .venv with $("$python" --version 2>&1) ($python)"
    "$python" -m venv --clear "$VENV" || die "could not make $VENV"
}

# installed_torch: prints the version of torch in .venv, if it is one that setup.cfg allows.
installed_torch() {
    "$PYTHON" - "$ROOT/setup.cfg" <<'PYTHON_CODE'
import configparser, importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement

config = configparser.ConfigParser()
config.read(sys.argv[1])
wanted = [Requirement(line) for line in config["options"]["install_requires"].split("\n") if line]
(torch,) = [requirement for requirement in wanted if requirement.name == "torch"]
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit()
if torch.specifier.contains(version, prereleases=True):
    print(version)
PYTHON_CODE
}

has_nvidia() { [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; }
has_amd() { [[ -e /dev/kfd ]] || rocminfo >/dev/null 2>&1; }

# amd_index: PyTorch's index for this machine's ROCm (7.2 where its version cannot be read).
amd_index() {
    local rocm=7.2 line
    if read -r line 2>/dev/null </opt/rocm/.info/version && [[ $line =~ ^([0-9]+\.[0-9]+) ]]; then
        rocm=${BASH_REMATCH[1]}
    fi
    printf 'https://download.pytorch.org/whl/rocm%s\n' "$rocm"
}

answers() {
    "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=3)' "$1/torch/" 2>/dev/null
}

pip_install() { "$PYTHON" -m pip install -qq --disable-pip-version-check "$@"; }

# install_torch: the build that fits this machine. A torch that is already there stays.
install_torch() {
    local have pin index='' why cpu=https://download.pytorch.org/whl/cpu
    have=$(installed_torch) || die "could not ask $PYTHON for its torch"
    if [[ -n $have ]]; then say "keeping torch $have (remove .venv to choose another)"; return; fi
    pin=$(grep -E '^torch==' "$CONSTRAINTS") || die "launch/constraints.txt has no line torch==..."
    if [[ -n ${MOEDIST_TORCH_INDEX:-} ]]; then
        index=$MOEDIST_TORCH_INDEX why='MOEDIST_TORCH_INDEX'
    elif has_nvidia; then
        why='NVIDIA GPU: the CUDA build, several GB'
    elif has_amd; then
        index=$(amd_index) why='AMD GPU: the ROCm build, several GB'
    elif [[ $(uname -s) == Darwin ]]; then
        why='macOS'
    elif answers "$cpu"; then
        index=$cpu why='no GPU: the CPU build; MOEDIST_TORCH_INDEX chooses another'
    else
        why="no GPU, but $cpu does not answer: whatever build pip finds, CUDA's may be several GB"
    fi
    say "installing $pin ($why)"
    if [[ -z $index ]]; then
        pip_install "$pin" || die "pip could not install $pin; set MOEDIST_TORCH_INDEX to an index that has it"
    elif ! pip_install "$pin" --index-url "$index"; then
        say "$index has no $pin for this Python: taking its newest torch"
        pip_install torch --index-url "$index" ||
            die "no torch from $index; set MOEDIST_TORCH_INDEX to one that https://pytorch.org/get-started names"
        [[ -n $(installed_torch) ]] || die "the newest torch at $index is older than setup.cfg allows"
    fi
}

# source_hash: changes whenever what would be installed changes.
source_hash() { cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" "$CONSTRAINTS" <(printf '%s' "$ROOT") | cksum; }

# is_set_up EXTRAS...: whether .venv holds the package with these extras, as of today's setup.cfg and constraints.
is_set_up() {
    local extra
    [[ -x $PYTHON && -f $STAMP && $(head -n 1 "$STAMP") == "$(source_hash)" ]] || return 1
    for extra in "$@"; do grep -qx "$extra" "$STAMP" || return 1; done
}

install_package() {
    local torch extras hash
    if is_set_up "$@"; then return; fi # another setup did it while this one waited
    hash=$(source_hash)
    make_venv
    install_torch
    torch=$(installed_torch)
    # The other pins, and the torch that is there instead of the pinned one.
    { grep -v '^torch==' "$CONSTRAINTS"; printf 'torch==%s\n' "$torch"; } >"$VENV/constraints.txt"
    # Extras that an earlier setup brought are kept up to date with the new ones.
    extras=$({ tail -n +2 "$STAMP" 2>/dev/null || true; printf '%s\n' "$@"; } | sed '/^$/d' | sort -u)
    say "installing moedist and what it needs${extras:+ (extras: $(tr '\n' ' ' <<<"$extras" | sed 's/ $//'))}, a minute or two"
    pip_install -c "$VENV/constraints.txt" -e "$ROOT${extras:+[$(tr '\n' ',' <<<"$extras" | sed 's/,$//')]}" ||
        die "pip could not install moedist; run the same command again to go on from here"
    printf '%s\n' "$hash" "$extras" >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    say "done in ${SECONDS} s"
}

# set_up EXTRAS...: .venv with torch, moedist (editable) and these extras, and its programs first in PATH.
set_up() {
    local status=0
    if is_set_up "$@"; then
        say ".venv is already set up"
    else
        # One setup at a time: a second one waits. A subshell, so that no later program inherits the lock;
        # not in a condition, where bash would ignore "set -e".
        set +e
        (
            set -e
            if command -v flock >/dev/null; then exec 9>"$ROOT/.venv.lock"; flock 9; fi
            install_package "$@"
        )
        status=$?
        set -e
        if ((status)); then exit "$status"; fi
    fi
    use_venv
}

# install_slurm: Slurm and munge for slurm/devcluster, and environment modules, where this is Debian or Ubuntu and root asks.
# Where not, what needs them says so.
install_slurm() {
    local missing=() program packages=(slurm-wlm munge iproute2 environment-modules)
    for program in slurmctld slurmd sbatch munged ip; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [[ -e /etc/profile.d/modules.sh || -e /etc/profile.d/lmod.sh ]] || missing+=("environment modules")
    if ((${#missing[@]} == 0)); then return; fi
    if ((EUID)) || ! command -v apt-get >/dev/null; then
        say "no ${missing[*]}: tests that need a Slurm are skipped (as root on Debian or Ubuntu it would be installed)"
        return
    fi
    say "installing ${packages[*]} for slurm/devcluster and its tests"
    local options=(-qq -y --no-install-recommends -o DPkg::Lock::Timeout=120)
    if ! DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "${packages[@]}" >/dev/null 2>&1; then
        apt-get update -qq >/dev/null 2>&1 || true
        DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "${packages[@]}" >/dev/null ||
            say "could not install them: tests that need a Slurm are skipped"
    fi
}

use_venv() {
    export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
    unset PYTHONHOME
}

# set_threads RANKS: divides the cores between the ranks of this machine.
set_threads() {
    local cores
    if [[ -n ${OMP_NUM_THREADS:-} ]]; then return; fi
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    OMP_NUM_THREADS=$((cores / $1 > 1 ? cores / $1 : 1))
    export OMP_NUM_THREADS
    say "OMP_NUM_THREADS=$OMP_NUM_THREADS ($cores cores, $1 ranks)"
}

# set_malloc: glibc hands large freed blocks back to the system in every step and pays for them again in page faults,
# up to a third of a step on CPUs. This makes it keep them.
set_malloc() {
    if [[ -n ${GLIBC_TUNABLES:-}${MALLOC_MMAP_MAX_:-}${MALLOC_TRIM_THRESHOLD_:-} ]]; then return; fi
    if [[ $(getconf GNU_LIBC_VERSION 2>/dev/null) != glibc* ]]; then return; fi
    export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0xffffffffffffffff
    say "GLIBC_TUNABLES=$GLIBC_TUNABLES (keeps freed memory)"
}

# start COMMAND...: says the command, then becomes it, so that signals and exit codes pass through.
start() {
    { printf '+'; printf ' %q' "$@"; printf '\n'; } >&2
    exec "$@"
}

# check_first RANKS ARGUMENTS...: refuse a wrong configuration before ranks start, in one line instead of one a rank
# and the launcher's stack trace.
check_first() {
    local ranks=$1
    shift
    python -m moedist train "$@" --check --ranks "$ranks" >/dev/null || exit 1
}

# torchrun_here RANKS ARGUMENTS...: torchrun on this machine alone. A free port, so that two jobs do not meet, and
# the loopback address, which works where the host's own name does not resolve.
torchrun_here() {
    local ranks=$1
    shift
    start torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$ranks" "$@"
}
