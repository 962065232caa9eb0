"""Reading CSV files: the same rows as Python's csv module gives, and every bad input named."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pytest
import torch

from allfuse.base.errors import DataError
from allfuse.prediction import records as records_module
from allfuse.prediction.records import Records, leaves_open
from allfuse.prediction.table import BadRow, Table


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "rows.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_all(path: Path, inputs=("a", "b"), keep=(), count=3):
    """All rows of a table, `count` at a time."""
    numbers, kept, row = [], [], 2
    with Table(path, inputs, keep) as table:
        while taken := table.take(count):
            part, texts = table.parse(taken, row)
            numbers += part.tolist()
            kept += texts
            row += len(taken)
    return numbers, kept


def test_columns_may_stand_in_any_order(tmp_path):
    path = write(tmp_path, "b,a\n1,2\n3,4\n")
    assert read_all(path)[0] == [[2, 1], [4, 3]]


def test_kept_columns_are_passed_on_as_they_stand(tmp_path):
    path = write(tmp_path, 'id,b,a,note\nx_1,1,2,"say ""hi"",\nyou"\n 007,3,4,\n')
    numbers, kept = read_all(path, keep=["note", "id"])
    assert numbers == [[2, 1], [4, 3]]
    assert kept == [['say "hi",\nyou', "x_1"], ["", " 007"]]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark_change_nothing(tmp_path, ending, last, mark):
    text = ending.join(['"a",b', "1,2", ' 3.5 ,"-4e2"', "0.1,+6"]) + last
    numbers, _ = read_all(write(tmp_path, mark + text.encode()))
    assert torch.equal(torch.tensor(numbers), torch.tensor([[1, 2], [3.5, -400], [0.1, 6]]))


def test_one_column_reads_as_many_do(tmp_path):
    assert read_all(write(tmp_path, 'a\n1\n"2"\n 3\n\n'), ["a"], count=1)[0] == [[1], [2], [3]]
    for blank in ("", " ", '""'):
        with pytest.raises(BadRow, match="row 3"):
            read_all(write(tmp_path, f"a\n1\n{blank}\n2\n"), ["a"])


def test_numbers_are_rounded_once_to_float32(tmp_path):
    values = torch.randn(200, 2, dtype=torch.float64)
    path = write(tmp_path, "a,b\n" + "\n".join(f"{a!r},{b!r}" for a, b in values.tolist()))
    assert torch.equal(torch.tensor(read_all(path, count=64)[0]), values.float())


BAD = {
    "a,b\n1,2\n1,x\n": r"rows.csv row 3, column 'b': received the text 'x'; allowed: a finite",
    "a,b\n1,2\n1,1_0\n": r"row 3, column 'b': received the text '1_0'",
    "a,b\n1,2\n1,0x10\n": r"row 3, column 'b': received the text '0x10'",
    "a,b\n1,2\n\n1,2\n": r"row 3 is blank; allowed: blank lines at the end only",
    "a,b\n1,2\n  \n": r"row 3 is blank",
    "a,b\nnan,2\n": r"row 2, column 'a': received 'nan'",
    "a,b\n1,-inf\n": r"row 2, column 'b': received '-inf'",
    "a,b\n1,1e39\n": r"row 2, column 'b': received '1e39', beyond the range of float32",
    "a,b\n1,\n": r"row 2, column 'b': is empty",
    "a,b\n1,2\n1\n": r"row 3 has 1 fields and the header has 2",
    "a,b\n1,2\n1,2,3\n1\n": r"row 3 has 3 fields and the header has 2",
    'a,b\n1,2\n1,"2\n': r'row 3: a quote \("\) is opened and never closed',
    'a,b\n1,"2"3\n': r"row 2 is not CSV: text follows a closing quote",
    "a,b\n1,2\n1\r,2\n": r"row 3 is not CSV: a carriage return stands inside it",
    "a,b\r1,2\r": r"row 1 is not CSV: a carriage return stands inside it",
    'a,b\n1,"a ""long"" story\nover lines"\n': r"row 2, column 'b': received the text 'a \"long",
    b"a,b\n1,2\n1,\xe9\n": r"row 3, column 'b': received bytes that are not UTF-8 \(0xe9\)",
    b"a,b\n1,2\n\xe9,1\n": r"row 3, column 'a': received bytes that are not UTF-8",
    b"\xe4,b\n1,2\n": r"row 1 is not UTF-8; next: save the file as UTF-8",
    "a,b\n1,2\n".encode("utf-16"): r"is UTF-16; next: save the file as UTF-8",
    "a,b\n1," + "7" * 200_000: r"row 2 is not CSV: a field is longer than 131,072 characters",
    "": r"rows.csv is empty; allowed: a header with the names of columns, then rows",
    "\n\n\n": r"rows.csv is empty",
    "\na,b\n1,2\n": r"row 1 is blank; allowed: the names of columns",
    "a,b,a\n1,2,3\n": r"row 1: column 'a' stands twice; next: rename one of them",
    "1,2\n3,4\n": r"row 1: received numbers where the names of columns belong",
    "a\n1\n": r"row 1: missing column 'b'; the file has column 'a'",
    "a,bb\n1,2\n": r"row 1: missing column 'b'; did you mean 'bb'\?; the file has columns",
    "a;b\n1;2\n": r"fields seem to be separated by ';', allowed: commas",
    "c,d,e,f,a\n": r"row 1: missing column 'b'; the file has columns 'c', 'd', 'e' and 2 more",
    "a,b,c\n1,2,3\n": r"row 1: received column 'c' too; allowed: the job's inputs, columns",
}


@pytest.mark.parametrize("content", BAD, ids=[str(content)[:24] for content in BAD])
def test_bad_input_is_named_with_its_row_and_column(tmp_path, content):
    with pytest.raises(DataError, match=BAD[content]) as caught:
        read_all(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_kept_column_is_named(tmp_path):
    with pytest.raises(DataError, match="missing column 'ident'; did you mean 'id'"):
        read_all(write(tmp_path, "a,b,id\n1,2,3\n"), keep=["ident"])


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.csv: there is no such file"):
        Table(tmp_path / "nothing.csv", ["a"])
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv: cannot be read: Is a directory"):
        Table(tmp_path / "folder.csv", ["a"])
    with pytest.raises(DataError, match=r"allowed: a CSV file, with a name that ends in \.csv"):
        Table(tmp_path / "rows.parquet", ["a"])


def test_first_bad_row_wins_whatever_is_taken_at_a_time(tmp_path):
    path = write(tmp_path, 'a,b\n1,2\n1,x\n1,"2\n')
    for count in (1, 2, 100):
        with pytest.raises(BadRow, match="row 3, column 'b'") as caught:
            read_all(path, count=count)
        assert caught.value.row == 3


def test_a_record_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_RECORD_BYTES", 5000)
    monkeypatch.setattr(records_module, "BLOCK_BYTES", 1000)
    path = write(tmp_path, 'a,b\n1,2\n1,"' + "x\n" * 50_000)
    with pytest.raises(DataError, match=r"row 3 is longer than 5 kB; next: look for a quote"):
        read_all(path)


FIELDS = ["", "1", "-2.5", " 3", "x", 'a"b', '"', ",", "\n", "\r\n", "\r", "ä€", "_", '""', "\n\n"]


def random_rows(random_source: random.Random) -> list[list[str]]:
    pick = random_source.choice
    rows = [
        ["".join(pick(FIELDS) for _ in range(random_source.randrange(3))) for _ in range(3)]
        for _ in range(random_source.randrange(1, 12))
    ]
    return [["a", "b", "c"], *rows, ["end", "1", "2"]]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_records_are_those_of_the_csv_module(tmp_path, monkeypatch, block):
    monkeypatch.setattr(records_module, "BLOCK_BYTES", block)
    source = random.Random(block)
    for _ in range(60):
        rows, text = random_rows(source), io.StringIO()
        quoting = source.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        # where lines end with \n, older versions leave a lone \r bare
        ending = "\r\n" if quoting == csv.QUOTE_MINIMAL else source.choice(["\n", "\r\n"])
        csv.writer(text, lineterminator=ending, quoting=quoting).writerows(rows)
        opened = Records(write(tmp_path, text.getvalue()))
        found = []
        while taken := opened.take(source.randrange(1, 5)):
            found += taken
        opened.close()
        read = [next(csv.reader([record.decode()], strict=True)) for record in found]
        assert read == rows
        assert opened.bytes_taken == pytest.approx(opened.size, abs=2 * len(rows))


def test_open_quotes_are_found_as_the_csv_module_finds_them():
    source = random.Random(5)
    for _ in range(3000):
        line = "".join(source.choice('",x ') for _ in range(source.randrange(8)))
        reader = csv.reader([line + "\n", "z\n"])
        first = next(reader)
        goes_on = reader.line_num == 2
        assert leaves_open(line.encode(), inside=False) == goes_on, (line, first)


def test_fast_reading_accepts_nothing_that_careful_reading_refuses(tmp_path):
    """Both readers on random fields: where the fast one gives rows, the other gives the same."""
    source = random.Random(11)
    pieces = [
        *["1", "2.5"] * 4,
        "-",
        "e",
        "_",
        " ",
        "nan",
        "inf",
        "0x",
        "\xa0",
        "٣",
        '"',
        ".",
        "+",
        "\x00",
    ]
    path = write(tmp_path, "a,b\n1,2\n")
    fast_ones = 0
    with Table(path, ["a", "b"]) as table:
        for _ in range(3000):
            count = source.choice([1, 2, 2, 2, 2, 3])
            fields = ["".join(source.choices(pieces, k=source.choice([1, 1, 1, 2]))) for _ in "abc"]
            record = ",".join(fields[:count]).encode()
            fast = table._parse_fast([record, b"7,8"])
            if fast is not None:
                numbers, _ = table._read_row(record, 2)
                assert fast[0].tolist() == [torch.tensor(numbers).tolist(), [7, 8]]
                fast_ones += 1
    assert fast_ones > 200
