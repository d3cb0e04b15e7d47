"""What `llada_finetune.py` stands on: one subject per file."""
