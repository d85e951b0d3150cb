"""Jobs: the library's batch functions composed on Ray Data, one readable chain a file. No formulas live here.

* `cli.py`      the `memscan` command
* `scan.py`     prompts -> sample -> judge -> census (the main chain; read this one first)
* `index.py`    reference images -> segment -> embed -> index
* `reduce.py`   census -> verdicts, flagged list, rates, report
* `stages.py`   the stateful callables that Ray Data runs
* `runs.py`     a run's folder: manifest, parts, resume, conservation of rows
* `session.py`, `progress.py`, `doctor.py`   Ray's life and logs; what a person sees; what is installed
"""
