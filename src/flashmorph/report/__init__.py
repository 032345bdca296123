"""One page with the results of a run. It reads files of the run and opens no model."""

from flashmorph.report.kept import claim_kept, keep
from flashmorph.report.write import PAGE_NAME, write_report

__all__ = ["PAGE_NAME", "claim_kept", "keep", "write_report"]
