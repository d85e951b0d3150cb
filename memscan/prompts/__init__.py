"""This package reads prompt files of many kinds into one table of distinct captions.

* `folders` finds the files of a path, folder or pattern, and names those that are not taken.
* `files` picks the reader of a file by its name; each format has a module (`text`, `json_lines`, `json_documents`,
  `separated` for CSV and TSV, `parquet`), which gives `rows.RawBatch`: captions, or reasons why there are none.
  `dialect` finds out how a CSV is separated and quoted.
* `captions` normalises a caption, and `judging` does so for batches. `folding` counts duplicates in a window in memory,
  and `spilling` counts those between windows on disk. `prompt_rows` makes `records.PROMPTS`, and `table` combines all.
"""
