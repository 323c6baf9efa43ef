"""Disks of a job: archives in and out."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.lab import LabError
from tests.lab.job import Job, read_results, write_job_disk, write_results_disk


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_script_when_words_have_spaces_and_quotes_then_a_shell_gets_them_as_they_are(tmp_path: Path) -> None:
    job = Job(
        command=["printf", "%s|", "a b", "it's", "$HOME", "*"],
        environment={"GREETING": "x 'y'"},
        directory=str(tmp_path),
    )
    told = subprocess.run(["bash", "-c", job.script], capture_output=True, text=True, check=True)
    assert told.stdout == "a b|it's|$HOME|*|"
    assert """export GREETING='x '"'"'y'"'"''""" in job.script


def test_write_job_disk_when_files_are_given_then_archive_has_them_and_is_whole_blocks(
    tmp_path: Path,
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/one").write_text("1")
    disk = tmp_path / "job.tar"
    write_job_disk(Job(command=["true"], files={"here/tree": tmp_path / "tree"}), disk)
    assert disk.stat().st_size % (1 << 20) == 0
    with tarfile.open(disk) as archive:
        members = {member.name: member for member in archive}
    assert members.keys() == {"job", "here/tree", "here/tree/one"}
    assert members["job"].mode == 0o755
    assert {member.uid for member in members.values()} == {0}


def test_write_job_disk_when_a_file_is_missing_then_names_it(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="gone is missing"):
        write_job_disk(Job(command=["true"], files={"x": tmp_path / "gone"}), tmp_path / "job.tar")


def test_read_results_when_archive_is_whole_then_unpacks_it_and_returns_the_status(tmp_path: Path) -> None:
    disk = write_archive(tmp_path / "results.tar", {"status": b"3\n", "report.json": b"{}"})
    assert read_results(disk, tmp_path / "out") == 3
    assert (tmp_path / "out/report.json").read_text() == "{}"


def test_read_results_when_lab_wrote_nothing_then_says_so(tmp_path: Path) -> None:
    write_results_disk(tmp_path / "results.tar")
    with pytest.raises(LabError, match="no whole results"):
        read_results(tmp_path / "results.tar", tmp_path / "out")


def test_read_results_when_a_member_points_outside_then_refuses(tmp_path: Path) -> None:
    disk = write_archive(tmp_path / "results.tar", {"../evil": b"x", "status": b"0\n"})
    with pytest.raises(LabError, match="no whole results"):
        read_results(disk, tmp_path / "out")
    assert not (tmp_path / "evil").exists()
