"""Which files the audit opens, which it only reports, and how it shows their names."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from audited import BF16, write_whole
from fakes.generator import GOLDEN

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.audit import audit
from w4a16gen.integrations.tensorrt_llm.folders import LARGEST_FILE, NotReadError, printable, read_file


def test_links_special_files_and_what_cannot_be_read_are_reported_and_not_opened(tmp_path: Path) -> None:
    folder = write_whole(tmp_path / "in")
    write_whole(tmp_path / "other")
    os.mkfifo(folder / "fifo.cu")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.cu"))
    (folder / "link.cu").symlink_to(tmp_path / "other" / "w4a16_trtllm_cs_pingpong_1.generated.cu")
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.cu").symlink_to("nowhere")
    (folder / "notes.txt").symlink_to("nowhere.txt")
    (folder / "folder.cu").mkdir()
    (folder / "folder.cu" / "deep.CU").write_text(f"{BF16}\n")
    os.mkfifo(folder / "fifo.txt")
    found = audit(folder)
    link, special = "a symbolic link, which is not followed", "not a regular file"
    assert dict(found.not_read) == {
        "fifo.cu": special, "socket.cu": special, "link.cu": link, "linked": link, "loop": link, "dangling.cu": link
    }  # fmt: skip
    assert found.foreign_places == {"BF16 x uint4": ["folder.cu/deep.CU:1"]}
    assert found.duplicates == []
    assert not found.ok


def test_reading_never_waits_and_never_follows_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("x")
    for name, reason in (("fifo", "not a regular file"), ("link", "cannot be read"), (".", "not a regular file")):
        with pytest.raises(NotReadError, match=reason):
            read_file(tmp_path / name)
    assert read_file(tmp_path / "file") == b"x"
    with (tmp_path / "file").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(NotReadError, match="67108865 bytes, more than 67108864"):
        read_file(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up the right to read and take it back")
def test_unreadable_files_and_folders_are_reported_by_root_too(tmp_path: Path) -> None:
    folder = write_whole(tmp_path / "in")
    (folder / "locked").mkdir(mode=0)
    (folder / "locked.cu").write_text("int x;\n")
    (folder / "locked.cu").chmod(0)
    for above in (folder, *folder.parents):
        if above.stat().st_uid == 0 and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        found = audit(folder)
    finally:
        os.seteuid(0)
    assert sorted(found.not_read) == [
        ("locked", "cannot be read: Permission denied"), ("locked.cu", "cannot be read: Permission denied")
    ]  # fmt: skip
    assert not found.ok


def test_names_of_any_bytes_are_shown_as_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\n\x1b.cu")
    (tmp_path / name).write_text(f"{BF16}\n")
    found = audit(tmp_path)
    assert found.foreign_places == {"BF16 x uint4": ["\\xff\\n\\x1b.cu:1"]}
    json.dumps(found.as_json()).encode()
    assert printable("ä/b c") == "ä/b c"


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text(GOLDEN[0])
    with pytest.raises(InvalidValueError, match=r"no \.cu files under"):
        audit(tmp_path)
    (tmp_path / "link").symlink_to(".")
    assert audit(tmp_path).problems == ["link: a symbolic link, which is not followed"]
