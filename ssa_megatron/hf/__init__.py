"""Hugging Face side: export of a run, and the model class that loads anywhere torch and transformers are installed."""
