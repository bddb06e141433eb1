"""What stands around gpt.py: open weights, text, speed, optimizers, processes and logs. Each module is imported by name."""
