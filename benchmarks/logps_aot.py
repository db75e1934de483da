"""Compiles every launch of kernels/logps_triton.py for every architecture, with no GPU, and says what it costs.

python benchmarks/logps_aot.py      (`make kernels-aot`)
"""

import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mede2.kernels import logps_triton
from mede2.kernels.logps_triton import BLOCKS, Blocks, choose_blocks, constants

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have (CUDA guide, appendix 20)
HIDDEN_SIZE = 3584  # of a 7B model; the compiled code depends on it only through its divisors
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = {"forward": logps_triton._forward_kernel, "backward": logps_triton._grad_logits_kernel}
TENSORS = {"targets_ptr": "*i64", "columns_of_targets_ptr": "*i64"}  # and fp32 or the inputs' dtype, by name
OF_INPUT_DTYPE = ("hidden_ptr", "weight_ptr", "bias_ptr", "grad_logits_ptr")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """One compiled launch: what it is, and its cost on the chip (bytes; spills in bytes of stores and loads)."""

    arch: int
    kernel: str
    extras: bool
    dtype: str
    blocks: Blocks
    registers: int
    spilled: int
    shared: int
    wgmma: bool

    @property
    def fits(self) -> bool:
        return not self.spilled and self.shared <= SHARED_LIMIT[self.arch]


Launch = tuple[int, str, bool, torch.dtype, Blocks]  # arch, kernel, with extras, dtype of the inputs, blocks


def launches(arch: int) -> list[Launch]:
    """Every launch that `choose_blocks` may pick on a card of this architecture."""
    found = []
    for kernel, extras in BLOCKS[arch]:
        for dtype in DTYPES:
            picked = (choose_blocks(kernel, extras, dtype, divmod(arch, 10), aligned) for aligned in (True, False))
            found += [(arch, kernel, extras, dtype, blocks) for blocks in dict.fromkeys(picked)]
    return found


def compile_launch(launch: Launch) -> Compiled:
    """Compile one launch: with a bias, and where it has extras with entropy and soft cap both."""
    arch, kernel, extras, dtype, blocks = launch
    function = KERNELS[kernel]
    fixed = constants(HIDDEN_SIZE, dtype, blocks, has_bias=True, has_softcap=extras, with_entropy=extras)
    signature = {}
    for argument in function.arg_names:
        if argument in fixed:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = TENSORS.get(argument, f"*{DTYPES[dtype] if argument in OF_INPUT_DTYPE else 'fp32'}")
        else:
            signature[argument] = "fp32" if argument == "softcap" else "i32"
    divisible = [name for name in function.arg_names if name.endswith(("_ptr", "_stride"))]
    source = ASTSource(
        fn=function, signature=signature, constexprs=fixed,
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )  # fmt: skip
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    report = _assembler_report(ptx)
    return Compiled(
        arch, kernel, extras, DTYPES[dtype], blocks,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        shared=compiled.metadata.shared,
        wgmma="wgmma" in ptx or "tcgen05.mma" in ptx,
    )  # fmt: skip


def _assembler_report(ptx: str) -> str:
    """What ptxas -v says of a kernel."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    blackwell = TOOLS / "ptxas-blackwell"
    tool = blackwell if target.startswith("sm_10") and blackwell.exists() else TOOLS / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@click.command(help=__doc__)
@click.option("--arch", "archs", multiple=True, type=click.Choice([str(arch) for arch in BLOCKS]), help="Default: all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a launch in place of the table.")
def main(archs: tuple[str, ...], as_json: bool) -> None:
    if logps_triton.INTERPRETED:
        raise click.UsageError("TRITON_INTERPRET is set: nothing would be compiled")
    every = [launch for arch in map(int, archs or BLOCKS) for launch in launches(arch)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as processes:
        compiled = list(processes.map(compile_launch, every))
    if as_json:
        for made in compiled:
            print(json.dumps(asdict(made) | {"blocks": made.blocks._asdict(), "fits": made.fits}))
    else:
        Console(width=140).print(as_table(compiled))
    if misfits := sum(not made.fits for made in compiled):
        raise click.ClickException(f"{misfits} launches spill registers or want more shared memory than the chip has")


def as_table(compiled: list[Compiled]) -> Table:
    table = Table(title=f"triton {triton.__version__}, H={HIDDEN_SIZE}, with bias; extras: entropy and soft cap")
    for heading in ("arch", "kernel", "dtype", "blocks", "registers", "spilled", "shared bytes", "wgmma, tcgen05"):
        table.add_column(heading)
    for made in compiled:
        tile = made.blocks
        shape = f"{tile.block_n}x{tile.block_v}x{tile.block_h}, {tile.num_warps} warps, {tile.num_stages} stages"
        table.add_row(
            f"sm_{made.arch}", made.kernel + (" + extras" if made.extras else ""), made.dtype,
            shape + (", TMA" if tile.descriptors else ""), str(made.registers), str(made.spilled), str(made.shared),
            "yes" if made.wgmma else "no",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
