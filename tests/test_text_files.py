"""Data files in the forms that people have: each is read as what it is, or refused with what to do."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import EXAMPLES

from prune_peak.data.text_files import LONGEST_TEXT, read_records
from prune_peak.data.texts import load_tokenizer, read_texts
from prune_peak.errors import PrunePeakError
from prune_peak.models.loading import open_model

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
LINES = '{"text": "one"}\n{"text": "two, \\"three\\""}\n'
TABLE = 'text,label\none,1\n"two, ""three""",2\n'
TEXTS = ["one", 'two, "three"']


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "a.jsonl": LINES,
        "a.JSONL": LINES,
        "a.ndjson": LINES + "\n\n",
        "bom.jsonl": "\ufeff" + LINES,
        "windows.jsonl": LINES.replace("\n", "\r\n"),
        "a.json": json.dumps([{"text": text, "id": 1} for text in TEXTS], indent=2),
        "strings.json": json.dumps(TEXTS),
        "a.csv": TABLE,
        "bom.csv": "\ufeff" + TABLE,
        "a.tsv": 'label\ttext\n1\tone\n2\t"two, ""three"""\n',
        "a.jsonl.gz": LINES,
        "a.csv.gz": TABLE,
    }.items(),
)
def test_records_of(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_records(path) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.txt.gz", "wiki.valid.tokens"])
def test_plain_text(name: str, tmp_path: Path) -> None:
    data = "\ufeffA text.\r\nIts end.\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_records(tmp_path / name) == ["A text.\nIts end.\n"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS, "id": [1, 2]}), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet") == TEXTS
    parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "chat.parquet")
    assert read_records(tmp_path / "chat.parquet") == [CHAT]
    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "other.parquet")
    with pytest.raises(PrunePeakError, match="columns body; expected one named text or messages"):
        read_records(tmp_path / "other.parquet")
    (tmp_path / "no.parquet").write_text("text")
    with pytest.raises(PrunePeakError, match="not a readable Parquet file"):
        read_records(tmp_path / "no.parquet")


def test_chats_take_the_model_s_template(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"text": "plain"}))
    (tmp_path / "chat.csv").write_text("messages\n" + '"' + json.dumps(CHAT).replace('"', '""') + '"\n')
    tokenizer = load_tokenizer(open_model(str(EXAMPLES / "llama-mini")))
    tokenizer.chat_template = None
    with pytest.raises(PrunePeakError, match="no chat template"):
        read_texts(str(tmp_path / "chat.jsonl"), tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert read_texts(str(tmp_path / "chat.jsonl"), tokenizer) == ["<user>Hi<assistant>Hello", "plain"]
    assert read_texts(str(tmp_path / "chat.csv"), tokenizer) == ["<user>Hi<assistant>Hello"]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(PrunePeakError, match="the chat template fails"):
        read_texts(str(tmp_path / "chat.jsonl"), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pdf", b"%PDF", "is a .pdf file; expected plain text"),
        ("a.html", b"<p>", "is a .html file"),
        ("a.DOCX", b"PK", "is a .docx file"),
        ("a.tar.gz", b"x", "is a .tar file"),
        ("a.json", b'{"text": "one"}', "holds a dict; expected a list"),
        ("a.json", b"[1]", "record 1: expected an object"),
        ("a.json", b"[", "is not JSON"),
        ("a.csv", b"body\none\n", "has the columns body; expected one named text"),
        ("a.csv", b"", "of an empty file"),
        ("a.csv", b'messages\n"[1"\n', "record 1: expected an object"),
        ("a.jsonl", b'{"messages": []}', "line 1: expected an object"),
        ("a.jsonl", b'{"messages": [{"content": "no role"}]}', "line 1: expected an object"),
        ("a.jsonl.gz", b"not gzip", "is not a readable"),
        ("a.txt", b"\xff\xfe", "is not a readable UTF-8"),
    ],
)
def test_refused_with_what_to_do(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrunePeakError, match=words):
        read_records(tmp_path / name)


def test_a_bomb_of_gzip_is_read_as_far_as_any_text(tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte: no more than the longest text is decompressed."""
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=9) as file:
        for _ in range(64):
            file.write(b"0" * 2**20)
    [text] = read_records(tmp_path / "a.txt.gz")
    assert len(text) == LONGEST_TEXT
