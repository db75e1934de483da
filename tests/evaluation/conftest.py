"""The real command, questions whose right answer depends on what their image shows, and invented evaluations."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mede2.trainer.evaluation.answered import AS_IT_IS, PROBES, Answered, Evaluation
from mede2.trainer.questions.cases import Case, read_cases

MODELS = ("base", "Stage I", "Stage II", "Stage II, one more seed")
SKILL = {"phantoms": (0.25, 0.45, 0.8, 0.78), "slides": (0.35, 0.4, 0.55, 0.5), "vignettes": (0.3, 0.34, 0.36, 0.33)}
WITHOUT_IMAGE = {"blank": 0.35, "shuffle": 0.45, "noise": 0.4, "text_only": 0.3}  # of the skill that is left
SPECIALTIES = ("pulmonology", "cardiology", "neurology", "infectious diseases", "gastroenterology", "rheumatology")
KEYS = ("pneumonia", "embolism", "heart failure", "sarcoidosis", "asthma")


@pytest.fixture(scope="session")
def user_case(user):
    """`user_case(id, answer, ...)`: a question as a benchmark's adapter makes it."""

    def case(name: str, answer: str, options=(), images=(), text: str | None = None, **meta) -> Case:
        prompt = (user(text or f"What does {name} show?", len(images)),)
        return Case(f"file:{name}", name, prompt, tuple(images), answer, tuple(options), None, meta)

    return case


