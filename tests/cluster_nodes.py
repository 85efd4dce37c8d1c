"""A Ray cluster of several machines, all of them this one: `python cluster_nodes.py COUNT`.

Prints its address, and takes a machine from it for each line that it reads: the last that was added, as if its plug was
pulled. Ends with its standard input.
"""

from __future__ import annotations

import os
import sys

# What a cluster that should notice quickly sets; Ray's own limits are tens of seconds.
os.environ |= {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
}

from ray.cluster_utils import Cluster

MACHINE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=MACHINE)
    machines = [cluster.add_node(**MACHINE) for _ in range(int(sys.argv[1]) - 1)]
    print(cluster.address, flush=True)
    try:
        for _ in sys.stdin:
            cluster.remove_node(machines.pop(), allow_graceful=False)
            print("gone", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
