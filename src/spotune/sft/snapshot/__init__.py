"""Checkpoints without a wait: copied in memory at a step boundary, written to disk by a thread behind training.

capture   Trainer's own ``_save_checkpoint`` runs; what it would write is copied instead
arena     the memory for these copies: one block, warm, used again for every save
writer    the thread that writes the copies, one snapshot at a time
direct    a file that is hashed while it is written, past the page cache where that can be
tensors   the safetensors format, from memory to a file without another copy
"""
