"""Checks of one node by itself: versions, GPUs, disks, clock, models."""

import ctypes
import importlib
import os
import platform
import shutil
import socket
import tempfile
import time
import urllib.request
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mede2.trainer.doctor.findings import FAIL, OK, WARN, Finding, worst

GIB, MIB = 2**30, 2**20
SHOWN = ("torch", "deepspeed", "transformers", "triton")
LEAST_SCRATCH_GIB = 1.0  # of /tmp and /dev/shm; containers have 64 MiB of the latter unless told otherwise
WRITTEN_MIB = 64
SLOW_MB_S = 50.0
FREE_SHARE = 0.9  # of a GPU's memory; where less is free somebody else is on it
DAY_S = 86400.0
HUB_TIMEOUT_S = 3.0


def check_node(output: Path, need_gib: float, model: str | None) -> list[Finding]:
    """Everything that a node can be asked without the others, the same checks in the same order on each.

    Args:
        output: folder that runs will write to; made where it is not there.
        need_gib: that should be free there.
        model: folder or hub name that runs will start from, or None.
    """
    return [
        versions(), gpus(), flash_attn(), writing(output, need_gib), openness(output),
        scratch(tempfile.gettempdir(), "compilers and data need it; set TMPDIR to a larger disk"),
        scratch("/dev/shm", "ranks and data workers talk through it; a container wants --shm-size=8g or --ipc=host"),
        clock(), models(model),
    ]  # fmt: skip


def versions() -> Finding:
    """What is installed, against the pins of setup.py as the installed package has them."""
    wrong = []
    if not SpecifierSet(metadata("mede2")["Requires-Python"]).contains(platform.python_version(), prereleases=True):
        wrong.append(f"python {platform.python_version()}, not {metadata('mede2')['Requires-Python']}")
    for requirement in map(Requirement, requires("mede2") or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there}, not {requirement.specifier}")
    if wrong:
        return Finding("versions", FAIL, "; ".join(wrong), "pip install -e . installs what belongs together")
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    return Finding("versions", OK, f"python {platform.python_version()}, {shown}")


def gpus() -> Finding:
    """The GPUs, what is free on them, and whether the driver serves torch's CUDA."""
    driver = _driver()
    if not torch.cuda.is_available():
        if driver or os.path.exists("/dev/nvidiactl"):
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
            return Finding(
                "GPUs", FAIL, f"torch is built for {built} and sees none, but a driver (CUDA {driver}) is there",
                "install the torch build for this driver, or a newer driver; look at CUDA_VISIBLE_DEVICES",
            )  # fmt: skip
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        cores = len(os.sched_getaffinity(0))
        text = f"none; runs go on the CPU ({cores} cores, {memory:.0f} GiB)"
        return Finding("GPUs", WARN, text, "that is slow, and enough for small models")
    names, busy = [], []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"{torch.cuda.get_device_name(index)} {total / GIB:.0f} GiB")
        if free < FREE_SHARE * total:
            busy.append(f"GPU {index} has {free / GIB:.0f} GiB free")
    counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    text = f"{', '.join(counted)}; driver for CUDA {driver}, torch for {torch.version.cuda}"
    if busy:
        return Finding("GPUs", WARN, f"{text}; {', '.join(busy)}", "another process is on it: nvidia-smi names it")
    return Finding("GPUs", OK, text)


def flash_attn() -> Finding:
    """Whether flash-attn, where it is installed, is a version of setup.py's, and was compiled for this torch."""
    try:
        there = version("flash-attn")
    except PackageNotFoundError:
        return Finding("flash-attn", OK, "not installed; attention=sdpa and eager go without it")
    wanted = next(each for each in map(Requirement, requires("mede2") or ()) if each.name == "flash-attn").specifier
    if not wanted.contains(there, prereleases=True):
        return Finding("flash-attn", FAIL, f"{there}, not {wanted}", "pip uninstall flash-attn, or install another")
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:  # a symbol of torch's or a library of CUDA's that is not there
        told = str(error).splitlines()[0]
        return Finding(
            "flash-attn", FAIL, f"{there} does not load beside torch {torch.__version__} ({told})",
            "compile it anew for this torch: launch/container/Containerfile says how",
        )  # fmt: skip
    return Finding("flash-attn", OK, f"{there} loads beside torch {torch.__version__}")


