"""The SFT script proper: the worker behind seam 2, one process per rank. It knows torch and TRL, and no store."""
