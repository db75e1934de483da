"""Real inputs for bench_logps.py: what linear_logps is called with when a model meets its data, as a safetensors file.

python benchmarks/dump_hidden_states.py --model FOLDER --data FILE.jsonl --stage 2 --output FILE.safetensors
"""

from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from mede2.trainer.data.collate import Collator
from mede2.trainer.data.dataset import load_dataset
from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.processing import load_processor, locate_model
from mede2.trainer.data.sampler import Slot
from mede2.trainer.settings import Settings
from mede2.trainer.world import join_world


@torch.no_grad()
def answer_states(model: str, data: str, stage: int, max_rows: int | None) -> dict[str, Tensor]:
    """The head's inputs for the answer tokens of every record, in order (Stage II: chosen, then rejected).

    Returns:
        hidden (N, H) and weight (V, H), bf16 on CUDA and fp32 elsewhere, and targets (N,) int64; on the CPU.

    Raises:
        ValueError: a model or rows that training would refuse, or a head with a bias, which the file has no place for.
    """
    folder = locate_model(model)
    from mede2.trainer.policy import load_policy, quiet_transformers  # slow, so after what may be misspelt

    quiet_transformers()
    world = join_world()
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    processor, settings = load_processor(folder), Settings()
    encoder = Encoder(processor, settings.max_length, settings.grey_window)
    dataset = load_dataset((data,), stage, encoder, "stop", world)
    collator = Collator(processor, Positions(folder), dataset.has_images, Layout())
    policy = load_policy(folder, dtype=dtype, attention=settings.attention, implementation="auto").to(world.device)
    policy.eval()
    head = policy.model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"model: the head of {folder} has a bias")
    hidden, targets, num_rows = [], [], 0
    for index in range(len(dataset.examples)):
        batch = collator(dataset.examples, [Slot(index, 1)]).to(world.device, dtype)
        hidden.append(policy.answer_states(batch.inputs, batch.branches, batch.rows).cpu())
        targets.append(batch.targets.cpu())
        num_rows += len(batch.rows)
        if max_rows and num_rows >= max_rows:
            break
    weight = head.weight.detach().cpu().contiguous()
    return {"hidden": torch.cat(hidden)[:max_rows], "weight": weight, "targets": torch.cat(targets)[:max_rows]}


@click.command(help=__doc__)
@click.option("--model", required=True, help="Model folder, or name on the hub.")
@click.option("--data", required=True, type=click.Path(exists=True, dir_okay=False), help="Records, jsonl.")
@click.option("--stage", required=True, type=click.Choice(["1", "2"]), help="What the records are.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--max-rows", type=click.IntRange(min=2), help="Answer tokens to stop at; default: all.")
def main(model: str, data: str, stage: str, output: Path, max_rows: int | None) -> None:
    try:
        states = answer_states(model, data, int(stage), max_rows)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(states, output, {"model": model, "data": data, "stage": stage})
    (num_rows, hidden_size), num_vocab = states["hidden"].shape, len(states["weight"])
    print(f"{output}: N={num_rows} H={hidden_size} V={num_vocab} {states['hidden'].dtype}")


if __name__ == "__main__":
    main()
