"""The settings of a probe, each of them a flag of the probe script: given, checked and filled in once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..common.errors import InputError, raise_if_any
from ..dump.buckets import BUCKET, NO_POOLING
from ..model.checkpoint import CheckpointSource
from .rules import ENTROPY

DEFAULT_DATASET = Path(__file__).parents[2] / "demo" / "problems.jsonl"
DEFAULT_VERIFIER = "boxed"
SAMPLING_DEFAULTS = {"num_prompts": 64, "num_samples": 8, "max_new_tokens": 1024, "temperature": 1.0}
BATCH_TOKENS = {"cuda": 16_384, "cpu": 2048}
LEAST = {
    **dict.fromkeys(("num_prompts", "num_samples", "max_new_tokens", "num_shards"), 1),
    **dict.fromkeys(("batch_tokens", "sample_rows", "server_requests"), 1),
    **dict.fromkeys(("shard_index", "seed", "pos_per_bin_per_rollout", "min_mixed_prompts"), 0),
    "bins": 2,
}
MOST = {"num_samples": 10**6, "max_new_tokens": 10**7}
"""Beyond these a typo is likelier than a study, and arrays of that length would be made."""
TASKS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""What torchrun and srun tell each task: its number, how many there are, its number on its node. (A batch script, which
is no task, sees SLURM_PROCID and SLURM_NTASKS, but not the number of tasks of a step.)"""


