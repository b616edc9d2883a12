"""The floor under the loop: device, precision, strategy and processes, by Lightning Fabric.

The loop calls Fabric's strategy and precision directly. Fabric's own wrappers around modules, optimizers and
loaders convert and check each call (350 µs a step measured); here that is decided once, at set-up.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trainer.blocks import apply_activation_checkpointing, compile_blocks
from trainer.component import Component
from trainer.config import Train
from trainer.deferred import defer_init, without_import_of
from trainer.errors import EXIT_FAILURE, EXIT_USER, TrainerError, UserError
from trainer.watchdog import FLIGHT_RECORDER
from trainer.world import World

defer_init("lightning")
with without_import_of("torchmetrics"):  # both together save 4 s
    from lightning.fabric import Fabric
    from lightning.fabric import fabric as fabric_module
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning.fabric.plugins.precision import HalfPrecision, MixedPrecision, Precision

# Each Fabric would look for callbacks in all installed packages, 25 ms; the loop never calls one.
vars(fabric_module)["_load_external_callbacks"] = lambda group: []
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # its banners say nothing that our lines don't

T = TypeVar("T")


def _precision(name: Literal["32", "bf16-mixed", "16-mixed", "bf16"], device_type: str) -> Precision:
    if name in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(name, device=device_type)
    return HalfPrecision("bf16-true") if name == "bf16" else Precision()


def _device_type(wanted: str) -> str:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[wanted]:
        raise UserError(f"train.device: {wanted} is not available on this machine; use auto or cpu")
    return wanted


class Pending:
    """Numbers on their way around the ranks; `wait` gives their sums."""

    def __init__(self, values: Sequence[float], group: Any) -> None:
        self._values = list(values)
        self._work = None
        if group is not None:
            self._tensor = torch.tensor(self._values, dtype=torch.float64)
            self._work = dist.all_reduce(self._tensor, group=group, async_op=True)

    def wait(self) -> list[float]:
        if self._work is None:
            return self._values
        self._work.wait()
        return self._tensor.tolist()


class Engine:
    """One process of the job: its device, its share of the model, its way to talk to the others."""

    def __init__(self, strategy: Component, train: Train, world: World) -> None:
        """Joins the process group; `train` gives device, precision, clipping and the like."""
        self.world = world
        self._train = train
        if train.threads is not None:
            torch.set_num_threads(train.threads)  # before anything is computed: the pool of threads keeps its size
        device_type = _device_type(train.device)
        self.precision = _precision(train.precision, device_type)
        fabric = Fabric(
            accelerator=device_type,
            strategy=strategy.build(world),
            devices=world.local_size,
            num_nodes=world.num_nodes,
            # Said outright: Lightning would take a world from whatever it finds in the environment, SLURM's for one.
            plugins=[self.precision, TorchElasticEnvironment() if world.launched else LightningEnvironment()],
        )
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)  # torch reads them with the first collective
        fabric.launch()
        self.strategy = fabric.strategy
        self.device: torch.device = fabric.device
        self.sharded = hasattr(self.strategy, "device_mesh")
        self._control: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._scaler = getattr(self.precision, "scaler", None)
        self._convert = isinstance(self.precision, HalfPrecision)
        self._autocast = train.precision != "32"
        if train.deterministic and device_type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not train.deterministic
        if device_type == "cpu":
            # Lightning sets it to 1, which makes each optimizer step look for NVIDIA's library: 75 µs without a GPU.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

    # -- set-up ---------------------------------------------------------------------------------------------------

    def setup(
        self,
        model: nn.Module,
        build_optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]],
        pretrained: str | None = None,
    ) -> None:
        """Bring the model to the device, wrap it for the strategy, then make its optimizers.

        Afterwards `self.model` is what the loop calls, `self.bare` has the parameters under their own names.
        `pretrained` is the fingerprint of weights that can be loaded again, where the model began with such.
        """
        model = self.precision.convert_module(model)
        self.strategy.module_to_device(model)
        if self._train.compile:
            compile_blocks(model)
        apply_activation_checkpointing(model, self._train.activation_checkpointing)
        self.bare = model
        self.model = self.strategy.setup_module(model)
        self.optimizers = build_optimizers(self.bare)
        self._seeds: dict[float, torch.Tensor] = {}
        is_whole = pretrained is None or all(p.requires_grad for p in self.bare.parameters())
        self.base: str | None = None if is_whole else pretrained
        """Fingerprint of the pretrained weights that checkpoints leave out; None where they hold all weights."""
        self._by_name = self.kept()
        self._parameters = [p for p in self.bare.parameters() if p.requires_grad]
        sync_control = getattr(self.strategy, "_backward_sync_control", None)
        self._no_sync = sync_control.no_backward_sync if sync_control is not None and self.world.size > 1 else None

    def kept(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, live and by name: all but frozen weights that can be loaded again (`self.base`).

        Of a quantised layer, those are the weights and what its state_dict says of their quantisation.
        """
        state = dict(self.bare.state_dict(keep_vars=True))
        if self.base is None:
            return state
        own = {name for name, p in self.bare.named_parameters(remove_duplicate=False) if p.requires_grad}
        own |= {name for name, _ in self.bare.named_buffers(remove_duplicate=False)}
        return {name: tensor for name, tensor in state.items() if name in own}

    # -- one step -------------------------------------------------------------------------------------------------

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast, or bf16 as default type, as the precision asks for."""
        return self.precision.forward_context() if self._autocast else nullcontext()

    def cast(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Floating-point inputs in the type of the weights, where these are in half precision."""
        return self.precision.convert_input(batch) if self._convert else batch

    def accumulating(self, more_to_come: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: gradients are not exchanged when more micro-batches follow."""
        return self._no_sync(self.model, enabled=more_to_come) if self._no_sync else nullcontext()

    def backward(self, loss: torch.Tensor, factor: float) -> None:
        """Add the gradients of `factor × loss`."""
        seed = self._seeds.get(factor)
        if seed is None or seed.dtype != loss.dtype:
            seed = self._seeds[factor] = torch.tensor(factor, dtype=loss.dtype, device=loss.device)
        self.precision.backward(loss, None, seed)

    def finish_gradients(self, factor: float) -> float:
        """Unscale, multiply by `factor` and clip; returns the L2 norm of all gradients together, before clipping."""
        if self._scaler is not None:
            for optimizer in self.optimizers:
                self._scaler.unscale_(optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        norm = torch.nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if self._train.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._train.clip_norm, norm, foreach=True)
        return float(norm)

    def step(self) -> None:
        """Update the weights and forget the gradients; with loss scaling a step of infinite gradients is left out."""
        for optimizer in self.optimizers:
            if self._scaler is not None:
                self._scaler.step(optimizer)
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self._scaler is not None:
            self._scaler.update()

    def skip_step(self) -> None:
        """Forget the gradients and leave the weights as they are."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self._scaler is not None:
            self._scaler.update()  # it has unscaled them, and expects to be told that this step is over

    @property
    def scales_loss(self) -> bool:
        """Whether infinite gradients are the loss scaler's matter: it leaves such a step out and lowers its scale."""
        return self._scaler is not None

    @property
    def reads_freely(self) -> bool:
        """Whether reading a number of the device doesn't wait for it."""
        return self.device.type == "cpu"

    def set_learning_rate(self, factor: float) -> float:
        """Set each group to `factor` × its own base rate; returns the first group's rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        return float(self.optimizers[0].param_groups[0]["lr"])

    def release_gathered_weights(self) -> None:
        """After a forward without backward: a sharded model must gather its weights anew."""
        for module in self.model.modules() if self.sharded else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    # -- among the ranks ------------------------------------------------------------------------------------------

    def add_up(self, values: Sequence[float]) -> Pending:
        """Start adding numbers over all ranks, on the CPU and beside the gradients' exchange."""
        return Pending(values, self._control)

    def add_up_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Add tensors on the device over all ranks, in place."""
        if self.world.size > 1:
            for name in sorted(tensors):
                dist.all_reduce(tensors[name])

    def share_buffers(self, average: Mapping[str, torch.Tensor]) -> None:
        """Give all ranks the buffers of rank 0 and their averages: batch statistics are otherwise each rank's own."""
        if self.world.size > 1:
            buffers = {name: t for name, t in self._by_name.items() if not isinstance(t, nn.Parameter)}
            for name, tensor in buffers.items():
                dist.broadcast(tensor, src=0)
                if name in average:
                    dist.broadcast(average[name], src=0)

    def from_main(self, value: T) -> T:
        """The value of rank 0, on all ranks. Only for what our own process sent: it is pickled on the way."""
        if self._control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on all ranks; where it raises an error there, all ranks raise one."""
        if self._control is None:
            return work()
        answer: tuple[Any, int, str] = (None, 0, "")
        caught: Exception | None = None
        if self.world.is_main:
            try:
                answer = (work(), 0, "")
            except Exception as error:
                caught = error
                answer = (None, getattr(error, "exit_code", EXIT_FAILURE), str(error))
        value, code, message = self.from_main(answer)
        if caught is not None:
            raise caught
        if code:
            raise (UserError if code == EXIT_USER else TrainerError)(message)
        return value  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on every rank."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    @property
    def control_group(self) -> Any:
        """Gloo group of all ranks for what must not wait for the device; None for a single process."""
        return self._control

    def parameter(self, name: str) -> torch.Tensor | None:
        """The parameter or buffer with this name, None where there is none."""
        return self._by_name.get(name)

    @property
    def fused(self) -> bool:
        """Whether the optimizers keep their step count on the device, as fused kernels want."""
        return any(group.get("fused") for optimizer in self.optimizers for group in optimizer.param_groups)

    def is_first_to_tell(self, patience: float = 0.0) -> bool:
        """Whether no other rank has told an error before; waits `patience` seconds for one that does.

        For errors before there is a run directory, where `failures` takes over.
        """
        if self._control is None:
            return True
        key = f"trainer/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            store = dist.distributed_c10d._get_default_store()
            end = time.monotonic() + patience
            while not store.check([key]) and time.monotonic() < end:
                time.sleep(0.05)
            return bool(store.add(key, 1) == 1)
        except RuntimeError:  # the store went down with the rank that kept it
            return True

    def close(self) -> None:
        """Leave the process group of accelerators; gloo's is left to the end of the process, see `__main__.end`."""
        if dist.is_available() and dist.is_initialized() and self.device.type != "cpu":
            dist.destroy_process_group()
