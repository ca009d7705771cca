"""The settings of a probe, each of them a flag of the probe script: explained, given, checked and filled in once."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..common.errors import InputError, raise_if_any
from ..dump.buckets import BUCKET, NO_POOLING
from ..problems.verifiers import BOXED, SECONDS_PER_ANSWER
from ..rollouts.formats import FORMATS
from .rules import ENTROPY, RULES, score_key_of

if TYPE_CHECKING:
    from ..model.source import CheckpointSource

DEFAULT_DATASET = Path(__file__).parents[2] / "demo" / "problems.jsonl"
BATCH_TOKENS = {"cuda": 16_384, "cpu": 2048}
TASKS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""What torchrun and srun tell each task: its number, how many there are, its number on its node. (A batch script, which
is no task, sees SLURM_PROCID and SLURM_NTASKS, but not the number of tasks of a step.)"""


def flag(text: str, metavar: str | None = None, default: Any = None, **about: Any) -> Any:
    """A setting of `ProbeSettings`, from which `add_flags` makes a flag; its type is the annotation's.

    Args:
        text: what `--help` says; it gains the default where it names none.
        default: None: not given; MISSING: it must be.
        about: `group`, the heading of this setting and those after it; `choices`, `type` and `nargs` of argparse;
            `sampled`, the default where responses are sampled; `least`, the smallest value, or `is_positive`;
            `only_with` or `never_with`, another setting in backticks, that it needs or can't go with, and why.
    """
    return field(default=default, metadata={"text": text, "metavar": metavar, **about})


