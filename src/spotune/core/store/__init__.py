"""The bucket: a few verbs that mean the same on file://, s3:// and gs://, and that hold out against its faults.

bucket.py     Store: the verbs, and what their faults are called
calls.py      the calls under way
patience.py   how long a verb holds out
disk.py       file://: hard links, atomic renames, fsync
objects.py    s3:// and gs://: whole objects from ranges and parts, create-only, verified
s3.py gcs.py  the single requests of each
download.py   the local file of a download, hashed while it is written
connection.py an event loop on a thread of its own; requests are tried again there
faults.py     which of the clients' exceptions pass, and which do not
"""

from spotune.core.store.faults import FOR_VERBS, Call, Patience
from spotune.core.store.store import Store

__all__ = ["FOR_VERBS", "Call", "Patience", "Store"]
