"""The examples, run small: every way to run the layers trains the same model, and a resumed run is the same run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = (
    "--layers 3 --width 16 --heads 2 --context 8 --batch 16 --steps 6 --dtype float64 --device cpu --sample 5"
).split()
WAYS = {
    "plain": ["--plain"],
    "scan_layers": ["--compile", "off"],
    "scan_layers, aot_eager": ["--compile", "aot_eager"],
    "scan_layers, remat": ["--compile", "off", "--remat", "--policy", "dots_saveable"],
    "scan_layers, remat of segments": ["--compile", "off", "--remat", "--every", "3"],
    "stack": ["--stack", "--compile", "off"],
    "stack, aot_eager": ["--stack", "--compile", "aot_eager"],
    "stack, remat": ["--stack", "--compile", "off", "--remat"],
}
LAYOUTS = ("plain", "scan_layers", "stack")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train_gpt = load("train_gpt")
ensemble_digits = load("ensemble_digits")


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = train_gpt.pydoc_data.topics
    monkeypatch.setattr(topics, "topics", dict(list(topics.topics.items())[:4]))


def train(way: str, out: Path, *extra: str) -> Any:
    return train_gpt.main([*SMALL, *WAYS[way], "--out", str(out), *extra])


def resume(way: str, out: Path) -> Any:
    return train_gpt.main(["--resume", "--device", "cpu", "--sample", "5", *WAYS[way], "--out", str(out)])


def assert_same_curves(run: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=tolerance)
    assert [step for step, _ in run.val] == [step for step, _ in expected.val]
    assert [loss for _, loss in run.val] == pytest.approx([loss for _, loss in expected.val], rel=tolerance)


@pytest.mark.parametrize("dropout", ["0", "0.3"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_every_way_to_run_the_layers_has_the_losses_of_the_plain_loop(way: str, dropout: str, tmp_path: Path) -> None:
    plain = train("plain", tmp_path / "plain", "--dropout", dropout)
    run = train(way, tmp_path / "lifted", "--dropout", dropout)
    assert len(plain.losses) == 6 and plain.losses[-1] < plain.losses[0]
    assert_same_curves(run, plain)
    assert run.sample == plain.sample


@pytest.mark.parametrize("way", LAYOUTS)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(way: str, tmp_path: Path) -> None:
    whole = train(way, tmp_path / "whole", "--dropout", "0.3")
    stopped = train(way, tmp_path / "parts", "--dropout", "0.3", "--stop", "4")
    assert stopped.step == 4
    assert stopped.losses == whole.losses[:4]
    resumed = resume(way, tmp_path / "parts")
    assert resumed.losses == whole.losses
    assert resumed.val == whole.val
    assert resumed.sample == whole.sample


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_a_checkpoint_of_one_layout_goes_on_in_another(before: str, after: str, tmp_path: Path) -> None:
    whole = train("plain", tmp_path / "whole", "--dropout", "0.3")
    train(before, tmp_path / "parts", "--dropout", "0.3", "--stop", "4")
    resumed = resume(after, tmp_path / "parts")
    assert_same_curves(resumed, whole)


def test_a_checkpoint_has_the_keys_of_a_module_list(tmp_path: Path) -> None:
    kept = {}
    for way in LAYOUTS:
        run = train(way, tmp_path / way, "--stop", "1")
        kept[way] = torch.load(tmp_path / way / "checkpoint.pt")
        assert ("blocks.0.qkv.weight" in run.model.state_dict()) == (way != "stack")
    for part in ("model", "optimizer"):
        shapes = {way: torch.utils._pytree.tree_map(lambda t: t.shape, kept[way][part]) for way in LAYOUTS}
        assert shapes["scan_layers"] == shapes["plain"] == shapes["stack"]
    assert "blocks.2.down.weight" in kept["stack"]["model"]


def test_bfloat16_trains_close_to_float32(tmp_path: Path) -> None:
    runs = [train("scan_layers", tmp_path / dtype, "--dtype", dtype) for dtype in ("float32", "bfloat16")]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-2)


def test_resuming_refuses_another_recipe(tmp_path: Path) -> None:
    train("plain", tmp_path, "--stop", "1")
    with pytest.raises(SystemExit, match="--width 32: the run to resume has 16"):
        train_gpt.main(["--resume", "--plain", "--width", "32", "--out", str(tmp_path)])


@pytest.mark.parametrize("flags", ["--plain --remat", "--plain --stack", "--stack --every 2", "--plain --lengths 2 3"])
def test_flags_that_contradict_each_other_are_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_gpt.main(flags.split())
    assert "--plain goes without" in capsys.readouterr().err


def test_a_missing_matplotlib_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train("plain", tmp_path)
    assert "loss.png not drawn: matplotlib is missing" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


ENSEMBLE = "--members 3 --width 16 --batch 16 --dtype float64 --device cpu".split()


def test_an_ensemble_without_dropout_equals_the_loop() -> None:
    data = ensemble_digits.Digits.synthetic(images=200)
    lifted, loop = ensemble_digits.main([*ENSEMBLE, "--epochs", "2", "--dropout", "0"], data)
    torch.testing.assert_close(lifted.logits, loop.logits, rtol=1e-8, atol=1e-8)
    assert lifted.accuracy.shape == (3,)
    assert lifted.ensemble == loop.ensemble


def test_an_ensemble_with_dropout_learns() -> None:
    data = ensemble_digits.Digits.synthetic(images=400)
    lifted, loop = ensemble_digits.main([*ENSEMBLE, "--epochs", "12", "--dropout", "0.1", "--lr", "1e-2"], data)
    assert lifted.accuracy.min() > 0.6 and loop.accuracy.min() > 0.6
    assert not torch.equal(lifted.logits[0], lifted.logits[1])
    assert "members" in str(lifted)


def test_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        ensemble_digits.main([])
