"""Jobs: the library's batch functions composed on Ray Data, one readable chain a file. No formulas live here.

The files of this folder are the jobs, one a command; the main chain is `scan.py` (read it first), then `index.py`,
`reduce.py` and `mitigate.py`; `cli.py` and `commands/` are what a person types. The folders hold what jobs are made of:

* `scanning/`, `indexing/`, `reducing/`, `repair/`   what the workers of each job do
* `run_folder/`   a run on disk or S3: manifest, parts, commit records, resume, conservation of rows
* `engine/`       Ray itself: its life and logs, metrics, shapes of stages, teams of workers
* `watching/`, `planning/`, `trials/`   what a nightly and a plan stand on; the work behind `memscan evaluate`
"""
