"""Names for what passes through the package as it stands in a file."""

from typing import Any

Figures = dict[str, Any]
"""Figures by name, in the form that a record, results.json or `--json` has them."""

SettingValues = dict[str, Any]
"""Settings by name: as a user gave them, or as the digest of a result depends on them."""
