"""Pages of docs/ that are made from the code; `scripts/references.py` writes them."""
