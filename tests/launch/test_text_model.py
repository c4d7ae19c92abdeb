from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from text_model import GPT, Text, read_text

LETTERS = "abcdefghij" * 80


def test_validation_windows_predict_each_held_out_character_once_and_divide_among_ranks() -> None:
    text = Text(LETTERS)
    windows = text.validation_windows(50, context=8, ranks=3)
    assert windows.shape == (9, 9)
    assert windows[:, 1:].flatten().tolist() == text.held_out[1:73].tolist()


def test_training_samples_leave_out_what_is_held_out() -> None:
    text = Text("ab" * 350 + "yz" * 50)
    samples = text.sample(batch=500, context=7, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (500, 8)
    assert set(samples.flatten().tolist()) == {0, 1}
    assert set(text.held_out.tolist()) == {2, 3}


def test_more_validation_tokens_than_held_out_are_refused() -> None:
    with pytest.raises(ValueError, match="200 validation tokens do not fit into the 100 held out"):
        Text(LETTERS).validation_windows(200, context=8, ranks=2)


def test_text_that_ships_with_python_suffices_for_48000_validation_tokens() -> None:
    text = read_text(None)
    assert text.validation_windows(48_000, context=64, ranks=2).shape[0] * 64 >= 48_000


def test_text_of_a_file_is_known_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(LETTERS, encoding="utf-8")
    assert read_text(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_prediction_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary=11, context=6, width=16, layers=2, heads=2, dropout=0.0).eval()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = tokens.clone()
    changed[0, 4] = 9
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4], after[4])
