"""Result files of T2I-CompBench's own tools."""

import json

import pytest

from cotgen_pl.official_results import read_vqa_result


def write(folder, content):
    file = folder / "vqa_result.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def entry(number, answer):
    return {"question_id": number, "answer": answer}


def test_scores_by_picture_whether_numbers_or_texts(tmp_path):
    file = write(tmp_path, [entry(0, "0.25"), entry("2", 1), entry(1, 0.0)])
    assert read_vqa_result(file) == {0: 0.25, 2: 1.0, 1: 0.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "expected JSON"),
        ({"0": 1}, "expected a list of question_id and answer, got dict"),
        ([], "got an empty list"),
        ([entry(0, 1), {"question_id": 1}], "entry 1: expected a question_id and an answer"),
        ([entry(0, "yes")], "entry 0: expected a question_id and an answer that is a number"),
        ([entry(0, None)], "entry 0: expected a question_id and an answer"),
        ([entry("a", 1)], "entry 0: expected a question_id"),
        ([entry(True, 1)], "entry 0: expected a question_id"),
        ([entry(1.5, 1)], "entry 0: expected a question_id"),
        ([entry(-1, 1)], "entry 0: expected a question_id"),
        (["x"], "entry 0: expected a question_id"),
        ('[{"question_id": 0, "answer": NaN}]', "entry 0: expected a finite score, got nan"),
        ([entry(3, 1), entry("3", 1)], "entry 1: expected each picture once, got question_id 3"),
    ],
)
def test_files_that_are_none_are_told(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_vqa_result(write(tmp_path, content))


def test_no_file_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"expected a vqa_result.json at .*, got no file"):
        read_vqa_result(tmp_path / "vqa_result.json")


def test_bytes_that_are_no_text_are_told(tmp_path):
    (tmp_path / "vqa_result.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(ValueError, match="expected JSON"):
        read_vqa_result(tmp_path / "vqa_result.json")
