"""What a GPU breaks first, looked for on a pretend one: same numbers as on the CPU, and how often the program waits."""

import copy
import sys
import types
import unittest
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from architectures import FAMILIES, VOCAB_SIZE, tiny_of_family
from pretend_gpu.device import GPU, has_kernel_for, watched

import gradprobe.gradients.step
from gradprobe.analysis.bucket import Bucket
from gradprobe.exp1 import measure as exp1
from gradprobe.exp2.direction import rollout_grams
from gradprobe.gradients import blocks, engine
from gradprobe.gradients.chosen import Chosen
from gradprobe.gradients.engine import GradientEngine
from gradprobe.gradients.step import along_step, subtract
from gradprobe.gradients.targets import AnyTarget, Projection, Target, expand_projected
from gradprobe.model.softmax import Softmax
from gradprobe.probe.self_check import refuse_unfit
from gradprobe.rollouts import sample, score

torch.set_num_threads(1)
CPU = torch.device("cpu")
BY_HAND, BY_AUTOGRAD, ALONE = "qwen3", "gemma3", "mamba"
LAYER, ROW, N_STEPS, BATCH_TOKENS = 1, 3, 10, 40
_rng = np.random.default_rng(0)
PROMPTS = [_rng.integers(3, VOCAB_SIZE, size=3 + 2 * min(i, 3)).tolist() for i in range(4)]
PROMPTS += [PROMPTS[-1], PROMPTS[-1]]  # which are run once
RESPONSES = [_rng.integers(3, VOCAB_SIZE, size=5 + (2 * i) % 5).tolist() for i in range(6)]
EACH = [Chosen.each(np.arange(0, len(r), 2)) for r in RESPONSES]
POOLED = [Chosen.pooled(np.arange(len(r)) % 3) for r in RESPONSES]


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the device is never a plain `Parameter`, which blocks ask for; they are tried out all the same."""
    monkeypatch.setattr(blocks, "_looks_right", lambda module: "Qwen3" in type(module).__name__)
    tried_out = blocks.blocks_of

    def apart(*of: object) -> object:
        with watched():  # once for many batches
            return tried_out(*of)

    for module in (engine, gradprobe.gradients.step):
        monkeypatch.setattr(module, "blocks_of", apart, raising=False)
    monkeypatch.setitem(sample.STEPS_UNSEEN, GPU.type, sample.STEPS_UNSEEN["cuda"])


@dataclass
class Case:
    """A model somewhere, and what it has become after a step of all its parameters."""

    family: str
    device: torch.device
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        model = tiny_of_family(self.family, self.dtype)
        end, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
        for parameter in end.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(self.dtype))
        self.model, self.end = model.to(self.device), end.to(self.device)

    def projected(self) -> list[AnyTarget]:
        """The family's first weight through a projection."""
        return expand_projected(self.model, str(LAYER), FAMILIES[self.family][2][0], Projection(4, 4, 0))

    def row(self) -> list[AnyTarget]:
        """One of its rows."""
        return [Target(LAYER, FAMILIES[self.family][2][0], ROW)]


Found = tuple[list[np.ndarray], int]
"""Numbers, and how many decoding steps or batches they took."""


def sampling(case: Case) -> Callable[[], Found]:
    """Responses, padded to one length."""
    how = sample.Sampling(2, N_STEPS, end_ids=frozenset({5, 6, 7, 8}))
    uniforms = lambda p, s: sample.rollout_uniforms(0, p, s, N_STEPS)  # noqa: E731

    def work() -> Found:
        steps: list[int] = []
        handle = case.model.register_forward_hook(lambda *_: steps.append(1))
        drawn = sample.sample_responses(case.model, PROMPTS[:4], uniforms, how, max_rows=6)
        responses = [r for batch in drawn for of_prompt in batch for r in of_prompt]
        handle.remove()
        return [np.array(r, float) for r in responses], len(steps)

    return work


def of_tokens(batches: Callable[[], object]) -> Found:
    """What is said of every response token, by batch."""
    found, n = {}, 0
    for batch in batches():
        found.update(batch)
        n += 1
    return [np.atleast_2d(found[i]).astype(float) for i in range(len(RESPONSES))], n


