"""What a snapshot sees of a folder: files, folders and links that stay inside; the rest is left out with a reason."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from heeler_sync.errors import LocalFileError
from heeler_sync.snapshot.manifest import Tree, check_tree
from heeler_sync.snapshot.scan import TICK_SECONDS, TreeScan, coarse_now, scan_tree
from heeler_sync.tree import Stamp


def scan(root: Path) -> TreeScan:
    return scan_tree(root, lambda _: True)


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_files_folders_and_links_are_seen_as_they_are(tmp_path: Path) -> None:
    file = put(tmp_path / "d/f")
    file.chmod(0o4640)
    (tmp_path / "empty").mkdir(mode=0o700)
    (tmp_path / "l").symlink_to("d/f")
    found = scan(tmp_path)
    assert set(found.files) == {"d/f"}
    assert found.files["d/f"].stamp == Stamp.of(file.stat())
    assert found.files["d/f"].mode == 0o640, "permission bits only"
    assert found.folders == {"d": 0o755, "empty": 0o700}
    assert found.links == {"l": "d/f"}
    assert found.left_out == {}


@pytest.mark.parametrize("name", [b"a b", b"new\nline", b"\xff\xfe", "日本".encode(), b"-rf", b"...", b"x" * 255])
def test_any_name_that_a_file_can_have_is_seen(tmp_path: Path, name: bytes) -> None:
    put(tmp_path / os.fsdecode(name))
    put(tmp_path / "d" / os.fsdecode(name))
    (tmp_path / "link").symlink_to(os.fsdecode(name))
    found = scan(tmp_path)
    assert set(found.files) == {os.fsdecode(name), "d/" + os.fsdecode(name)}
    assert found.links == {"link": os.fsdecode(name)}


def test_heelers_own_folders_and_the_file_systems_are_not_the_jobs(tmp_path: Path) -> None:
    for name in (".heeler/aside/f", "d/.heeler/f", "lost+found/f", "d/lost+found/f"):
        put(tmp_path / name)
    assert set(scan(tmp_path).files) == {"d/lost+found/f"}
    assert set(scan(tmp_path).folders) == {"d", "d/lost+found"}


def test_only_what_is_included_is_seen_but_all_folders(tmp_path: Path) -> None:
    put(tmp_path / "d/f.pt")
    put(tmp_path / "d/f.log")
    (tmp_path / "d/l.log").symlink_to("f.pt")
    found = scan_tree(tmp_path, lambda path: path.endswith(".pt"))
    assert (set(found.files), found.links, set(found.folders)) == ({"d/f.pt"}, {}, {"d"})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("d/f", "d/f"),
        ("./d//f", "d/f"),
        ("d", "d"),
        (".", "."),
        ("nothing", "nothing"),
        ("{root}/d/f", "d/f"),
        ("{root}", "."),
        ("{root}/nothing", "nothing"),
        ("d/../d/f", "d/f"),
    ],
)
def test_links_that_stay_inside_are_kept_relative(tmp_path: Path, text: str, kept: str) -> None:
    put(tmp_path / "d/f")
    (tmp_path / "l").symlink_to(text.replace("{root}", str(tmp_path)))
    found = scan(tmp_path)
    assert found.links == {"l": kept}
    check_tree(Tree(folders=found.folders, links=found.links))


def test_an_absolute_link_is_kept_as_seen_from_where_it_is(tmp_path: Path) -> None:
    put(tmp_path / "d/e/f")
    (tmp_path / "d/e/l").symlink_to(tmp_path / "d/other")
    (tmp_path / "d/e/up").symlink_to(tmp_path)
    assert scan(tmp_path).links == {"d/e/l": "../other", "d/e/up": "../.."}


@pytest.mark.parametrize(
    "text",
    ["/etc/passwd", "..", "../x", "../../x", "d/../../x", "{root}x", "{root}/..", "way/../x", "out/x", ".heeler/x"],
)
def test_links_that_lead_out_are_left_out_with_the_reason(tmp_path: Path, text: str) -> None:
    root = tmp_path / "root"
    put(root / "d/f")
    put(tmp_path / "deep/er/f")
    (root / "way").symlink_to(tmp_path / "deep/er")
    (root / "out").symlink_to(tmp_path / "deep")
    (root / "l").symlink_to(text.replace("{root}", str(root)))
    found = scan(root)
    assert found.links == {}
    assert "a symbolic link" in found.left_out["l"]


def test_a_detour_by_way_of_a_link_is_not_cut_short(tmp_path: Path) -> None:
    """`sub/../x` is not `x` where `sub` is a link: the restored link would lead to another file."""
    put(tmp_path / "d/x", b"meant")
    (tmp_path / "d/e").mkdir()
    put(tmp_path / "x", b"another")
    (tmp_path / "sub").symlink_to("d/e")
    (tmp_path / "l").symlink_to("sub/../x")
    assert (tmp_path / "l").read_bytes() == b"meant"
    found = scan(tmp_path)
    assert "l" in found.left_out or (tmp_path / found.links["l"]).read_bytes() == b"meant"


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        found = scan(tmp_path)
    assert found.left_out == {"fifo": "not a regular file", "socket": "not a regular file"}


def test_a_root_behind_a_link_is_seen_as_any_other(tmp_path: Path) -> None:
    put(tmp_path / "real/d/f")
    (tmp_path / "real/l").symlink_to("d/f")
    (tmp_path / "real/abs").symlink_to(tmp_path / "real/d")
    (tmp_path / "root").symlink_to("real")
    found = scan(tmp_path / "root")
    assert (set(found.files), found.links) == ({"d/f"}, {"l": "d/f", "abs": "d"})


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "none")


def test_a_root_that_is_a_file_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(LocalFileError):
        scan(put(tmp_path / "f"))


def test_a_folder_that_may_not_be_read_is_an_error_and_not_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "d/f")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("/d"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(LocalFileError, match="/d"):
        scan(tmp_path)


def test_two_scans_differ_by_any_change(tmp_path: Path) -> None:
    file = put(tmp_path / "d/f", b"1")
    (tmp_path / "l").symlink_to("d")
    changes: list[Callable[[], object]] = [
        lambda: file.write_bytes(b"2"),
        lambda: file.chmod(0o600),
        lambda: put(tmp_path / "g"),
        lambda: (tmp_path / "g").rename(tmp_path / "h"),
        (tmp_path / "h").unlink,
        (tmp_path / "e").mkdir,
        lambda: (tmp_path / "e").chmod(0o700),
        (tmp_path / "e").rmdir,
        (tmp_path / "l").unlink,
        lambda: (tmp_path / "l").symlink_to("d/f"),
        lambda: os.utime(file, ns=(1, 1)),
    ]
    before = scan(tmp_path)
    for change in changes:
        time.sleep(TICK_SECONDS)
        change()
        after = scan(tmp_path)
        assert not after.same_tree(before)
        assert after.same_tree(scan(tmp_path))
        before = after


def test_a_scan_without_some_files_is_the_same_but_for_them(tmp_path: Path) -> None:
    put(tmp_path / "a")
    put(tmp_path / "b")
    before = scan(tmp_path)
    put(tmp_path / "b", b"longer")
    after = scan(tmp_path)
    assert not after.same_tree(before)
    assert after.without({"b"}).same_tree(before.without({"b"}))
    assert set(before.files) == {"a", "b"}


def test_the_coarse_clock_is_never_ahead_of_the_stamp_that_a_file_gets_next(tmp_path: Path) -> None:
    """A stamp may be finer than the clock (multigrain stamps), but then it is later."""
    for number in range(50):
        before = coarse_now()
        assert before <= put(tmp_path / str(number)).stat().st_ctime_ns


def test_a_tick_is_over_after_its_time() -> None:
    before = coarse_now()
    time.sleep(TICK_SECONDS)
    assert coarse_now() > before
