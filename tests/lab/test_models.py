"""Networks by name: published sizes, seeded weights, rebuilding from JSON, and the errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import MissingExtraError, UnknownNameError, UsageError
from secateur.lab.models import CATALOG, build_model, resolve_builder
from secateur.lab.models.ddrop import Bottleneck, NarrowResNet
from secateur.lab.models.parts import FeatureScale
from secateur.registry import load_attribute


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _meta(name: str, num_classes: int, in_shape: tuple[int, int, int], kwargs: dict | None = None) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, num_classes=num_classes, in_shape=in_shape, kwargs=kwargs)


@pytest.mark.parametrize("name", CATALOG)
def test_every_network_maps_its_published_input_to_its_classes(name: str) -> None:
    info = CATALOG[name]
    model = _meta(name, info.num_classes, info.in_shape)
    with torch.device("meta"):
        assert model(torch.zeros(2, *info.in_shape)).shape == (2, info.num_classes)


def test_thesis_network_has_the_published_size() -> None:
    assert _count(_meta("thesis_cnn", 10, (3, 128, 128))) == 33_930_890


def test_targeted_dropout_resnet_has_the_published_weights_and_filters() -> None:
    model = _meta("td_resnet32", 10, (3, 32, 32))
    convs = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "stem"]
    assert sum(m.weight.numel() for m in convs) == 1_849_344
    assert sum(m.out_channels for m in convs) == 2_464


C100 = {"widths": [16, 32, 64, 128]}


@pytest.mark.parametrize(
    ("name", "classes", "kwargs", "dense", "pruned"),
    [
        ("ddrop_resnet18", 10, {}, 176_402, 54_378),
        ("ddrop_resnet34", 10, {}, 335_154, 100_188),
        ("ddrop_resnet50", 10, {}, 375_762, 108_395),
        ("ddrop_resnet18", 100, C100, 713_076, 228_700),
        ("ddrop_resnet34", 100, C100, 1_346_228, 416_524),
        ("ddrop_resnet50", 100, C100, 1_530_356, 470_154),
    ],
)
def test_ddrop_resnets_have_the_published_counts(
    name: str, classes: int, kwargs: dict, dense: int, pruned: int
) -> None:
    model = _meta(name, classes, (3, 32, 32), kwargs)
    assert _count(model) == dense
    assert isinstance(model, NarrowResNet)
    with torch.device("meta"):
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                _narrow_inside(block)
    assert _count(model) == pruned


def _narrow_inside(block: nn.Module) -> None:
    """Rebuild the inner convolutions of a block with int(0.3 n) channels; its output stays."""
    kept = int(0.3 * block.conv1.out_channels)
    chain = ["conv1", "conv2", "conv3"] if isinstance(block, Bottleneck) else ["conv1", "conv2"]
    for i, name in enumerate(chain):
        old = getattr(block, name)
        inputs = old.in_channels if i == 0 else kept
        outputs = old.out_channels if i == len(chain) - 1 else kept
        setattr(block, name, nn.Conv2d(inputs, outputs, old.kernel_size, bias=False))
        setattr(block, f"bn{i + 1}", nn.BatchNorm2d(outputs))


@pytest.mark.parametrize(
    ("name", "dense", "pruned"),
    [("ddrop_vgg11", 9_758_474, 1_172_827), ("ddrop_vgg13", 9_943_370, 1_189_243)],
)
def test_ddrop_vggs_have_the_published_counts(name: str, dense: int, pruned: int) -> None:
    assert _count(_meta(name, 10, (3, 32, 32))) == dense
    kept = [int(0.3 * width) for width in (64, 128, 256, 512, 512)]
    assert _count(_meta(name, 10, (3, 32, 32), {"widths": kept})) == pruned


@pytest.mark.parametrize(
    ("name", "dense", "pruned"),
    [("ddrop_vit_b_16", 86_604_520, 46_924_120), ("ddrop_swin_t", 28_306_018, 16_207_570)],
)
def test_ddrop_transformers_have_the_published_counts(name: str, dense: int, pruned: int) -> None:
    from torchvision.ops.misc import MLP

    model = _meta(name, 1000, (3, 224, 224))
    assert _count(model) == dense
    with torch.device("meta"):
        for mlp in [m for m in model.modules() if isinstance(m, MLP)]:
            names = [n for n, _ in mlp.named_children()]
            assert names == ["0", "scale", "1", "2", "3", "4"]
            first, last = mlp.get_submodule("0"), mlp.get_submodule("3")
            kept = first.out_features - int(0.7 * first.out_features)
            mlp.add_module("0", nn.Linear(first.in_features, kept))
            mlp.add_module("scale", FeatureScale(kept))
            mlp.add_module("3", nn.Linear(kept, last.out_features))
    assert _count(model) == pruned


def test_added_scale_changes_nothing_at_first() -> None:
    from torchvision.models import swin_t

    ours = build_model("ddrop_swin_t", num_classes=3, in_shape=(3, 32, 32)).eval()
    plain = swin_t(weights=None, num_classes=3).eval()
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith("scale.weight") for key in missing)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


SMALL = {
    "mlp": {"hidden": [7]},
    "digits_cnn": {"widths": [3, 4, 5]},
    "dropnet_c": {"widths": [2, 3, 4, 5], "hidden": 6},
    "resnet20": {"widths": [4, 6, 9]},
    "td_resnet32": {"widths": [2, 3, 4], "stem": 2, "units": 1},
    "vgg11": {"widths": [2, 3, 4, 5, 6]},
    "ddrop_resnet50": {"widths": [2, 3, 4, 5]},
}


@pytest.mark.parametrize("name", SMALL)
def test_resolved_builder_and_json_arguments_rebuild_the_network(name: str) -> None:
    model = build_model(name, num_classes=4, in_shape=(2, 32, 32), kwargs=SMALL[name], seed=5)
    builder, arguments = resolve_builder(name, 4, (2, 32, 32), SMALL[name])
    assert json.loads(json.dumps(arguments)) == arguments
    again = load_attribute(builder)(**arguments)
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), again.eval()(x))
    assert model(x).shape == (3, 4)


def test_defaults_are_written_out() -> None:
    _, arguments = resolve_builder("dropnet_c", 10, (3, 32, 32), {"hidden": 9})
    assert arguments == {
        "num_classes": 10,
        "in_shape": [3, 32, 32],
        "widths": [64, 64, 128, 128],
        "hidden": 9,
    }


@pytest.mark.parametrize("name", ["digits_cnn", "torchvision:squeezenet1_1"])
def test_weights_follow_the_seed_and_leave_the_global_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    shape = (3, 32, 32)
    first, same, other = (build_model(name, num_classes=3, in_shape=shape, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    states = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (first, same, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("name", "in_shape", "kwargs"),
    [
        ("torchvision:resnet18", (3, 32, 32), {"width_per_group": 64}),
        ("torchvision:vit_b_16", (3, 32, 32), {}),
        ("torchvision:fcn_resnet50", (3, 32, 32), {}),
    ],
)
def test_torchvision_networks_are_fitted_to_the_task(name: str, in_shape: tuple[int, int, int], kwargs: dict) -> None:
    model = _meta(name, 7, in_shape, kwargs)
    with torch.device("meta"):
        out = model.eval()(torch.zeros(1, *in_shape))
    assert (out["out"] if isinstance(out, dict) else out).shape[1] == 7


def test_timm_networks_are_fitted_to_the_task() -> None:
    pytest.importorskip("timm")
    model = build_model("timm:test_vit", num_classes=7, in_shape=(1, 32, 32))
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 7)
    with pytest.raises(UsageError, match=r"its arguments: .*depth"):
        build_model("timm:test_vit", num_classes=7, in_shape=(1, 32, 32), kwargs={"depht": 1})


def test_missing_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'secateur\[timm\]'"):
        resolve_builder("timm:resnet18", 10, (3, 32, 32))


def test_python_builders_need_leave_and_get_only_what_they_take() -> None:
    with pytest.raises(UsageError, match="did not allow"):
        build_model("python:torch.nn:Linear", num_classes=2, in_shape=(1, 1, 1))
    kwargs = {"in_features": 3, "out_features": 2}
    model = build_model(
        "python:torch.nn:Linear", num_classes=2, in_shape=(1, 1, 1), kwargs=kwargs, allow_code=["torch.nn"]
    )
    assert model.weight.shape == (2, 3)
    builder, arguments = resolve_builder("python:torch.nn:Linear", 2, (1, 1, 1), kwargs, allow_code=["torch"])
    assert builder == "torch.nn:Linear"
    assert load_attribute(builder)(**arguments).weight.shape == (2, 3)
    with pytest.raises(UsageError, match="needs in_features, out_features"):
        resolve_builder("python:torch.nn:Linear", 2, (1, 1, 1), allow_code=["torch"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("renset20", "resnet20"),
        ("torchvision:renset18", "torchvision:resnet18"),
        ("timm:renset18", "timm:resnet18"),
    ],
)
def test_unknown_names_list_the_nearest(name: str, nearest: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UnknownNameError, match=f"nearest: {nearest},"):
        resolve_builder(name, 10, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet20", {"wdths": [1]}, "valid: widths"),
        ("resnet20", {"num_classes": 3}, "valid: widths"),
        ("resnet20", {"widths": [8, 4, 16]}, "none smaller"),
        ("resnet20", {"widths": [8, 16]}, "expected 3"),
        ("mlp", {"hidden": [0]}, "at least 1"),
        ("mlp", {"hidden": "40"}, "list of integers"),
        ("mlp", {"hidden": nn.ReLU()}, "plain JSON"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "takes no argument"),
        ("torchvision:resnet18", {"groups_": 1}, "nearest: groups"),
        ("torchvision:resnet18", {"groups": 2}, "cannot be built"),
    ],
)
def test_bad_arguments_are_named(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(name, num_classes=10, in_shape=(3, 32, 32), kwargs=kwargs)


@pytest.mark.parametrize(
    ("name", "classes", "shape", "message"),
    [
        ("mlp", 0, (1, 8, 8), "num_classes"),
        ("mlp", True, (1, 8, 8), "num_classes"),
        ("mlp", 2, (8, 8), "in_shape"),
        ("vgg11", 2, (3, 16, 16), "at least 32x32"),
        ("torchvision:resnet18", 2, (1, 32, 32), "expected 3 "),
        ("ddrop_vit_b_16", 2, (3, 30, 30), "multiple of 16"),
    ],
)
def test_impossible_tasks_are_refused(name: str, classes: int, shape: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(name, num_classes=classes, in_shape=shape)


def test_the_catalog_lists_without_torch() -> None:
    code = "import sys, secateur.lab.models.catalog; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_digits_network_learns() -> None:
    from secateur.lab.data import Loader, load_data

    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=10, in_shape=data.in_shape)
    loader = Loader(data.train_images, data.train_labels, 64, seed=0, normalize=data.normalize)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(6 * loader.steps_per_epoch):
        images, labels = loader.batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval()(data.normalize(data.test_images)).argmax(1) == data.test_labels
    assert right.float().mean() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("name", "correct"), [("resnet20", 9173), ("resnet56", 9339)])
def test_published_cifar_weights_give_their_published_accuracy(name: str, correct: int) -> None:
    """Weights trained by others load strictly and classify as many of the 10,000 test images as they report."""
    from secateur.lab.data import evaluation_batches, load_data

    root = os.environ.get("SECATEUR_DATA_DIR")
    files = sorted(Path(root).glob(f"models/akamaster_cifar10/{name}-*.th")) if root else []
    if not files:
        pytest.skip("needs SECATEUR_DATA_DIR with cifar10/ and models/akamaster_cifar10/")
    normalize = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    data = load_data("cifar10", normalize=normalize)
    model = build_model(name, num_classes=10, in_shape=data.in_shape).eval()
    state = torch.load(files[0], map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()}, strict=True)
    right = 0
    with torch.inference_mode():
        batches = evaluation_batches(data.test_images, data.test_labels, 250, normalize=data.normalize)
        for images, labels in batches:
            right += int((model(images).argmax(1) == labels).sum())
    # Another convolution algorithm may tip an image that lies on the border.
    assert abs(right - correct) <= 3
