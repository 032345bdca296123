"""The documents that a run lays questions out in: read once from their source, and kept in the run's data folder."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from flashmorph import distributed
from flashmorph.errors import UserError
from flashmorph.files import digest_of, write_json
from flashmorph.inputs.shapes import read_as
from flashmorph.run.digests import read_settings
from flashmorph.run.run import Run

_Documents = Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True)
class Pools:
    """Of the text of a run; a dataset of the hub would otherwise be streamed by every rank, and for every model."""

    run: Run

    def pool(self, split: str, seed: int) -> list[str]:
        """The documents of `Corpus.pool`; rank 0 reads them where they are not kept yet. All ranks must call it.

        Raises:
            UserError: see `Corpus.pool`.
        """
        path = self.run.folder.data / f"pool-{split}-{digest_of([seed, read_settings(self.run)])}.json"

        def keep() -> None:
            try:
                read_as(path, _Documents)
            except UserError as error:
                if path.exists():
                    self.run.screen.say(f"{error}; making it again")
                write_json(path, self.run.corpus.pool(split, seed))

        distributed.first(keep)
        return read_as(path, _Documents)
