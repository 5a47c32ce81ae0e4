"""A run as one HTML page that opens from disk, without a network."""

from moedist.report.page import render, write_report
from moedist.report.read import RunData, read_run
from moedist.report.serve import serve

__all__ = ["RunData", "read_run", "render", "serve", "write_report"]
