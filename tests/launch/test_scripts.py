"""The launch scripts: syntax, arguments, pins, and the set-up's steps with a stand-in for Python and pip."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ["launch/quickstart", "launch/local", "tests/run", ".ci/run"]

# Plays the system's Python and the venv's: notes its arguments in $LOG, makes a .venv of itself, and fails in
# `pip install` when the arguments hold $FAIL_ON.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
if [[ $* == "-m venv"* ]]; then
    folder="${!#}"
    rm -rf "$folder"
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    echo "VIRTUAL_ENV=$folder" >"$folder/bin/activate"
elif [[ $1 == - ]]; then
    cat >/dev/null
    if [[ -e $LOG.torch ]]; then echo 2.13.0; fi
elif [[ $* == "-m pip install"* ]]; then
    if [[ -n ${FAIL_ON:-} && $* == *"$FAIL_ON"* ]]; then exit 1; fi
    if [[ $* == *torch==* ]]; then touch "$LOG.torch"; fi
fi
"""


def run(*command, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment.update(variables)
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=60)


def requirements(config, *sections):
    for section, option in sections:
        for line in config[section][option].split("\n"):
            if line.strip():
                yield Requirement(line)


def pins():
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned_versions(python):
    """{package: pinned version} on the given Python, "3.10" for example."""
    environment = {"python_version": python, "python_full_version": python + ".1"}
    applying = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate(environment)]
    names = [canonicalize_name(pin.name) for pin in applying]
    assert len(names) == len(set(names)), "two pins of one package apply at once"
    return {name: next(iter(pin.specifier)).version for name, pin in zip(names, applying)}


# -- the files


ENVIRONMENTS = [f"slurm/env/{kind}.sh" for kind in ("cuda", "rocm", "cpu")]


@pytest.mark.parametrize("script", [*PROGRAMS, *ENVIRONMENTS, "launch/setup.sh"])
def test_syntax(script):
    assert run("bash", "-n", ROOT / script).returncode == 0


@pytest.mark.parametrize("script", PROGRAMS)
def test_programs_are_executable_and_strict(script):
    assert os.access(ROOT / script, os.X_OK)
    assert "\nset -euo pipefail" in (ROOT / script).read_text()


def test_every_pin_is_exact():
    for pin in pins():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], str(pin)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_within_its_range(python):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    pinned = pinned_versions(python)
    extras = [("options.extras_require", extra) for extra in config["options.extras_require"]]
    for requirement in requirements(config, ("options", "install_requires"), *extras):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin in launch/constraints.txt for Python {python}"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is outside {requirement}"


def test_mpich_stays_out_of_the_mpi_extra():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = {r.name for r in requirements(config, ("options", "install_requires"), ("options.extras_require", "mpi"))}
    assert "mpich" not in names


def test_lint():
    ruff = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ruff is None:
        pytest.skip("ruff is not installed; it comes with the extra 'test'")
    rules = ["--isolated", "--no-cache", "--select", "E4,E7,E9,F"]
    done = run(ruff, "check", "--output-format", "concise", "--quiet", *rules, ROOT / "moedist", ROOT / "tests")
    assert done.returncode == 0, done.stdout


# -- launch/local


