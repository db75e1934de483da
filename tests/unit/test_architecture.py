"""The shape of the code: imports go down only, and our folder `kernels` hides nobody's package."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("launch", "trainer", "kernels") for path in (ROOT / folder).rglob("*.py"))
OURS = {"launch": ("mede2.trainer",), "trainer": ("mede2.trainer", "mede2.kernels"), "kernels": ("mede2.kernels",)}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute, from mede2..."
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    """launch -> trainer -> kernels -> torch, triton."""
    layer = path.relative_to(ROOT).parts[0]
    names = imported(path)
    ours = {name for name in names if name.split(".")[0] in ("mede2", "trainer", "kernels", "launch", "tests")}
    assert {name for name in ours if not name.startswith(OURS[layer])} == set()
    if layer == "kernels":
        others = {name.split(".")[0] for name in names - ours} - sys.stdlib_module_names
        assert others <= {"torch", "triton"}


def test_deepspeed_is_imported_in_two_files_that_say_so():
    files = [path for path in FILES if any(name.split(".")[0] == "deepspeed" for name in imported(path))]
    assert len(files) <= 2
    for path in files:
        assert "deepspeed" in path.read_text(encoding="utf-8").splitlines()[0].lower(), path


def test_no_file_shadows_a_package():
    """Hugging Face has a package `kernels` that transformers imports; `launch/` is sys.path[0] of its scripts."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert not {path.stem for path in (ROOT / "launch").glob("*.py")} & sys.stdlib_module_names


def test_a_model_loads_with_the_repository_root_on_the_path(model_folder):
    """As under DeepSpeed's multi-node runner, which puts the working folder on PYTHONPATH. With a `kernels/__init__.py`
    transformers would run our folder in place of Hugging Face's package."""
    code = (
        "import sys, mede2.kernels.logps; from transformers import AutoModelForImageTextToText as model;"
        "model.from_pretrained(sys.argv[1]); print(getattr(sys.modules.get('kernels'), '__file__', None))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(model_folder)], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout.strip().startswith(str(ROOT)), f"transformers imported {done.stdout.strip()}"
