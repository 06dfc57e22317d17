import copy

import pytest
import torch

from mvat.models import Manner
from train import command
from train.polarity import start_upright
from train.synthetic import prepare_synthetic

ARGUMENTS = ["--model.arguments", "{hidden: 6, depth: 1}", "--data.segment_seconds", "0.25"]


@pytest.mark.parametrize("upright", [True, False])
def test_a_network_starts_with_the_sign_of_the_speech_and_is_else_as_it_was(upright):
    model = Manner(hidden=6, depth=1)
    clean = 0.1 * torch.randn(3, 1, 2000)
    noisy = clean + 0.01 * torch.randn_like(clean)
    last = model.manner_block.out_conv
    with torch.no_grad():
        estimate = copy.deepcopy(model).train()(noisy)
        if ((estimate * clean).sum() > 0) != upright:
            for parameter in last.parameters():
                parameter.neg_()
    before = copy.deepcopy(model.state_dict())
    assert start_upright(model, clean, noisy) is not upright
    assert (copy.deepcopy(model).train()(noisy) * clean).sum() > 0
    turned = {f"manner_block.out_conv.{name}" for name, _ in last.named_parameters()} if not upright else set()
    for name, value in model.state_dict().items():
        assert torch.equal(value, -before[name] if name in turned else before[name]), name


def test_a_run_starts_upright_or_from_given_weights(tmp_path, monkeypatch, capsys):
    prepare_synthetic(tmp_path / "data", train_minutes=0.1, valid_minutes=0.05, test_minutes=0.05, progress=False)
    made, turned = [], []
    monkeypatch.setattr(command.Solver, "__init__", lambda self, config, model, *rest: made.append(model))
    monkeypatch.setattr(command.Solver, "fit", lambda self: [])
    monkeypatch.setattr(command, "start_upright", lambda model, clean, noisy: turned.append(clean.shape))
    arguments = ["--data.path", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *ARGUMENTS]
    assert command.main(arguments, "test", "teacher") == 0
    assert turned == [(4, 1, 4000)]

    Manner(hidden=6, depth=1).save_pretrained(tmp_path / "start")
    start = Manner.from_pretrained(tmp_path / "start").state_dict()
    assert command.main([*arguments, "--model.weights", str(tmp_path / "start")], "test", "teacher") == 0
    assert len(turned) == 1 and all(torch.equal(value, start[name]) for name, value in made[-1].state_dict().items())

    Manner(hidden=8, depth=1).save_pretrained(tmp_path / "other")
    assert command.main([*arguments, "--model.weights", str(tmp_path / "other")], "test", "teacher") == 2
    error = capsys.readouterr().err
    assert "model.weights" in error and "hidden: 6 and 8" in error and error.count("\n") == 1
