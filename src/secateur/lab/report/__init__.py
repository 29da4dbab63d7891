"""Reports: from the plain results of runs to words, plots, tables and one self-contained HTML file."""

from __future__ import annotations

from secateur.lab.report.render import summary_lines, write_report

__all__ = ["summary_lines", "write_report"]
