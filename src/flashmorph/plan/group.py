"""Groups: the units that a plan assigns an option to, layers or key-value heads."""

import re
from functools import cached_property

from flashmorph.errors import UserError, quoted

_ADDRESS = re.compile(r"layers\.(0|[1-9][0-9]{0,5})(?:\.kv_heads\.(0|[1-9][0-9]{0,5}))?")


class Group(str):
    """The address of a layer, `layers.3`, or of one of its key-value heads, `layers.3.kv_heads.1`.

    Raises:
        UserError: the text is neither.
    """

    def __new__(cls, address: str) -> "Group":
        """The address, checked."""
        if not _ADDRESS.fullmatch(address):
            raise UserError(f"{quoted(address)} is no group: they are called layers.3, or layers.3.kv_heads.1")
        return super().__new__(cls, address)

    @cached_property
    def layer(self) -> int:
        """The number of its decoder layer, from 0."""
        return int(self._match[1])

    @cached_property
    def kv_head(self) -> int | None:
        """The number of its key-value head, from 0; None for a whole layer."""
        return None if self._match[2] is None else int(self._match[2])

    @property
    def sort_key(self) -> tuple[int, int]:
        """Groups are sorted by layer, then by head."""
        return self.layer, -1 if self.kv_head is None else self.kv_head

    @property
    def _match(self) -> re.Match[str]:
        match = _ADDRESS.fullmatch(self)
        assert match
        return match
