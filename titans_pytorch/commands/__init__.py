"""The commands of `python -m titans_pytorch`: text from a run, its evaluation, a conversation with it."""
