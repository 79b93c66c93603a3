"""Stores the reference's results for every configuration. Run it with a Python that has the reference:

python tests/golden/make_golden.py            # writes the figures
python tests/golden/make_golden.py --check    # runs the reference again and compares with the stored results
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE, VERSION = 'titans-pytorch', '0.5.5'


def import_reference() -> None:
    """Import the reference as `titans_pytorch`, or stop: this package must not be compared with itself."""
    sys.path = [path for path in sys.path if path and Path(path).resolve() != REPOSITORY]
    sys.path.insert(0, str(REPOSITORY / 'tests'))

    try:
        found = version(PACKAGE)
        module = importlib.import_module('titans_pytorch')
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        raise SystemExit(f'needs {PACKAGE} {VERSION}: {error}') from None

    path = Path(module.__file__).resolve()

    if found != VERSION or path.is_relative_to(REPOSITORY):
        raise SystemExit(f'needs {PACKAGE} {VERSION}, found {found}, with titans_pytorch at {path}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare with the stored figures instead of writing them')
    check = parser.parse_args().check

    import_reference()

    # only now: these import titans_pytorch

    import torch
    from golden import harness, helpers, store
    from golden.configurations import CHECKPOINTS, CONFIGURATIONS, GROUPS

    torch.set_num_threads(1)

    figures = {name: harness.run(name, configuration) for name, configuration in CONFIGURATIONS.items()}

    if check:
        errors = [
            harness.relative_error(figures[name][key], value)
            for group in GROUPS
            for name, stored in store.load(group).items()
            for key, value in stored.items()
        ]
        print(f'{len(errors)} values, largest relative difference {max(errors)}')
        return

    for group, configurations in GROUPS.items():
        store.save(group, {name: figures[name] for name in configurations})

    record = {
        'versions': {PACKAGE: VERSION, 'torch': torch.__version__, 'python': platform.python_version()},
        'signatures': harness.public_signatures(),
        'state_dicts': {
            name: {key: list(value.shape) for key, value in harness.construct(name).state_dict().items()}
            for name in CHECKPOINTS
        },
    }
    (store.FOLDER / 'reference.json').write_text(json.dumps(record, indent=1) + '\n')
    (store.FOLDER / 'helpers.json').write_text(json.dumps(helpers.record(), indent=1) + '\n')


if __name__ == '__main__':
    main()
