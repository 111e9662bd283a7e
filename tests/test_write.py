"""Writing: a file is whole or not there, whatever happens to the writer; its zips are zips."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fusegen
from fusegen.runtime import write
from fusegen.runtime.errors import FileError
from fusegen.runtime.read import archive
from fusegen.runtime.write import atomic

WRITER = """
import sys, time
from fusegen.runtime.write import atomic
from pathlib import Path
with atomic(Path(sys.argv[1])) as file:
    file.write(bytes(1000)); file.flush(); print("writing", flush=True); time.sleep(60)
"""


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.fg"
    path.write_bytes(b"old")
    root = str(Path(fusegen.__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env={"PYTHONPATH": root}, cwd=tmp_path
    )
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".part")] == ["model.fg"]


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.fg"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(FileError, match="cannot be written"), atomic(path) as file:
            file.write(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.fg"]
    with atomic(path) as file:  # the next write works
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_large_zips_have_wide_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_FULL32", 300)  # as though 4 GiB were 300 bytes
    monkeypatch.setattr(archive, "_FULL32", 300)
    path = tmp_path / "x.zip"
    contents = {"a": b"1" * 10, "b": b"2" * 700, "c": b"3" * 5}
    with path.open("wb") as file:
        write.write_zip(file, {k: [v] for k, v in contents.items()})
    opened = archive.Archive(path)
    assert {k: opened.content(k, 1000) for k in opened.members} == contents
    assert all(m.offset % 64 == 0 for m in opened.members.values())


def test_small_zips_are_as_python_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        write.write_zip(file, {"a/é": [b"12", b"345"], "empty": []})
    with zipfile.ZipFile(path) as theirs:
        assert theirs.testzip() is None
        assert {n: theirs.read(n) for n in theirs.namelist()} == {"a/é": b"12345", "empty": b""}
