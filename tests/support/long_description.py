"""Look whether the long description of a built wheel stands alone: no link or picture that only a clone could follow.

    python tests/support/long_description.py dist/peft_gradguard-0.2.0-py3-none-any.whl

`make build` runs it.
"""

from __future__ import annotations

import re
import sys
import zipfile
from email.parser import HeaderParser

TARGETS = re.compile(
    r"\]\(\s*<?([^)\s>]+)|^\s*\[[^\]]+\]:\s*(\S+)|\b(?:href|src)\s*=\s*[\"']?([^\"'\s>]+)", re.MULTILINE
)
"""Links and pictures: inline, by reference, and in HTML."""


def long_description(wheel: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return str(HeaderParser().parsestr(archive.read(metadata).decode()).get_payload())


def relative_targets(text: str) -> list[str]:
    """Return what links and pictures lead to without saying on which site."""
    without_code = re.sub(r"^```.*?^```|`[^`\n]*`(?!\]\()", "", text, flags=re.MULTILINE | re.DOTALL)
    found = ["".join(groups) for groups in TARGETS.findall(without_code)]
    return [target for target in found if not target.startswith(("https://", "http://", "mailto:"))]


if __name__ == "__main__":
    for wheel in sys.argv[1:]:
        text = long_description(wheel)
        if not text.strip():
            sys.exit(f"{wheel}: there is no long description")
        if found := relative_targets(text):
            sys.exit(f"{wheel}: the long description has relative links or pictures: {', '.join(found)}")
