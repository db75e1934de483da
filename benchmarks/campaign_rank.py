"""A rank of campaign_faults.py: the command of Stage II, its moments counted from outside, killed at one of them.

Nothing in the trainer knows of this: the functions that a run calls are wrapped here, and a name that is gone raises.
Under a launcher this file is the script; its job comes in the environment.
"""

import ctypes
import functools
import io
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

JOB = "CAMPAIGN_FAULTS_JOB"  # in the environment
OF_UPDATES = ("step", "epoch", "evaluation", "save", "rename")  # phases that come with every update, or every few
FILE_CALLS = {"rename": 1, "replace": 1, "unlink": 0, "rmdir": 0}  # of os, and which argument names the file


@dataclass(frozen=True)
class Moment:
    """A place in a run.

    Attributes:
        phase: what the run is doing.
        name: what was about to happen, or had just happened.
        target: the file that it happened to, or nothing.
        update: that was being made (from 1); 0 in phases that are of no update.
        number: the how manieth such moment of this update, or of this start (from 1).
    """

    phase: str
    name: str
    target: str
    update: int
    number: int


@dataclass(frozen=True)
class Job:
    """What a start of the ranks is to do beside the command itself.

    Attributes:
        folder: for what the ranks report.
        moment: at which to kill; None: at none.
        trigger: the rank that kills when it gets there.
        victims: the ranks that are killed.
        records: whether every moment is written down.
        sabotage: "rng": random number generators are not restored; "data": the order of data begins anew.
    """

    folder: str
    moment: Moment | None = None
    trigger: int = 0
    victims: tuple[int, ...] = ()
    records: bool = False
    sabotage: str | None = None

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def read_job(text: str) -> Job:
    values = json.loads(text)
    moment = values["moment"] and Moment(**values["moment"])
    return Job(**values | {"moment": moment, "victims": tuple(values["victims"])})


