"""The tokenizers behind llmc/tokenizer.py, one kind of file each."""
