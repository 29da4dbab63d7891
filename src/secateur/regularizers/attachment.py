"""The handle of an attached regularizer: the same four calls whatever the method."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from secateur.core.duration import Progress
from secateur.core.masks import Masks
from secateur.core.targets import Targets, find_targets, unwrap
from secateur.errors import CheckpointError, NoEffectError, UsageError, nearest
from secateur.regularizers.base import Regularizer
from secateur.regularizers.parallel import is_wrapped, not_averaged
from secateur.regularizers.stream import NoiseStream

__all__ = ["Attachment", "Hook", "targets_of"]


class Hook:
    """A module hook that copies of the module do not inherit: a copy is a plain network. `ran`: it was called."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function
        self.ran = False

    def __call__(self, *args: Any) -> Any:
        self.ran = True
        return self._function(*args) if self._function is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> Any:
        return (Hook, (None,))


class _Attaching(ABCMeta):
    """What is raised while an attachment is made, by any subclass, leaves nothing of it in the network."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        attachment: Any = cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]
        try:
            attachment.__init__(*args, **kwargs)
            attachment._watch()
        except BaseException:
            # Half made, it may not know how to remove itself; what it has put into the network it does.
            with suppress(Exception):
                attachment.remove()
            Attachment._detach(attachment)
            raise
        return attachment


class Attachment(metaclass=_Attaching):
    """An attached regularizer. Use as a context manager, or call `remove` when done.

    In a training loop: add `penalty()` to the loss, call `after_step(progress)` after each optimizer step.

    `learned` holds the parameters a method has added to the network, by their name in it, until `remove`.
    """

    def __init__(self, spec: Regularizer, model: nn.Module, targets: Targets | None, seed: int) -> None:
        self.spec, self.model = spec, model
        self.network = unwrap(model)
        self.targets = _chosen(spec, self.network, targets)
        self.parameters = self.targets.tensors(self.network)
        devices = {p.device for p in self.parameters.values()}
        if len(devices) > 1:
            raise UsageError(f"attach: targets lie on several devices {sorted(map(str, devices))}; expected one")
        self.stream = NoiseStream(seed, next(iter(devices)))
        self.progress = Progress(0, 0, 1) if not spec.draws_noise else Progress(0, 1, 1)
        self._places = _places(self.network, self.parameters)
        self.learned: dict[str, nn.Parameter] = {}
        self.is_sampling = False
        self._forwards = 0
        self._handles: list[Any] = []
        # Hooks on parts of a network that may not be called at all, because a compiled graph is run in their place.
        self._inside: list[Hook] = []
        if spec.draws_noise:
            self._handles.append(model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True))
            self._handles.append(model.register_forward_hook(Hook(lambda *_: self.resume()), always_call=True))

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_sampling:
            self.end()
            self.begin(args, kwargs)
        elif module.training and torch.is_grad_enabled():
            self._refuse_replaced()
            self._forwards += 1
            self.begin(args, kwargs)
        elif torch.is_grad_enabled():
            # It may have a backward pass of its own, which must find what its forward pass saw.
            self.end()
        else:
            self.pause()

    def _watch(self) -> None:
        inside = [m for m in self.network.modules() if m is not self.model]
        places = {id(hooks) for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks)}
        for handle in self._handles:
            hooks: Any = handle.hooks_dict_ref() if hasattr(handle, "hooks_dict_ref") else None
            if id(hooks) in places and isinstance(hooks[handle.id], Hook):
                self._inside.append(hooks[handle.id])
        if self._inside and not self.spec.draws_noise:
            self._handles.append(self.model.register_forward_pre_hook(Hook(self._note_training)))

    def _note_training(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self._forwards = 1

    def _replaced(self) -> list[str]:
        """Targets whose parameter is no longer where it was."""
        return [n for n, path in self._places.items() if any(holder.get(k) is not held for holder, k, held in path)]

    def _refuse_replaced(self) -> None:
        if not self._replaced():
            return
        # After an interrupt in the middle of a layer.
        for handle in self._handles:
            if hasattr(handle, "put_back"):
                handle.put_back()
        for name in self._replaced():
            raise UsageError(
                f'{type(self.spec).__name__}: "{name}" was replaced while attached (the network was cut); '
                "finalize() or remove() before a cut, and attach again after it"
            )

    def learn(self, module: str, name: str, initial: Tensor) -> nn.Parameter:
        """Add a learned parameter to submodule `module` until `remove`. Call it in `__init__` only.

        It is part of `named_parameters()` and `state_dict()` of the network while attached, so that optimizers,
        data-parallel wrappers and checkpoints treat it like any other. Weight decay should spare it.

        Args:
            module: path of a submodule, `target.module` mostly; `""` is the network itself.
            name: what it is called there; must be free, so let it begin with the method's name.
            initial: what it starts from, on the device and of the dtype of what it acts with.
        """
        holder = self._holder(module, name)
        if not self.learned:
            if is_wrapped(self.model):
                raise UsageError(self._unaveraged)
            self._handles.append(self.model.register_forward_pre_hook(Hook(self._expect_averaged)))
            self._handles.append(register_optimizer_step_pre_hook(self._expect_trained))
        parameter = nn.Parameter(initial)
        holder.register_parameter(name, parameter)
        self.learned[f"{module}.{name}" if module else name] = parameter
        return parameter

    def _holder(self, module: str, name: str) -> nn.Module:
        """The submodule that a learned parameter is for, if the name is free in it."""
        what = f'{type(self.spec).__name__}: learn("{module}", "{name}", ...)'
        try:
            holder = self.network.get_submodule(module)
        except AttributeError as error:
            near = nearest(module, [path for path, _ in self.network.named_modules()])
            if module in dict(self.network.named_parameters(remove_duplicate=False)):
                near = [module.rpartition(".")[0]]
            hint = "nearest: " + ", ".join(f'"{path}"' for path in near) if near else "pass target.module"
            raise UsageError(f"{what}: expected the path of a module, got none's; {hint}") from error
        if not name or "." in name:
            raise UsageError(f"{what}: a parameter's name is not empty and has no dot")
        if hasattr(holder, name):
            raise UsageError(
                f'{what}: that {type(holder).__name__} already has "{name}"; if the method is attached already, '
                "finalize() or remove() that attachment first; else choose another name, with the method's in front"
            )
        return holder

    @property
    def _unaveraged(self) -> str:
        return (
            f"{type(self.spec).__name__}: DistributedDataParallel does not average the gradients of parameters that "
            "are added after it was built; attach to the bare model (or to the compiled one), then wrap it"
        )

    def _expect_averaged(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not_averaged(self.learned.values()):
            raise UsageError(self._unaveraged)

    def _expect_trained(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        ours = any(id(p) in trained for p in self.parameters.values())
        if ours and not all(id(p) in trained for p in self.learned.values()):
            raise UsageError(
                f"{type(self.spec).__name__}: the optimizer does not train the parameters the method has added "
                "(attachment.learned); attach first, then build the optimizer from model.named_parameters()"
            )

    @contextmanager
    def sampling(self, seed: int = 0) -> Iterator[None]:
        """Within the block noise acts in eval mode and without gradients too, drawn anew in every forward pass.

        Not between a training forward pass and its backward pass. Training goes on afterwards as if nothing had been.

        Randomness: a stream of its own from `seed`.
        """
        self.end()
        training, self.stream = self.stream, NoiseStream(seed, self.stream.device)
        self.is_sampling = True
        try:
            yield
        finally:
            self.is_sampling = False
            self.stream = training
            self.end()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A training forward pass is about to run."""

    def end(self) -> None:
        """Noise must not be seen from here on (optimizer step, loading, removal)."""

    def pause(self) -> None:
        """Noise must not be seen until `resume` (evaluation, saving), but a backward pass may still need it."""
        self.end()

    def resume(self) -> None:
        """What `pause` was called for is over."""

    def penalty(self) -> Tensor | float:
        """What to add to the loss; 0.0 for methods without a penalty."""
        return 0.0

    def after_step(self, progress: Progress) -> None:
        """Tell the method that an optimizer step was made and where the run stands."""
        self.end()
        if self.spec.draws_noise and not self._forwards:
            raise NoEffectError(
                f"{type(self.spec).__name__}: no training forward pass since the last step, so nothing was "
                "regularized; attach to the very object the loop calls, in train() mode"
            )
        if self._inside:
            self._expect_hooks()
        self._forwards = 0
        self.progress = progress

    def _expect_hooks(self) -> None:
        if self._forwards and not any(hook.ran for hook in self._inside):
            raise NoEffectError(
                f"{type(self.spec).__name__}: no target layer was called as a module since the last step; a compiled "
                "model ignores hooks where it, or another of its class, has run without them: call "
                "torch.compiler.reset() after attaching"
            )
        for hook in self._inside:
            hook.ran = False

    def scores(self) -> dict[str, Tensor]:
        """Per-unit or per-weight scores the method ranks by; empty if it keeps none."""
        return {}

    def finalize(self) -> Masks | None:
        """Remove the regularizer and return the masks it has decided on, if it decides."""
        self.remove()
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors; with the model's and the optimizer's, enough to resume bitwise."""
        p = self.progress
        return {"progress": torch.tensor([p.step, p.steps, p.steps_per_epoch]), **self.stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise CheckpointError(
                f"{type(self.spec).__name__}: saved state has keys {sorted(state)}, expected {sorted(expected)}"
            )
        self.progress = Progress(*(int(v) for v in state["progress"]))
        self.stream.load_state_dict(dict(state))

    def remove(self) -> None:
        """Stop acting and leave the model exactly as without the regularizer. Safe to call twice."""
        self.end()
        self._detach()

    def _detach(self) -> None:
        # It may be that not even the base class was set up.
        handles, learned = getattr(self, "_handles", []), getattr(self, "learned", {})
        for handle in handles:
            handle.remove()
        handles.clear()
        for name in learned:
            module, _, leaf = name.rpartition(".")
            delattr(self.network.get_submodule(module), leaf)
        learned.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _chosen(spec: Regularizer, network: nn.Module, targets: Targets | None) -> Targets:
    if targets is None:
        return targets_of(spec, network)
    if not isinstance(targets, Targets):
        raise UsageError(
            f"{type(spec).__name__}: targets is of type {type(targets).__name__}, expected Targets; make them with "
            'find_targets(model, include=["layer1.*"])'
        )
    return targets


def targets_of(
    spec: Regularizer, model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> Targets:
    """What the method can act on in a network, by the patterns of `find_targets`; a hint where there is nothing."""
    try:
        return find_targets(model, include, exclude, spec.acts_on)
    except NoEffectError as error:
        if spec.acts_on == "weight" or tuple(include) != ("*",) or exclude:
            raise
        raise NoEffectError(
            f"{error}: {type(spec).__name__} acts on the scales of BatchNorm layers; for a network without them, "
            "DDropScale (ddrop_scale) adds scales of its own"
        ) from None


def _places(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[tuple[Any, str, Any]]]:
    """Where each parameter is found: every `(dict, key, value)` on the way to it, which takes no time to check."""
    places: dict[str, list[tuple[Any, str, Any]]] = {}
    for name, parameter in parameters.items():
        *modules, leaf = name.split(".")
        holder, path = network, []
        for key in modules:
            path.append((holder._modules, key, holder._modules[key]))
            holder = holder.get_submodule(key)
        places[name] = [*path, (holder._parameters, leaf, parameter)]
    return places
