"""Problems of reasoning-gym, and its scorers as the verifier."""

import json

import pytest
import reasoning_gym

from gradprobe.common.errors import InputError
from gradprobe.problems.data_set import load_problems
from gradprobe.problems.gym import ENTRY
from gradprobe.problems.verifiers import RunningVerifier, load_verifier

SUMS = "gym:chain_sum:min_terms=2,max_terms=2,max_digits=1,size=20,seed=3"


def test_problems_are_made_up_anew_and_the_same():
    made = load_problems(SUMS)
    assert made == load_problems(SUMS)
    assert len({problem.id for problem in made.problems}) == len(made.problems) == 20
    assert made.sha256 != load_problems(SUMS.replace("seed=3", "seed=4")).sha256
    for problem in made.problems:
        assert eval(problem.prompt.split(":")[1].rstrip("= ")) == int(problem.ground_truth)
    assert len(load_problems("gym:countdown").problems) == 500
    assert load_problems("gym:countdown:size=7,seed=0").problems == load_problems("gym:countdown:size=7").problems


def test_each_problem_is_made_up_once(monkeypatch):
    made = []
    kind = type(reasoning_gym.create_dataset("chain_sum"))
    make = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, index: made.append(index) or make(self, index))
    assert load_problems(SUMS.replace("seed=3", "seed=5")).n_rows == 20
    assert made == list(range(20))


def test_its_own_scorer_is_the_verifier():
    entries = load_problems("gym:countdown:size=5", answer_key=ENTRY).problems
    with RunningVerifier(load_verifier("gym")) as verifier:
        for problem in entries:
            answer = json.loads(problem.ground_truth)["answer"]
            # Another way to write the sum is as right, which the text of the answer would not tell.
            for response, is_right in [
                (f"\\boxed{{{answer}}}", True),
                (f"\\boxed{{0 + ({answer})}}", False),  # 0 is not among the numbers
                (f"\\boxed{{({answer})}}", True),
                (f"<answer>{answer}</answer>", True),
                (f"<answer>{answer}</answer> \\boxed{{1}}", False),
                (answer, False),
            ]:
                assert verifier.judge(response, problem.ground_truth).correct is is_right, response
        no_entry = verifier.judge("\\boxed{4}", "4")
        assert no_entry.correct is None
        assert "no entry of reasoning-gym" in no_entry.error


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("gym:", "Dataset '' not registered"),
        ("gym:no_such", "Dataset 'no_such' not registered"),
        ("gym:chain_sum:sise=3", "unexpected keyword argument 'sise'"),
        ("gym:chain_sum:min_terms=9", "max_terms must be >= min_terms"),
        ("gym:chain_sum:size", "not of the form"),
        ("gym:chain_sum:size=open('f')", "malformed node"),
        ("gym:chain_sum:size='many'", "TypeError"),
    ],
)
def test_what_is_no_such_data_set(source, complaint):
    with pytest.raises(InputError, match=r"`dataset` gym:") as error:
        load_problems(source)
    assert complaint in str(error.value)
