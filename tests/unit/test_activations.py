"""Activations that wait in host memory: which, and what is refused."""

import pytest
import torch

from mede2.trainer.activations import Offload
from mede2.trainer.policy import freeze, load_policy
from mede2.trainer.settings import Settings


@pytest.mark.parametrize("folder", ["model_folder", "internvl_folder"])
def test_the_input_of_every_layer_and_nothing_else_is_moved(folder, request):
    policy = load_policy(
        request.getfixturevalue(folder), dtype=torch.float32, attention="sdpa", implementation="torch",
        activation_checkpointing=True, activation_offload=True,
    )  # fmt: skip
    policy.train()
    config = policy.model.config.get_text_config()
    tokens, rows = torch.arange(10, 22)[None], torch.arange(11)
    logps = policy({"input_ids": tokens}, None, rows, tokens[0, 1:], torch.zeros_like(rows))
    assert policy.offload.bytes_moved == config.num_hidden_layers * tokens.numel() * config.hidden_size * 4
    logps.sum().backward()
    assert policy.offload.bytes_moved == config.num_hidden_layers * tokens.numel() * config.hidden_size * 4
    assert policy.model.get_input_embeddings().weight.grad.norm() > 0


def test_without_layers_to_checkpoint_it_is_refused():
    with pytest.raises(ValueError, match="activation_offload: no layer of Linear can be checkpointed"):
        Offload(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="activation_offload: true needs activation_checkpointing: true"):
        Settings(activation_offload=True)


def test_a_frozen_tower_has_no_backward_under_checkpointing(model_folder):
    """transformers makes the inputs of every checkpointed model differentiable, the tower's patches too."""
    policy = load_policy(
        model_folder, dtype=torch.float32, attention="sdpa", implementation="torch", activation_checkpointing=True
    )
    policy.train()
    freeze(policy, {"language_model": True, "vision_tower": False, "merger": False})
    tower = policy.model.model.visual
    pixels = torch.zeros(16, tower.patch_embed.proj.weight[0].numel())
    assert not tower(pixels, torch.tensor([[1, 4, 4]])).pooler_output.requires_grad
