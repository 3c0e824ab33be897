"""The local engine, a small stand-in for SkyPilot's managed jobs: everything can be tried without a cloud.

engine.py      LocalInfra, which the verbs call: writes to the queue, starts the supervisor, waits
queue.py       the queue: jobs, their machines, and requests of verbs, in one SQLite file
database.py    the queue's rows, its file, and the second copy of each row
supervisor.py  the loop: requests, planned preemptions, watching, settling, starting. One at a time, gone when idle
watch.py       one machine: whether it lives, what it left behind, what the bucket says, and the job's next state
machine.py     the machine itself, a process that runs `setup` and `run`; its environment, start and processes
layout.py      the GPUs of this computer, and the paths below `$SPOTUNE_HOME/local`
"""
