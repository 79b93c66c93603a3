"""The command line of `python -m titans_pytorch`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from titans_pytorch.commands.evaluation import evaluate, num_windows
from titans_pytorch.commands.options import integer, length, number
from titans_pytorch.commands.text import Conversation, generate
from titans_pytorch.training.data import BadData
from titans_pytorch.training.files import RunError, one_line
from titans_pytorch.training.machine import PRECISIONS
from titans_pytorch.training.runs import Run, latest_run, open_run, unseen_text

CONTEXTS = (128, 512, 2048, 8192, 32_768, 131_072, 524_288)
LONGEST = 8192
TOKENS_ON_CPU = 65_536


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m titans_pytorch', description='Use what train_mac.py has trained.')
    commands = parser.add_subparsers(required=True, metavar='generate|evaluate|chat')
    for name, run_command, add_options in (
        ('generate', generate_command, add_generate_options),
        ('evaluate', evaluate_command, add_evaluate_options),
        ('chat', chat_command, add_chat_options),
    ):
        command = commands.add_parser(name, help=run_command.__doc__, description=run_command.__doc__)
        command.set_defaults(run_command=run_command)
        add_options(command)
        command.add_argument(
            '--run', type=Path, help='folder of the run (default: the one in runs/ with the newest checkpoint)'
        )
        command.add_argument('--checkpoint', type=Path, help='file in it (default: the best, else the latest one)')
        command.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
        command.add_argument('--precision', default='auto', choices=PRECISIONS, help='as in train_mac.py')
    return parser


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('prompt', nargs='?', help='text to continue (default: the standard input, or a new line)')
    parser.add_argument('--file', type=Path, help='file that holds the prompt')
    add_sampling_options(parser, stops=[])


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--state', type=Path, help='file that holds the conversation; it is saved after every turn')
    parser.add_argument(
        '--template',
        type=template,
        default='\nYou: {message}\nModel: ',
        help=r'text around a message; \n stands for a new line (default: \nYou: {message}\nModel: )',
    )
    add_sampling_options(parser, stops=['\n'])


def add_sampling_options(parser: argparse.ArgumentParser, stops: list[str]) -> None:
    parser.add_argument('--length', type=length(), default=256, help='tokens at most (default: 256)')
    parser.add_argument('--temperature', type=number(), default=0.8, help='0 takes the likeliest token (default: 0.8)')
    parser.add_argument('--top-k', type=integer(1), help='keep so many tokens')
    parser.add_argument('--top-p', type=number(0, 1), help='keep the likeliest tokens of this total probability')
    parser.add_argument('--min-p', type=number(0, 1), help='keep tokens of this share of the highest probability')
    parser.add_argument('--seed', type=integer(), help='for the same text again')
    parser.add_argument(
        '--stop',
        type=stop_string,
        action='append',
        help=r'end before this text; \n stands for a new line; can be repeated' + (r' (default: \n)' if stops else ''),
    )
    parser.add_argument('--compile', action='store_true', help='on a CPU: faster tokens after minutes of compiling')
    parser.set_defaults(default_stops=stops)


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--data', type=Path, nargs='+', default=[], help='files or folders (default: the text of the run)'
    )
    parser.add_argument(
        '--context',
        type=integer(1),
        help=f'longest context in tokens (default: {LONGEST:,}, or less for a shorter text or fewer --tokens)',
    )
    parser.add_argument(
        '--tokens',
        type=integer(),
        help=f'tokens of the text (default: {TOKENS_ON_CPU:,} on a CPU, all on a GPU; 0: all)',
    )
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')


def unescaped(text: str) -> str:
    return text.replace('\\n', '\n')


def template(text: str) -> str:
    if '{message}' not in text:
        raise argparse.ArgumentTypeError(f'must contain {{message}}, got {text!r}')
    return unescaped(text)


def stop_string(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError('must not be empty')
    return unescaped(text)


def generate_command(options: argparse.Namespace) -> None:
    """Continue a text."""
    prompt = prompt_bytes(options) or b'\n'
    run = opened(options)
    for text in generate(run, prompt, options.length, options.stop or [], **sampling(options, run)):
        print(text, end='', flush=True)
    print()


def prompt_bytes(options: argparse.Namespace) -> bytes:
    if options.prompt is not None and options.file is not None:
        raise RunError('give a prompt or a --file, not both')
    if options.prompt is not None:
        return os.fsencode(options.prompt)
    if options.file is not None:
        return options.file.read_bytes()
    return b'' if sys.stdin.isatty() else sys.stdin.buffer.read()


def evaluate_command(options: argparse.Namespace) -> None:
    """Bits per byte of the test split by length of context."""
    if options.context is not None and options.tokens and options.context > options.tokens:
        raise RunError(f'--tokens must be at least --context={options.context}, or 0 for all, got {options.tokens}')
    run = opened(options)
    text, source = unseen_text(run, options.data)
    default = TOKENS_ON_CPU if run.machine.device.type == 'cpu' else 0
    limit = (default if options.tokens is None else options.tokens) or None
    if limit is not None and limit < len(text):
        source = f'{source}, {limit:,} of its {len(text):,} tokens'
    contexts = evaluated_contexts(options.context, limit, len(text))
    try:
        num_windows(text, contexts[-1], limit)  # raises its errors before any result is printed
    except BadData as error:
        raise BadData(f'{error}: give a smaller --context, or other text with --data') from None

    rows = []
    if not options.json:
        print(f'{source}\n{"context":>9}  {"bits per byte":>13}  {"bytes":>11}  {"seconds":>7}', flush=True)
    for context in contexts:
        with tqdm(
            desc=f'context {context:,}',
            total=num_windows(text, context, limit) * context,
            unit='token',
            unit_scale=True,
            leave=False,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        ) as bar:
            row = evaluate(run, text, context, limit, progress=bar.update)
        rows.append(row)
        if not options.json:
            print(f'{context:>9,}  {row.bits_per_byte:>13.4f}  {row.bytes:>11,}  {row.seconds:>7.1f}', flush=True)
    if options.json:
        head = {'checkpoint': str(run.checkpoint), 'steps': run.steps, 'text': source}
        print(json.dumps({**head, 'contexts': [row._asdict() for row in rows]}, indent=2))


def evaluated_contexts(longest: int | None, limit: int | None, length: int) -> list[int]:
    """Context lengths up to `longest`. Default: up to `LONGEST`, as far as the `length` tokens of the text suffice.

    `limit`: number of tokens to predict; `None` for all.
    """
    last = min(LONGEST, limit or LONGEST) if longest is None else longest
    contexts = [*(context for context in CONTEXTS if context < last), last]
    if longest is None:
        # the shortest is kept, and becomes an error if the text is shorter still
        contexts = [context for context in contexts if context < length] or contexts[:1]
    return contexts


def chat_command(options: argparse.Namespace) -> None:
    """Hold a conversation. Ctrl-C ends an answer, Ctrl-D the conversation."""
    run = opened(options)
    conversation = Conversation(run, options.template, options.stop or options.default_stops)
    if options.state is not None:
        continue_conversation(conversation, options.state)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited
    arguments = sampling(options, run)
    while True:
        try:
            message = input('You: ')
            conversation.turn(message)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except ValueError as error:
            print(one_line(error))
            continue
        with (
            contextlib.suppress(KeyboardInterrupt),
            contextlib.closing(conversation.answer(message, options.length, **arguments)) as answer,
        ):
            print('Model: ', end='', flush=True)
            for text in answer:
                print(text, end='', flush=True)
        print()
        if options.state is not None:
            conversation.save(options.state)


def continue_conversation(conversation: Conversation, path: Path) -> None:
    """Load the conversation from a file, if there is one; refuse a file that cannot be written before any answer."""
    is_new = not path.exists()
    if not is_new:
        conversation.load(path)
    try:
        conversation.save(path)
        if is_new:
            path.unlink()
    except OSError as error:
        raise RunError(f'--state {path} cannot be written: {error.strerror}') from None


def opened(options: argparse.Namespace) -> Run:
    run = open_run(options.run or latest_run(), options.checkpoint, options.device, options.precision)
    print(f'{run.checkpoint} after {run.steps:,} steps, on {run.machine.device}', file=sys.stderr)
    return run


def sampling(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Arguments of the model's `stream`."""
    generator = torch.Generator(run.machine.device)
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    names = ('temperature', 'top_k', 'top_p', 'min_p')
    return {**{name: getattr(options, name) for name in names}, 'generator': generator, 'compiled': options.compile}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; report a failure in one line."""
    options = build_parser().parse_args(arguments)
    # autocast does this on purpose: norms in bfloat16 with weights in float32
    warnings.filterwarnings('ignore', 'Mismatch dtype between input and weight')
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors='replace')  # type: ignore[union-attr]  # a terminal may lack characters
    try:
        options.run_command(options)
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RunError, ValueError) as error:
        sys.exit(' '.join(str(error).split()))
    except (OSError, torch.OutOfMemoryError) as error:
        sys.exit(one_line(error))
    return 0
