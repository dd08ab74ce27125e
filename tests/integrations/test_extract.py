"""The FP16 x uint4 instantiations out of mixed files: bytes, conditions, and what is never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes.generator import GOLDEN, INCLUDE, filtered, generated
from hypothesis import given, settings
from hypothesis import strategies as st

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.audit import audit
from w4a16gen.integrations.tensorrt_llm.extract import SCHEMA, extract
from w4a16gen.integrations.tensorrt_llm.instantiations import scan
from w4a16gen.integrations.tensorrt_llm.known import W4A16, classify

BF16 = GOLDEN[0].replace("half", "__nv_bfloat16")


def extracted(folder: Path, content: str | bytes) -> bytes:
    """Audit one source, extract from it, and return what was written."""
    (folder / "in").mkdir()
    source = folder / "in" / "a.cu"
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    (path,) = extract(audit(folder / "in"), folder / "out")
    assert source.read_bytes() == (content.encode() if isinstance(content, str) else content)
    return path.read_bytes()


def test_extracting_takes_kernels_out_of_mixed_files(tmp_path: Path) -> None:
    extract(audit(generated(tmp_path / "all")), tmp_path / "extracted")
    again = audit(tmp_path / "extracted")
    assert again.ok
    assert again.total == 63
    for file in again.files:
        text = file.path.read_text()
        assert text.startswith(INCLUDE)
        assert text.count("{") == text.count("}") == 3
        assert "fp8" not in text
        assert "\n\n\n" not in text
    assert json.loads((tmp_path / "extracted" / "manifest.json").read_text())["schema"] == SCHEMA


def test_extracting_saves_what_a_filter_leaves(tmp_path: Path) -> None:
    found = audit(filtered(generated(tmp_path / "some")))
    assert len(extract(found, tmp_path / "extracted")) == 5
    again = audit(tmp_path / "extracted")
    assert (again.total, len(again.kernels), dict(again.foreign)) == (40, 40, {})


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_all_other_bytes_stay(tmp_path: Path, ending: bytes) -> None:
    head = b'\xef\xbb\xbf// \xe4\xff "quoted"\n#include "a.inl"\n\nnamespace a {\n\n/* kept */\n'
    kept = GOLDEN[0].encode().replace(b", ", b" , \t\\\n") + b"  // b\xfc\n"
    tail = b'\nconst char* s = R"(\n)"; \t\n}  // namespace a'
    foreign = b"// goes too\n" + BF16.encode() + b" // and this\n"
    content, wanted = ((head + part + kept + tail).replace(b"\n", ending) for part in (foreign, b""))
    assert extracted(tmp_path, content) == wanted


def test_a_file_without_others_stays_as_it_is(tmp_path: Path) -> None:
    content = f"\n\n{INCLUDE}\nvoid f() {{}}\n#ifdef ENABLE_X\n#endif\n{GOLDEN[0]}\n\n\n\n{GOLDEN[1]}".encode()
    assert extracted(tmp_path, content) == content


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("#ifdef ENABLE_BF16\nOTHER\n#endif\nKEPT\n", "KEPT\n"),
        ("KEPT\n#ifdef ENABLE_BF16\nOTHER\n#endif  // ENABLE_BF16\n", "KEPT\n"),
        ("#ifdef ENABLE_BF16\nOTHER\n#else\nKEPT\n#endif\n", "#ifdef ENABLE_BF16\n#else\nKEPT\n#endif\n"),
        ("#ifdef ENABLE_BF16\nKEPT\n#else\nOTHER\n#endif\n", "#ifdef ENABLE_BF16\nKEPT\n#else\n#endif\n"),
        ("#ifndef EXCLUDE_SM_90\nKEPT\nOTHER\n#endif\n", "#ifndef EXCLUDE_SM_90\nKEPT\n#endif\n"),
        ("#if A\n#if B\nOTHER\n#endif\n#ifdef C\nOTHER\n#endif\n#endif\nKEPT\n", "KEPT\n"),
        ("#if A\n#if B\nOTHER\n#endif\nKEPT\n#endif\n", "#if A\nKEPT\n#endif\n"),
        ("#ifdef A\n#include <a>\nOTHER\n#endif\nKEPT\n", "#ifdef A\n#include <a>\n#endif\nKEPT\n"),
        ("#ifdef A\n#elif B\nOTHER\n#else\nOTHER\n#endif\nKEPT\n", "KEPT\n"),
        ("#if 0\nOTHER\n#endif\nKEPT\n", "#if 0\nOTHER\n#endif\nKEPT\n"),
        ("#ifdef ENABLE_BF16\nINST(half, 1);\n#endif\nINST(half, 2)\nKEPT\n", "KEPT\n"),
        ("#define I(T) template void f<T>();\nI(half);\nKEPT\n", "#define I(T) template void f<T>();\nKEPT\n"),
        ("extern template void f<int>();\nKEPT\nKEPT\n", "extern template void f<int>();\nKEPT\n"),
        ("int x; OTHER int y;\nKEPT\n", "int x;  int y;\nKEPT\n"),
        ("#ifdef ENABLE_A\nKEPT\n#else\nKEPT\n#endif\n", "#ifdef ENABLE_A\nKEPT\n#else\nKEPT\n#endif\n"),
        ("#ifdef ENABLE_A\nKEPT\n#endif\nKEPT\n", "#ifdef ENABLE_A\nKEPT\n#endif\nKEPT\n"),
        ("KEPT\n#ifdef ENABLE_A\nKEPT\n#endif\n", "KEPT\n"),
        ("/* a\n// */\nOTHER\nKEPT\n", "/* a\n// */\nKEPT\n"),
        ("// a \\\nb\n// c\nOTHER\nKEPT\n", "// a \\\nb\nKEPT\n"),
    ],
)
def test_conditions_stay_whole_or_go(tmp_path: Path, before: str, after: str) -> None:
    texts = [text.replace("KEPT", GOLDEN[0]).replace("OTHER", BF16) for text in (before, after)]
    assert extracted(tmp_path, texts[0]).decode() == texts[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"#define I(T) {GOLDEN[0][:-1].replace('half', 'T')}\n#define ALL I(half); I(__nv_bfloat16);\nALL\n",
            "line 3: one",
        ),
        (f"{GOLDEN[0]}\n#endif\n", "line 2: #endif without #if"),
        (f"{GOLDEN[0]}\n{GOLDEN[1][:-1]}\n", "line 2: the instantiation of sm90.* does not end"),
        (GOLDEN[0].replace("half*", "half\n#if A\n*\n#else\n*\n#endif\n", 1), "line 1: an #if stands inside"),
    ],
)
def test_files_that_cannot_be_taken_apart_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.cu").write_text(text)
    (tmp_path / "in" / "b.cu").write_text(f"{GOLDEN[2]}\n{BF16}\n")
    with pytest.raises(InvalidValueError, match=f"a.cu: {message}"):
        extract(audit(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_audited_folder_is_never_written_to(tmp_path: Path) -> None:
    folder = generated(tmp_path / "all" / "in")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "hop").mkdir()
    found = audit(folder)
    for output in (
        folder, folder / "out", folder.parent, tmp_path, tmp_path / "link", tmp_path / "link" / "out",
        tmp_path / "hop" / ".." / "all" / "in", folder / ".." / "in" / "x",
    ):  # fmt: skip
        with pytest.raises(InvalidValueError, match="is, contains or lies in the audited folder"):
            extract(found, output)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InvalidValueError, match="is, contains or lies in"):
        extract(audit(tmp_path / "link"), folder)


@pytest.mark.parametrize("name", ["notes.txt", "0.cu", "sub/x", "manifest.json", "link"])
def test_a_folder_with_files_of_others_is_refused_and_stays_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.cu").write_text(f"{GOLDEN[0]}\n{BF16}\n")
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    if name == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("mine")
    with pytest.raises(InvalidValueError, match=r"was not written by an earlier call|is not a manifest"):
        extract(audit(tmp_path / "in"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name.partition("/")[0]]
    assert path.is_symlink() or path.read_text() == "mine"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "0.cu").write_text(f"{GOLDEN[0]}\n{BF16}\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "in" / "sub")
    with pytest.raises(InvalidValueError, match="sub is not a folder"):
        extract(audit(tmp_path / "in"), tmp_path / "out")
    assert BF16 in (tmp_path / "in" / "sub" / "0.cu").read_text()


def test_an_earlier_extraction_is_brought_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    first, second = (tmp_path / "in" / name for name in ("a.cu", "b.cu"))
    first.write_text(f"{GOLDEN[0]}\n{BF16}\n")
    second.write_text(f"{GOLDEN[1]}\n")
    out = tmp_path / "out"
    assert extract(audit(tmp_path / "in"), out) == [out / "a.cu", out / "b.cu"]
    assert extract(audit(tmp_path / "in"), out) == [out / "a.cu", out / "b.cu"]
    first.write_text(f"{GOLDEN[2]}\n")
    second.unlink()
    assert extract(audit(tmp_path / "in"), out) == [out / "a.cu"]
    assert (out / "a.cu").read_text() == f"{GOLDEN[2]}\n"
    assert (out / "b.cu").exists()
    extract(audit(tmp_path / "in"), out, remove_stale=True)
    assert not (out / "b.cu").exists()
    (out / "a.cu").write_text("edited")
    with pytest.raises(InvalidValueError, match="was changed since"):
        extract(audit(tmp_path / "in"), out)
    assert (out / "a.cu").read_text() == "edited"


BLOCKS = st.recursive(
    st.sampled_from(["KEPT 0\n", "KEPT 1\n", "OTHER\n", "int x;\n", "// c\n", "\n", "INST(1)\n", "#define A\n"]),
    lambda inner: st.builds(
        lambda condition, one, two: f"#if {condition}\n{''.join(one)}#else\n{''.join(two)}#endif\n",
        st.sampled_from(["ENABLE_A", "defined(ENABLE_B)", "0", "1"]),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.lists(BLOCKS, max_size=5))
def test_what_is_extracted_has_the_same_kernels_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("extract")
    text = "".join(blocks).replace("OTHER", BF16)
    for number in (0, 1):
        text = text.replace(f"KEPT {number}", GOLDEN[number])
    (folder / "in").mkdir()
    (folder / "in" / "a.cu").write_text(f"{text}{GOLDEN[5]}\n")
    found = audit(folder / "in")
    assert not found.problems
    (path,) = extract(found, folder / "out")
    again = scan(path.read_bytes())
    assert not again.problems
    assert {classify(one).types for one in again.instantiations} == {W4A16}
    before, after = (
        {
            (one.arguments, one.conditions)
            for one in scan(file.read_bytes()).instantiations
            if classify(one).types == W4A16
        }
        for file in (folder / "in" / "a.cu", path)
    )
    assert after <= before
    assert {arguments for arguments, _ in after} == {arguments for arguments, _ in before}
    for arguments, conditions in before:  # the kernel stays in every build that had it
        assert any(arguments == other and set(kept) <= set(conditions) for other, kept in after)
    rest = path.read_text()
    assert rest.count("int x;") == text.count("int x;")