def scoring(case: Case) -> Callable[[], Found]:
    """All of `TokenScores`."""
    return lambda: of_tokens(lambda: score.score_responses(case.model, PROMPTS, RESPONSES, BATCH_TOKENS))


def step(case: Case) -> Callable[[], Found]:
    """d_t."""
    delta = subtract(case.end, case.model, case.end)
    return lambda: of_tokens(lambda: along_step(case.model, delta, PROMPTS, RESPONSES, BATCH_TOKENS))


Path = Callable[[Case], Callable[[], Found]]


def gradients(targets: Callable[[Case], list[AnyTarget]], chosen: list[Chosen]) -> Path:
    """A path that differentiates, and copies to the host what it finds."""

    def path(case: Case) -> Callable[[], Found]:
        differentiating = GradientEngine(case.model, targets(case))
        assert (differentiating._blocks is not None) == (case.family == BY_HAND)

        def work() -> Found:
            batches = differentiating.batches(PROMPTS, RESPONSES, chosen, BATCH_TOKENS)
            found = [of.cpu().numpy() for *_, (of,) in batches]
            return found, len(found)

        return work

    return path


PATHS = {
    "sampling": sampling,
    "scoring": scoring,
    "rows": gradients(Case.row, EACH),
    "pooled rows": gradients(Case.row, POOLED),
    "projected, pooled": gradients(Case.projected, POOLED),
    "along a step": step,
}
CASES = [(family, path) for family in (BY_HAND, BY_AUTOGRAD) for path in PATHS]
CASES += [(ALONE, "sampling")]


