"""Put on the path of engines with more processes than the machine has cores.

vLLM's worker processes wait for each other in loops of ``os.sched_yield`` (``SpinCondition`` of
``vllm.distributed.device_communicators.shm_broadcast``). Where they outnumber the cores, Linux 6.18 was seen
to give no other process a turn for 30 s: a bystander that only slept 0.1 s at a time stood still as long, one
with a real-time priority did not. A short sleep instead of the yield keeps every process going.
"""

import os
import time

os.sched_yield = lambda: time.sleep(1e-4)
