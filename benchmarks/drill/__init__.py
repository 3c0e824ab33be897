"""Game days: runs whose machines are taken away on a schedule, and what that did to them. See gameday.py."""
