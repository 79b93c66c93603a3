"""A continuing conversation: each turn starts from the state of the previous one, which is saved to a file.

    python examples/chat.py --checkpoint model.pt --state chat.pt "What was my name?"

Without a checkpoint the model is untrained and answers with noise; the example shows the mechanism. No turn is read
twice, the state has a constant size, and the answer arrives byte by byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from titans_pytorch import MemoryAsContextTransformer


def build() -> MemoryAsContextTransformer:
    torch.manual_seed(0)
    return MemoryAsContextTransformer(
        num_tokens=256,
        dim=64,
        depth=2,
        segment_len=32,
        num_longterm_mem_tokens=2,
        neural_memory_segment_len=4,
        neural_memory_batch_size=64,
        dim_head=32,
        heads=2,
        sliding_window_attn=True,
        neural_memory_kwargs={'dim_head': 32, 'heads': 2, 'qk_rmsnorm': True},
    )


def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('message')
    parser.add_argument('--checkpoint', type=Path, help='weights of the model that `build` returns')
    parser.add_argument(
        '--state', type=Path, default=Path('chat.pt'), help='file that holds the state of the conversation'
    )
    parser.add_argument('--length', type=int, default=64, help='maximum length of the answer in bytes')
    options = parser.parse_args()

    model = build()
    if options.checkpoint is not None:
        model.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    unread, state = torch.zeros(1, 0, dtype=torch.long), None
    if options.state.exists():
        unread, state = torch.load(options.state, weights_only=True)

    message = torch.tensor([[*f'\nYou: {options.message}\nModel: '.encode()]])
    prompt = torch.cat((unread, message), dim=1)
    stream = model.stream(prompt, prompt.shape[1] + options.length, state=state, stop_tokens=ord('\n'))
    answer: list[int] = []
    while True:
        try:
            answer.append(next(stream).item())
        except StopIteration as end:
            state = end.value
            break
        print(chr(answer[-1]) if 32 <= answer[-1] < 127 else '·', end='', flush=True)
    print()

    torch.save(
        (torch.tensor([answer[-1:]]), state), options.state
    )  # the model has not read the last byte of the answer
    return bytes(answer).decode('latin1')


if __name__ == '__main__':
    main()
