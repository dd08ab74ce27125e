"""How the manual reads: short sentences, and none of the phrases that readers stumbled over."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest
from paths import ROOT

from docs.pages import PAGES, name_of, sentences_of

MEAN_WORDS = 20
LONGEST_WORDS = 30
TEXTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
SOURCES = ("w4a16gen", "templates", "tools", "examples")
ENDINGS = (".py", ".h", ".cuh", ".cpp", ".jinja", ".md")
PHRASES = (
    # What three new users met in README, help texts, messages and manual.
    "a kernel here is a value",
    "all there is to know about it",
    "nothing is generated to be filtered out again",
    "that are derived and not chosen",
    "a GPU need not be there",
    "is looked up in what",
    "for calls that name none",
    "of a real model through",
    "goes on where it was interrupted",
    "that mends it",
    "mend it with",
    "adds so many random problems",
    "run so many random problems",
    "that what was asked for was emitted",
    "nothing foreign in it",
    "leave what they should",
    "or name its folder",
    "it is legal, so",
    "there twice",
    "is asked for but not emitted",
    "name what to time",
    "say what to write",
    "processes that start from now on",
    "choose another folder or file",
    "m of --model",
    "of long problems a third",
    "within so many percent",
    "--random's too",
    "plots and page again, from",
    "generator wrote into a folder hold",
    "are measured anew",
    "nothing was multiplied",
    "as called us",
    "the weak spot are",
    "where it is, the library is whole",
    "none are taken unseen",
    "what brings it on is not known",
    "shorter last group nowhere",
    # What a reader of the code met.
    "or half but of eight warps",
    "now caught that and now did not",
    "is told of once",
    "is supposed, not measured",
    "leaves the table of use",
    "or give None, with nothing done",
    "goes the long way",
    "that several hold are added up",
    "which would hold up the consumers",
    "in the way of this one's",
    "which so had to go",
    "that this one left empty",
    "which are all that 4 bits save",
    "end the kernel that they are at",
    "a handler of Python's does not run",
    "who reads too early is seen",
    # Patterns behind them.
    "one a line",
    "so many",
    " anew",
    "what the gpu can do at most",
    '"""give ',
)


def flat(text: str) -> str:
    """Return a text in one line, without the marks that begin comment lines."""
    return re.sub(r"\s+(//|#|\*)?\s*", " ", text).lower()


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_no_page_has_a_phrase_that_readers_stumbled_over(page: Path) -> None:
    text = flat(page.read_text())
    assert [phrase for phrase in PHRASES if flat(phrase) in text] == []


def test_no_source_has_a_phrase_that_readers_stumbled_over() -> None:
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    assert len(paths) > 100  # otherwise the sources were not found
    texts = {path: flat(path.read_text()) for path in paths}
    found = [(path, phrase) for phrase in PHRASES for path, text in texts.items() if flat(phrase) in text]
    assert found == []


def test_sentences_have_at_most_twenty_words_on_average() -> None:
    lengths = [len(sentence.split()) for page in PAGES for sentence in sentences_of(page)]
    assert len(lengths) > 500  # otherwise the prose was not found
    assert mean(lengths) <= MEAN_WORDS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_page_has_short_sentences(page: Path) -> None:
    sentences = sentences_of(page)
    assert mean(len(sentence.split()) for sentence in sentences) <= MEAN_WORDS
    assert [sentence for sentence in sentences if len(sentence.split()) > LONGEST_WORDS] == []


def test_sentences_are_found_and_counted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\nOne two\nthree. Four `a b` five.\n\n| no | table |\n\n- Item one.\n- Item [two](x.md)\n\n"
        "```bash\nno code\n```\n"
    )
    assert sentences_of(page) == ["One two three.", "Four code five.", "Item one.", "Item two"]
