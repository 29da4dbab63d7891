"""Data in memory: sources, checks, splits, and batches that depend on the step number alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.seeds import keyed_generator, keyed_numpy, keyed_seed
from secateur.errors import DataError, UnknownNameError, UsageError
from secateur.lab.data import Loader, Normalize, evaluation_batches, load_data
from secateur.lab.data.dataset import stratified
from secateur.lab.data.loader import _mirror, crop_flip


def _write(folder: Path, **changed: np.ndarray) -> Path:
    """A folder of plain arrays: 40 + 20 images of 6x5, 4 classes; `changed` replaces arrays by name."""
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8),
        "train_labels": np.arange(40) % 4,
        "test_images": rng.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8),
        "test_labels": np.arange(20) % 4,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (arrays | changed).items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    return folder


# Seeds


def test_streams_depend_on_seed_and_keys_only() -> None:
    seeds = [keyed_seed(*k) for k in [(0,), (1,), (0, 1), (0, "1"), (0, "a", "b"), (0, "ab"), (0, "b", "a")]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)
    before = torch.random.get_rng_state()
    first, again = (torch.rand(4, generator=keyed_generator(3, "x")) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())
    assert keyed_numpy(3, "x").integers(1 << 60) == keyed_numpy(3, "x").integers(1 << 60)


@pytest.mark.parametrize("keys", [(True,), (0, 1.0), (0, None), ("a",)])
def test_keys_that_are_no_keys_are_refused(keys: tuple) -> None:
    with pytest.raises(UsageError):
        keyed_seed(*keys)


# Sources


def test_digits_are_split_alike_every_time_and_by_class() -> None:
    data, again = load_data("digits"), load_data("digits", seed=9)
    assert data.fingerprint == again.fingerprint
    assert (len(data.train_labels), len(data.test_labels)) == (1437, 360)
    assert data.in_shape == (1, 8, 8)
    counts = data.test_labels.bincount(minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 38
    x = data.normalize(data.train_images)
    assert abs(float(x.mean())) < 1e-4
    assert abs(float(x.std()) - 1) < 1e-3


@pytest.mark.parametrize("layout", ["hwc", "chw", "float", "gray"])
def test_plain_arrays_of_any_usual_layout(tmp_path: Path, layout: str) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
    stored = {
        "hwc": images,
        "chw": images.transpose(0, 3, 1, 2),
        "float": images / 255.0,
        "gray": images[..., 0],
    }[layout]
    _write(tmp_path / "mine", train_images=stored, test_images=stored[:20])
    data = load_data("mine", data_dir=tmp_path)
    expected = images.transpose(0, 3, 1, 2)[:, : data.in_shape[0]]
    scale = 1.0 if layout == "float" else 255.0
    assert np.allclose(data.train_images.numpy() * (255.0 / scale), expected, atol=1e-4)
    x = data.normalize(data.train_images)
    assert x.dtype == torch.float32
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(data.in_shape[0]), atol=1e-4)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(data.in_shape[0]), atol=1e-4)
    assert data.num_classes == 4


def test_known_names_may_be_folders_of_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    _write(tmp_path / "cifar10", train_images=images, test_images=images[:20])
    monkeypatch.setenv("SECATEUR_DATA_DIR", str(tmp_path))
    data = load_data("cifar10")
    assert data.num_classes == 10
    assert data.normalize.mean == (0.4914, 0.4822, 0.4465)
    assert np.array_equal(data.train_images[7].numpy(), images[7].transpose(2, 0, 1))
    other = load_data("cifar10", normalize=((0.5,) * 3, (0.25,) * 3))
    assert other.fingerprint != data.fingerprint
    assert torch.allclose(other.normalize(data.train_images), data.train_images / 255.0 / 0.25 - 2, atol=1e-5)


def test_mnist_files_are_read_through_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    for part, stem in (("train", "train"), ("test", "t10k")):
        count = 30 if part == "train" else 10
        head = b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28))
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(head + images[:count].tobytes())
        head = b"".join(n.to_bytes(4, "big") for n in (2049, count))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(head + labels[:count].tobytes())
    data = load_data("mnist", data_dir=tmp_path)
    assert np.array_equal(data.train_images[:, 0].numpy(), images)
    assert data.test_labels.tolist() == list(range(10))
    assert data.normalize.std == (0.3081,)


def _picture(path: Path, size: tuple[int, int], value: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


def test_image_folders_are_decoded_once(tmp_path: Path) -> None:
    for part, extra in (("train", 2), ("val", 1), ("test", 1)):
        for label, value in (("cat", 10), ("dog", 200)):
            for i in range(extra):
                _picture(tmp_path / part / label / f"{i}.png", (12 + i, 9), value)
    with pytest.raises(DataError, match="set image_size"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), image_size=8)
    assert data.in_shape == (3, 8, 8)
    assert data.train_labels.tolist() == [0, 0, 1, 1]
    assert data.train_images[:, 0].flatten(1).float().mean(1).tolist() == [10, 10, 200, 200]
    assert (len(data.validation_labels), len(data.test_labels)) == (2, 2)
    with pytest.raises(UsageError, match="own val"):
        load_data(str(tmp_path), image_size=8, validation=0.5)
    with pytest.raises(DataError, match="GiB decoded"):
        load_data(str(tmp_path), image_size=8, memory_limit=100)
    (tmp_path / "train" / "dog" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        load_data(str(tmp_path), image_size=8)


def test_image_folders_must_have_the_same_classes(tmp_path: Path) -> None:
    _picture(tmp_path / "train" / "cat" / "a.png", (8, 8), 1)
    with pytest.raises(DataError, match="neither test/ nor val/"):
        load_data(str(tmp_path))
    _picture(tmp_path / "val" / "dog" / "a.png", (8, 8), 1)
    with pytest.raises(DataError, match="differ: cat, dog"):
        load_data(str(tmp_path))
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(DataError, match="cat"):
        load_data(str(tmp_path))


# Errors


def test_a_data_folder_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_DATA_DIR", raising=False)
    with pytest.raises(DataError, match=r"data_dir.*SECATEUR_DATA_DIR"):
        load_data("cifar10")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_files_say_where_and_how(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"looked for .*--data-dir.*download=True"):
        load_data(name, data_dir=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "error"), [("mnist", RuntimeError("Error downloading x:\nno\nroute")), ("cifar10", OSError("no route"))]
)
def test_a_download_that_fails_is_not_advised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    with pytest.raises(DataError, match=r"downloading failed \(.*no route\); try again, or put") as caught:
        load_data(name, data_dir=tmp_path, download=True)
    assert "--download" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_said_before_a_data_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_DATA_DIR", raising=False)
    with pytest.raises(UnknownNameError, match=r'unknown data set "cifar"; nearest: cifar10.*SECATEUR_DATA_DIR'):
        load_data("cifar")


def test_unknown_names_list_sets_and_folders(tmp_path: Path) -> None:
    _write(tmp_path / "my_pictures")
    with pytest.raises(UnknownNameError, match="my_pictures"):
        load_data("my_picture", data_dir=tmp_path)
    with pytest.raises(UnknownNameError, match="cifar10"):
        load_data("cifar", data_dir=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_data(str(tmp_path / "nothing"))


OBJECTS = np.array([{"a": 1}] * 40, dtype=object)
NAN = np.zeros((40, 6, 5, 3), np.float32)
NAN[17, 2, 2, 1] = np.nan


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_labels": np.array([0] * 13 + [4] + [9] * 6)}, r"max 9, expected 0 <= label < 4 .*index 13: 4"),
        ({"train_labels": np.arange(40) - 1}, r"min -1.*index 0: -1"),
        ({"train_labels": np.arange(39) % 4}, "39 labels for 40 images"),
        ({"train_labels": np.zeros(40)}, "float64, expected integers"),
        ({"train_labels": np.zeros((40, 4), int)}, "one number an image"),
        ({"train_labels": OBJECTS}, "plain numbers"),
        ({"train_images": NAN, "test_images": NAN[:16]}, "image 17 has NaN"),
        ({"train_images": np.zeros((40, 6, 5, 3), np.int32)}, "expected uint8 or float"),
        ({"train_images": np.zeros((40, 30), np.uint8)}, r"\(40, 30\), expected"),
        ({"train_images": np.zeros((40, 3, 5, 3), np.uint8)}, "cannot tell the channels"),
        ({"train_images": np.zeros((0, 6, 5, 3), np.uint8)}, "empty"),
        ({"test_images": np.zeros((20, 6, 6, 3), np.uint8)}, r"\(3, 6, 6\), expected \(3, 6, 5\)"),
        ({"test_images": np.zeros((20, 6, 5, 3), np.float32)}, "same type"),
    ],
)
def test_malformed_arrays_are_refused(tmp_path: Path, changed: dict, message: str) -> None:
    folder = _write(tmp_path / "mine", **changed)
    with pytest.raises(DataError, match=message):
        load_data(str(folder))


def test_missing_and_truncated_arrays_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "mine")
    whole = (folder / "test_images.npy").read_bytes()
    (folder / "test_images.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"test_images\.npy: not a readable array"):
        load_data(str(folder))
    (folder / "test_images.npy").unlink()
    with pytest.raises(DataError, match=r"missing test_images\.npy"):
        load_data(str(folder))


def test_known_sets_check_shape_and_classes(tmp_path: Path) -> None:
    _write(tmp_path / "cifar10")
    with pytest.raises(DataError, match=r"expected \(3, 32, 32\)"):
        load_data("cifar10", data_dir=tmp_path)
    with pytest.raises(DataError, match="labels out of range"):
        load_data(str(_write(tmp_path / "mine")), num_classes=3)


# Splits


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 3))
def test_stratified_draws_exactly_and_in_proportion(values: list[int], share: float, seed: int) -> None:
    labels = torch.tensor(values)
    count = int(share * len(values))
    drawn, rest = stratified(labels, count, seed, "test")
    assert len(drawn) == count
    assert sorted([*drawn.tolist(), *rest.tolist()]) == list(range(len(values)))
    exact = labels.bincount() * count / len(values)
    assert ((labels[drawn].bincount(minlength=len(exact)) - exact).abs() < 1 + 1e-6).all()
    assert torch.equal(drawn, stratified(labels, count, seed, "test")[0])


def test_validation_comes_from_training_and_leaves_the_test_set_alone() -> None:
    whole = load_data("digits")
    held = load_data("digits", validation=137)
    share = load_data("digits", validation=0.1)
    assert (len(held.train_labels), len(held.validation_labels)) == (1300, 137)
    assert len(share.validation_labels) == 143
    assert torch.equal(held.test_images, whole.test_images)
    together = torch.cat([held.train_images, held.validation_images]).flatten(1)
    assert sorted(together.tolist()) == sorted(whole.train_images.flatten(1).tolist())
    assert held.normalize == whole.normalize
    fingerprints = [load_data("digits", validation=137, seed=s).fingerprint for s in (0, 0, 1)]
    assert fingerprints[0] == fingerprints[1] == held.fingerprint != fingerprints[2]


def test_subsets_leave_the_validation_set_alone() -> None:
    held = load_data("digits", validation=0.2)
    small = load_data("digits", validation=0.2, subset=100, test_subset=50)
    assert torch.equal(small.validation_images, held.validation_images)
    assert (len(small.train_labels), len(small.test_labels)) == (100, 50)
    assert small.train_labels.bincount().min() >= 9


@pytest.mark.parametrize(
    "asked",
    [
        {"validation": 1.0},
        {"validation": -1},
        {"validation": 1437},
        {"validation": True},
        {"subset": 0},
        {"subset": 2000},
        {"test_subset": 361},
        {"normalize": ((0.5,), (0.0,))},
    ],
)
def test_impossible_splits_are_refused(asked: dict) -> None:
    with pytest.raises(UsageError):
        load_data("digits", **asked)


# Batches


def _loader(**changed: object) -> Loader:
    images = torch.arange(23 * 2 * 8 * 8, dtype=torch.float32).view(23, 2, 8, 8).remainder(251).to(torch.uint8)
    arguments = {"normalize": Normalize((0.5, 0.4), (0.25, 0.2), 255.0), "augment": "crop_flip"} | changed
    return Loader(images, torch.arange(23), 5, 7, **arguments)


def test_any_step_can_be_made_again_in_any_order() -> None:
    straight, resumed = _loader(), _loader()
    batches = [straight.batch(step) for step in range(12)]
    for step in (11, 3, 7, 0):
        images, labels = resumed.batch(step)
        assert torch.equal(images, batches[step][0])
        assert torch.equal(labels, batches[step][1])
    before = torch.random.get_rng_state()
    straight.batch(4)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 5), (True, 4)])
def test_an_epoch_shows_every_image_once(drop_last: bool, steps: int) -> None:
    loader = _loader(drop_last=drop_last)
    assert loader.steps_per_epoch == steps
    epochs = [torch.cat([loader.batch(e * steps + s)[1] for s in range(steps)]) for e in range(2)]
    for seen in epochs:
        assert len(set(seen.tolist())) == len(seen) == (20 if drop_last else 23)
    assert not torch.equal(*epochs)
    plain = _loader(shuffle=False, augment="none")
    assert plain.batch(0)[1].tolist() == [0, 1, 2, 3, 4]


def test_batches_are_normalized_and_the_stored_images_stay() -> None:
    loader = _loader(augment="none")
    stored = loader.images.clone()
    images, labels = loader.batch(2)
    mean, std = torch.tensor([0.5, 0.4]).view(2, 1, 1), torch.tensor([0.25, 0.2]).view(2, 1, 1)
    assert torch.allclose(images, (stored[labels] / 255.0 - mean) / std, atol=1e-5)
    whole = list(evaluation_batches(stored, loader.labels, 10, normalize=loader.normalize))
    assert [len(y) for _, y in whole] == [10, 10, 3]
    assert torch.equal(torch.cat([y for _, y in whole]), loader.labels)
    floats = stored.float()
    for _ in evaluation_batches(floats, loader.labels, 10, normalize=loader.normalize):
        pass
    assert torch.equal(floats, stored.float())
    assert torch.equal(loader.images, stored)


def test_loader_refuses_what_it_cannot_give() -> None:
    images, labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UnknownNameError, match="crop_flip"):
        Loader(images, labels, 2, 0, augment="crop_flp")
    for arguments in ((images, labels[:2], 2), (images[:0], labels[:0], 2), (images, labels, 0)):
        with pytest.raises(UsageError):
            Loader(*arguments, 0)
    with pytest.raises(UsageError, match="drop_last"):
        Loader(images, labels, 4, 0, drop_last=True)
    with pytest.raises(UsageError, match="step"):
        Loader(images, labels, 2, 0).batch(-1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 8), (2, 7, 5)])
def test_crop_flip_gives_one_of_torchvisions_results_for_every_image(shape: tuple, dtype: torch.dtype) -> None:
    """Each output is the image padded, cut at some of the 81 offsets, and perhaps flipped: nothing else."""
    _, height, width = shape
    images = torch.randint(1, 250, (40, *shape), generator=keyed_generator(0, "images")).to(dtype)
    out = crop_flip(images, keyed_numpy(0, "crop"))
    assert out.dtype == dtype
    assert out.shape == images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    places = []
    for before, after in zip(padded, out, strict=True):
        cuts = {
            (top, left, flip): cut.flip(-1) if flip else cut
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            for cut in [before[:, top : top + height, left : left + width]]
        }
        matching = [place for place, cut in cuts.items() if torch.equal(cut, after)]
        assert matching
        places.append(matching[0])
    assert len(set(places)) > 20


def test_crop_flip_has_torchvisions_distribution() -> None:
    """162 equally likely outcomes, as `RandomCrop(8, padding=4)` and `RandomHorizontalFlip()` have.

    Chi-square with 161 degrees of freedom: mean 161, deviation 17.9; 250 is 5 deviations off.
    """
    from torchvision.transforms import v2

    draws = 40_000
    # One bright pixel right of the middle: where it lands tells the offsets, a second one tells the flip.
    image = torch.zeros(1, 17, 17, dtype=torch.uint8)
    image[0, 8, 8], image[0, 8, 9] = 2, 1
    ours = crop_flip(image.expand(draws, -1, -1, -1), keyed_numpy(1, "distribution"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs_transform = v2.Compose([v2.RandomCrop(17, padding=4), v2.RandomHorizontalFlip()])
        theirs = torch.stack([theirs_transform(image) for _ in range(4_000)])
    counts, their_counts = _outcomes(ours), _outcomes(theirs)
    assert set(their_counts) <= set(counts)
    assert len(counts) == 162
    expected = draws / 162
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 250
    their_expected = 4_000 / 162
    assert sum((their_counts.get(k, 0) - their_expected) ** 2 / their_expected for k in counts) < 250


def _outcomes(images: torch.Tensor) -> dict[tuple[int, bool], int]:
    flat = images.flatten(1)
    bright, second = (flat == 2).int().argmax(1), (flat == 1).int().argmax(1)
    found: dict[tuple[int, bool], int] = {}
    for place, flipped in zip(bright.tolist(), (second < bright).tolist(), strict=True):
        found[place, flipped] = found.get((place, flipped), 0) + 1
    return found


@pytest.mark.parametrize("width", [1, 7, 8, 24, 32])
def test_mirror_reverses_the_last_axis(width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 4, width), dtype=np.uint8)
    assert np.array_equal(_mirror(pixels), pixels[..., ::-1])
