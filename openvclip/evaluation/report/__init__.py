"""A page about evaluations: one HTML file that needs no connection."""

from openvclip.evaluation.report.writing import ReportSettings, ReportSummary, write_report

__all__ = ["ReportSettings", "ReportSummary", "write_report"]
