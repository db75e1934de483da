"""Jobs: which answers are to be had, with the seed and the key of each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mede2.trainer.data.records import Message
from mede2.trainer.files import hash_json
from mede2.trainer.questions.cases import Case, with_system
from mede2.trainer.questions.rows import Row

SEEDS = 2**31  # servers take 32 bits, some of them signed
ANSWER = ("text", "finish", "num_tokens")  # what is journalled of an answer, beside its key


@dataclass(frozen=True)
class Job:
    """One answer to be had.

    Attributes:
        case: what is asked.
        sample: which of the case's answers, from 0.
        seed: of the answer's draws.
        prompt: the case's messages as they are asked.
    """

    case: Case
    sample: int
    seed: int
    prompt: tuple[Message, ...]

    def key(self, settings: Row) -> str:
        """sha256 of all that the answer depends on; `settings` say which model, too."""
        return hash_json([self.prompt, self.case.image_hashes, settings, self.seed])


def plan(cases: Sequence[Case], num: int, seed: int, system: str | None) -> list[Job]:
    """`num` answers to each case, in order.

    The seed of an answer follows from the run's seed, the case's id and the answer's number alone, so that more cases
    or more answers leave those before as they are.
    """

    def seed_of(case: Case, sample: int) -> int:
        digest = hashlib.sha256(f"{seed} {sample} {case.id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % SEEDS

    return [
        Job(case, sample, seed_of(case, sample), case.prompt if system is None else with_system(case, system))
        for case in cases
        for sample in range(num)
    ]
