"""SkyPilot's managed jobs behind the same interface as ``local``. Only client.py imports ``sky``.

engine.py    the engine that the verbs call, and its record of the runs that this SPOTUNE_HOME submitted
client.py    requests to SkyPilot, its errors as ours, its output as the job's lines
jobs.py      managed jobs as runs, costs as paid intervals, logs
task.py      a submission as SkyPilot's task; Slurm's partitions and signals over the login node; ``check --infra``
offers.py    where a task could run, and what that costs
clusters.py  dev clusters: ssh, requests to SkyPilot, their costs in the bucket
dev.py       what ``spotune dev`` does on them
"""
