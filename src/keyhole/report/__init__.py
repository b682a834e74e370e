"""From outcomes to a report that a person can read.

`keyhole.report.summarize` needs numpy and scipy only; `keyhole.report.render` draws HTML with the optional jinja2 and
matplotlib, which it imports when a page is asked for.
"""

from keyhole.report.summarize import Report, Setting, summarize

__all__ = ["Report", "Setting", "summarize"]
