"""The lock of the CUDA stack agrees with setup.py and is whole; the Containerfile installs it, and nothing else."""

import ast
import re
import shlex
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "container"
SOURCES = {"deepspeed", "flash-attn"}  # published as source alone
PYTHONS = ("3.11", "3.12")  # that the lock is for
UBUNTU_PYTHON = {"24.04": "3.12"}
PIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][0-9a-z.+]*)")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def read_lock(name: str) -> dict[str, str]:
    """Versions by package. Any line but a pin, a sha256 of the pin before it, or a comment is an error."""
    pins, hashes, text = {}, {}, (FOLDER / name).read_text(encoding="utf-8").replace("\\\n", "")
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        pin, *rest = line.split()
        found = PIN.fullmatch(pin)
        assert found, f"{name}: {line[:80]!r} is not NAME==VERSION"
        assert all(map(HASH.fullmatch, rest)), f"{name}: {pin} has something else than hashes"
        assert found[1] not in pins, f"{name}: {found[1]} twice"
        pins[found[1]], hashes[found[1]] = found[2], rest
    assert [package for package, known in hashes.items() if not known] == []
    return pins


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    return read_lock("wheels.txt") | read_lock("sources.txt")


@pytest.fixture(scope="module")
def project() -> dict:
    """What setup.py tells setuptools, as far as it is written there in literals."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    named = {word.arg: word.value for word in call.keywords}
    return {name: ast.literal_eval(named[name]) for name in ("install_requires", "extras_require", "python_requires")}


@pytest.fixture(scope="module")
def containerfile() -> list[tuple[str, str]]:
    """(instruction, its argument), continued lines joined, comments left out."""
    text = (FOLDER / "Containerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in lines.splitlines() if line.strip()]


def arguments(containerfile, instruction: str) -> list[str]:
    return [argument for name, argument in containerfile if name == instruction]


def unmet(requirements, lock: dict[str, str], python: str) -> list[str]:
    """The requirements that the lock does not meet, of those that hold on Linux on x86_64."""
    here = {
        "extra": "", "platform_system": "Linux", "sys_platform": "linux", "os_name": "posix",
        "platform_machine": "x86_64", "implementation_name": "cpython", "platform_python_implementation": "CPython",
        "python_version": python, "python_full_version": f"{python}.0",
    }  # fmt: skip
    told = []
    for each in map(Requirement, requirements):
        if each.marker is None or each.marker.evaluate(here):
            version = lock.get(canonicalize_name(each.name))
            if version is None or not each.specifier.contains(version, prereleases=True):
                told.append(f"{each} is met by {version}")
    return told


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_meets_what_setup_py_asks_for(lock, project, python):
    extras = re.findall(r"--extra (\S+)", (FOLDER / "lock.sh").read_text(encoding="utf-8"))
    assert {"cuda", "watch", "pairs"} <= set(extras)
    asked = [*project["install_requires"], *(each for extra in extras for each in project["extras_require"][extra])]
    built_with = [line for line in (FOLDER / "build.in").read_text().splitlines() if not line.startswith("#")]
    assert unmet(asked + built_with, lock, python) == []
    assert SpecifierSet(project["python_requires"]).contains(python)
    assert unmet(["torch==2.12.0", "torch>=2; platform_system == 'Darwin'"], lock, python) != [], "the test can fail"


def test_the_sources_are_apart(lock):
    assert read_lock("sources.txt").keys() == SOURCES
    assert not read_lock("wheels.txt").keys() & SOURCES


def test_what_is_locked_has_all_that_it_needs(lock):
    """Of the packages that are installed here in the locked version (torch's CPU build asks for no CUDA)."""
    known, told = 0, []
    for package in distributions():
        if lock.get(canonicalize_name(package.metadata["Name"])) == package.version:
            known += 1
            told += unmet(package.requires or (), lock, PYTHONS[0])
    assert known, "nothing is installed in a locked version"
    assert told == []


def test_the_image_has_the_cuda_of_torch_and_a_python_of_the_lock(lock, containerfile):
    base = dict(each.split("=", 1) for each in arguments(containerfile, "ARG"))["BASE"]
    found = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu(\d+\.\d+)", base)
    assert found, base
    assert lock["cuda-toolkit"].startswith(f"{found[1]}."), "nvcc and torch's CUDA must agree, or DeepSpeed refuses"
    assert UBUNTU_PYTHON[found[2]] in PYTHONS


def test_the_image_copies_what_is_there_and_all_that_is_installed(containerfile):
    copied = [
        source
        for argument in arguments(containerfile, "COPY")
        if not argument.startswith("--from=")
        for source in argument.split()[:-1]
    ]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    packages = re.findall(r'"mede2\.\w+": "(\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert packages
    assert {*packages, "setup.py", "pyproject.toml", "README.md", "launch", "ds_configs"} <= set(copied)


def test_the_image_installs_by_hashes_and_runs_as_no_root(containerfile):
    assert {name for name, _ in containerfile} <= {"ARG", "FROM", "RUN", "COPY", "ENV", "WORKDIR", "VOLUME", "USER"}
    installs = [
        shlex.split(command)
        for argument in arguments(containerfile, "RUN")
        for command in argument.split("&&")
        if "pip install" in command
    ]
    assert [words for words in installs if "--require-hashes" not in words and words[-2:] != ["--editable", "."]] == []
    assert {word.removeprefix("/locks/") for words in installs for word in words if word.endswith(".txt")} == {
        "wheels.txt", "sources.txt"
    }  # fmt: skip
    assert all("--only-binary" in words or {"--no-build-isolation", "--no-deps"} <= set(words) for words in installs)
    assert containerfile[-1] == ("USER", "1000:1000")
