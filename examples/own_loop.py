"""Your own training loop: train under Targeted Dropout, cut half of the units, go on training, save, reload.

Run: python examples/own_loop.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from secateur.lab.data import load_data


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def main(folder: Path, epochs: int = 8, batch: int = 64) -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    x, y = data.normalize(data.train_images), data.train_labels
    test = data.normalize(data.test_images), data.test_labels
    build = {"hidden": [128, 64], "num_classes": data.num_classes, "in_shape": list(data.in_shape)}
    from secateur.lab.models.small import mlp

    model = mlp(**build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = epochs * (len(y) // batch)
    targets = sc.find_targets(model, exclude=["@last"])
    regularizer = sc.TargetedDropout(gamma=0.5, alpha=0.5, granularity="unit")

    def epoch(sparsifier: sc.Sparsifier | None) -> None:
        for chosen in torch.randperm(len(y))[: len(y) // batch * batch].split(batch):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            if sparsifier is not None:
                loss = loss + sparsifier.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if sparsifier is not None:
                sparsifier.after_step()

    with sc.Sparsifier(model, regularizer, steps=steps, targets=targets) as sparsifier:
        for _ in range(epochs):
            epoch(sparsifier)
    print(f"dense:      {accuracy(model, *test):.3f}")
    report = sc.prune_units_(model, 0.5, test[0], optimizer=optimizer)
    print(f"cut:        {accuracy(model, *test):.3f}  ({report})")
    epoch(None)  # the optimizer came along: momentum of what is left is still there
    print(f"fine-tuned: {accuracy(model, *test):.3f}")
    path = sc.save_pruned(
        folder / "digits.safetensors",
        model,
        builder="secateur.lab.models.small:mlp",
        kwargs=build,
        plan=report.plan,
        inputs=test[0][:2],
    )
    print(f"reloaded:   {accuracy(sc.load_pruned(path), *test):.3f}  ({path})")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
