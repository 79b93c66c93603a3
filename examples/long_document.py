"""Training on a document that is too long for one pass, in pieces linked by a detached state.

    python examples/long_document.py [file]

The model reads the whole document in order, several times. A step keeps the activations of only one piece, however long
the document is. Earlier text reaches the piece through the state: the attention window and the weights of the memories.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from titans_pytorch import MemoryAsGateTransformer
from titans_pytorch.commands.options import integer
from titans_pytorch.presets import memory_settings


def main() -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, nargs='?', default=Path(__file__).parent.parent / 'README.md')
    parser.add_argument('--piece', type=integer(1), default=512, help='bytes in a piece')
    parser.add_argument('--rounds', type=integer(1), default=4, help='number of passes over the document')
    options = parser.parse_args()

    text = options.file.read_bytes()
    if len(text) < 2:
        raise SystemExit(f'{options.file} is too short: there must be a byte to predict after the first')
    document = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unsqueeze(0)
    torch.manual_seed(0)
    model = MemoryAsGateTransformer(
        num_tokens=256,
        dim=64,
        depth=2,
        segment_len=32,
        neural_memory_segment_len=16,
        neural_memory_batch_size=16,
        dim_head=32,
        heads=2,
        neural_memory_kwargs=memory_settings(heads=2, dim_head=32, memory_batch=16),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    bits = []
    for number in range(options.rounds):
        state, losses = None, []
        # pieces overlap by one token: it is the last target of one piece and the first input of the next
        for start in range(0, document.shape[1] - 1, options.piece):
            piece = document[:, start : start + options.piece + 1]
            loss, state = model(piece, return_loss=True, state=state, return_state=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state = state.detach()
            losses.append(loss.item() * (piece.shape[1] - 1))
        bits.append(sum(losses) / (document.shape[1] - 1) / math.log(2))
        print(f'round {number + 1}: {bits[-1]:.3f} bits per byte, {document.shape[1]:,} bytes in {len(losses)} pieces')
    return bits


if __name__ == '__main__':
    try:
        main()
    except OSError as error:
        sys.exit(str(error))
