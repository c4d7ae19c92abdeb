"""The tree of errors."""

from __future__ import annotations

import pickle

import pytest

import gradckpt_dist
from gradckpt_dist import AgreementError, GradckptError

NAMES = [name for name in gradckpt_dist.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("name", NAMES)
def test_one_tree(name: str) -> None:
    assert issubclass(getattr(gradckpt_dist, name), GradckptError)


def test_agreement_error_names_rank_and_step_and_survives_a_pickle() -> None:
    for error in (AgreementError("the cause", rank=3, step=7), AgreementError("the cause")):
        again = pickle.loads(pickle.dumps(error))
        assert (again.reason, again.rank, again.step) == (error.reason, error.rank, error.step)
        assert str(again) == str(error)
    assert str(AgreementError("the cause", rank=3, step=7)) == "agreement failed (rank 3, step 7): the cause"
    assert str(AgreementError("the cause")) == "agreement failed (step 0): the cause"
