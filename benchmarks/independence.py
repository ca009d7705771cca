#!/usr/bin/env python3
"""Is noise that prompts share found, and is it found where there is none? Draws of rollouts by the demo's base model.

    python benchmarks/independence.py --draws 200

Each draw samples as vLLM does with one seed for all requests (sample s of every prompt gets the same noise), and with
noise of each rollout's own, and gives both to `shared_noise`.
"""

import argparse
import json
from pathlib import Path

import torch

from gradprobe.dump.records import Rollout
from gradprobe.model.checkpoint import load_checkpoint
from gradprobe.rollouts.independence import LARGEST_Z, shared_noise
from gradprobe.rollouts.sample import Sampling, rollout_uniforms, sample_responses

DEMO = Path(__file__).parents[1] / "demo"
N_PROMPTS = (16, 32, 128)


def main() -> None:
    """Print a table, a row for each number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(str(DEMO / "base"), torch.device("cpu"), torch.float32)
    lines = (DEMO / "problems.jsonl").read_text().splitlines()[: max(N_PROMPTS)]
    prompts = [
        checkpoint.tokenizer(json.loads(line)["prompt"], add_special_tokens=False)["input_ids"] for line in lines
    ]
    sampling = Sampling(arguments.samples, arguments.steps, 1.0, checkpoint.end_ids)
    found = {(n, is_shared): [] for n in N_PROMPTS for is_shared in (False, True)}
    for draw in range(arguments.draws):
        for is_shared in (False, True):

            def uniforms(p: int, s: int, seed: int = draw, is_shared: bool = is_shared):
                return rollout_uniforms(seed, 0 if is_shared else p, s, arguments.steps)

            batches = sample_responses(checkpoint.model, prompts, uniforms, sampling, 512)
            responses = [of_prompt for batch in batches for of_prompt in batch]
            for n in N_PROMPTS:
                rollouts = [
                    Rollout(p, s, "", prompts[p], ids, [], [], "", "", False)
                    for p, samples in enumerate(responses[:n])
                    for s, ids in enumerate(samples)
                ]
                found[n, is_shared].append(shared_noise(rollouts).z)
    print(f"{arguments.draws} draws of {arguments.samples} rollouts a prompt, {arguments.steps} tokens each\n")
    print("| prompts | shared: found | least z | own noise: false alarms | largest z |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for n in N_PROMPTS:
        shared, own = found[n, True], found[n, False]
        hits, alarms = (sum(z > LARGEST_Z for z in of_kind) for of_kind in (shared, own))
        print(f"| {n} | {hits} of {len(shared)} | {min(shared):.1f} | {alarms} of {len(own)} | {max(own):.1f} |")


if __name__ == "__main__":
    main()