of_sampling = partial(flag, never_with="`rollouts`, which brings its own")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What to probe and how. None: not given; `filled` puts defaults there; `check` names all that can't be."""

    model_path: str = flag(
        "checkpoint: a directory, or a name on the Hub", "M", MISSING, group="what to read and where to write"
    )
    revision: str | None = flag("branch, tag or commit of a name on the Hub (default: its default branch)", "REV")
    adapter: str | None = flag(
        "PEFT adapter (LoRA), merged into the weights: a directory, or a name on the Hub",
        "A",
        never_with="`device_map`; merge it into a checkpoint first",
    )
    tokenizer: str | None = flag(
        "tokenizer with the same ids as the checkpoint's: a directory, or a name on the Hub (default: the adapter's "
        "own, if it brings one, else the checkpoint's)",
        "T",
    )
    trust_remote_code: bool = flag("let code that comes with the checkpoint run (default: never)", default=False)
    output_dir: Path = flag("directory of the new dump", "D", MISSING)
    dataset: str | None = flag(
        "problems: .jsonl, .json, .parquet, a directory of datasets.save_to_disk, hf:NAME[:CONFIG][:SPLIT], or "
        "gym:NAME[:key=value,...] of reasoning-gym (default: the demo's)",
        "F",
        sampled=str(DEFAULT_DATASET),
    )
    min_mixed_prompts: int | None = flag(
        "after the sampling, stop unless so many of this probe's prompts have correct and incorrect rollouts, which "
        "are kept (default: 1; 0 with fewer than 16 prompts or one rollout each)",
        "N",
        least=0,
    )
    sample_only: bool = flag(
        "stop after the sampling; the same command without it goes on with the gradients", default=False
    )
    check_only: bool = flag("check all that can be known without the weights; write nothing", default=False)
    overwrite: bool = flag("start afresh where the output directory holds a dump", default=False)

    problem_key: str | None = flag(
        "field of the problem, dotted if nested (default: the first of prompt, problem, question, messages, "
        "conversations)",
        "KEY",
        group="problems into prompts",
    )
    answer_key: str | None = flag(
        "field of the answer (default: the first of ground_truth, reward_model.ground_truth, final_answer, "
        "answer, solution)",
        "KEY",
    )
    id_key: str | None = flag(
        "field of the id; none: row numbers (default: the first of id, unique_id, extra_info.index)", "KEY"
    )
    prompt_template: str | None = flag(
        "text with {problem}, or a file of it; other braces stay (default: the problem itself)", "FILE|TEXT"
    )
    chat_template: bool = flag("put the problem into the tokenizer's own chat template", default=False)
    system_prompt: str | None = flag(
        "system message of the chat template (default: the template's own)", "TEXT", only_with="`chat_template`"
    )
    continue_final_message: bool = flag(
        "go on with the assistant's message that a problem's messages end in, a prefilled one; without it such a data "
        "set is refused: sets for supervised training hold the solution there",
        default=False,
        only_with="`chat_template`",
    )

    num_prompts: int | None = of_sampling(
        "prompts of the whole study, over all shards", "N", group="sampling (not with --rollouts)", sampled=64, least=1
    )
    skip_prompts: int = of_sampling(
        "leave the study's first K prompts to dumps that are there: a study grows by more --num-prompts and further "
        "shards, which are merged with the old ones",
        "K",
        0,
        least=0,
    )
    num_samples: int | None = of_sampling("rollouts per prompt", "N", sampled=8, least=1)
    max_new_tokens: int | None = of_sampling("tokens at most in a response", "N", sampled=1024, least=1)
    temperature: float | None = of_sampling("divides the logits while sampling", "T", sampled=1.0, is_positive=True)
    stop: str | None = of_sampling("ends a response as an end token does (base models, few-shot prompts)", "TEXT")
    sampler: str = of_sampling(
        "openai: ask the server at --base-url for responses", None, "own", choices=("own", "openai")
    )
    base_url: str | None = of_sampling("of a vLLM, SGLang or llama.cpp server that runs this checkpoint", "URL")
    server_model: str | None = of_sampling("model to ask for (default: the only one that the server lists)", "NAME")
    server_requests: int = flag("requests under way at once", "N", 16, least=1)
    api_key_env: str | None = of_sampling(
        "environment variable that holds the server's API key (default: none is sent); never the key itself",
        "NAME",
        only_with="`base_url`",
    )

    rollouts: Sequence[Path] | None = flag(
        "probe these instead of sampling: a dump, its rollouts.jsonl, or files of vLLM, an OpenAI-shaped server, TRL "
        "(also a folder with the completions of one step) or verl",
        "F",
        type=Path,
        nargs="+",
        group="rollouts from elsewhere (docs/rollouts.md)",
    )
    rollouts_format: str = flag(
        "shape of --rollouts (default: by its keys)", None, "auto", choices=("auto", *FORMATS), only_with="`rollouts`"
    )
    correct_from: str = flag(
        "verdicts of --rollouts: auto (a true or false 'correct' or 'acc', else the reward), a key of the file, or "
        "verifier to judge anew",
        "NAME",
        "auto",
        only_with="`rollouts`",
    )
    correct_above: float | None = flag("a reward above this is a correct answer", "REWARD", only_with="`rollouts`")

    verifier: str = flag(
        "boxed: the last box, exactly; numeric: by value; math-verify; gym: reasoning-gym's scorer; or "
        "module:function, which takes response and ground truth and returns a bool",
        default=BOXED,
        group="verdicts",
    )
    verifier_seconds: float = flag(
        "time limit of one answer, of all but boxed", "S", SECONDS_PER_ANSWER, is_positive=True
    )

    shard_index: int | None = flag(
        "this shard, from 0 (default: 0)",
        "I",
        group="shards (default: by torchrun's or srun's tasks, if there are several)",
        least=0,
    )
    num_shards: int | None = flag("shards of the study (default: 1)", "N", least=1)

    layer: str | None = flag(
        "layer, from 0 (default: the middle one, 14 of Qwen2.5-1.5B's 28)",
        "LAYER[,...]",
        group="target: lists separated by commas give one dump for each combination",
    )
    param_suffix: str = flag("linear weight inside it", default="mlp.down_proj.weight")
    row_idx: str = flag(
        "row, from 0; also first, mid, last, random:K", default="0", never_with="`project`, which takes whole weights"
    )
    project: str | None = flag(
        "whole weights in the place of rows, seen through random signs from both sides, e.g. 16x16; then also --layer "
        "all and --param-suffix all-linear, which is all linear weights in one dump",
        "KxL",
    )

    pool: str = flag(
        "bucket: one gradient for each rollout and bucket, summed over all its tokens there, as Exp 3 needs it; none: "
        "one for each picked token",
        default=NO_POOLING,
        choices=(NO_POOLING, BUCKET),
        group="tokens and buckets",
    )
    bucket_by: str = flag(
        f"of pooled tokens: {', '.join(RULES)}, or score:KEY, a list of numbers per token in --rollouts",
        "RULE",
        ENTROPY,
        only_with="`pool` bucket",
    )
    bins: int = flag("buckets of equal size", default=5, least=2)
    pos_per_bin_per_rollout: int = flag(
        "positions of each bucket and rollout; 0: every response token",
        default=4,
        least=0,
        never_with="`pool` bucket, which takes all tokens",
    )
    entropy_edges: Path | None = flag("take the edges of another dump's manifest.json", "MANIFEST")
    seed: int = flag("of prompts, sampling and positions", default=0, least=0)

    step_to: str | None = flag(
        "along the step from the probed checkpoint to this one, the derivative of each token's log-prob",
        "CKPT",
        never_with="`device_map`",
        group="the step that training took: what is not named is the probed model itself",
    )
    step_from: str | None = flag("the step from this checkpoint", "CKPT", never_with="`device_map`")
    step_to_adapter: str | None = flag("adapter merged into --step-to (default of that, then: --model-path)", "A")
    step_from_adapter: str | None = flag("adapter merged into --step-from (likewise)", "A")
    step_by_weight: bool = flag(
        "of each rollout also every weight's part of its sum along the step: one backward pass for each", default=False
    )

    device: str = flag(
        "auto, cuda or cpu",
        default="auto",
        never_with="`device_map`, which says where the weights are",
        group="computing",
    )
    device_map: str | None = flag(
        "spread the weights: auto over all GPUs, then the CPU's memory, then the disk; or a JSON file of module: "
        'number of a GPU, "cpu" or "disk"; needs accelerate (default: all on --device)',
        "auto|FILE",
    )
    max_memory: str | None = flag(
        "weights at most on each device with --device-map auto; a device not named is not used (default: what is "
        "free, less a tenth)",
        "0=70GiB,cpu=200GiB",
        only_with="`device_map`",
    )
    offload_dir: Path | None = flag(
        "for weights on the disk that can't be read from the checkpoint as they are (mixtures of experts)",
        "D",
        only_with="`device_map`",
    )
    dtype: str = flag("auto: bfloat16 on GPUs that have it", default="auto", choices=("auto", "bfloat16", "float32"))
    attention: str = flag(
        "auto: sdpa where the architecture has it, else eager",
        default="auto",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    batch_tokens: int | None = flag(
        "tokens in one scoring or gradient pass; halves by itself when memory runs out "
        f"(default: {BATCH_TOKENS['cuda']:,} on a GPU, {BATCH_TOKENS['cpu']:,} on a CPU)",
        least=1,
    )
    sample_rows: int = flag("responses sampled at once; halves by itself when memory runs out", default=512, least=1)

    @property
    def is_pooled(self) -> bool:
        """Whether gradients are summed over a rollout's tokens in a bucket."""
        return self.pool == BUCKET

    @property
    def checkpoint(self) -> "CheckpointSource":
        """Which checkpoint is probed."""
        from ..model.source import CheckpointSource

        return CheckpointSource(self.model_path, self.revision, self.adapter, self.trust_remote_code, self.tokenizer)

    @property
    def step_ends(self) -> dict[str, "CheckpointSource"]:
        """The ends of the step that are other checkpoints, under "to" and "from"; empty without a step."""
        named = {"to": (self.step_to, self.step_to_adapter), "from": (self.step_from, self.step_from_adapter)}
        return {
            end: type(self.checkpoint)(path or self.model_path, None, adapter, self.trust_remote_code)
            for end, (path, adapter) in named.items()
            if path is not None or adapter is not None
        }

    def check(self) -> None:
        """Raise `InputError` with every value that can't be, and every two that can't go together."""
        faults = []
        for setting in fields(self):
            name, value, about = setting.name, getattr(self, setting.name), setting.metadata
            if value == setting.default:
                continue
            if "least" in about and value < about["least"]:
                faults.append(f"`{name}` {value}: must be at least {about['least']}")
            if "is_positive" in about and not (math.isfinite(value) and value > 0):
                faults.append(f"`{name}` {value}: must be above 0")
            if "only_with" in about and not self._is_given(about["only_with"]):
                faults.append(f"`{name}` says something of {about['only_with']} only")
            if "never_with" in about and self._is_given(about["never_with"]):
                faults.append(f"`{name}` can't go with {about['never_with']}")
        if (self.sampler == "openai") != (self.base_url is not None):
            faults.append("`sampler` openai and `base_url` need each other")
        if self.stop == "":
            faults.append("`stop`: an empty text would end every response")
        index, count = self.shard_index or 0, 1 if self.num_shards is None else self.num_shards
        if count >= 1 and index >= count:
            faults.append(f"`shard_index` {index}: must be below `num_shards` {count}")
        if self.bucket_by not in RULES and not score_key_of(self.bucket_by):
            faults.append(f"`bucket_by` {self.bucket_by}: must be one of {', '.join(RULES)}, or score:KEY")
        elif self.bucket_by not in RULES and self.rollouts is None:
            faults.append(f"`bucket_by` {self.bucket_by}: scores stand in a file of rollouts; name it by `rollouts`")
        if self.step_by_weight and not self.step_ends:
            faults.append("`step_by_weight` says something of a step only: name one by `step_to` or `step_from`")
        raise_if_any(faults)

    def _is_given(self, quoted: str) -> bool:
        """Whether the setting that a text has in backticks is another than its default."""
        name = quoted.split("`")[1]
        return getattr(self, name) != getattr(ProbeSettings, name)

    def filled(self) -> "ProbeSettings":
        """With defaults where shards, and sampling if there is any, were not said."""
        sampled = {setting.name: setting.metadata.get("sampled") for setting in fields(self)}
        unsaid = {name: value for name, value in sampled.items() if value and getattr(self, name) is None}
        of_shards = {"shard_index": self.shard_index or 0, "num_shards": self.num_shards or 1}
        return replace(self, **of_shards, **(unsaid if self.rollouts is None else {}))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser the flag of each setting."""
    for setting in fields(ProbeSettings):
        about, text = setting.metadata, setting.metadata["text"]
        if "group" in about:
            add = parser.add_argument_group(about["group"]).add_argument
        default = None if setting.default is MISSING else setting.default
        told, kind = about.get("sampled", default), (*get_args(setting.type), setting.type)[0]
        if told is not None and kind is not bool and "(default: " not in text:
            text += f" (default: {told})"
        how = {key: about[key] for key in ("metavar", "choices", "nargs", "type") if key in about}
        how = {"action": "store_true"} if kind is bool else {"type": kind, "required": setting.default is MISSING} | how
        add("--" + setting.name.replace("_", "-"), default=default, help=text, **how)


def settings_of_task(settings: ProbeSettings, environment: Mapping[str, str]) -> ProbeSettings:
    """Where no shard was asked for, each task of torchrun or srun takes one, a directory and a GPU of its own."""
    if settings.shard_index is not None or settings.num_shards is not None:
        return settings
    for rank, size, local in TASKS:
        if environment.get(size, "1") == "1":
            continue
        index, count, gpu = int(environment[rank]), int(environment[size]), int(environment.get(local, 0))
        if settings.device_map == "auto" and local == "LOCAL_RANK":
            raise InputError("`device_map` auto takes all GPUs: not in several tasks of torchrun at once")
        import torch

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
