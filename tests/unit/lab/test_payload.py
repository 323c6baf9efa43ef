"""What a test run in the lab is made of."""

from __future__ import annotations

from pathlib import Path

from tests.lab import payload
from tests.lab.table import table

PROJECT = """
[project]
dependencies = ["msgspec>=0.22"]
[dependency-groups]
test = ["pytest>=9", "hypothesis>=6"]
dev = [{ include-group = "test" }, "nox"]
"""


def test_requirements_when_project_has_groups_then_package_and_tests_count() -> None:
    assert payload.requirements(PROJECT) == ("hypothesis>=6", "msgspec>=0.22", "pytest>=9")


def test_requirements_when_project_is_ours_then_each_is_a_plain_requirement() -> None:
    wanted = payload.requirements((payload.ROOT / "pyproject.toml").read_text("utf-8"))
    assert any(one.startswith("pytest>=") for one in wanted)


def test_test_job_when_made_then_tests_come_from_the_list_and_files_are_there() -> None:
    job = payload.test_job(Path("/p"), Path("/l"), Path("/t"), ["-x"], limit_s=5)
    assert job.command[-2:] == ("-x", "@/mnt/tests.txt")
    assert job.environment["CASEMATE_IN_LAB"] == "1"
    assert job.environment["PYTHONPATH"] == "/mnt/package:/mnt/libraries"
    assert (job.files["package"], job.files["libraries"], job.files["tests.txt"]) == (
        Path("/p"),
        Path("/l"),
        Path("/t"),
    )
    assert all(job.files[f"tree/{name}"].exists() for name in payload.TREE)


def test_table_when_tests_ran_then_each_has_what_it_needed() -> None:
    text = table(
        {
            "tests/lab/test_a.py::test_one": {
                "outcome": "passed",
                "seconds": 12.34,
                "needs": ["root", "kvm"],
            },
            "tests/lab/test_a.py::test_two": {"outcome": "failed", "seconds": 1.0, "needs": []},
        }
    )
    assert text.splitlines() == [
        "outcome  seconds  needed  test",
        "passed      12.3  kvm     tests/lab/test_a.py::test_one",
        "failed       1.0  -       tests/lab/test_a.py::test_two",
    ]
