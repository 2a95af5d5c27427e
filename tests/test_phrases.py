"""Phrase files: written by a parser that stands in for spaCy, and read back."""

import json
from types import SimpleNamespace

import pytest

import tools.fetch
from cotgen_pl.downloads import Downloader
from cotgen_pl.phrases import PUBLISHED, PhraseFile, format_phrases, hash_prompt
from tests.file_server import Served, running
from tools.fetch import main

KINDS = {"a": "DET", "an": "DET", "the": "DET", "red": "ADJ", "on": "ADP", ".": "PUNCT"}
KINDS |= {"is": "AUX", "and": "CCONJ"}
TEXT = "a red cup is on the café table."


class Language:
    """Stands in for a model of spaCy's: chunks are from an article to the next small word."""

    def __init__(self, version="3.5.0"):
        self.meta = {"lang": "en", "name": "core_web_sm", "version": version}
        self.asked = []

    def __call__(self, text):
        self.asked.append(text)
        return Document(text)


class Document:
    def __init__(self, text):
        self.words, place = [], 0
        for piece in text.replace(".", " .").split():
            place = text.index(piece, place)
            self.words.append(Token(piece, place, KINDS.get(piece.lower(), "NOUN")))
            place += len(piece)
        self.end = place

    def __iter__(self):
        return iter(self.words)

    @property
    def noun_chunks(self):
        start = None
        for word in self.words:
            if word.pos_ == "DET":
                start = word.idx
            elif word.pos_ in ("AUX", "PUNCT", "ADP", "CCONJ") and start is not None:
                yield SimpleNamespace(start_char=start, end_char=word.idx - (word.pos_ != "PUNCT"))
                start = None
        if start is not None:
            yield SimpleNamespace(start_char=start, end_char=self.end)


class Token(SimpleNamespace):
    def __init__(self, text, idx, pos_):
        super().__init__(text=text, idx=idx, pos_=pos_)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "phrases.jsonl"
    path.write_text(format_phrases([TEXT, f"  {TEXT}\n", "the dog."], Language(), "3.5.3"))
    return path


def test_phrases_and_words_are_read_back(file):
    parse = PhraseFile(str(file)).find(f"{TEXT} ")
    assert parse.phrases == ["a red cup", "the café table"]
    assert parse.words[:3] == [("a", "DET"), ("red", "ADJ"), ("cup", "NOUN")]
    assert parse.words[-2:] == [("table", "NOUN"), (".", "PUNCT")]


def test_other_prompts_have_no_phrases(file):
    assert PhraseFile(str(file)).find("a blue cup") is None


def test_the_file_holds_no_prompt_and_each_once(file):
    text = file.read_text()
    assert "cup" not in text and "table" not in text
    assert len(text.splitlines()) == 3
    assert hash_prompt(TEXT) in text


@pytest.mark.parametrize(
    ("spacy", "model", "published"),
    [("3.5.3", "3.5.0", True), ("3.8.18", "3.8.0", False), ("3.5.3", "3.5.1", False)],
)
def test_the_published_parser_is_told_from_others(tmp_path, spacy, model, published):
    (tmp_path / "p.jsonl").write_text(format_phrases([TEXT], Language(model), spacy))
    read = PhraseFile(str(tmp_path / "p.jsonl"))
    assert read.parser == {"spacy": spacy, "model": f"en_core_web_sm {model}"}
    assert read.is_published is published


def test_no_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"got none; make it with `python tools/fetch.py phrases`"):
        PhraseFile(str(tmp_path / "phrases.jsonl"))


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, "a red cup"),
        (1, '{"spacy": "3.5.3"}'),
        (2, '{"prompt": "x", "chunks": [[0, 2]]}'),
        (2, '{"prompt": "x", "chunks": [[2, 0]], "words": []}'),
        (2, '{"prompt": "x", "chunks": [], "words": [[0, 2]]}'),
        (2, "[]"),
    ],
)
def test_a_line_that_is_none_of_a_phrase_file_is_named(tmp_path, number, line):
    lines = [line] if number == 1 else [json.dumps(PUBLISHED), line]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"p.jsonl:{number}: expected an object with .*, got "):
        PhraseFile(str(tmp_path / "p.jsonl"))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"p.jsonl:1: expected an object with spacy and model"):
        PhraseFile(str(tmp_path / "p.jsonl"))


# The recipe ---------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """A recipe with two prompt files on a server, one of them with CRLF."""
    with running() as server:
        server.files["/a.txt"] = Served(f"{TEXT}\r\nthe dog.".encode())
        server.files["/b.txt"] = Served(b"the dog.\n\na cup.\n")
        targets = [
            f"  - {{target: {name}, url: '{server.address}/{name}'}}" for name in ("a.txt", "b.txt")
        ]
        (tmp_path / "own.yaml").write_text(
            "\n".join(["# Own", "files:", *targets, "phrases: {target: p.jsonl, model: small}"])
        )
        yield tmp_path / "own.yaml"


def fetch(recipe):
    arguments = [str(recipe), "--to", str(recipe.parent / "data")]
    return main(arguments, Downloader(pause=0.0, show=False))


def test_the_recipe_parses_all_prompts_once(recipe, monkeypatch, capsys):
    language = Language()
    monkeypatch.setattr(tools.fetch, "load_spacy", lambda model: (language, "3.8.1"))
    assert fetch(recipe) == 0
    assert "phrases of 3 prompts" in capsys.readouterr().out
    assert language.asked == [TEXT, "the dog.", "a cup."]
    read = PhraseFile(str(recipe.parent / "data" / "p.jsonl"))
    assert read.find("a cup.").phrases == ["a cup"] and not read.is_published
    assert fetch(recipe) == 0
    assert len(language.asked) == 3
    assert "is there; remove it" in capsys.readouterr().out


def test_without_spacy_the_command_that_installs_it_is_told(recipe, monkeypatch, capsys):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tools.fetch.importlib, "import_module", missing)
    assert fetch(recipe) == 2
    error = capsys.readouterr().err
    assert "run pip install 'cotgen-pl[phrases]' and python -m spacy download small" in error
    assert not (recipe.parent / "data" / "p.jsonl").exists()
