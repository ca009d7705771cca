r"""Train the pair of the study on the CPU: two LoRA adapters of SmolLM2-135M-Instruct.

`supervised` teaches the public model, for a few steps only, to answer in the form asked for: the study's base
(`base_adapter/`). `rl` goes on from there with GRPO under DAPO's loss and a verifiable reward: `trained_adapter/`.

    python get_model.py                      # -> model/
    python train.py supervised
    python train.py rl                       # the same command again goes on from the last checkpoint

Needs requirements.txt of this folder. Where other programs keep the cores busy put `OMP_WAIT_POLICY=PASSIVE` before it.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from gradprobe.problems.boxed import is_correct  # noqa: E402
from gradprobe.problems.templates import fill  # noqa: E402

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
COMMON = {
    "report_to": "none",
    "save_strategy": "steps",
    "disable_tqdm": True,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 16,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
}
SUPERVISED = {
    "max_steps": 120,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "save_steps": 20,
}
RL = {
    "max_steps": 47,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 48,
    "learning_rate": 5e-4,
    "loss_type": "dapo",
    "beta": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "save_steps": 2,
    "save_total_limit": 2,
}
LOGGED = ("step", "reward", "frac_reward_zero_std", "entropy", "completions/mean_length", "grad_norm", "step_time")


def rows_of(file: str, **columns: str) -> Dataset:
    """The problems of a file as prompts, with further columns under the names that TRL expects."""
    template = (HERE / "template.txt").read_text(encoding="utf-8")
    rows = Dataset.from_parquet(str(HERE / file))
    return Dataset.from_list(
        [{"prompt": fill(template, row["problem"])} | {new: row[old] for new, old in columns.items()} for row in rows]
    )


def load_model(folder: Path) -> Any:
    """The public model in float32, sampling from its full softmax."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = model.generation_config.eos_token_id
    # `generate` fills what TRL leaves unset from here.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=ends)
    return model


def train_on(trainer: SFTTrainer | GRPOTrainer) -> None:
    """Train from the last checkpoint on, if there is one."""
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """The adapter as PEFT saves it, named as one of the public model instead of by a folder of this machine."""
    model.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(folder, save_embedding_layers=False)  # else it asks the Hub whether they were changed
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def train_supervised(model_folder: Path, work: Path, out: Path) -> None:
    """Fit the worked solutions for a few steps."""
    trainer = SFTTrainer(
        model=load_model(model_folder),
        args=SFTConfig(output_dir=str(work / "supervised"), completion_only_loss=True, **COMMON, **SUPERVISED),
        train_dataset=rows_of("supervised.parquet", completion="solution"),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LORA,
    )
    train_on(trainer)
    save_adapter(trainer.model, out / "base_adapter")


def reward_correct(completions: list[str], ground_truth: list[str], **_: Any) -> list[float]:
    """TRL's reward function: 1 for a right box, 0 for anything else."""
    return [float(is_correct(text, truth)) for text, truth in zip(completions, ground_truth, strict=True)]


class LogSteps(TrainerCallback):
    """Writes the trainer's history, which a resumed run takes from its checkpoint, into a table."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        entries = [entry for entry in state.log_history if "reward" in entry]
        with self.file.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, LOGGED, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows({name: round(entry[name], 4) for name in LOGGED} for entry in entries)


def train_rl(model_folder: Path, work: Path, out: Path) -> None:
    """GRPO on the problems of training.parquet, from the supervised adapter on."""
    trainer = GRPOTrainer(
        model=PeftModel.from_pretrained(load_model(model_folder), out / "base_adapter", is_trainable=True),
        reward_funcs=reward_correct,
        args=GRPOConfig(output_dir=str(work / "rl"), **COMMON, **RL),
        train_dataset=rows_of("training.parquet", ground_truth="answer"),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        callbacks=[LogSteps(out / "training_log.csv")],
    )
    train_on(trainer)
    save_adapter(trainer.model, out / "trained_adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("supervised", "rl"))
    parser.add_argument("--model", type=Path, default=HERE / "model", help="the public model (default: model/ here)")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints (default: work/ here)")
    parser.add_argument("--out", type=Path, default=HERE, help="where adapters and log go (default: here)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train = {"supervised": train_supervised, "rl": train_rl}[args.phase]
    began = time.monotonic()
    train(args.model, args.work, args.out)
    print(f"{args.phase}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
