"""What stands around gpt.py: fast inference, optimizers, text, open weights, processes, logs. Import each by name."""
