"""A scan whose workers carry `faults.poison`: python poisoned_scan.py CONFIG.json"""

from __future__ import annotations

import sys

import ray
from faults import poison

from memscan.config import load_config
from pipelines.ray.session import worker_environment
from pipelines.scan.job import scan

if __name__ == "__main__":
    with worker_environment():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": poison},
        )
        scan(load_config(sys.argv[1]))
