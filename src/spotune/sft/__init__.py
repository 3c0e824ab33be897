"""The script: ``python -m spotune.sft CONFIG``. The guard enters first; torch is imported by the worker only."""