class Watch:
    """Counts the moments of this rank; `reach` is called at each."""

    def __init__(self, job: Job):
        self.job, self.rank, self.pid = job, int(os.environ["RANK"]), os.getpid()
        self.folder = Path(job.folder)
        self.phases, self.update, self.calls = ["start"], 0, Counter()
        self.record = open(self.folder / f"moments-{self.rank}", "w") if job.records else None  # noqa: SIM115
        (self.folder / f"pid-{self.rank}").write_text(str(self.pid))
        self.where = os.open(self.folder / f"where-{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def reach(self, name: str, target: str = "", *, phase: str = "", prepare: Callable[[], None] | None = None) -> None:
        """The run is at a moment; if it is the one, `prepare` is done and the victims are killed."""
        if os.getpid() != self.pid:  # a data worker
            return
        phase = phase or self.phases[-1]
        update = self.update if phase in OF_UPDATES else 0
        self.calls[phase, name, target, update] += 1
        moment = Moment(phase, name, target, update, self.calls[phase, name, target, update])
        line = json.dumps(asdict(moment)) + "\n"
        os.pwrite(self.where, f"{line:<500}".encode(), 0)
        if self.record:
            self.record.write(line)
            self.record.flush()
        if moment == self.job.moment and self.rank == self.job.trigger:
            if prepare:
                prepare()
            (self.folder / "reached").write_text(line)
            for rank in sorted(self.job.victims, key=lambda rank: rank == self.rank):  # itself last
                os.kill(int((self.folder / f"pid-{rank}").read_text()), signal.SIGKILL)

    def phase(self, function: Callable, phase: str) -> None:
        """Wherever the trainer calls `function`, the run is in a phase."""
        replace(function, self.in_phase(function, phase))

    def in_phase(self, function: Callable, phase: str) -> Callable:
        """`function`, during which the run is in a phase."""

        @functools.wraps(function)
        def call(*arguments, **keywords):
            self.phases.append(phase)
            try:
                self.reach(f"{function.__name__} begins")
                result = function(*arguments, **keywords)
                self.reach(f"{function.__name__} ends")
            finally:
                self.phases.pop()
            if phase == "step":
                self.phases[0] = "export"  # what is left of the run
            return result

        return call

    def between(self, function: Callable, phases: Sequence[str], shown: str, file: int | None = None) -> Callable:
        """`function` with a moment before and one after each call in some phases; `file`: the argument that names the
        file, whose moments in a save are of the phase "rename"."""

        @functools.wraps(function)
        def call(*arguments, **keywords):
            if self.phases[-1] not in phases:
                return function(*arguments, **keywords)
            target = "" if file is None else os.path.basename(os.fspath(arguments[file]))
            phase = "rename" if file is not None and self.phases[-1] == "save" else ""
            self.reach(f"before {shown}", target, phase=phase)
            result = function(*arguments, **keywords)
            self.reach(f"after {shown}", target, phase=phase)
            return result

        return call

    def half_files(self) -> None:
        """A moment in the middle of each file that torch.save writes in a checkpoint: half of it is there."""
        save = torch.save

        def call(value, file, *arguments, **keywords):
            def write_half() -> None:
                buffer = io.BytesIO()
                save(value, buffer, *arguments, **keywords)
                file.write(buffer.getvalue()[: buffer.tell() // 2])
                file.flush()

            if self.phases[-1] == "save":
                self.reach("half a file", os.path.basename(file.name), prepare=write_half)
            return save(value, file, *arguments, **keywords)

        torch.save = call

    def updates(self, feed: type) -> None:
        """Which update is being made, and the moments between two epochs."""
        micro_batches = feed.micro_batches

        def call(feed, step: int):
            if self.phases[-1] == "step":
                self.update = step + 1
                if step and step % feed.batches.sampler.steps_per_epoch == 0:
                    self.reach("an epoch begins", phase="epoch")
            return micro_batches(feed, step)

        feed.micro_batches = call


def replace(function: Callable, other: Callable) -> None:
    """Put `other` wherever a module of the trainer has `function`, under its name."""
    name = function.__name__
    holders = [
        module for path, module in sys.modules.items()
        if path.startswith("mede2.trainer") and getattr(module, name, None) is function
    ]  # fmt: skip
    functools.update_wrapper(other, function)
    for module in holders:
        setattr(module, name, other)


def install(job: Job) -> None:
    """Wrap what a run calls."""
    import mede2.trainer.run  # noqa: F401 - and with it all that is wrapped
    from mede2.trainer import checkpoint, export, files, loop, reference
    from mede2.trainer.data.batches import Feed
    from mede2.trainer.engine import Engine
    from mede2.trainer.metrics import Metrics

    if job.sabotage:
        {"rng": forget_generators, "data": forget_position}[job.sabotage]()
    watch = Watch(job)
    load = checkpoint.load_checkpoint

    def noted(engine, found, *arguments, **keywords):
        (watch.folder / "resumed").write_text(str(found.step))
        return load(engine, found, *arguments, **keywords)

    replace(load, noted)
    watch.phase(noted, "resume")
    watch.phase(reference.compute, "reference")
    watch.phase(loop.train, "step")
    watch.phase(loop.evaluate, "evaluation")
    checkpoint.Checkpoints.save = watch.in_phase(checkpoint.Checkpoints.save, "save")
    watch.phase(export.export, "export")
    watch.phase(export.publish, "export")
    watch.updates(Feed)
    Engine.__call__ = watch.between(Engine.__call__, ("reference", "step", "evaluation"), "a forward")
    Engine.backward = watch.between(Engine.backward, ("step",), "a backward")
    Engine.update = watch.between(Engine.update, ("step",), "the update")
    Metrics.row = watch.between(Metrics.row, ("step",), "the row of metrics")
    replace(files.hash_file, watch.between(files.hash_file, ("save",), "the hash of a file"))
    watch.half_files()
    torch.save = watch.between(torch.save, ("save",), "torch.save")
    for name, place in FILE_CALLS.items():
        call = watch.between(getattr(os, name), ("start", "reference", "save", "export"), f"os.{name}", place)
        setattr(os, name, call)


def forget_generators() -> None:
    """Take the restoring of random number generators out of the loading of checkpoints."""
    from mede2.trainer import checkpoint

    load = checkpoint.load_checkpoint

    def call(*arguments, **keywords):
        state = torch.get_rng_state()
        result = load(*arguments, **keywords)
        torch.set_rng_state(state)
        return result

    replace(load, call)


def forget_position() -> None:
    """Let a run that continues get the data of its first updates again."""
    from mede2.trainer.data import batches

    class FromTheFirst(batches.Feed):
        def __init__(self, those: batches.Batches, steps: range, of: str = "update"):
            super().__init__(those, range(len(steps)), of)
            self.steps = steps

        def micro_batches(self, step: int):
            return super().micro_batches(step - self.steps.start)

    batches.Feed = FromTheFirst


def write_model(folder: Path) -> None:
    """The model that ships with MedE2, cut down to its first layers, so that little time goes by between two kills."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from mede2.trainer.data.processing import save_processor
    from mede2.trainer.demo.defaults import BASE_MODEL
    from mede2.trainer.policy import quiet_transformers

    quiet_transformers()
    config = AutoConfig.from_pretrained(BASE_MODEL)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 1, config.text_config.layer_types[:1]
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 1, [0]
    model = AutoModelForImageTextToText.from_pretrained(BASE_MODEL, config=config, use_safetensors=True)
    model.save_pretrained(folder)
    save_processor(BASE_MODEL, folder, None)


def run(arguments: Sequence[str], job: Job) -> None:
    """The command of Stage II, as launch/stage2.py is it."""
    from mede2.trainer.commandline import stage_command

    install(job)
    stage_command(2).main(list(arguments), prog_name="stage2.py")


def forked(arguments: Sequence[str], environment: dict[str, str], job: Job, log: Path) -> None:
    """The life of a rank that a fork server started, which has all imports done."""
    pr_set_pdeathsig = 1  # of prctl(2): if the campaign is killed, its ranks do not stay
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # a command's own default
    os.environ.update(environment)
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    run(arguments, job)


if __name__ == "__main__":
    run(sys.argv[1:], read_job(os.environ[JOB]))
