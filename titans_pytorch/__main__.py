"""`python -m titans_pytorch generate|evaluate|chat`: what a trained model is for."""

import sys

from titans_pytorch.commands.main import main

if __name__ == '__main__':
    sys.exit(main())
