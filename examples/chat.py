"""One turn of a conversation with a trained model. A file holds the conversation between turns.

    make train ARGS="--preset quick"
    python examples/chat.py --run runs/quick --state chat.pt "What was my name?"

No earlier turn is read again, the file has a constant size, and the answer is printed as it is sampled. `python -m
titans_pytorch chat` does the same in a loop.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from titans_pytorch.commands.options import length
from titans_pytorch.commands.text import Conversation
from titans_pytorch.training import RunError
from titans_pytorch.training.runs import open_run


def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('message')
    parser.add_argument('--run', type=Path, default=Path('runs/quick'), help='folder of the run, or a checkpoint in it')
    parser.add_argument('--state', type=Path, default=Path('chat.pt'), help='file that holds the conversation')
    parser.add_argument('--length', type=length(), default=64, help='maximum length of the answer in tokens')
    options = parser.parse_args()

    conversation = Conversation(open_run(options.run))
    if options.state.exists():
        conversation.load(options.state)
    answer = ''
    for text in conversation.answer(options.message, options.length, temperature=0.8):
        print(text, end='', flush=True)
        answer += text
    print()
    conversation.save(options.state)
    return answer


if __name__ == '__main__':
    try:
        main()
    except (RunError, OSError) as error:
        sys.exit(str(error))
