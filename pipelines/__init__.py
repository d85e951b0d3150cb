"""This package holds the jobs, which run the library's batch functions on Ray, and the commands of `memscan`.

It contains no formulas.

Each job has a folder with the name of its command, and its `job.py` shows the chain of the job on one screen. The
folders are `scan/` (read it first), `index/`, `reduce/`, `mitigate/`, `verify/`, `nightly/`, `plan/` and `evaluate/`.
They use these folders and modules:

* `run_folder/` is a run on disk or in an object store: manifest, parts, commit records, resume, conservation of rows.
* `ray/` handles Ray itself: its life and logs, stages, layouts of actor pools, training workers, metrics, progress.
* `cli.py` and `commands/` are the commands that a person types. `doctor.py` checks an installation before a job.
"""
