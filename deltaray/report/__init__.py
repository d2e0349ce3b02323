"""The HTML report of a study: one self-contained file made from an output folder."""

from .build import build_report, is_reported, write_report

__all__ = ["build_report", "is_reported", "write_report"]
