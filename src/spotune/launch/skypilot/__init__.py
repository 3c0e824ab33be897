"""SkyPilot's managed jobs behind the same interface as ``local``. Nothing here but engine.py imports ``sky``.

infra.py     what the verbs call
engine.py    the one door to SkyPilot: its client, its errors as one line
registry.py  what this SPOTUNE_HOME handed to SkyPilot, and how it ended: answers without asking
task.py      a submission as SkyPilot's task
jobs.py      managed jobs as runs; pure
history.py   rows of what was paid as intervals; pure
booking.py   what dev clusters were paid for, into the bucket
logs.py      what SkyPilot prints as the lines that the job printed; pure
offers.py    where a task could run and what that costs; prices.py is its pure part, catalog.py reads SkyPilot's prices
slurm.py     what Slurm does and SkyPilot does not: partitions, signals, over the login node
preempt.py   taking a machine away, as its infrastructure does
survey.py    ``check --infra``; server.py is its pure part
"""
