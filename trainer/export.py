"""The trained model in Hugging Face form, proven by loading it again before the run is called done."""

import json
import os
import shutil
from pathlib import Path
from stat import S_IMODE

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from mede2.trainer.adapters import CONFIG_FILE, save_adapter
from mede2.trainer.data.processing import save_processor
from mede2.trainer.engine import Engine
from mede2.trainer.files import write_text
from mede2.trainer.world import World

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # largest difference of a token's log-probability
MERGED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # mean difference


def export(
    engine: Engine, source: Path, folder: Path, max_pixels: int | None, card: str, *, max_shard_gb: float = 5.0,
    adapter_of: str | None = None,
) -> None:  # fmt: skip
    """Write weights (safetensors), configs, processor and model card to `folder`. All ranks call it.

    Args:
        engine: holds the weights.
        source: the model folder that training started from: its processor and generation config go along.
        folder: written anew.
        max_pixels: the pixel limit that training used, if a setting gave one.
        card: text of the model card.
        max_shard_gb: largest weight file, 1e9 bytes; a larger model is split, with an index.
        adapter_of: write the adapter alone, and this name of its base; None: the whole model, an adapter merged.

    Raises:
        ValueError: the disk refuses.
    """
    state = engine.state_dict(adapter_only=adapter_of is not None)

    def write() -> None:
        try:
            write_files()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"export: {folder} cannot be written ({error}); the last checkpoint is whole: make room, then the same "
                "command continues from there"
            ) from error

    def write_files() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if adapter_of is not None:
            save_adapter(engine.policy.model, state, folder, adapter_of)
        else:
            with torch.device("meta"):
                shell = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source), dtype=engine.dtype)
            if (source / "generation_config.json").is_file():
                shell.generation_config = GenerationConfig.from_pretrained(source)
            shell.save_pretrained(folder, state_dict=state, max_shard_size=round(max_shard_gb * 1e9))
            for weights in folder.glob("*.safetensors"):  # closed by the library to all but their owner
                weights.chmod(S_IMODE((folder / "config.json").stat().st_mode))
        save_processor(source, folder, max_pixels)
        write_text(folder / "README.md", card)

    engine.world.on_main(write)


def publish(partial: Path, output: Path) -> None:
    """Move a verified export from `partial` into `output`; the config, which makes it a model folder, comes last."""
    for path in sorted(partial.iterdir(), key=lambda path: path.name in ("config.json", CONFIG_FILE)):
        os.replace(path, output / path.name)
    partial.rmdir()


def compare(
    of_engine: torch.Tensor, of_export: torch.Tensor, dtype: torch.dtype, world: World, merged: bool = False
) -> float:
    """Largest difference, over all ranks, of the log-probabilities (N,) of the engine and of the exported model.

    Where an adapter was merged, the sums were rounded to the dtype once more, and single log-probabilities may lie
    apart as far as two correct computations do; their mean difference is held to a tolerance there.

    Raises:
        RuntimeError: on every rank, if the largest difference (`merged`: the mean one) exceeds the tolerance.
    """
    differences = (of_engine - of_export).abs().double()
    largest = max(world.gather(float(differences.max()) if differences.numel() else 0.0))
    sums = world.sum({"differences": differences.sum(), "tokens": differences.numel()})
    difference = sums["differences"] / sums["tokens"] if merged else largest
    allowed = (MERGED_TOLERANCE if merged else TOLERANCE)[dtype]
    if not difference <= allowed:
        raise RuntimeError(
            f"the exported model does not answer as the trained one: log-probabilities differ by {difference:.2e} "
            f"(allowed: {allowed:.0e}); the checkpoint is whole, the export is not published"
        )
    return largest


def model_card(title: str, settings: dict, inputs: dict, metrics: dict, adapter_of: str | None = None) -> str:
    """A model card: what was trained, from what, with which settings, and the last metrics."""
    library = (
        f"library_name: peft\nbase_model: {json.dumps(adapter_of)}" if adapter_of else "library_name: transformers"
    )
    rows = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in settings.items())
    hashes = "\n".join(f"| {name} | {value} |" for name, value in inputs.items())
    figures = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
    return (
        f"---\n{library}\npipeline_tag: image-text-to-text\ntags: [medical, mede2]\n---\n\n"
        f'# {title}\n\nTrained with MedE2, after "Elicit and Enhance" (arXiv 2505.23118). '
        f"For research; not a medical device.\n\n"
        f"## Inputs\n\n| what | sha256 or name |\n| --- | --- |\n{hashes}\n\n"
        f"## Last metrics of training\n\n| metric | value |\n| --- | --- |\n{figures}\n\n"
        f"## Settings\n\n| setting | value |\n| --- | --- |\n{rows}\n"
    )
