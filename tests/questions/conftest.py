"""Files in the published forms, with contents of our own, and what reading them says."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mede2.trainer.questions.benchmarks import read_benchmark


@pytest.fixture(scope="session")
def picture():
    """`picture(seed, kind)`: the bytes of a small image, PNG or JPEG."""

    def encode(seed: int, kind: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, kind)
        return content.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_parquet():
    """`write_parquet(path, rows, strings=())`: as the hub's viewer stores them, images as {"bytes", "path"} structs."""

    def write(path: Path, rows: list[dict], images: tuple[str, ...] = ()) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {
            name: pa.array([row.get(name) for row in rows], image if name in images else None) for name in rows[0]
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(columns), path)
        return path

    return write


@pytest.fixture
def write_json():
    """`write_json(path, value)`."""

    def write(path: Path, value) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read(tmp_path):
    """`read(name, path)`: the cases by id, and the lines that were said; embedded images go to `store`."""

    def of(name: str, path: Path):
        said = []
        cases = read_benchmark(name, path, tmp_path / "store", said.append)
        return {case.id: case for case in cases}, said

    return of


@pytest.fixture
def refused(tmp_path):
    """`refused(name, path)`: what is said of a path that cannot be read."""

    def of(name: str, path: Path) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller looks at the words
            read_benchmark(name, path, tmp_path / "store", lambda line: None)
        return str(error.value)

    return of


@pytest.fixture(scope="session")
def layout():
    """`layout(case)`: the prompt as a list of texts, and None where an image is shown."""

    def of(case) -> list[str | None]:
        (message,) = case.prompt
        assert message["role"] == "user"
        return [part.get("text") for part in message["content"]]

    return of