@pytest.mark.parametrize("script", ["launch/local", "launch/quickstart"])
def test_help_has_an_example(script):
    done = run(ROOT / script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script}")
    assert f"\n  {script}" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no CONFIG given"),
        (["-n"], "-n needs the number of ranks"),
        (["-n", "two", "setup.cfg"], "not 'two'"),
        (["-n", "0", "setup.cfg"], "not '0'"),
        (["--ranks", "2", "setup.cfg"], "unknown option --ranks"),
        (["no/such.yaml"], "there is no file no/such.yaml"),
        (["setup.cfg", "model.top_k"], "'model.top_k' is not an override"),
    ],
)
def test_bad_arguments_give_one_line(arguments, message):
    done = run(ROOT / "launch/local", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.fixture
def active_environment(tmp_path):
    """Variables of an activated environment whose python, torchrun and mpirun print how they are called."""
    programs = tmp_path / "env/bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text("#!/bin/sh\nexit 0\n")
    for name in ("torchrun", "mpirun"):
        text = f'#!/bin/sh\n[ "$1" = --version ] && exit\necho {name} "$@"\necho "$OMP_NUM_THREADS"\nexit 7\n'
        (programs / name).write_text(text)
    for program in programs.iterdir():
        program.chmod(0o755)
    return {"VIRTUAL_ENV": str(tmp_path / "env"), "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "5"}


def test_local_starts_torchrun_and_passes_its_exit_code(active_environment):
    done = run(ROOT / "launch/local", "-n", 3, "setup.cfg", "a.b=c d", "--resume", **active_environment)
    assert done.returncode == 7, done.stderr
    command, threads = done.stdout.splitlines()
    assert command.startswith("torchrun ") and "--nproc-per-node 3 -m moedist train " in command
    assert command.endswith("setup.cfg a.b=c d --resume")
    assert threads == "5"
    assert "using the active environment" in done.stderr


def test_local_starts_mpirun(active_environment):
    done = run(ROOT / "launch/local", "--mpi", "setup.cfg", **active_environment)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[0].startswith("mpirun -n 2 python -m moedist train ")


def test_memory_settings_of_the_user_stay(active_environment):
    done = run(ROOT / "launch/local", "setup.cfg", GLIBC_TUNABLES="glibc.malloc.check=0", **active_environment)
    assert "GLIBC_TUNABLES" not in done.stderr


# -- the set-up


@pytest.fixture
def fresh(tmp_path):
    """A copy of what the set-up reads, with a stand-in Python; returns (folder, a function that sets up)."""
    project = tmp_path / "project with space"
    (project / "launch").mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", "launch/setup.sh", "launch/constraints.txt"):
        shutil.copy(ROOT / name, project / name)
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    log = tmp_path / "log"

    def set_up(*extras, **variables):
        log.write_text("")
        script = f'set -euo pipefail; source "{project}/launch/setup.sh"; set_up {" ".join(extras)}'
        index = {"MOEDIST_PYTHON": str(python), "MOEDIST_TORCH_INDEX": "http://index.invalid", "LOG": str(log)}
        done = run("bash", "-c", script, **{**index, **variables})
        done.calls = log.read_text().splitlines()
        done.installs = [call for call in done.calls if call.startswith("-m pip install")]
        return done

    return project, set_up


def test_second_set_up_does_nothing(fresh):
    project, set_up = fresh
    first = set_up("test")
    assert first.returncode == 0, first.stderr
    torch, package = first.installs
    assert f"torch=={pinned_versions('3.11')['torch']} --index-url http://index.invalid" in torch
    assert package.endswith(f"-e {project}[test]")
    for extras in (["test"], []):  # the core is part of every set-up
        again = set_up(*extras)
        assert again.returncode == 0 and again.calls == []
        assert again.stderr == "setup: .venv is already set up\n"


@pytest.mark.parametrize("changed", ["setup.cfg", "launch/constraints.txt"])
def test_changed_requirements_are_installed_and_torch_is_kept(fresh, changed):
    project, set_up = fresh
    set_up("test")
    with open(project / changed, "a") as file:
        file.write("# changed\n")
    again = set_up()
    (package,) = again.installs
    assert "keeping torch 2.13.0" in again.stderr
    assert package.endswith("[test]"), "an extra installed before is kept up to date"
    assert set_up("test").calls == []


def test_new_extra_is_added(fresh):
    _, set_up = fresh
    set_up()
    assert set_up("mpi").installs[0].endswith("[mpi]")
    assert set_up("test").installs[0].endswith("[mpi,test]")
    assert set_up("mpi").calls == []


def test_interrupted_set_up_goes_on(fresh):
    project, set_up = fresh
    failed = set_up("test", FAIL_ON="-e ")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: pip could not install moedist")
    again = set_up("test")
    assert again.returncode == 0 and len(again.installs) == 1  # torch was there already
    assert set_up("test").calls == []


def test_moved_project_gets_a_new_venv(fresh, tmp_path):
    project, set_up = fresh
    set_up()
    activate = project / ".venv/bin/activate"
    activate.write_text(f"VIRTUAL_ENV={tmp_path}/elsewhere/.venv\n")
    (project / "setup.cfg").write_text((project / "setup.cfg").read_text() + "# changed\n")
    assert any(call.startswith("-m venv --clear") for call in set_up().calls)


def test_old_python_is_one_clear_line(fresh, tmp_path):
    _, set_up = fresh
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    done = set_up(MOEDIST_PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr.startswith("error: moedist needs Python 3.10 or newer") and done.stderr.count("\n") == 1


def test_missing_venv_module_names_the_package(fresh, tmp_path):
    _, set_up = fresh
    bare = tmp_path / "bare"
    bare.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.12;; *ensurepip*) exit 1;; esac\n')
    bare.chmod(0o755)
    done = set_up(MOEDIST_PYTHON=str(bare))
    assert done.returncode == 1
    assert "sudo apt install python3.12-venv" in done.stderr and done.stderr.count("\n") == 1
