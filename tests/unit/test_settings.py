"""Settings: layers and origins, batch arithmetic, the learning rate, and the recipe a run leaves behind."""

import pytest

from mede2.trainer.resolution import parse_assignments, read_recipe, resolve
from mede2.trainer.run import settings_yaml
from mede2.trainer.settings import ELICIT, ENHANCE, FIELDS, BatchArithmetic, Settings, learning_rate_at


def test_layers_and_origins():
    """The later layer wins, field by field, and each field remembers the layer that it came from."""
    layers = [
        ("embedded default", {"epochs": 3, "learning_rate": 2e-4, "seed": 1, "max_length": 512}),
        ("recipe r.yaml", {"epochs": 2, "learning_rate": 3e-4, "seed": 2}),
        ("flag", {"epochs": 1, "learning_rate": 4e-4}),
        ("--set", {"epochs": 0.5}),
    ]
    resolved = resolve(ELICIT, layers)
    expected = {
        "epochs": (0.5, "--set"),
        "learning_rate": (4e-4, "flag"),
        "seed": (2, "recipe r.yaml"),
        "max_length": (512, "embedded default"),
        "weight_decay": (0.0, "default"),
    }
    assert {name: (getattr(resolved.settings, name), resolved.origins[name]) for name in expected} == expected


def test_described_rows_leave_out_the_other_stage():
    names = {stage: {name for name, *_ in resolve(stage, []).described()} for stage in (ELICIT, ENHANCE)}
    assert names[ENHANCE] == set(FIELDS)
    assert names[ENHANCE] - names[ELICIT] == {
        "beta", "objective", "label_smoothing", "simpo_gamma", "corruption", "reference", "reference_cache",
        "shared_prefix",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("learning_rate", "1e-5", 1e-5),  # what YAML 1.1 makes of a bare 1e-5
        ("learning_rate", 1, 1.0),
        ("max_steps", "1e3", 1000),
        ("max_steps", 7.0, 7),
        ("max_steps", None, None),
        ("train", "rows.jsonl", ("rows.jsonl",)),
        ("train", ["a.jsonl", "b.jsonl"], ("a.jsonl", "b.jsonl")),
        ("grey_window", [0, "4e3"], (0.0, 4000.0)),
        ("dry_run", True, True),
    ],
)
def test_values_take_the_type_of_their_field(name, given, expected):
    value = getattr(resolve(ELICIT, [("flag", {name: given})]).settings, name)
    assert value == expected
    assert type(value) is type(expected)


def test_a_mapping_of_weights():
    """From --set to the setting: the numbers become floats, and the mapping stands as a whole, not merged."""
    given = parse_assignments(["objective={sigmoid: 0.8, bco_pair: 2e-1}"])
    layers = [("recipe", {"objective": {"nll": 2}}), ("--set", given)]
    assert resolve(ENHANCE, layers).settings.objective == {"sigmoid": 0.8, "bco_pair": 0.2}
    weight = resolve(ENHANCE, layers[:1]).settings.objective["nll"]
    assert (weight, type(weight)) == (2, float)
    assert resolve(ENHANCE, []).settings.objective == {"sigmoid": 1, "nll": 1}


def test_a_setting_at_its_default_suits_any_objective():
    """What a run leaves behind names every setting, and is itself a recipe."""
    given = {"objective": {"nll": 1}, "beta": 0.1, "label_smoothing": 0, "simpo_gamma": 0.5, "reference": None}
    assert resolve(ENHANCE, [("recipe", given)]).settings == Settings(objective={"nll": 1})


def test_assignments_are_yaml():
    given = parse_assignments(["beta=0.1", "grey_window=[0, 4095]", "train_merger=true", "reference=a=b", "eval=null"])
    assert given == {"beta": 0.1, "grey_window": [0, 4095], "train_merger": True, "reference": "a=b", "eval": None}


@pytest.mark.parametrize("stage", [ELICIT, ENHANCE])
def test_settings_of_a_run_read_back_as_a_recipe(stage, tmp_path):
    """Every field that may differ from its default, awkward texts included."""
    given = {
        "model": "a folder/with: colon # and hash", "train": ["one.jsonl", "no", "1e3"], "eval": "null", "output": "~",
        "learning_rate": 1e-5, "adam_epsilon": 1e-12, "max_steps": 3, "grey_window": [-1000, 400.5], "resume": "1",
        "activation_checkpointing": True, "on_bad_row": "skip", "seed": 2**40,
    }  # fmt: skip
    if stage == ENHANCE:
        given |= {
            "beta": 0.25, "reference": "yes", "objective": {"robust": 0.75, "nll": 1}, "label_smoothing": 0.125,
            "corruption": "blank",
        }  # fmt: skip
    resolved = resolve(stage, [("recipe of # mine: x", given)])
    path = tmp_path / "settings.yaml"
    path.write_text(settings_yaml(resolved), encoding="utf-8")
    again = resolve(stage, [("recipe", read_recipe(path))])
    assert again.settings == resolved.settings
    assert set(read_recipe(path)) == {name for name, *_ in resolved.described()}


@pytest.mark.parametrize(
    ("sizes", "steps", "text"),
    [
        ((16, 1, 1), 16, "global batch 16 = micro-batch 1 x accumulation 16 x 1 rank"),
        ((24, 3, 4), 2, "global batch 24 = micro-batch 3 x accumulation 2 x 4 ranks"),
        ((8, 4, 2), 1, "global batch 8 = micro-batch 4 x accumulation 1 x 2 ranks"),
    ],
)
def test_batch_arithmetic(sizes, steps, text):
    batch = BatchArithmetic(*sizes)
    assert (batch.grad_accum_steps, str(batch)) == (steps, text)


def rates(num_steps=10, **given) -> list[float]:
    settings = Settings(learning_rate=1.0, **given)
    return [learning_rate_at(settings, step, num_steps) for step in range(num_steps)]


def test_learning_rate_warms_up_linearly_then_falls_to_its_end():
    """A fifth of 10 updates warms up: 1/2, then the peak. Linear falls by 0.9 over the 7 steps from update 2 to 9."""
    assert rates(warmup_ratio=0.2, final_lr_ratio=0.1, scheduler="linear") == pytest.approx(
        [0.5, 1.0, *(1 - 0.9 * done / 7 for done in range(8))]
    )


def test_learning_rate_of_a_cosine():
    """Without warm-up over 5 updates: cosines of 0, 45, 90, 135 and 180 degrees, and the last at the floor."""
    half = 0.5**0.5
    assert rates(5, warmup_ratio=0, final_lr_ratio=0.0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2, 0])
    assert rates(5, warmup_ratio=0, final_lr_ratio=0.3)[-1] == pytest.approx(0.3)


def test_learning_rate_that_stays():
    assert rates(warmup_ratio=0.1, scheduler="constant", final_lr_ratio=0) == [1.0] * 10


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 1.0])
def test_learning_rate_of_short_runs_stays_in_range(scheduler, num_steps, warmup_ratio):
    assert all(0 < rate <= 1 for rate in rates(num_steps, scheduler=scheduler, warmup_ratio=warmup_ratio))
