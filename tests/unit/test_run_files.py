"""What a run leaves and finds again: checkpoints by their markers, rows of metrics, whole files."""

import json
import pickle

import pytest

from mede2.trainer.checkpoint import MARKER, _delete_old, checkpoint_folders, first_whole, read_checkpoint
from mede2.trainer.data.records import BadRow
from mede2.trainer.files import hash_file, hash_weights, write_json, write_text
from mede2.trainer.metrics import Metrics, read_metrics


@pytest.fixture
def write_checkpoint(tmp_path):
    """`write_checkpoint(name, step)`; without a step it was never completed."""

    def write(name: str, step: int | None = None):
        folder = tmp_path / name
        (folder / "of ranks").mkdir(parents=True)
        (folder / "weights.pt").write_bytes(b"...")
        (folder / "of ranks" / "0.pt").write_bytes(b"0123456789")
        if step is not None:
            hashes = {name: hash_file(folder / name) for name in ("weights.pt", "of ranks/0.pt")}
            files = {name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in hashes}
            marker = {"step": step, "world_size": 2, "identity": {"stage": 1}, "objective": {"total": 1 / 3}}
            write_json(folder / MARKER, marker | {"files": files})
        return folder

    return write


def test_the_newest_complete_checkpoint_counts(tmp_path, write_checkpoint, world):
    older = write_checkpoint("step-000009", 9)
    newest = write_checkpoint("step-000010", 10)
    write_checkpoint("step-000011")  # killed before its marker
    write_checkpoint(".step-000012.partial", 12)  # killed before it was renamed
    assert checkpoint_folders(tmp_path) == [newest, older]
    found = first_whole(checkpoint_folders(tmp_path), world)
    assert (found.path, found.step, found.world_size, found.identity) == (newest, 10, 2, {"stage": 1})
    assert found.objective == {"total": 1 / 3}
    assert found.num_bytes == 13


def test_steps_are_compared_as_numbers(tmp_path, write_checkpoint):
    write_checkpoint("step-999999", 999_999)
    newest = write_checkpoint("step-1000000", 1_000_000)
    assert checkpoint_folders(tmp_path)[0] == newest


def test_no_complete_checkpoint_is_none(tmp_path, write_checkpoint):
    assert checkpoint_folders(tmp_path / "none") == []
    write_checkpoint("step-000001")
    assert checkpoint_folders(tmp_path) == []


def test_reading_a_half_written_checkpoint_is_refused(write_checkpoint):
    folder = write_checkpoint("step-000001")
    with pytest.raises(ValueError, match=r"step-000001 is no complete checkpoint \(complete.json is missing"):
        read_checkpoint(folder)


DAMAGE = {
    "a flipped bit": (
        lambda folder: (folder / "of ranks" / "0.pt").write_bytes(b"0123456788"),
        "0.pt is damaged (its sha",
    ),
    "a cut file": (lambda folder: (folder / "weights.pt").write_bytes(b".."), "weights.pt is damaged (2 bytes, 3 were"),
    "a lost file": (lambda folder: (folder / "weights.pt").unlink(), "weights.pt is damaged (no bytes, 3 were"),
    "a cut manifest": (lambda folder: (folder / MARKER).write_text('{"step": 2'), "is no complete checkpoint"),
    "another manifest": (lambda folder: (folder / MARKER).write_text("[]"), "is no complete checkpoint"),
}


@pytest.mark.parametrize(("do", "told"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_older_one_serves(write_checkpoint, world, capsys, do, told):
    older, damaged = write_checkpoint("step-000001", 1), write_checkpoint("step-000002", 2)
    do(damaged)
    assert first_whole([damaged, older], world).path == older
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {damaged}")
    assert told in said
    with pytest.raises(ValueError, match=r"^resume: .*step-000002.*; start over with --resume never$"):
        first_whole([damaged], world)


def test_a_file_that_cannot_be_read_is_damage(write_checkpoint, world, monkeypatch, capsys):
    older, damaged = write_checkpoint("step-000001", 1), write_checkpoint("step-000002", 2)

    def hash_or_fail(path):
        if path == damaged / "weights.pt":
            raise OSError(5, "Input/output error")
        return hash_file(path)

    monkeypatch.setattr("mede2.trainer.checkpoint.hash_file", hash_or_fail)
    assert first_whole([damaged, older], world).path == older
    assert "weights.pt is damaged (cannot be read: Input/output error)" in capsys.readouterr().out


def test_a_checkpoint_without_a_list_of_files_still_serves(write_checkpoint, world):
    folder = write_checkpoint("step-000001", 1)
    marker = json.loads((folder / MARKER).read_text())
    del marker["files"]
    write_json(folder / MARKER, marker)
    assert first_whole([folder], world).step == 1


def test_what_is_newer_than_the_checkpoint_just_written_does_not_push_it_out(tmp_path, write_checkpoint):
    for step in (20, 25, 26, 30):
        write_checkpoint(f"step-{step:06d}", step)
    _delete_old(tmp_path, 26, keep=1, keep_every=10)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-000030", "step-000026", "step-000020"]
    assert not list(tmp_path.glob(".step*"))


def test_what_ranks_raise_survives_the_way_between_them():
    problem = BadRow("a.jsonl:3", "id: missing", "text")
    again = pickle.loads(pickle.dumps(problem))
    assert (type(again), str(again), again.kind) == (BadRow, str(problem), "text")


@pytest.fixture
def metrics_file(tmp_path):
    """Five rows and a sixth one cut short by a crash."""
    path = tmp_path / "metrics.jsonl"
    rows = "".join(json.dumps({"step": step, "loss": step / 10}) + "\n" for step in range(1, 6))
    path.write_text(rows + '{"step": 6, "lo', encoding="utf-8")
    return path


def test_a_last_line_cut_short_is_tolerated(metrics_file, tmp_path):
    assert [row["step"] for row in read_metrics(metrics_file)] == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("first_step", [0, 3, 5])
def test_a_continued_run_neither_doubles_nor_misses_a_step(metrics_file, first_step):
    metrics = Metrics(metrics_file.parent, first_step, 8, "stage 1")
    for step in range(first_step + 1, 9):
        metrics.row(step, {"loss": 7.0, "num_tokens": 30}, seconds=0.5)
    metrics.close()
    rows = read_metrics(metrics_file)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == [step / 10 for step in range(1, first_step + 1)] + [7.0] * (8 - first_step)
    assert (rows[-1]["step_ms"], rows[-1]["tokens_per_s"]) == (500, 60)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old and long")
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_hash_of_weights_follows_bytes_and_names(tmp_path, world):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in ({"config.json": "{}", "a.safetensors": "1", "b.safetensors": "2"} | files).items():
            (tmp_path / name / file).write_text(content)
        return hash_weights(tmp_path / name, world)

    base = folder("base")
    assert folder("same", **{"README.md": "a file that changes no output"}) == base
    assert base not in {
        folder("weights", **{"b.safetensors": "3"}),
        folder("config", **{"config.json": "{ }"}),
        folder("swapped", **{"a.safetensors": "2", "b.safetensors": "1"}),
    }
