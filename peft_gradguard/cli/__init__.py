"""The command ``peft-gradguard``."""
