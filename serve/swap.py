"""Exchanges the live drafter's weights between two engine steps: all or nothing, the target untouched.

`stage` runs beside serving: it verifies the version, reads it, checks every key, shape, dtype and value, refuses
storage shared with the target, and builds the new linear operators beside the live ones (on CPU each weight is packed
into an operator and the parameter left empty) and the new tensors on the live ones' device. `commit` runs between two
steps: it only exchanges operators and copies the plain parameters in place, so CUDA graphs and in-flight requests stay
valid. A failure in `commit` puts back what was there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aurora.store import DrafterRefused, DrafterStore
from drafters.checksum import checksum
from serve.on_device import beside_serving, fingerprint, placed

_STACKED = {".qkv_proj.": (".q_proj.", ".k_proj.", ".v_proj."), ".gate_up_proj.": (".gate_proj.", ".up_proj.")}


@dataclass(frozen=True)
class Staged:
    """A drafter version, checked and packed, waiting for the exchange."""

    version: int
    gated_rates: list[float]
    operators: dict[str, Any]  # module name -> new packed operator
    tensors: dict[str, Tensor]  # parameter name -> new value, on its device


class DrafterSwap:
    """The one place that writes drafter weights into a running engine."""

    def __init__(self, drafter: nn.Module, target: nn.Module, store_root: Path, version: int) -> None:
        self.drafter = drafter
        self.target = target
        self.store = DrafterStore(store_root)
        self.version = version
        self.gated_rates: list[float] = []
        self._vocabulary = int(cast("Any", drafter).config.vocab_size)
        self._modules: dict[str, Any] = dict(drafter.named_modules())
        self._shapes = _loaded_shapes(drafter)
        self._foreign = {p.untyped_storage().data_ptr() for p in target.parameters() if p.numel()}

    def stage(self, number: int) -> Staged:
        """Prepare version `number`. Raises DrafterRefused; the live drafter is not touched."""
        record = self.store.verify(number)
        weights = self._merged(load_file(record.path / "model.safetensors"), record.path)
        self._check(weights, record.path)
        operators: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        with beside_serving(next(self.drafter.parameters()).device):
            for name, value in weights.items():
                module_name = name.rpartition(".")[0]
                module = self._modules.get(module_name)
                if module is not None and name.endswith(".weight") and hasattr(module, "cpu_linear"):
                    operators[module_name] = _packed(module, value)
                if self._parameter(name).numel():
                    tensors[name] = placed(value, self._parameter(name))
        rates = record.metadata.get("gated_rates") or []
        return Staged(number, [float(r) for r in rates], operators, tensors)

    def commit(self, staged: Staged) -> None:
        """Exchange live weights for `staged`. On any error the former weights are back before it is raised."""
        undo: list[Callable[[], None]] = []
        try:
            for name, operator in staged.operators.items():
                undo.append(_exchange(self._modules[name], operator))
            for name, value in staged.tensors.items():
                undo.append(_overwrite(self._parameter(name), value))
            self._verify(staged)
        except BaseException:
            for restore in reversed(undo):
                restore()
            raise
        self.version, self.gated_rates = staged.version, staged.gated_rates

    def target_checksum(self) -> str:
        """XXH3 of what the target computes with: packed parameters by what they answer, plain ones by their bytes.

        Bytes on a GPU count by a fingerprint that is computed there.
        """
        return _checksum(self.target)

    def drafter_checksum(self) -> str:
        return _checksum(self.drafter)

    def _parameter(self, name: str) -> nn.Parameter:
        return self.drafter.get_parameter(name)

    def _merged(self, raw: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        """Checkpoint names -> the live module's parameter names, projections stacked as vLLM stacks them."""
        renamed = {_live_name(name): value for name, value in raw.items() if name != "t2d"}
        merged: dict[str, Tensor] = {}
        for name in self._shapes:
            parts = next(
                ([name.replace(whole, p) for p in ps] for whole, ps in _STACKED.items() if whole in name), [name]
            )
            missing = [p for p in parts if p not in renamed]
            if missing:
                raise DrafterRefused(f"{path}: key {missing[0]!r} is missing; publish a drafter of this architecture")
            merged[name] = torch.cat([renamed.pop(p) for p in parts]) if len(parts) > 1 else renamed.pop(parts[0])
        if renamed:
            raise DrafterRefused(f"{path}: key {sorted(renamed)[0]!r} is not part of the running drafter")
        return merged

    def _check(self, weights: dict[str, Tensor], path: Path) -> None:
        for name, value in weights.items():
            live = self._parameter(name)
            if tuple(value.shape) != self._shapes[name]:
                raise DrafterRefused(
                    f"{path}: {name} has shape {tuple(value.shape)}, the engine runs {self._shapes[name]}"
                )
            if value.dtype.is_floating_point != live.dtype.is_floating_point:
                raise DrafterRefused(f"{path}: {name} has dtype {value.dtype}, the engine runs {live.dtype}")
            if value.dtype.is_floating_point and not torch.isfinite(value).all():
                raise DrafterRefused(f"{path}: {name} holds NaN or infinity")
            if live.numel() and live.untyped_storage().data_ptr() in self._foreign:
                raise DrafterRefused(f"{path}: {name} shares storage with the target, whose weights never change")
        self._check_vocabulary(weights, path)

    def _check_vocabulary(self, weights: dict[str, Tensor], path: Path) -> None:
        offsets = weights.get("draft_id_to_target_id")
        if offsets is None:
            return
        ids = torch.arange(len(offsets)) + offsets
        if ids.min() < 0 or ids.max() >= self._vocabulary or len(ids.unique()) != len(ids):
            raise DrafterRefused(f"{path}: d2t maps outside the target's vocabulary or twice to one token")

    def _verify(self, staged: Staged) -> None:
        for name, operator in staged.operators.items():
            if self._modules[name].cpu_linear is not operator:
                raise RuntimeError(f"swap to version {staged.version}: operator {name} is not the staged one")
        for name, value in staged.tensors.items():
            live = self._parameter(name)
            if not torch.equal(live.data, value):
                raise RuntimeError(f"swap to version {staged.version}: {name} differs from the published weights")