@dataclass(frozen=True)
class ProbeSettings:
    """What to probe and how; the probe script's flags, which `--help` explains. None: not given.

    `filled` puts defaults in the place of None where there are any; `check` names all that can't be.
    """

    model_path: str
    output_dir: Path
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False
    dataset: str | None = None
    problem_key: str | None = None
    answer_key: str | None = None
    id_key: str | None = None
    prompt_template: str | None = None
    chat_template: bool = False
    system_prompt: str | None = None
    num_prompts: int | None = None
    num_samples: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    stop: str | None = None
    sampler: str = "own"
    base_url: str | None = None
    server_model: str | None = None
    server_requests: int = 16
    api_key_env: str | None = None
    rollouts: Sequence[Path] | None = None
    rollouts_format: str = "auto"
    correct_from: str = "auto"
    correct_above: float | None = None
    verifier: str = DEFAULT_VERIFIER
    verifier_seconds: float = 10.0
    shard_index: int | None = None
    num_shards: int | None = None
    layer: str | None = None
    param_suffix: str = "mlp.down_proj.weight"
    row_idx: str = "0"
    project: str | None = None
    pool: str = NO_POOLING
    bucket_by: str = ENTROPY
    bins: int = 5
    pos_per_bin_per_rollout: int = 4
    entropy_edges: Path | None = None
    seed: int = 0
    device: str = "auto"
    device_map: str | None = None
    max_memory: str | None = None
    offload_dir: Path | None = None
    dtype: str = "auto"
    attention: str = "auto"
    batch_tokens: int | None = None
    sample_rows: int = 512
    min_mixed_prompts: int | None = None
    sample_only: bool = False
    check_only: bool = False
    overwrite: bool = False

    @property
    def is_pooled(self) -> bool:
        """Whether gradients are summed over a rollout's tokens in a bucket."""
        return self.pool == BUCKET

    @property
    def checkpoint(self) -> CheckpointSource:
        """Which checkpoint is probed."""
        return CheckpointSource(self.model_path, self.revision, self.adapter, self.trust_remote_code)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name, paths as text."""
        found = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        return found | {"rollouts": self.rollouts and list(map(str, self.rollouts))}

    def check(self) -> None:
        """Raise `InputError` with every value that can't be, and every two that can't go together."""
        raise_if_any(
            [
                *self._faults_of_rollouts(),
                *self._faults_of_sampling(),
                *self._faults_of_placement(),
                *self._faults_of_targets(),
                *self._values_out_of_range(),
            ]
        )

    def filled(self) -> "ProbeSettings":
        """With defaults where sampling and shards were not said."""
        defaults: dict[str, Any] = {"shard_index": 0, "num_shards": 1}
        if self.rollouts is None:
            defaults |= SAMPLING_DEFAULTS | {"dataset": str(DEFAULT_DATASET)}
        return replace(self, **{key: value for key, value in defaults.items() if getattr(self, key) is None})

    def _faults_of_rollouts(self) -> list[str]:
        if self.rollouts is None:
            given = {"rollouts_format": "auto", "correct_from": "auto", "correct_above": None}
            return [
                f"`{name}` says something of `rollouts` only"
                for name, default in given.items()
                if getattr(self, name) != default
            ]
        given = {
            **dict.fromkeys((*SAMPLING_DEFAULTS, "stop", "base_url", "server_model", "api_key_env")),
            "sampler": "own",
        }
        return [
            f"`{name}` can't go with `rollouts`, which brings its own"
            for name, default in given.items()
            if getattr(self, name) != default
        ]

    def _faults_of_sampling(self) -> list[str]:
        faults = []
        if (self.sampler == "openai") != (self.base_url is not None):
            faults.append("`sampler` openai and `base_url` need each other")
        if self.api_key_env is not None and self.base_url is None and self.rollouts is None:
            faults.append("`api_key_env` says something of `base_url` only")
        if self.stop == "":
            faults.append("`stop`: an empty text would end every response")
        for name in ("temperature", "verifier_seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                faults.append(f"`{name}` {value}: must be above 0")
        if self.system_prompt is not None and not self.chat_template:
            faults.append("`system_prompt`: only a chat template has a place for it; add `chat_template`")
        return faults

    def _faults_of_placement(self) -> list[str]:
        if self.device_map is None:
            return [
                f"`{name}` says something of `device_map` only"
                for name in ("max_memory", "offload_dir")
                if getattr(self, name) is not None
            ]
        faults = []
        if self.device != "auto":
            faults.append(f"`device` {self.device} can't go with `device_map`, which says where the weights are")
        if self.adapter is not None:
            faults.append("`adapter` can't go with `device_map`; merge it into a checkpoint first")
        return faults

    def _faults_of_targets(self) -> list[str]:
        faults = []
        if self.project is not None and self.row_idx != ProbeSettings.row_idx:
            faults.append("`row_idx` can't go with `project`, which takes whole weights")
        if self.pool == BUCKET and self.pos_per_bin_per_rollout != ProbeSettings.pos_per_bin_per_rollout:
            faults.append("`pos_per_bin_per_rollout` can't go with `pool` bucket, which takes all tokens")
        if self.pool == NO_POOLING and self.bucket_by != ENTROPY:
            faults.append(f"`bucket_by` {self.bucket_by} goes with `pool` bucket only")
        return faults

    def _values_out_of_range(self) -> list[str]:
        faults = []
        for name, least in LEAST.items():
            value, most = getattr(self, name), MOST.get(name, 2**31 - 1)
            if value is not None and value < least:
                faults.append(f"`{name}` {value}: must be at least {least}")
            if value is not None and value > most:
                faults.append(f"`{name}` {value}: must be at most {most}")
        index, count = self.shard_index or 0, 1 if self.num_shards is None else self.num_shards
        if count >= 1 and index >= count:
            faults.append(f"`shard_index` {index}: must be below `num_shards` {count}")
        return faults


def settings_of_task(settings: ProbeSettings, environment: Mapping[str, str]) -> ProbeSettings:
    """Where no shard was asked for, each task of torchrun or srun takes one, a directory and a GPU of its own.

    Raises:
        InputError: the environment is odd, or several tasks would each take all GPUs.
    """
    if settings.shard_index is not None or settings.num_shards is not None:
        return settings
    for rank, size, local in TASKS:
        if environment.get(size, "1") == "1":
            continue
        try:
            index, count = int(environment[rank]), int(environment[size])
            gpu = int(environment.get(local, 0))
        except (KeyError, ValueError) as error:
            raise InputError(f"{rank}, {size} and {local} in the environment are not numbers: {error}") from error
        if settings.device_map == "auto" and local == "LOCAL_RANK":
            raise InputError("`device_map` auto takes all GPUs: not in several tasks of torchrun at once")
        n_gpus = torch.cuda.device_count()
        on_one_of_several = settings.device in ("auto", "cuda") and settings.device_map is None and n_gpus > 1
        return replace(
            settings,
            shard_index=index,
            num_shards=count,
            output_dir=settings.output_dir.with_name(f"{settings.output_dir.name}_s{index}"),
            device=f"cuda:{gpu % n_gpus}" if on_one_of_several else settings.device,
        )
    return settings
