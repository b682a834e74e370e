"""From outcomes to a report that a person can read.

jinja2 and matplotlib are imported only when a page is drawn.
"""

from keyhole.report.summarize import Report, Setting, summarize
from keyhole.report.write import read_audit, write_report

__all__ = ["Report", "Setting", "read_audit", "summarize", "write_report"]
