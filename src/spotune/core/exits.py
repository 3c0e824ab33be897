"""Exit codes of the script and of ``spotune train``: part of the contract with users' scripts."""

SUCCEEDED = 0  # finished and certified
FAILED = 1  # failed for good
BAD_INPUT = 2  # what the user gave is wrong
INFRA_FAILED = 3  # launcher only: the infrastructure failed
PREEMPTED = 75  # preempted, or a fault worth another machine (EX_TEMPFAIL)
PAUSED = 76  # the budget's wall
