"""The trained model in Hugging Face form, proven by loading it again before the run is called done."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from mede2.trainer.data.processing import save_processor
from mede2.trainer.engine import Engine
from mede2.trainer.files import write_text
from mede2.trainer.world import World

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # largest difference of a token's log-probability


def export(engine: Engine, source: Path, folder: Path, max_pixels: int | None, card: str) -> None:
    """Write weights (safetensors), configs, processor and model card to `folder`. All ranks call it.

    Args:
        engine: holds the weights.
        source: the model folder that training started from: its processor and generation config go along.
        folder: written anew.
        max_pixels: the pixel limit that training used, if a setting gave one.
        card: text of the model card.
    """
    state = engine.state_dict()

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with torch.device("meta"):
            shell = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source), dtype=engine.dtype)
        if (source / "generation_config.json").is_file():
            shell.generation_config = GenerationConfig.from_pretrained(source)
        shell.save_pretrained(folder, state_dict=state)
        save_processor(source, folder, max_pixels)
        write_text(folder / "README.md", card)

    engine.world.on_main(write)


def publish(partial: Path, output: Path) -> None:
    """Move a verified export from `partial` into `output`; config.json, which makes it a model folder, comes last."""
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    partial.rmdir()


def compare(of_engine: torch.Tensor, of_export: torch.Tensor, dtype: torch.dtype, world: World) -> float:
    """Largest difference, over all ranks, of the log-probabilities (N,) of the engine and of the exported model.

    Raises:
        RuntimeError: on every rank, if it exceeds the tolerance of the dtype.
    """
    difference = max(world.gather(float((of_engine - of_export).abs().max()) if of_engine.numel() else 0.0))
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"the exported model does not answer as the trained one: log-probabilities differ by {difference:.2e} "
            f"(allowed: {TOLERANCE[dtype]:.0e}); the checkpoint is whole, the export is not published"
        )
    return difference


def model_card(title: str, settings: dict, inputs: dict, metrics: dict) -> str:
    """A model card: what was trained, from what, with which settings, and the last metrics."""
    rows = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in settings.items())
    hashes = "\n".join(f"| {name} | {value} |" for name, value in inputs.items())
    figures = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [medical, mede2]\n---\n\n"
        f'# {title}\n\nTrained with MedE2, after "Elicit and Enhance" (arXiv 2505.23118). '
        f"For research; not a medical device.\n\n"
        f"## Inputs\n\n| what | sha256 or name |\n| --- | --- |\n{hashes}\n\n"
        f"## Last metrics of training\n\n| metric | value |\n| --- | --- |\n{figures}\n\n"
        f"## Settings\n\n| setting | value |\n| --- | --- |\n{rows}\n"
    )
