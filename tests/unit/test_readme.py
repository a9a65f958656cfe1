"""README says what the code says: the settings table is made from the settings, and links lead somewhere."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from heeler.config import environment_name, flag_name, show
from heeler.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- settings: made from worker/heeler/settings.py, checked by tests/unit/test_readme.py -->\n"
END = "<!-- end of settings -->"


def settings_table() -> str:
    """The table as README has to have it; `python -m tests.unit.test_readme` writes it there."""
    rows = ["| flag | environment | default | what |", "|---|---|---|---|"]
    for entry in fields(Settings):
        names = [environment_name(entry.name), *(alias for alias, _ in entry.metadata["aliases"])]
        flag = "" if entry.metadata["secret"] else f"`{flag_name(entry.name)}`"
        if entry.name == "job":
            flag = "`--job FILE`"
        default = "`/var/lib/heeler`; for users `~/.local/state/heeler`" if entry.name == "state_dir" else ""
        default = default or (f"`{show(entry.default)}`" if show(entry.default) else "")
        environment = ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {flag} | {environment} | {default} | {entry.metadata['words']} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_settings_is_the_one_that_the_code_makes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = text.partition(BEGIN)[2].partition(END)[0]
    assert found == settings_table(), "run: python -m tests.unit.test_readme"


def test_every_link_to_a_file_leads_to_one() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(before + BEGIN + settings_table() + END + rest.partition(END)[2], encoding="utf-8")
