"""One page that tells what a run kept, lost and won. It reads files of the run and opens no model."""

from flashmorph.report.kept import keep, require_finished
from flashmorph.report.write import write_report

__all__ = ["keep", "require_finished", "write_report"]
