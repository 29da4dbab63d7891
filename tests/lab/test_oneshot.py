"""The public names, and pruning inside someone's own training loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import UnknownNameError, UsageError


@pytest.mark.parametrize("name", secateur.__all__)
def test_every_public_name_is_there(name):
    assert getattr(secateur, name) is not None
    assert name in dir(secateur)


def test_the_public_names_are_told_to_type_checkers_once():
    import ast
    from pathlib import Path

    assert len(set(secateur.__all__)) == len(secateur.__all__)
    tree = ast.parse(Path(secateur.__file__).read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(secateur.__all__) <= typed


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="prune_everything"):
        _ = secateur.prune_everything


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 5)
    )


@pytest.mark.parametrize("optimizer_kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_whole_way_in_an_own_loop(tmp_path, optimizer_kind):
    """Train under a regularizer, cut with the optimizer carried along, fine-tune, save, load."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = torch.randn(64, 1, 8, 8)
        labels = (images.mean((1, 2, 3)) * 20).round().long().clamp(-2, 2) + 2
        model = classifier()
        extra = {"momentum": 0.9} if optimizer_kind is torch.optim.SGD else {}
        optimizer = optimizer_kind(model.named_parameters(), lr=0.01, **extra)
        loss_of = nn.functional.cross_entropy

        def steps(count: int, sparsifier: secateur.Sparsifier | None = None) -> float:
            for _ in range(count):
                loss = loss_of(model(images), labels) + (sparsifier.penalty() if sparsifier else 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if sparsifier:
                    sparsifier.after_step()
            return float(loss.detach())

        method = secateur.TargetedDropout(gamma=0.5, alpha=0.5, granularity="unit")
        with secateur.Sparsifier(model, method, steps=10, targets=secateur.find_targets(model, exclude=["@last"])) as s:
            steps(10, s)
        report = secateur.prune_units_(model, 0.5, images, multiple_of=1, optimizer=optimizer)
        assert model[0].out_channels == 8
        assert report.sparsity_got == 0.5
        assert report.pruned.params < report.dense.params
        assert "max |masked - cut|" in str(report)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in model.parameters()}
        for parameter in model.parameters():
            shapes = [v.shape for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.dim()]
            assert shapes
            assert set(shapes) == {parameter.shape}
        before = steps(1)
        assert steps(20) < before
    model.eval()
    with torch.random.fork_rng():
        file = secateur.save_pruned(
            tmp_path / "net.safetensors",
            model,
            builder=f"{__name__}:classifier",
            kwargs={},
            plan=report.plan,
            inputs=images,
        )
        again = secateur.load_pruned(file, allow_code=[__name__])
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_held_masks_in_an_own_loop():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = classifier()
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        masks = secateur.prune_weights(model, 0.75, targets=secateur.find_targets(model, exclude=["@last"]))
        assert masks.sparsity == 0.75
        with masks.hold(model, optimizer):
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(8, 1, 8, 8)).square().mean().backward()
                optimizer.step()
        assert int((model[0].weight == 0).sum()) == 3 * model[0].weight.numel() // 4


def test_units_are_rounded_up_to_multiples_where_the_layer_has_more():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))
        report = secateur.prune_units_(model, 0.75, torch.randn(16, 8))
    assert model[0].out_features == 16
    assert model[2].out_features == 2, "fewer than 16 units: cut as asked"
    assert report.sparsity_got < report.sparsity_asked


def test_masks_of_another_network_are_refused():
    masks = secateur.prune_weights(classifier(), 0.5)
    with pytest.raises(UsageError, match="another network"):
        masks.apply_(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnknownNameError):
        masks.apply_(nn.Linear(2, 2))