def _live_name(name: str) -> str:
    """The name that vLLM gives a checkpoint's key."""
    if name == "d2t":
        return "draft_id_to_target_id"
    if name.startswith("lm_head."):
        return name
    return "model." + name.replace("midlayer.", "layers.0.")


def _loaded_shapes(drafter: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that come from a drafter's checkpoint; the embedding is the target's."""
    shapes = {}
    for name, parameter in drafter.named_parameters():
        if "embed_tokens" in name:
            continue
        module: Any = drafter.get_submodule(name.rpartition(".")[0])
        packed = parameter.numel() == 0 and hasattr(module, "cpu_linear")
        shapes[name] = (int(module.output_size), int(module.input_size)) if packed else tuple(parameter.shape)
    return shapes


def _packed(live: Any, weight: Tensor) -> Any:
    """The operator that computes with `weight` as the live module's `cpu_linear` does with its own."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    holder: Any = nn.Module()
    holder.weight = nn.Parameter(weight.to(live.weight.dtype).contiguous(), requires_grad=False)
    holder.bias = None
    dispatch_cpu_unquantized_gemm(holder, remove_weight=False)
    return holder.cpu_linear


def _exchange(module: Any, operator: Any) -> Callable[[], None]:
    former = module.cpu_linear
    module.cpu_linear = operator
    return lambda: setattr(module, "cpu_linear", former)


def _overwrite(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    former = parameter.data.clone()
    parameter.data.copy_(value)
    return lambda: (parameter.data.copy_(former), None)[1]


def _checksum(model: nn.Module) -> str:
    with torch.inference_mode():
        return checksum(_weights(model))


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if hasattr(module, "cpu_linear") and module.weight.numel() == 0:
            probe = torch.linspace(-1, 1, int(module.input_size), dtype=module.weight.dtype).unsqueeze(0)
            yield name, module.cpu_linear(probe, module.weight, None)
    for name, parameter in model.named_parameters():
        if parameter.numel():
            yield name, fingerprint(parameter.data) if parameter.is_cuda else parameter.data