def off_by(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest error, relative to the largest number, of any array."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("family", "path"), CASES)
@pytest.mark.usefixtures("float64_throughout")
def test_numbers_are_those_of_the_cpu_at_one_wait_each(family: str, path: str):
    expected, _ = PATHS[path](Case(family, CPU))()
    work = PATHS[path](Case(family, GPU))
    with watched() as seen:
        found, n = work()
    print(f"{family}, {path}: {seen.waits.total()} waits, {n} steps or batches ({dict(seen.waits)})")
    assert off_by(found, expected) < 1e-12
    assert 0 < seen.waits.total() <= n


def test_a_model_is_tried_out_on_the_device():
    case = Case(BY_HAND, GPU, torch.float32)
    refuse_unfit(GradientEngine(case.model, case.row()), "a model", is_sampled=True)


@pytest.mark.parametrize(("n", "dim"), [(480, 400), (400, 480)], ids=["tall", "wide"])
def test_analyses_are_those_of_the_cpu(n: int, dim: int, monkeypatch: pytest.MonkeyPatch):
    """Directions by iteration for the wholes, by decomposition for the parts."""
    monkeypatch.setattr("gradprobe.analysis.bucket.MAX_EXACT", 380)
    grads = np.random.default_rng(n).standard_normal((n, dim)) / np.sqrt(1 + np.arange(dim))
    rollout, label = np.arange(n) // 4, np.arange(n) % 2
    found = {}
    for device in (CPU, GPU):
        whole = Bucket(grads, np.arange(n), rollout // 2, rollout, str(device))
        measured = exp1.measure_dump(whole, label, 2, exp1.Exp1Settings(halves=50, matched=3, ceiling=3, null=3))
        points, *_ = exp1.project_to_plane(whole)
        found[device] = [*measured.energies, *(of.dots for of in measured.sums), points, *_numbers(measured.numbers)]
        found[device].append(rollout_grams(whole, rollout % 2 == 0).gram)
    assert off_by(found[GPU], found[CPU]) < 1e-9


def _numbers(tree: object) -> list[np.ndarray]:
    if isinstance(tree, dict | list | tuple):
        return [x for part in (tree.values() if isinstance(tree, dict) else tree) for x in _numbers(part)]
    return [np.array([tree])] if isinstance(tree, float) else []


# ---- what the pretend device can't see ----------------------------------------------------------------------------

IN_BFLOAT16 = [(BY_HAND, path) for path in ("sampling", "projected, pooled", "along a step")]
IN_BFLOAT16 += [(BY_HAND, "pooled rows"), (BY_AUTOGRAD, "projected, pooled")]
KNOWN_AS = {"index": "__getitem__", "gelu_backward": "gelu", "silu_backward": "silu"}
"""In torch's tables, where operations and their backward passes are one."""
OF_OTHERS = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


def test_every_operation_has_a_bfloat16_kernel_and_a_forward_derivative(monkeypatch: pytest.MonkeyPatch):
    """By the tables of torch's own tests; docs/scaling.md says what they leave open."""
    asked = {}
    for family, path in IN_BFLOAT16:
        with watched() as seen:
            found, _ = PATHS[path](Case(family, GPU, torch.bfloat16))()
        assert all(np.isfinite(x).all() for x in found)
        asked[family, path] = seen.operations
    narrow = {name for of_path in asked.values() for name, dtype in of_path if dtype is torch.bfloat16}
    dual = {name for name, dtype in asked[BY_HAND, "along a step"] if dtype is not None and dtype.is_floating_point}
    table = tables_of_torch(monkeypatch)
    lacking = {name for name in narrow if not any(torch.bfloat16 in of.dtypesIfCUDA for of in table(name))}
    assert {name for name in lacking if not is_of_others(name)} == set()
    lacking = {name for name in dual if not any(of.supports_forward_ad for of in table(name))}
    assert {name for name in lacking if not is_of_others(name)} == set()
    print(f"looked up: {len(narrow)} overloads in bfloat16, {len(dual)} along a step")


def is_of_others(name: str) -> bool:
    """Whether it only moves numbers, or is made of other operations, on any device."""
    return any(has_kernel_for(name, key) for key in OF_OTHERS)


def tables_of_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list]:
    """What `torch.testing._internal` has of an overload."""
    stub = types.ModuleType("expecttest")  # a library that torch's tests want, and not its tables
    stub.TestCase = unittest.TestCase
    monkeypatch.setitem(sys.modules, "expecttest", stub)
    from torch.testing._internal import common_cuda

    monkeypatch.setattr(common_cuda, "SM53OrLater", True)
    from torch.testing._internal.common_methods_invocations import op_db

    by_name: dict[str, list] = {}
    for of in op_db:
        for name in {of.name, of.name.rpartition(".")[2], of.aten_name}:
            by_name.setdefault(name, []).append(of)

    def found(overload: str) -> list:
        name = overload.partition("::")[2].partition(".")[0].rstrip("_")
        return by_name.get(KNOWN_AS.get(name, name)) or by_name.get(name.lstrip("_"), [])

    return found


# ---- planted faults ----------------------------------------------------------------------------------------------


def mask_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    pad_left = score.pad_left
    patch.setattr(score, "pad_left", lambda *of: (pad_left(*of)[0], pad_left(*of)[1].cpu()))


def index_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "on_device", lambda numbers, device: torch.tensor(numbers))


def numpy_of_the_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "cpu", lambda self: self)


def factory_without_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(score, "on_device", lambda numbers, device: torch.tensor(numbers))


def item_of_every_token(patch: pytest.MonkeyPatch) -> None:
    log_prob = Softmax.log_prob
    patch.setattr(Softmax, "log_prob", lambda self, ids: log_prob(self, torch.stack([i + 0 * i.item() for i in ids])))


FAULTS = [
    (mask_on_the_cpu, BY_HAND, "scoring", "same device"),
    (index_on_the_cpu, BY_AUTOGRAD, "rows", "same device"),
    (numpy_of_the_device, BY_HAND, "scoring", "to numpy"),
    (factory_without_device, BY_HAND, "scoring", "same device"),
    (item_of_every_token, BY_HAND, "scoring", None),
]


@pytest.mark.parametrize(("fault", "family", "path", "error"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_planted_faults_are_found(fault, family, path, error, monkeypatch: pytest.MonkeyPatch):
    work = PATHS[path](Case(family, GPU))
    work()
    fault(monkeypatch)
    if error is not None:
        with pytest.raises((RuntimeError, TypeError), match=error):
            work()
        return
    with watched() as seen:
        _, n = work()
    assert seen.waits["a number is read"] == sum(map(len, RESPONSES))
    assert seen.waits.total() > n
