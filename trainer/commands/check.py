"""Check a config without running it, and print it complete with its defaults.

trainer check --config quickstart.yaml optimizer.lr=0.1
trainer check --schema > trainer.schema.json    for completion in an editor
"""

from __future__ import annotations

import argparse
import json
import sys

from trainer.cli import add_config_arguments
from trainer.errors import EXIT_DONE, UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_config_arguments(parser, required=False)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a config instead")


def run(args: argparse.Namespace) -> int:
    """Print the resolved config (YAML, or JSON with `--json`) or the schema."""
    if args.schema:
        if args.config or args.overrides:
            raise UserError("--schema describes every config: leave --config and the overrides out")
        from trainer.schema import json_schema

        print(json.dumps(json_schema(), indent=2))
        return EXIT_DONE
    if not args.config:
        raise UserError("--config is missing: name a YAML file or a config that ships (`trainer list configs`)")
    from trainer.load import as_dict, dump, load

    config = load(args.config, args.overrides)
    print(json.dumps(as_dict(config), indent=2) if args.json else dump(config).rstrip())
    if config.tune.space:
        from trainer.search.space import read_space

        print(f"trainer: tune.space: {read_space(config.tune.space).describe()}", file=sys.stderr)
    return EXIT_DONE
