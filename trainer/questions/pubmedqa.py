"""PubMedQA: yes, no or maybe to a question about an abstract, which goes into the prompt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mede2.trainer.data.records import BadRow
from mede2.trainer.questions.adapter import Adapter, Outcome, adapt
from mede2.trainer.questions.rows import Row
from mede2.trainer.questions.tables import find_files, read_json, read_tables

OPTIONS = ("yes", "no", "maybe")
TEST_KEY = "test_ground_truth.json"


def sections(source: str, labels: object, texts: object) -> str:
    """The labelled paragraphs of an abstract, one a line: `RESULTS: ...`."""
    for name, value in (("labels", labels), ("contexts", texts)):
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise BadRow(source, f"{name}: a list of texts, not {value!r:.60}")
    if len(labels) != len(texts):
        raise BadRow(source, f"{len(labels)} labels for {len(texts)} paragraphs of the context")
    return "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))


def _from_dictionary(source: str, row: Row) -> Row:
    return {"CONTEXTS": sections(source, row["LABELS"], row["CONTEXTS"])}


def _from_hub(source: str, row: Row) -> Row:
    context = row["context"]
    if not isinstance(context, dict) or not {"labels", "contexts"} <= context.keys():
        raise BadRow(source, f"context: labels and contexts, not {context!r:.60}")
    return {"context": sections(source, context["labels"], context["contexts"])}


DICTIONARY = Adapter(
    id="pmid",
    question="QUESTION",
    context="CONTEXTS",
    choices=OPTIONS,
    answer="final_decision",
    explanation="LONG_ANSWER",
    meta={"year": "YEAR"},
    unused=("LABELS", "MESHES", "reasoning_required_pred", "reasoning_free_pred"),
    optional=("YEAR", "MESHES", "reasoning_required_pred", "reasoning_free_pred"),
    prepare=_from_dictionary,
)
HUB = Adapter(
    id="pubid",
    question="question",
    context="context",
    choices=OPTIONS,
    answer="final_decision",
    explanation="long_answer",
    prepare=_from_hub,
)


def read_pubmedqa(path: Path, store: Path) -> Iterator[Outcome]:
    """The labelled thousand of pubmedqa/pubmedqa (ori_pqal.json) or of qiaojin/PubMedQA (parquet); of these only the
    official test half where its key, test_ground_truth.json, lies beside.

    Fields as in ori_pqal.json itself, and as in the hub card's dataset_info.
    """
    files = find_files(path, "ori_pqal.json", "data/ori_pqal.json", "pqa_labeled/*.parquet", "*.parquet")
    key_file = files[0].parent / TEST_KEY
    key = read_json(key_file) if key_file.is_file() else None
    if files[0].suffix == ".json":
        adapter, rows = DICTIONARY, _entries(files[0])
    else:
        adapter, rows = HUB, read_tables(files)
    yield from adapt(adapter if key is None else _half(adapter, key), rows, files[0].parent, store)


def _entries(file: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """{pmid: row} as rows with a pmid."""
    entries = read_json(file)
    if not isinstance(entries, dict):
        raise ValueError(f"{file}: an object {{PubMed id: row}}, not {type(entries).__name__}")
    for pmid, row in entries.items():
        source = f"{file} entry {pmid}"
        yield source, {"pmid": pmid} | row if isinstance(row, dict) else BadRow(source, f"no object: {row!r:.60}")


def _half(adapter: Adapter, key: object) -> Adapter:
    """The adapter for the rows that are in the official test's key, whose answers must be the rows'."""
    if not isinstance(key, dict):
        raise ValueError(f"{TEST_KEY}: an object {{PubMed id: answer}}, not {type(key).__name__}")

    def leave_out(row: Row) -> str | None:
        return None if str(row[adapter.id]) in key else f"not in the official test half, {TEST_KEY}"

    def prepare(source: str, row: Row) -> Row:
        if (official := key[str(row[adapter.id])]) != row[adapter.answer]:
            raise BadRow(source, f"{adapter.answer}: {row[adapter.answer]!r}, but {official!r} in {TEST_KEY}")
        return adapter.prepare(source, row)

    return replace(adapter, leave_out=leave_out, prepare=prepare)