@pytest.fixture(scope="session")
def answered():
    """`answered(model, benchmark, case, answer, right, ...)`: an answer in the strict form, or one without any."""

    def answer(model: str, benchmark: str, case: str, said: str | None, right: bool, **others) -> Answered:
        text = "I cannot tell." if said is None else f"<think>It is plain.</think> <answer>{said}</answer>"
        given = {
            "probe": AS_IT_IS, "sample": None, "text": text, "finish": "stop", "num_tokens": 10,
            "rung": None if said is None else "format",
        }  # fmt: skip
        return Answered(model, benchmark, case, answer=said, right=right, **given | others)

    return answer


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory, user_case, phantom_cases) -> dict[str, dict[str, Case]]:
    """Phantoms with options; open and closed questions, two about each of some pictures; vignettes without images."""
    phantoms = {}
    for i, case in enumerate(read_cases(phantom_cases)):
        case.meta.update(specialty=SPECIALTIES[i % 2], task=("reasoning", "understanding")[i % 2])
        phantoms[case.id] = case
    pictures = [case.images for case in phantoms.values()]
    slides = {}
    for i in range(30):
        closed = i % 2 == 0
        key = ("yes", "no")[i % 4 // 2] if closed else "left upper zone"
        meta = {"modality": ("CT", "MRI", "X-ray")[i % 3], "answer_type": "closed" if closed else "open"}
        text = "Is there a mass?" if closed else "Where is the shadow?"
        slides[f"s{i}"] = user_case(
            f"s{i}", key, ("yes", "no") if closed else (), pictures[i // 2 % len(pictures)], text, **meta
        )
    vignettes = {}
    for i in range(60):
        text = (
            f"A {30 + i}-year-old has had fever and a cough for {1 + i % 9} days. On examination there are crackles at "
            "the left base; oxygen saturation is 93 % in room air. Which diagnosis is most likely?"
        )
        vignettes[f"v{i}"] = user_case(f"v{i}", KEYS[i * i % 5], KEYS, (), text, specialty=SPECIALTIES[i % 6])
    return {"phantoms": phantoms, "slides": slides, "vignettes": vignettes}


@pytest.fixture(scope="session")
def example(benchmarks):
    """`example(num_models, images, samples)`: an evaluation drawn at random, the same each time."""

    def make(num_models: int = 3, images: bool = True, samples: int = 8) -> Evaluation:
        chosen = {name: benchmarks[name] for name in (SKILL if images else ("vignettes",))}
        rng, answers = np.random.default_rng(0), []
        for benchmark, cases in chosen.items():
            for case in cases.values():
                ease = rng.random()
                for model, skill in list(zip(MODELS, SKILL[benchmark], strict=True))[:num_models]:
                    luck = 0.6 * ease + 0.4 * rng.random()
                    given = (model, benchmark, case, rng)
                    answers.append(_draw(*given, luck < skill))
                    for probe in PROBES if case.images else ():
                        answers.append(_draw(*given, luck < skill * WITHOUT_IMAGE[probe], probe=probe))
                    for sample in range(samples):
                        right = 0.6 * ease + 0.4 * rng.random() < skill
                        answers.append(_draw(*given, right, sample=sample, mmrp=1 + rng.random() * (3 + right)))
        settings = {
            "date": "2026-11-24", "temperature": 1.0, "max_tokens": 1024, "seed": 0,
            "models": {name: f"runs/{name}" for name in MODELS[:num_models]},
        }  # fmt: skip
        return Evaluation(MODELS[:num_models], chosen, answers, settings)

    return make


def _draw(model: str, benchmark: str, case: Case, rng, right: bool, *, probe=AS_IT_IS, sample=None, mmrp=None):
    """An answer that is right or not; a wrong one is now and then cut off or cannot be read."""
    others = [option for option in case.options if option != case.answer] or ["right lower zone", "the heart"]
    said: str | None = case.answer if right else others[rng.integers(len(others))]
    rung = "format" if rng.random() < 0.4 + 0.15 * MODELS.index(model) else "sentence"
    finish = "stop"
    if not right and rng.random() < 0.2:
        said, rung, finish = None, None, "length"
    why = "The history is short and the shadow is dense. Nothing else is seen, so the others are less likely."
    text = {
        "format": f"<think>{why}</think>\n<answer>{said}</answer>",
        "sentence": f"{why} The answer is {said}.",
        None: why,
    }[rung]
    tokens = int(rng.integers(40, 90)) + 20 * MODELS.index(model)
    recall = None if case.options else float(right or 0.5 * (said is not None and "zone" in said))
    mmrp = mmrp if mmrp is not None or sample is not None else round(2 + 2 * rng.random(), 2)
    return Answered(model, benchmark, case.id, probe, sample, text, finish, tokens, rung, said, right, recall, mmrp)


@pytest.fixture(scope="session")
def phantom_cases(tmp_path_factory) -> Path:
    """40 of the demo's cases: cases.jsonl with pictures beside it."""
    from mede2.trainer.demo.records import write_cases

    return write_cases(tmp_path_factory.mktemp("cases") / "cases.jsonl", 40, seed=3, split="heldout")


@pytest.fixture(scope="session")
def evaluate(launched):
    """`evaluate(*arguments, wait=True, **environment)` runs launch/evaluate.py."""
    return partial(launched, "evaluate.py")


@pytest.fixture(scope="session")
def shades(tmp_path_factory, write_rows, user) -> Path:
    """Six questions on whether a picture is lighter above or below, right answers in turn, and two without images."""
    folder = tmp_path_factory.mktemp("shades")
    rows = []
    for number in range(6):
        pixels = np.full((32, 32, 3), 40 + 10 * number, dtype=np.uint8)
        half = slice(0, 16) if number % 2 == 0 else slice(16, 32)
        pixels[half] = 200
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({
            "id": f"q{number}", "prompt": [user("Is it lighter above or below?", 1)], "images": [f"{number}.png"],
            "answer": ("above", "below")[number % 2], "options": ["above", "below"],
            "meta": {"modality": "photograph" if number < 4 else "drawing"},
        })  # fmt: skip
    for number in (6, 7):
        question = {"id": f"q{number}", "prompt": [user(f"Two and {number}?")], "answer": str(2 + number)}
        rows.append(question | {"meta": {"modality": "none"}})
    return write_rows(folder / "shades.jsonl", rows)
