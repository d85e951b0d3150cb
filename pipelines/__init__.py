"""This package holds the jobs, which run the library's batch functions on Ray, and the commands of `memscan`.

It contains no formulas.

Each job has a folder, named as its command, whose `job.py` shows its chain on one screen: `scan/` (read it first),
`index/`, `reduce/`, `mitigate/`, `verify/`, `nightly/`, `plan/`, `evaluate/`. Under them:

* `run_folder/`   a run on disk or in an object store: manifest, parts, commit records, resume, conservation of rows
* `ray/`          Ray itself: its life and logs, stages, layouts of actor pools, training workers, metrics, progress
* `cli.py`, `commands/`   what a person types; `doctor.py` looks at an installation before a job
"""
