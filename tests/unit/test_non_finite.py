"""What would let an update that is not finite through."""

import pytest
import torch

from mede2.trainer.deepspeed_file import fill_deepspeed_config
from mede2.trainer.settings import BatchArithmetic, Settings


@pytest.mark.parametrize(
    ("section", "name"), [("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")]
)
def test_deepspeed_must_look_at_the_gradients(section, name):
    def fill(**more):
        config = {"zero_optimization": {"stage": 2}}
        config |= {section: config.get(section, {}) | more}
        settings, batch = Settings(global_batch_size=4, micro_batch_size=1), BatchArithmetic(4, 1, 2)
        return fill_deepspeed_config(config, settings, batch, torch.bfloat16, hidden_size=32, largest_parameter=999)

    assert fill()
    assert fill(**{name: True})
    with pytest.raises(ValueError, match=rf"^--ds: {section}\.{name}: remove it; on_non_finite"):
        fill(**{name: False})
