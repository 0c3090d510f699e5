"""Links in a run folder, which may be anybody's."""

from __future__ import annotations

import os
from pathlib import Path

from diffexp.errors import UserError


def check_links(folder: Path) -> None:
    """Checks that no link in a run folder leads out of it: to go on with the run would write wherever it leads.

    The folder itself may be reached by a link: that is what the user named.

    Raises:
        UserError: which one does.
    """
    inside = folder.resolve()
    for where, folders, files in os.walk(folder):
        for path in (Path(where) / name for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(f"{path} leads out of the run's folder: replace that link by what it leads to")
