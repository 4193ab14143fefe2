"""Command line: `python -m hpcguard.STAGE CONFIG.yaml [section.key=value ...]`, or `hpcguard STAGE ...`.

Every stage is a module with a docstring (its help), EXAMPLE, SECTIONS (the configuration it reads),
`add_arguments(parser)` and `run(config, arguments) -> exit status`. The stages OF_STORES read any store, which need
not lie in a run folder, and those OF_SWEEPS a sweep: theirs is `run(path, arguments)`. Those OF_RESULTS read results
and no configuration: `run(paths, arguments)`.
"""

import argparse
import importlib
import itertools
import sys
import textwrap
from pathlib import Path
from types import ModuleType

from hpcguard import __version__
from hpcguard.cluster.lifetime import end_with_owner
from hpcguard.cluster.ranks import end_world, rank_name, tell_fault
from hpcguard.config import Config, describe_keys, load_config
from hpcguard.config.sweep import SweepConfig
from hpcguard.errors import InputError
from hpcguard.runs import check_private
from hpcguard.sweeps.folder import is_sweep

STAGES = (
    "attribute", "consolidate", "refine", "evaluate", "compare", "report", "loop", "sweep",
    "status", "cancel", "inspect", "export",
)  # fmt: skip
OF_STORES = ("inspect", "export")
OF_SWEEPS = ("sweep",)  # take a sweep's YAML file or folder
OF_BOTH = ("status", "report", "cancel")  # take a sweep's folder too: `run_sweep(path, arguments)`
OF_RESULTS = ("compare",)
LOOKING = ("status",)  # reads others' run folders and runs nothing of theirs
ALIASES = {"retry": "attribute"}
ALIAS_HELP = {"retry": "Try what was given up again, with all that follows: attribute by another name."}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `hpcguard` command."""
    end_with_owner()
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in ("-V", "--version"):
        print(f"hpcguard {__version__}")
        return 0
    if given and given[0] in ALIASES:
        return run_stage(ALIASES[given[0]], given[1:])
    names = list(itertools.takewhile(STAGES.__contains__, given))
    if names:
        return _run_in_order(names, given[len(names) :])
    lines = [f"  {name:<12} {_summary(_stage(name))}" for name in STAGES]
    lines += [f"  {name:<12} {ALIAS_HELP[name]}" for name in ALIASES]
    usage = "\n".join(
        ["usage: hpcguard STAGE [STAGE ...] CONFIG.yaml [section.key=value ...]", "", "Stages, in their order:", *lines]
    )
    usage += "\n\n`hpcguard STAGE --help` shows an example and the keys. `hpcguard --version` shows the version."
    if given and given[0] in ("-h", "--help"):
        print(usage)
        return 0
    wrong = f"{given[0]!r} is no stage: one of {', '.join([*STAGES, *ALIASES])}" if given else usage
    print(f"hpcguard: {wrong}" if given else wrong, file=sys.stderr)
    return 2


def _run_in_order(names: list[str], given: list[str]) -> int:
    """Several stages on one configuration, until one does not end well."""
    for name in names:
        if len(names) > 1:
            print(f"== {name}", flush=True)
        if status := run_stage(name, given):
            return status
    return 0


def run_stage(name: str, given: list[str] | None = None) -> int:
    """Parse a stage's command line and run it; bad input is one line on stderr and status 2."""
    stage = _stage(name)
    parser = _parser(name, stage)
    try:
        arguments = parser.parse_intermixed_args(sys.argv[1:] if given is None else given)
        if name in OF_RESULTS:
            return int(stage.run([Path(one) for one in arguments.results], arguments))
        source = Path(arguments.config)
        if name in OF_STORES + OF_SWEEPS:
            return int(stage.run(source, arguments))
        if name in OF_BOTH and is_sweep(source):
            return int(stage.run_sweep(source, arguments))
        config = load_config(source, arguments.overrides)
        if config.run.is_dir() and name not in LOOKING:
            check_private(config.run)  # its files may name code to be run
        return int(stage.run(config, arguments))
    except InputError as error:
        tell_fault(f"hpcguard {name}: {rank_name()}{' '.join(str(error).split())}")
        return end_world(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell_fault(f"hpcguard {name}: {rank_name()}{where}{error.strerror or error}")
        return end_world(2)
    except KeyboardInterrupt:
        print(f"hpcguard {name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _stage(name: str) -> ModuleType:
    return importlib.import_module(f"hpcguard.{name}")


def _summary(stage: ModuleType) -> str:
    return (stage.__doc__ or "").strip().splitlines()[0]


def _parser(name: str, stage: ModuleType) -> argparse.ArgumentParser:
    keys = [] if name in OF_RESULTS else ["", "keys and defaults:", *_keys(name, stage)]
    parser = argparse.ArgumentParser(
        prog=f"python -m hpcguard.{name}",
        description=stage.__doc__,
        epilog="\n".join(["example:", *(f"  {line}" for line in stage.EXAMPLE), *keys]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name in OF_RESULTS:
        known = "RUN/results/ARM.json; the others are held against the first"
        parser.add_argument("results", nargs="+", metavar="RESULT.json", help=known)
        stage.add_arguments(parser)
        return parser
    if name in OF_STORES:
        parser.add_argument("config", metavar="STORE", help="a store or shard (.h5), a run folder, or a YAML file")
    elif name in OF_SWEEPS:
        parser.add_argument("config", metavar="SWEEP", help="a sweep's YAML file, or its folder")
    else:
        folders = "a run folder (its config.yaml) or a sweep's" if name in OF_BOTH else "a run folder (its config.yaml)"
        parser.add_argument("config", metavar="CONFIG", help=f"a YAML file, or {folders}")
    stage.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to single keys")
    return parser


def _keys(name: str, stage: ModuleType) -> list[str]:
    if name in OF_SWEEPS:
        rows = describe_keys(SweepConfig)
    else:
        rows = describe_keys(Config, sections=("run", "device", *stage.SECTIONS))
    return [
        f"  {key} = {default}\n" + textwrap.fill(meaning, 96, initial_indent="      ", subsequent_indent="      ")
        for key, default, meaning in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
