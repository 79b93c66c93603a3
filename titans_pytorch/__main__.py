"""Command line for trained models: `python -m titans_pytorch generate|evaluate|chat`."""

import sys

from titans_pytorch.commands.main import main

if __name__ == '__main__':
    sys.exit(main())
