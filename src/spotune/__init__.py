"""spotune: fine-tune LLMs on the cheapest GPUs of any cloud without losing a step or a dollar."""

__version__ = "0.1.0"
