"""This package makes the report: one static, self-contained HTML page of a census.

`render_report` turns the figures of `census.json`, the flagged list with its clusters, and the evidence of the prompts
that `choose_exhibits` picks into a page that opens from disk and makes no request. `evidence` fetches what an exhibit
shows (generation, masks, maps, matched training image) from Parquet files without reading the rest of them. `data` is
the list as the page's script reads it, `pictures` what it shows.
"""

from memscan.report.evidence import Exhibit, Match, find_matches, gather_exhibits
from memscan.report.page import Images, choose_exhibits, render_report

__all__ = ["Exhibit", "Images", "Match", "choose_exhibits", "find_matches", "gather_exhibits", "render_report"]
