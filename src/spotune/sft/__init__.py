"""The worker: trains with TRL, one process per rank. It uses torch and TRL and knows no bucket."""
