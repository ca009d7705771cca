#!/usr/bin/env python3
"""Merge shards of one study into one dump and bucket entropy again over their union.

    python merge_grad_vector_shards.py out/exp12/exp12_base out/exp12/exp12_base_s0 out/exp12/exp12_base_s1

Shards with several targets give a directory with one merged dump for each. Gradients are copied in blocks, never all
in memory. Edges are fitted over all response tokens where every shard has its rollouts.jsonl, else over the dumped
positions (as with shards of the original scripts); shards that were all probed with the same --entropy-edges keep
those. Shards that don't belong together are refused.
"""

import argparse
import sys
from pathlib import Path

from gradprobe.common.console import add_common_flags, printable, script_main
from gradprobe.dump.merge import merge_shards


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, help="directory of the merged dump; replaced if it holds one")
    parser.add_argument("shard_dirs", type=Path, nargs="+", metavar="SHARD_DIR", help="dumps to merge, in this order")
    add_common_flags(parser)
    return parser.parse_args(argv)


@script_main
def main(argv: list[str] | None = None) -> int:
    """Merge shards into one dump, or one for each target."""
    args = parse_args(argv)
    for directory, manifest in merge_shards(args.out_dir, args.shard_dirs):
        counts = f"{manifest['num_positions']} gradients of {manifest['num_rollouts']} rollouts"
        over = manifest["entropy_edges_over"].replace("_", " ")
        print(printable(f"{directory}: {counts} from {len(args.shard_dirs)} shards, edges over {over}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
