"""The report: one static, self-contained HTML page of a census.

`render_report(census, exhibits)` turns the figures of `census.json` and the evidence of the flagged prompts into a page
that opens from disk and makes no request. `evidence` fetches what an exhibit shows (generation, masks, matched training
image) from Parquet files without reading the rest of them.
"""

from memscan.report.evidence import Exhibit, Match, find_matches, gather_exhibits
from memscan.report.page import Images, render_report

__all__ = ["Exhibit", "Images", "Match", "find_matches", "gather_exhibits", "render_report"]