def _driver() -> str | None:
    """The newest CUDA that the driver serves, or None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def writing(output: Path, need_gib: float) -> Finding:
    """Room in the output folder, and how fast it takes a file."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output).free / GIB
        probe = output / f".doctor-{socket.gethostname()}-{os.getpid()}"
        block = os.urandom(MIB)  # no file system makes less of it
        try:
            started = time.perf_counter()
            with open(probe, "wb") as file:
                for _ in range(WRITTEN_MIB):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            speed = WRITTEN_MIB * MIB / 1e6 / (time.perf_counter() - started)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return Finding(
            "output", FAIL, f"{output} cannot be written ({error.strerror})",
            "mend its permissions, room or quota, or name another --output",
        )  # fmt: skip
    level = worst({FAIL: free < need_gib, WARN: speed < SLOW_MB_S})
    remedies = {
        FAIL: f"{need_gib:g} GiB are asked for (--need-gib): make room, or name another --output",
        WARN: "checkpoints will take long: a faster disk, or fewer of them (--save-every)",
    }
    text = f"{output}: {free:.3g} GiB free, writes {speed:.0f} MB/s"
    return Finding("output", level, text, remedies.get(level, ""))


def openness(output: Path) -> Finding:
    """Whether every user of the machine may look into the output folder."""
    try:
        mode = output.stat().st_mode & 0o777
    except OSError as error:
        return Finding("readers", WARN, f"{output} cannot be looked at ({error.strerror})", "see output")
    if mode & 0o007:
        return Finding(
            "readers", WARN, f"{output} is open to every user of the machine (mode {mode:o})",
            f"runs may hold data of patients: chmod o-rwx {output}",
        )  # fmt: skip
    return Finding("readers", OK, f"{output} is closed to other users (mode {mode:o})")


def scratch(folder: str, remedy: str) -> Finding:
    """Room in a folder for what is not kept."""
    if not os.access(folder, os.W_OK):
        return Finding(folder, FAIL, "cannot be written", remedy)
    free = shutil.disk_usage(folder).free / GIB
    level = worst({WARN: free < LEAST_SCRATCH_GIB})
    return Finding(folder, level, f"{free:.3g} GiB free", remedy if level == WARN else "")


def clock() -> Finding:
    """Whether the time can be right: it is not before the packages were installed."""
    now, installed = time.time(), Path(torch.__file__).stat().st_mtime
    text = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now))
    if now < installed - DAY_S:
        return Finding("clock", FAIL, f"{text} is before torch was installed", "set the time (chronyc makestep)")
    return Finding("clock", OK, text)


def models(model: str | None) -> Finding:
    """Whether models of the hub can be had, and whether the one that is asked for is there."""
    cache = Path(constants.HF_HUB_CACHE)
    where = f"{sum(1 for _ in cache.glob('models--*'))} models of the hub in {cache}"
    if model and Path(model).is_dir():
        from mede2.trainer.data.processing import locate_model

        try:
            return Finding("models", OK, f"{locate_model(model)} is there")
        except ValueError as error:
            return Finding("models", FAIL, str(error), "name another --model")
    cached = not model or isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json"), str)
    if constants.HF_HUB_OFFLINE:
        if cached:
            return Finding("models", OK, f"{where}; HF_HUB_OFFLINE, so nothing else")
        return Finding(
            "models", FAIL, f"{model} is no folder and not among the {where}; HF_HUB_OFFLINE, so nothing else",
            f"where there is a network: hf download {model}",
        )  # fmt: skip
    if proxy := urllib.request.getproxies().get(urlsplit(constants.ENDPOINT).scheme):
        return Finding("models", OK if cached else WARN, f"{where}; the rest by the proxy {proxy}, which is not asked")
    address = urlsplit(constants.ENDPOINT)
    host, port = address.hostname, address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), HUB_TIMEOUT_S).close()
    except OSError as error:
        return Finding(
            "models", WARN if cached else FAIL, f"{where}; {host} cannot be reached ({error})",
            "download beforehand, and set HF_HUB_OFFLINE=1, or every load waits for the network",
        )  # fmt: skip
    return Finding("models", OK, f"{where}; {host} can be reached")
