"""What DATA names: parts of data sets, and refusals before anything is read."""

import json
import socket
import time
from pathlib import Path

import pytest
from conftest import EXAMPLES
from huggingface_hub import constants
from test_compress import run

from prune_peak.data.data_sets import check_data
from prune_peak.data.texts import read_texts
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.export.card import reproduce
from prune_peak.healing.windows import recorded_reading
from prune_peak.models.loading import open_model_spec
from prune_peak.options import DataOptions

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not care. "
CARD = """---
configs:
- config_name: first
  data_files: [{split: train, path: first.jsonl}]
- config_name: second
  data_files: [{split: train, path: second.jsonl}, {split: test, path: held.jsonl}]
---
"""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A data set of two configurations, one with two splits, whose text is in the column `body`."""
    pytest.importorskip("datasets")
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    for name in ("first", "second", "held"):
        rows = [{"body": f"{name} {number} {SENTENCE}", "title": name} for number in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_config_split_and_column(parts: Path) -> None:
    reading = DataOptions(dataset_config="second", dataset_split="test", text_column="body")
    assert read_texts(str(parts), None, reading)[0].startswith("held 0 ")
    reading = DataOptions(dataset_config="first", text_column="body")
    assert [text[:7] for text in read_texts(str(parts), None, reading)[:2]] == ["first 0", "first 1"]


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ({"text_column": "body"}, r"Config name is missing.*Check the name, dataset_config and dataset_split\.$"),
        ({"dataset_config": "third"}, "third"),
        ({"dataset_config": "first", "dataset_split": "none"}, "none"),
        ({"dataset_config": "first"}, r'row 1: expected an object with a "text"'),
        ({"dataset_config": "first", "text_column": "none"}, "row 1: expected text, .* in the column none"),
    ],
)
def test_a_part_that_is_not_there(reading: dict[str, str], words: str, parts: Path) -> None:
    with pytest.raises(PrunePeakError, match=words):
        read_texts(str(parts), None, DataOptions(**reading))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_column_of_a_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [{"body": "one", "text": "other"}, {"body": "two", "text": "other"}]
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        path.write_text("body,text\none,other\ntwo,other\n")
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    assert read_texts(str(path), None, DataOptions(text_column="body")) == ["one", "two"]
    with pytest.raises(PrunePeakError, match="none"):
        read_texts(str(path), None, DataOptions(text_column="none"))


IMAGES = str(EXAMPLES / "digits" / "calibration")


@pytest.mark.parametrize(
    ("data", "takes_images", "reading", "words"),
    [
        ("none.txt", False, {}, r"none\.txt does not exist, and is no id of a Hub data set\. Check the path\."),
        ("none/of/these", False, {}, "does not exist"),
        ("none.jsonl.gz", False, {}, "does not exist"),
        ("none.png", True, {}, "does not exist"),
        (IMAGES, False, {}, "is a folder of images, and the model reads text"),
        ("text.txt", True, {}, "is a file, and the model takes images"),
        ("text.txt", False, {"dataset_config": "a"}, "dataset_config is for a Hub data set, and text.txt is none"),
        ("self", False, {"dataset_split": "test"}, "dataset_split is for a Hub data set, and self is none"),
        ("text.txt", False, {"text_column": "a"}, "text_column is for data with columns, and text.txt has none"),
        (IMAGES, True, {"text_column": "a"}, "text_column is for data with columns"),
        (IMAGES, True, {"dataset_split": "test"}, "dataset_split is for a Hub data set"),
    ],
)
def test_data_of_another_kind(
    data: str,
    takes_images: bool,
    reading: dict[str, str],
    words: str,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(text.parent)
    with pytest.raises(UsageError if reading else PrunePeakError, match=words):
        check_data([data], takes_images, DataOptions(**reading))


@pytest.mark.parametrize("data", ["org/name", "org/name-v1.1", "self", "text.txt", "rows.CSV"])
def test_data_that_may_be_there(data: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    (text.parent / "rows.CSV").write_text("a\nsome text\n")
    check_data([data, "org/name"], False, DataOptions(dataset_split="test", text_column="a"))


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub behind a port of this machine where nothing answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_hub_is_told_at_once() -> None:
    pytest.importorskip("datasets")
    began = time.monotonic()
    with pytest.raises(
        PrunePeakError, match=r"the Hub, where it may be a data set, cannot be reached .*Check the conn"
    ):
        read_texts("org/name")
    with pytest.raises(PrunePeakError, match=r"neither a folder nor in the Hub's cache, and the Hub cannot be reached"):
        open_model_spec("org/name")
    assert time.monotonic() - began < 8  # datasets alone asks for 28 seconds


def test_the_part_is_in_recipe_and_card(parts: Path, tmp_path: Path) -> None:
    words = ("--dataset-config", "second", "--dataset-split", "test", "--text-column", "body")
    more = ("--samples", 2, "--sequence-length", 32, "--no-refit", "-q")
    command = ("compress", EXAMPLES / "opt-mini", "--ratio", 0.3, "--output", tmp_path / "cut")
    result = run(*command, "--calibration", parts, *words, *more)
    assert result.exit_code == 0, result.stderr
    recipe = json.loads((tmp_path / "cut" / "prune_peak.json").read_text())
    expected = DataOptions(dataset_config="second", dataset_split="test", text_column="body")
    assert recorded_reading(recipe["options"]) == expected
    assert " ".join(words) in reproduce(recipe).replace(" \\\n ", "")
