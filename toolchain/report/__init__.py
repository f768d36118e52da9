"""What people read: tables for a terminal (`text`), and the HTML page of `bittailor report`.

The page's modules need `bittailor[report]` and are imported by its command alone; `from toolchain.report import table` needs nothing.
"""

from toolchain.report.text import MISSING, number, table

__all__ = ["MISSING", "number", "table"]
