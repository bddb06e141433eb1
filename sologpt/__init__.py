"""Everything around gpt.py: training, faster inference, text, open weights. Import each by name."""
