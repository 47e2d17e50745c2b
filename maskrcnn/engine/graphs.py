"""A training step as CUDA graphs: the work of a step is recorded once for each shape of its tensors, and then replayed.

A replay starts thousands of kernels with one call. It reads and writes the memory of the recording: new inputs are
copied into its input tensors, and its outputs are overwritten by the next replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from maskrcnn.data.buckets import BucketsConfig
from maskrcnn.errors import InputError
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.runtime.processes import Exchange

Work = Callable[..., Tensor]
Compile = Literal["off", "parts", "step"]

# Runs of a shape before it is recorded: they allocate gradients and momenta, let cuDNN choose its kernels, and compile.
WARM_UP = 3

MOST_SHAPES = 256  # that are compiled; torch's limit of 8 is for shapes that nobody planned


class Execution(NamedTuple):
    """How a training step is run. The keys of `training` with these names explain it (docs/gpu.md)."""

    compile: Compile = "off"
    cuda_graph: bool = False
    buckets: BucketsConfig | None = None
    gradient_exchange: Exchange = "fp32"
    accumulates: bool = True  # whether a step may have several batches; if not, it has a static graph for torch
    backend: str | Callable = "inductor"  # of torch.compile

    @property
    def is_static(self) -> bool:
        """Whether the whole step needs tensors of fixed shapes."""
        return self.cuda_graph or self.compile == "step"

    @property
    def missing(self) -> str:
        """What the keys lack, as a message; empty if nothing."""
        if self.is_static and self.buckets is None:
            return f"{self._key} needs batches of few shapes: set training.buckets"
        return ""

    @property
    def _key(self) -> str:
        return "training.cuda_graph: true" if self.cuda_graph else "training.compile: step"

    def compiled(self, losses: nn.Module) -> nn.Module:
        """Return `losses`, a module with the attribute `model`, compiled as a whole; or compile parts of the model."""
        if self.compile == "parts":
            assert isinstance(losses.model, MaskRCNN)
            losses.model.compile_dense(backend=self.backend)
        if self.compile == "step":
            compiled = torch.compile(losses, fullgraph=True, dynamic=False, backend=self.backend)
            return cast(nn.Module, compiled)
        return losses

    def compiling(self, is_inside: bool) -> AbstractContextManager[object]:
        """Return a context for a batch, in which a new shape is compiled only if the batch is in a bucket."""
        if self.compile != "step":
            return nullcontext()
        if not is_inside:
            return torch.compiler.set_stance("force_eager")
        from torch._dynamo import config  # importing it takes a second, which only compiling needs

        return config.patch(recompile_limit=MOST_SHAPES)

    def require_device(self, device: torch.device, world: int) -> None:
        """Raise InputError, with what to do, if `world` processes cannot run a step in this way on such devices."""
        if not self.is_static:
            return
        if self.missing:
            raise InputError(self.missing)
        if device.type != "cuda":
            raise InputError(
                f"{self._key} needs a GPU, but the device is {device}: set training.cuda_graph to false and "
                "training.compile to off or parts"
            )
        if self.cuda_graph and world > 1:
            raise InputError(
                f"{self._key} works in a single process, but there are {world}: set it to false; training.compile "
                "works with several"
            )

    def require_model(self, model: MaskRCNN) -> None:
        """Raise InputError, with what to do, if shapes in the model depend on values."""
        if self.is_static and model.drop_padding:
            raise InputError(
                f"{self._key} needs fixed shapes, but a head has batch norms, from whose statistics padding must be "
                "left out: use norm none or gn there, or set training.cuda_graph to false and training.compile to parts"
            )


EAGER = Execution()


class Recording(NamedTuple):
    """Work that was recorded with its tensors."""

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    output: Tensor


class Recorder(Protocol):
    """What records work: `CudaRecorder`, or a stand-in for it in tests."""

    def stream(self) -> AbstractContextManager[object]:
        """Return a context for work, recorded or not. What is queued before and after it, happens before and after."""

    def record(self, work: Work, inputs: tuple[Tensor, ...]) -> Recording:
        """Record `work(*inputs)` without running it."""


class CudaRecorder:
    """Records CUDA graphs. They share their memory, since one is replayed after another."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # the default stream cannot be recorded
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Queue the work of the block on the stream of the recordings, so that it has the same memory and handles."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Work, inputs: tuple[Tensor, ...]) -> Recording:
        """See `Recorder`.

        Raises:
            InputError: the work cannot be recorded, for example because it makes the host wait.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of data loaders may allocate page-locked memory in the meantime.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = work(*inputs)
        except RuntimeError as error:
            raise InputError(
                f"training.cuda_graph: the training step cannot be recorded: {error}; set it to false"
            ) from error
        return Recording(graph.replay, inputs, output)


class Replays:
    """Runs work, and after `WARM_UP` runs with inputs of the same shapes, replays a recording of it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._runs: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, Recording] = {}

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self._recordings)

    def __call__(self, name: str, work: Work, *inputs: Tensor) -> Tensor:
        """Return `work(*inputs)`. The next call may overwrite it.

        Args:
            name: identifies the work.
            work: always does the same with tensors of the same shapes.
            inputs: of any content.
        """
        key = (name, *(tuple(tensor.shape) for tensor in inputs))
        self._runs[key] += 1
        if self._runs[key] <= WARM_UP:
            return work(*inputs)
        if key not in self._recordings:
            self._recordings[key] = self.recorder.record(work, tuple(each.clone() for each in inputs))
        recording = self._recordings[key]
        for target, source in zip(recording.inputs, inputs, strict=True):
            target.copy_(source, non_blocking=True)
        recording.replay()
        return recording.output
