"""`longtrain report RUN`: one HTML page of what a run did, that opens from disk and asks no network. Read `read.py`, then `page.py`."""

from longtrain.report.page import run

__all__ = ["run"]
