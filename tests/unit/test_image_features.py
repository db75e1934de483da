"""Features of a frozen vision tower in place of images: the same log-probabilities, for every family and layout."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mede2.trainer.data.batches import Batches
from mede2.trainer.data.collate import Collator
from mede2.trainer.data.dataset import load_dataset
from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.sampler import Sampler
from mede2.trainer.image_features import compute_features, features_path, read_features
from mede2.trainer.policy import Policy, takes_image_features
from mede2.trainer.settings import ELICIT, ENHANCE, BatchArithmetic

COMPONENTS = {"weights": "a1", "records": "b2"}
LAYOUTS = {
    "shared": (ENHANCE, {}, {}),
    "apart": (ENHANCE, {"shared_prefix": False}, {}),
    "packed": (ENHANCE, {}, {"packed": True}),
    "corrupted": (ENHANCE, {"corrupted": True}, {"corruption": ("noise", 0)}),
    "another's": (ENHANCE, {"corrupted": True, "shared_prefix": False}, {"corruption": ("shuffle", 0)}),
    "demonstrations": (ELICIT, {}, {"packed": True}),
}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "internvl3"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def policy(family, family_folders) -> Policy:
    """fp64, its weights scaled up, or features would hardly matter."""
    model = AutoModelForImageTextToText.from_pretrained(family_folders[family], dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return Policy(model, "torch")


@pytest.fixture
def batches(family, families, family_files, policy, world):
    """`batches(layout)`: rows with 1, 0, 3 and 2 images, two in a micro-batch."""

    def make(name: str) -> Batches:
        stage, layout, options = LAYOUTS[name]
        encoder = Encoder(families[family], 1000)
        dataset = load_dataset((str(family_files[stage]),), stage, encoder, "stop", world)
        layout = Layout(**layout)
        positions = Positions(Path(policy.model.name_or_path))
        collator = Collator(families[family], positions, True, layout, **options)
        sampler = Sampler(tuple(map(layout.lengths, dataset.examples)), BatchArithmetic(4, 2, 1), seed=None)
        return Batches(dataset, sampler, collator, world)

    return make


def engine(policy, world):
    """As much of an engine as the tower needs."""
    switches = SimpleNamespace(eval=lambda: None, train=lambda: None)
    return SimpleNamespace(
        deepspeed=switches, world=world, dtype=torch.float64, policy=policy,
        image_features=lambda batch: policy(batch.inputs),
    )  # fmt: skip


@torch.no_grad()
def compute(policy, batches, folder):
    return compute_features(engine(policy, batches.world), batches, folder, COMPONENTS, lambda done, total: None)


@torch.no_grad()
def logps(policy, batches) -> list[torch.Tensor]:
    """Of each micro-batch, two of them: the longest rows are together, and one has no image."""
    device = torch.device("cpu")
    found = [batch.to(device, torch.float64) for batch in batches.micro_batches(0)]
    return [policy(b.inputs, b.branches, b.rows, b.targets, b.sequence) for b in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_give_the_log_probabilities_of_the_images(policy, batches, layout, tmp_path, monkeypatch):
    """And neither the tower runs then nor is an image decoded."""
    with_images = batches(layout)
    want = logps(policy, with_images)
    with_features = with_images.with_features(compute(policy, with_images, tmp_path))
    monkeypatch.setattr(policy.model.model, "get_image_features", None)
    monkeypatch.setattr("mede2.trainer.data.collate.load_image", None)
    got = logps(policy, with_features)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)

    broken = with_images.with_features(read_features(tmp_path, COMPONENTS, with_images))
    monkeypatch.setattr(type(broken.collator.features), "__call__", _zeros(broken.collator.features))
    for wrong, right in zip(logps(policy, broken), want, strict=True):
        assert (wrong - right).abs().max() > 1e-3, "the features do not matter, so the test proves nothing"


def _zeros(features):
    """Features that are all zero, with the right grids."""
    read = type(features).__call__

    def call(self, index, corrupted):
        values, grids = read(self, index, corrupted)
        return torch.zeros_like(values), grids

    return call


def test_a_micro_batch_without_image_needs_no_tower(policy, batches, tmp_path, monkeypatch):
    """Its filler gets features of zeros, which nothing sees."""
    with_images = batches("shared")
    number = next(i for i, example in enumerate(with_images.dataset.examples) if not example.images)
    slots = [slot for turn in with_images.sampler.turns(0) for slot in turn if slot.index == number]
    with_features = with_images.with_features(compute(policy, with_images, tmp_path))
    answers = []
    for each in (with_images, with_features):
        b = each.collator(each.dataset.examples, slots).to(torch.device("cpu"), torch.float64)
        with torch.no_grad():
            answers.append(policy(b.inputs, b.branches, b.rows, b.targets, b.sequence))
        monkeypatch.setattr(policy.model.model, "get_image_features", None)
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-9)


def test_all_families_take_features(policy):
    assert takes_image_features(policy.model.config)


@pytest.fixture
def shared(batches) -> Batches:
    return batches("shared")


@pytest.fixture
def computed(policy, shared, tmp_path) -> Path:
    compute(policy, shared, tmp_path)
    return features_path(tmp_path, COMPONENTS)


def test_another_component_is_another_folder(computed, shared):
    assert read_features(computed.parent, COMPONENTS, shared).folder == computed
    assert read_features(computed.parent, COMPONENTS | {"weights": "other"}, shared) is None
    assert [path.name for path in computed.parent.iterdir()] == [computed.name], "a partial folder was left"


def test_features_made_from_something_else_are_refused_by_name(computed, shared):
    others = COMPONENTS | {"weights": "c3"}
    computed.rename(features_path(computed.parent, others))
    with pytest.raises(ValueError, match=r"made from another weights; delete .*image_features"):
        read_features(computed.parent, others, shared)


@pytest.mark.parametrize("keep", [0, 40, -8], ids=["empty", "half_a_header", "cut"])
def test_a_damaged_file_is_refused(computed, shared, keep):
    (file,) = computed.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"image features .*rank-00000-00000\.safetensors: damaged"):
        read_features(computed.parent, COMPONENTS, shared)


def test_features_that_lack_a_row_are_refused(policy, shared, tmp_path):
    """As where two runs had written one folder."""
    row = next(index for index, example in enumerate(shared.dataset.examples) if not example.images)
    compute(policy, shared, tmp_path)
    other = dataclasses.replace(shared.dataset.examples[row], images=shared.dataset.examples[row - 1].images)
    examples = [*shared.dataset.examples[:row], other, *shared.dataset.examples[row + 1 :]]
    larger = dataclasses.replace(shared, dataset=dataclasses.replace(shared.dataset, examples=examples))
    with pytest.raises(ValueError, match=rf"stage2\.jsonl:{row + 1} are missing; delete it"):
        read_features(tmp_path, COMPONENTS, larger)


def test_files_are_written_as_they_grow_and_a_second_run_changes_nothing(policy, shared, tmp_path, monkeypatch):
    monkeypatch.setattr("mede2.trainer.image_features.FLUSH_BYTES", 0)
    sampler = dataclasses.replace(shared.sampler, batch=BatchArithmetic(2, 2, 1))
    shared = dataclasses.replace(shared, sampler=sampler)
    folder = compute(policy, shared, tmp_path).folder
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(files) > 1
    assert compute(policy, shared, tmp_path).folder == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_full_disk_is_told_before_the_pass(policy, batches, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"cache_image_features: .* GiB free and the features take .*make room"):
        compute(policy, batches("shared"), tmp_path)
