import gzip
import json
import logging
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from unsloth.core.errors import ConfigError, DataError
from unsloth.data.sources import load_rows

ROWS = [{"question": 'a, "b"\nc', "answer": "ü 漢"}, {"question": "d", "answer": "e"}]


def listed(rows):
    return [dict(row) for row in rows]


def test_json_lines_json_and_their_compressed_forms(tmp_path):
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "d.json").write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}))
    (tmp_path / "e.json").write_text(lines)  # JSON Lines under another name
    for name in ("a.jsonl", "b.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    names = ["a.jsonl", "b.json", "c.json", "d.json", "e.json", "a.jsonl.gz", "b.json.gz"]
    for name in names:
        assert listed(load_rows(tmp_path / name)) == ROWS, name


def test_rows_of_json_lines_are_read_when_asked_for(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(b'{"n": %d, "text": "x"}\r\n' % i for i in range(1000)))
    rows = load_rows(path)
    assert len(rows) == 1000 and rows[-1]["n"] == 999 and rows[0] == {"n": 0, "text": "x"}
    assert [row["n"] for row in rows[995:]] == list(range(995, 1000))
    assert [row["n"] for row in rows] == list(range(1000))
    assert [row["n"] for row in rows[10:4:-3]] == [10, 7]
    with pytest.raises(IndexError):
        rows[1000]


def test_a_list_of_messages_is_a_conversation(tmp_path):
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "a.json").write_text(json.dumps([talk]))
    assert load_rows(tmp_path / "a.json") == [{"conversations": talk}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_any_delimiter_and_byte_order_mark(tmp_path, delimiter):
    table = [["question", "n", "x"], ['"a, ""b""\nc"', "1", "2.5"], ["d; e", "", "1"], ["f", "2", ""]]
    table[2][0] = '"d; e"'
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(delimiter.join(row) for row in table).encode())
    rows = listed(load_rows(path))
    assert rows == [
        {"question": 'a, "b"\nc', "n": 1, "x": 2.5},
        {"question": "d; e", "n": None, "x": 1.0},
        {"question": "f", "n": 2, "x": None},
    ]
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert listed(load_rows(tmp_path / "t.csv.gz")) == rows


def test_text_that_looks_like_a_number_stays_text_in_a_mixed_column(tmp_path):
    (tmp_path / "t.csv").write_text("zip,date,id\n01234,2024-01-02,7\n99999,2024-01-03,x\n")
    assert listed(load_rows(tmp_path / "t.csv"))[0] == {"zip": "01234", "date": "2024-01-02", "id": "7"}


def workbook(path, sheet, shared, styles="", about=""):
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    links = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "xl/workbook.xml",
            f'<workbook xmlns="{main}" xmlns:r="{links}">{about}<sheets>'
            '<sheet name="Data" sheetId="1" r:id="rId1"/></sheets></workbook>',
        )
        archive.writestr(
            "xl/_rels/workbook.xml.rels",
            '<Relationships><Relationship Id="rId1" Target="worksheets/sheet1.xml"/></Relationships>',
        )
        strings = "".join(f"<si><t>{text}</t></si>" for text in shared)
        archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{main}">{strings}</sst>')
        archive.writestr("xl/worksheets/sheet1.xml", f'<worksheet xmlns="{main}">{sheet}</worksheet>')
        if styles:
            archive.writestr("xl/styles.xml", f'<styleSheet xmlns="{main}">{styles}</styleSheet>')


def test_excel_with_merged_cells_dates_and_gaps(tmp_path):
    cells = (
        '<row><c r="A1" t="s"><v>0</v></c><c r="B1" t="s"><v>1</v></c>'
        '<c r="C1" t="inlineStr"><is><t>when</t></is></c></row>'
        '<row><c r="A2" t="s"><v>2</v></c><c r="B2"><v>3</v></c><c r="C2" s="1"><v>45292</v></c></row>'
        '<row><c r="B3"><v>2.5</v></c></row><row></row><row><c r="B5" t="b"><v>1</v></c></row>'
    )
    sheet = f'<sheetData>{cells}</sheetData><mergeCells><mergeCell ref="A2:A3"/></mergeCells>'
    path = tmp_path / "t.xlsx"
    workbook(path, sheet, ["topic", "n", "tea"], '<cellXfs><xf numFmtId="0"/><xf numFmtId="14"/></cellXfs>')
    assert load_rows(path) == [
        {"topic": "tea", "n": 3, "when": "2024-01-01"},
        {"topic": "tea", "n": 2.5, "when": None},
        {"topic": None, "n": True, "when": None},
    ]
    with pytest.raises(ConfigError, match="Data"):
        load_rows(path, sheet="Other")


@pytest.mark.parametrize(
    ("about", "day"), [("", "2020-02-28"), ('<workbookPr date1904="1"/>', "2024-02-29")], ids=["1900", "1904"]
)
def test_excel_with_times_formulas_and_errors(tmp_path, caplog, monkeypatch, about, day):
    monkeypatch.setattr(logging.getLogger("unsloth"), "propagate", True)
    names = ["day", "time", "span", "money", "sum", "lost", "error"]
    head = "".join(f'<c r="{chr(65 + i)}1" t="s"><v>{i}</v></c>' for i in range(7))
    cells = (
        '<c r="A2" s="1"><v>43889</v></c><c r="B2" s="2"><v>0.545138888888889</v></c><c r="C2" s="3"><v>1.25</v></c>'
        '<c r="D2" s="4"><v>1.5</v></c><c r="E2"><f>1+1</f><v>2</v></c><c r="F2"><f>A2*2</f></c>'
        '<c r="G2" t="e"><v>#N/A</v></c>'
    )
    styles = (
        '<numFmts><numFmt numFmtId="164" formatCode="[$-409]d mmm yyyy"/><numFmt numFmtId="165" formatCode="h:mm"/>'
        '<numFmt numFmtId="166" formatCode="[h]:mm:ss"/><numFmt numFmtId="167" formatCode="0.00 &quot;dollars&quot;"/>'
        '</numFmts><cellXfs><xf numFmtId="0"/><xf numFmtId="164"/><xf numFmtId="165"/><xf numFmtId="166"/>'
        '<xf numFmtId="167"/></cellXfs>'
    )
    path = tmp_path / "t.xlsx"
    workbook(path, f"<sheetData><row>{head}</row><row>{cells}</row></sheetData>", names, styles, about)
    row = load_rows(path)[0]
    assert row == {
        "day": day,
        "time": "13:05:00",
        "span": "30:00:00",
        "money": 1.5,
        "sum": 2,
        "lost": None,
        "error": None,
    }
    assert (
        "2 cells are empty because they hold an error, or a formula whose result was not saved, such as F2"
        in caplog.text
    )


def test_parquet_text_and_folders(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "1.parquet")
    (tmp_path / "2.txt").write_text("c\n")
    (tmp_path / "README.md").write_text("about")
    assert [row["text"] for row in load_rows(tmp_path)] == ["a", "b", "c\n"]
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert listed(load_rows(tmp_path / "saved")) == ROWS


def test_sources_that_are_not_there(tmp_path):
    for source in (tmp_path / "no.jsonl", "no.csv", "./nothing"):
        with pytest.raises(DataError, match="no such file"):
            load_rows(source)
    (tmp_path / "x.doc").write_text("x")
    with pytest.raises(DataError, match="Readable are"):
        load_rows(tmp_path / "x.doc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file that can be read"):
        load_rows(tmp_path / "empty")
