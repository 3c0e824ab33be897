"""One machine's small stand-in for SkyPilot's managed jobs: everything can be tried without a cloud.

infra.py       what the verbs call: writes to the queue, starts the supervisor, waits
queue.py       the queue: one SQLite file, jobs and the machines that they were given
daemon.py      one supervisor at a time, started on demand, gone when idle
supervisor.py  the loop: requests, planned preemptions, watching, settling, starting
watch.py       one machine: is it alive, has its time come, what did it leave behind
settle.py      what follows when a machine is gone; verdict.py decides it, purely
machine.py     the environment and the files of a machine, and its start
node.py        the machine itself: a tiny process that runs `setup` and `run`
look.py        what the bucket says of a run: certificate, marks, newest commit
processes.py   who belongs to a machine, across sessions and reboots
gpus.py        what GPUs there are
"""
